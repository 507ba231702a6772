"""Sums of emitted Triton kernels: ordered helpers called as the TREE form needs, over lengths that a form has.

held      total = ordered.tree_sum(where(mask, block, identity))                     R0_BLOCK >= length
looped    stack = push_sum(stack, tree_sum(block), number), blocks ascending; total_sum(stack)
chunks    one program per 2**k elements, in either shape; then the tree over the chunks, in ascending order
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from .lengths import Forms, Names, Values, ceil_div, constant, is_constant, values_of
from .syntax import KernelSyntax, is_power_of_two

_SUBSCRIPT = r"(?:\[:(?:, :)*, None\])?"
_ROUNDED = r"(?:\.to\(tl\.(?:bfloat16|float16)\)\.to\(tl\.float32\))?"
_TREE = r"ordered\.tree_(?P<kind>sum|prod)\((?P<leaves>\w+)\)"
_BLOCKS = r"\(r0_numel \+ R0_BLOCK - 1\) // R0_BLOCK"
#: The lines that may call an ordered helper. ``zero``: a finished float sum gets + 0.0 once.
_SHAPES = {
    "held": rf"(?P<target>\w+) = \(?{_TREE}{_SUBSCRIPT}(?P<zero> \+ 0\.0\))?{_ROUNDED}",
    "new": r"(?P<target>_\w+) = ordered\.new_stack\((?P<identity>(?P=target)_identity), "
    r"\((?P<bound>\d+) \+ R0_BLOCK - 1\) // R0_BLOCK\)",
    "push": rf"(?P<target>_\w+) = ordered\.push_(?P<pushed>\w+)\((?P=target), {_TREE}, r0_offset // R0_BLOCK\)",
    "total": rf"(?P<target>\w+) = \(?ordered\.total_(?P<kind>sum|prod)\((?P<stack>_\w+), (?P=stack)_identity, "
    rf"{_BLOCKS}\){_SUBSCRIPT}(?P<zero> \+ 0\.0\))?{_ROUNDED}",
}
_ORDERED = {shape: re.compile(pattern) for shape, pattern in _SHAPES.items()}
_IDENTITY = {"sum": "0", "prod": "1"}
#: A looped block has at most this many elements; a length it divides fills all blocks.
_LARGEST_LOOPED_BLOCK = 4096
_REDUCED_VARIABLE, _KEPT_VARIABLE = re.compile(r"r0_\d+"), re.compile(r"[xyz]\d+")


class OrderedSums:
    """The sums of one kernel."""

    def __init__(self, kernel: KernelSyntax) -> None:
        self.kernel = kernel
        #: Lines with a finished sum: (kind, statement, whether + 0.0 follows).
        self.finished: list[tuple[str, ast.stmt, bool]] = []
        self.bounds: list[tuple[int, ast.stmt]] = []
        #: (kind, length) of the forms that sums of this kernel were found to have, or to be chunks of.
        self.retraced: set[tuple[str, Values]] = set()

    def check(self) -> None:
        """Every line with an ordered helper has one of the shapes above, and they fit together."""
        stacks: dict[str, list[re.Match[str]]] = {}
        for statement in self.kernel.statements:
            line = self.kernel.line(statement)
            if "ordered." not in line:
                continue
            for shape, pattern in _ORDERED.items():
                match = pattern.fullmatch(line)
                if match:
                    self._check_shape(shape, match, statement)
                    if shape != "held":
                        stack = match["stack"] if shape == "total" else match["target"]
                        stacks.setdefault(stack, []).append(match)
                    break
            else:
                self.kernel.note("ordered", statement)
        for name, matches in stacks.items():
            self._check_stack(name, matches)

    def _check_shape(self, shape: str, match: re.Match[str], statement: ast.stmt) -> None:
        if self.kernel.is_in_loop(statement) != (shape == "push") or (
            shape == "push" and match["pushed"] != match["kind"]
        ):
            self.kernel.note("ordered", statement)
        if shape in ("held", "push"):
            self._check_leaves(match["kind"], match["leaves"], statement)
        if shape in ("held", "total"):
            self.finished.append((match["kind"], statement, bool(match["zero"])))
        if shape == "new":
            self.bounds.append((int(match["bound"]), statement))

    def _check_stack(self, name: str, matches: list[re.Match[str]]) -> None:
        """One new, one push, one total, of one kind, with the identity of that kind."""
        kinds = {match.groupdict().get("kind") for match in matches} - {None}
        identity = self.kernel.assignments.get(f"{name}_identity")
        wanted = _IDENTITY.get(str(min(kinds, default="")), "?")  # type: ignore[type-var]
        if len(matches) != 3 or len(kinds) != 1:
            self.kernel.note(
                "ordered", identity, f"{name}: not one new_stack, one push, one total of one kind"
            )
        elif not re.fullmatch(rf"tl\.full\(\[[\w, ]+\], {wanted}, tl\.\w+\)", self.kernel.text(identity)):
            self.kernel.note("ordered", identity, f"{name}_identity is not a block of {wanted}")

    def _check_leaves(self, kind: str, name: str, statement: ast.stmt) -> None:
        """Leaves fill the whole block, the reduced axis last, and what is past the end is the identity."""
        kernel = self.kernel
        text, masks = kernel.text_of(name), set()
        match = re.fullmatch(rf"tl\.where\(([^,]+), (\w+), {_IDENTITY[kind]}\)", text)
        if match:
            masks = {mask.strip() for mask in match[1].split("&")}
            text = kernel.text_of(match[2])
        if not re.fullmatch(r"tl\.broadcast_to\(.+, \[[\w, ]*\bR0_BLOCK\]\)", text):
            kernel.note(
                "ordered", statement, f"{kernel.line(statement)}: {name} is not a masked block of R0_BLOCK"
            )
        if kernel.text_of("r0_mask") == "r0_index < r0_numel" and "r0_mask" not in masks:
            kernel.note("ordered", statement, f"{kernel.line(statement)}: leaves past the end are not masked")

    def check_lengths(self, forms: Forms, chunks: set[Values], arguments: Names, has_flip: bool) -> None:
        """Reduced lengths, chunks and blocks are those of ``forms``.

        ``chunks``: numbers of chunks that earlier kernels of the graph left; a kernel over chunks adds to it.
        """
        kernel, length = self.kernel, self.kernel.values("r0_numel", arguments)
        block = kernel.values("R0_BLOCK", {})
        if "R0_BLOCK" in kernel.assignments:
            # A length with symbols may be bounded by guards that the text does not show.
            is_short = bool(block and length and is_constant(length) and length[0] > block[0])
            if is_short or not is_power_of_two(block):
                kernel.note("block", kernel.assignments["R0_BLOCK"])
        if length is None:
            return
        for bound, statement in self.bounds:
            if is_constant(length) and bound < length[0]:
                kernel.note("ordered", statement, f"a stack for {bound} elements, with {length[0]} to come")
        self._check_missing_mask(length, block)
        for kind, statement, has_zero in self.finished:
            self._check_zero(kind, statement, has_zero, forms)
            is_exact = not has_zero and any(combine == kind for combine, _ in forms.unordered)
            if not forms.is_open and (kind, length) in forms.trees:
                self.retraced.add((kind, length))
            if forms.is_open or is_exact or length in forms.lengths(kind):
                continue
            if length in chunks:
                self._check_order_of_chunks(arguments)
            else:
                self._check_chunk(kind, statement, length, forms, chunks)
                if not has_flip:
                    self._check_place_of_chunk(length, arguments)

    def _check_zero(self, kind: str, statement: ast.stmt, has_zero: bool, forms: Forms) -> None:
        is_float = any(combine == kind for combine, _ in forms.trees)
        is_integer = any(combine == kind for combine, _ in forms.unordered)
        if kind == "sum" and is_float != is_integer and has_zero != is_float:
            self.kernel.note(
                "ordered", statement, f"{self.kernel.line(statement)}: a float sum, and only it, ends + 0.0"
            )

    def _check_missing_mask(self, length: Values, block: Values | None) -> None:
        if not self.kernel.text_of("r0_mask").startswith("tl.full"):
            return
        fills = length == block if block else all(n % _LARGEST_LOOPED_BLOCK == 0 for n in length)
        if not fills and not (block is None and is_power_of_two(length)):
            mask = self.kernel.assignments["r0_mask"]
            self.kernel.note("ordered", mask, f"no mask, but {length[0]} elements do not fill their blocks")

    def _check_chunk(
        self, kind: str, statement: ast.stmt, length: Values, forms: Forms, chunks: set[Values]
    ) -> None:
        longer = {
            n for n in forms.lengths(kind) | chunks if all(a > b for a, b in zip(n, length, strict=True))
        }
        if is_power_of_two(length) and longer:
            chunks |= {ceil_div(n, length) for n in longer}
            self.retraced |= {(kind, n) for n in longer} & forms.trees
        elif is_constant(length) and longer:
            found = f"a chunk of {length[0]} elements is neither a form's length nor a power of two"
            self.kernel.note("block", statement, found)
        else:
            shown = str(length[0]) if is_constant(length) else "with its symbols"
            self.kernel.note("length", statement, f"no form of this kernel has the length r0_numel, {shown}")

    def _check_order_of_chunks(self, arguments: Names) -> None:
        """Chunk c is element c of the second tree: its address ascends."""
        for load, step, _ in self._addresses(arguments):
            if min(step) < 0:
                self.kernel.note("order", load)

    def _check_place_of_chunk(self, length: Values, arguments: Names) -> None:
        """Chunk c begins where chunk c - 1 ends, wherever an address is r0 + length * c, forwards or backwards.

        An address that stands still, of the one bias of a channel's elements, is in no order.
        """
        for load, step, kept in self._addresses(arguments):
            reach = tuple(a * b for a, b in zip(step, length, strict=True))
            if any(reach) and tuple(-n for n in reach) in kept.values():
                self.kernel.note("order", load)

    def _addresses(self, arguments: Names) -> Iterator[tuple[ast.AST, Values, dict[str, Values | None]]]:
        """Every readable address of a load, with its step along the reduced axis and along each kept variable."""
        for call in self.kernel.calls:
            if self.kernel.text(call.func) != "tl.load" or not isinstance(call.args[0], ast.BinOp):
                continue
            address = call.args[0].right
            variables = {node.id for node in ast.walk(address) if isinstance(node, ast.Name)}
            reduced = {name for name in variables if _REDUCED_VARIABLE.fullmatch(name)}
            kept = {name for name in variables if _KEPT_VARIABLE.fullmatch(name)}
            origin = {**arguments, **dict.fromkeys(reduced | kept, constant(0))}
            step = _step(address, origin, reduced)
            if reduced and step is not None:
                yield call, step, {name: _step(address, origin, {name}) for name in kept}


def _step(address: ast.expr, origin: Names, moved: set[str]) -> Values | None:
    """How far ``address`` goes when the names in ``moved`` go from 0 to 1."""
    start = values_of(address, origin)
    end = values_of(address, {**origin, **dict.fromkeys(moved, constant(1))})
    return tuple(b - a for a, b in zip(start, end, strict=True)) if start and end else None
