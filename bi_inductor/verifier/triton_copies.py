"""Copies of many tensors by one emitted Triton kernel, each in programs of its own: a ``cat`` of twenty inputs.

::

    num_xblocks_0 = tl.cdiv(1200, XBLOCK)                       programs of the first copy
    num_xblocks_1 = num_xblocks_0 + tl.cdiv(1200, XBLOCK)       of the first two, and so on
    if pid < num_xblocks_0:
        pid_offset = pid
        ...                                                     the copy
    elif pid < num_xblocks_1:
        pid_offset = pid - num_xblocks_0
        ...
    else:
        pass

Torch 2.14 lets copies that are alike choose pointers there, ``foreach_arg0 = in_ptr7``, and writes one copy below. None
does more than load, cast and store, at addresses that are computed from its own numbers.
"""

from __future__ import annotations

import ast
import re

from .syntax import KernelSyntax, assigned, dotted

#: What a copy may call; nothing here adds two elements, or compares them.
CALLS: dict[str, frozenset[str]] = {
    "tl": frozenset("arange broadcast_to cdiv full load num_programs program_id store where".split()),
    "triton_helpers": frozenset(["div_floor_integer", "remainder_integer"]),
}
_BLOCK = re.compile(r"[XY]BLOCK: tl\.constexpr = \d+")
#: What a copy sets for the one that is written once for all.
_CHOICE = re.compile(r"(?:[xy]numel|r0_numel) = \d+|pid_offset = pid(?: - \w+)?|foreach_arg\d+ = \w+_ptr\d+")
_NO_CHOICE = re.compile(r"(?:[xy]numel|r0_numel|pid_offset) = 0|foreach_arg\d+ = \w+_ptr\d+")
_MODULES = frozenset(["tl", "triton_helpers"])


class ManyCopies:
    """The rules for a kernel that Inductor launches as ``foreach``; ``is_meant`` is false for every other.

    ``heads``: the ``if`` and each ``elif`` of its chain.
    """

    def __init__(self, kernel: KernelSyntax) -> None:
        self.kernel = kernel
        self.body = kernel.function.body if kernel.function else []
        decorators = kernel.function.decorator_list if kernel.function else []
        names = [dotted(d.func) for d in decorators if isinstance(d, ast.Call)]
        self.is_meant = "triton_heuristics.foreach" in names
        self.heads: list[ast.If] = []
        rest = [node for node in self.body if self.is_meant and isinstance(node, ast.If)]
        while len(rest) == 1 and isinstance(rest[0], ast.If):
            self.heads.append(rest[0])
            rest = rest[0].orelse  # type: ignore[assignment]
        self._otherwise: list[ast.stmt] = [*rest]

    def check(self) -> None:
        """Each copy has programs of its own, as many as its elements need, and knows only itself."""
        kernel = self.kernel
        if not self.heads or not self._otherwise:
            kernel.note("copies", None, "no chain of copies")
            return
        place = self.body.index(self.heads[0])
        head, below = self.body[:place], self.body[place + 1 :]
        counts = [node for node in head[1:] if not _BLOCK.fullmatch(kernel.line(node))]
        if not head or kernel.line(head[0]) != "pid = tl.program_id(0)" or len(counts) != len(self.heads):
            kernel.note("copies", self.heads[0], "programs are not counted copy by copy")
            return
        known = {*kernel.parameters, *_MODULES, *_bound(head)}
        for number, (count, copy) in enumerate(zip(counts, self.heads, strict=True)):
            self._check_programs(number, count, copy)
            self._check_body(copy.body, known)
        if below:
            self._check_choices(self.heads[0], below, known)
        elif [kernel.line(node) for node in self._otherwise] != ["pass"]:
            kernel.note("copies", self._otherwise[0])

    def _check_programs(self, number: int, count: ast.stmt, copy: ast.If) -> None:
        kernel, before = self.kernel, f"num_xblocks_{number - 1}"
        sum_of = rf"num_xblocks_{number} = {before + ' [+] ' if number else ''}tl\.cdiv\((\d+), XBLOCK\)"
        size = re.fullmatch(sum_of, kernel.line(count))
        if not size:
            kernel.note("copies", count)
        if kernel.text(copy.test) != f"pid < num_xblocks_{number}":
            kernel.note("copies", copy)
        offset = f"pid_offset = pid - {before}" if number else "pid_offset = pid"
        lines = {kernel.line(statement) for statement in copy.body}
        if size and not lines >= {offset, f"xnumel = {size[1]}"}:
            kernel.note("copies", copy, f"{kernel.line(copy)}: not {offset}, xnumel = {size[1]}")

    def _check_body(self, body: list[ast.stmt], known: set[str]) -> None:
        """Straight lines that read what they bound, and rebind nothing."""
        bound: set[str] = set()
        for statement in body:
            own = _bound([statement])
            is_alone = _read(statement) <= known | bound and not own & (known | bound)
            if not is_alone or not _is_step(statement):
                self.kernel.note("copies", statement)
            bound |= own

    def _check_choices(self, first: ast.If, below: list[ast.stmt], known: set[str]) -> None:
        """Every copy chooses pointers for the one ``below``, and a program without a copy no elements."""
        chosen = _bound(first.body)
        for body in (*(copy.body for copy in self.heads), self._otherwise):
            shape = _NO_CHOICE if body is self._otherwise else _CHOICE
            for statement in body:
                if not shape.fullmatch(self.kernel.line(statement)):
                    self.kernel.note("copies", statement)
            if _bound(body) != chosen:
                self.kernel.note("copies", body[0], "copies choose different things")
        self._check_body(below, known | chosen)


def _is_step(statement: ast.stmt) -> bool:
    """True for an address, an element that is moved, and a store of one."""
    value = getattr(statement, "value", None)
    if isinstance(statement, ast.Expr) and isinstance(value, ast.Call):
        return dotted(value.func) == "tl.store" and len(value.args) > 1 and _is_moved(value.args[1])
    if not isinstance(statement, ast.Assign) or value is None or "" in _bound([statement]):
        return False
    if all(name.startswith("tmp") for name in _bound([statement])):
        return _is_moved(value)
    calls = {dotted(node.func) for node in ast.walk(value) if isinstance(node, ast.Call)}
    return "tl.load" not in calls and not any(name.startswith("tmp") for name in _read(statement))


def _is_moved(value: ast.expr) -> bool:
    """True for an element that was loaded, cast or not, or for zero where there is none."""
    if isinstance(value, ast.Name):
        return value.id.startswith("tmp")
    if not isinstance(value, ast.Call):
        return False
    if isinstance(value.func, ast.Attribute) and value.func.attr == "to":
        return _is_moved(value.func.value)
    name = dotted(value.func)
    if name == "tl.where":
        return _is_moved(value.args[1]) and isinstance(value.args[2], ast.Constant)
    return name == "tl.load" or (name == "tl.broadcast_to" and _is_moved(value.args[0]))


def _bound(statements: list[ast.stmt]) -> set[str]:
    return {name for statement in statements for name, _ in assigned(statement)}


def _read(statement: ast.stmt) -> set[str]:
    return {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
