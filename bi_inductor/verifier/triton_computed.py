"""The function by which an attention kernel computes its mask: each element by operations on its own indices.

It is a line of assignments without a loop or a branch; what it calls says nothing of other elements, of programs or of
tiles, so no schedule can reach its result. Its name, and what it is called with, are those of ``triton_attention.py``.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

from .syntax import assigned, dotted

if TYPE_CHECKING:
    from .triton_kernel import TritonKernel

NAME = "computed_mask"
_PARAMETERS = ["idx_b", "idx_h", "idx_m", "idx_n", "captured"]
_CAPTURED = re.compile(r"captured\[\d+\]")
#: Elementwise functions, and ``load``, which reads where an element's own indices say.
_CALLS = {
    "tl": frozenset(
        """abs broadcast_to cast clamp device_assert exp full load log maximum minimum rsqrt sigmoid sqrt sqrt_rn where
        zeros zeros_like""".split()
    ),
    "triton_helpers": frozenset(
        """div_floor_integer maximum minimum pow_integer remainder_integer""".split()
    ),
    "triton.language": frozenset(["div_rn"]),
    "": frozenset(["float"]),
}


class ComputedMask:
    """The function in the file of ``kernel``, if it has one."""

    def __init__(self, kernel: TritonKernel) -> None:
        self.kernel = kernel
        found = [n for n in kernel.module.body if isinstance(n, ast.FunctionDef) and n is not kernel.function]
        self.function = found[0] if len(found) == 1 and found[0].name == NAME else None

    def check(self, elementwise: frozenset[str]) -> None:
        """``elementwise``: modules all of whose functions are."""
        if self.function is None:
            return
        kernel, function = self.kernel, self.function
        if [argument.arg for argument in function.args.args] != _PARAMETERS:
            kernel.note("computed mask", function)
        if [dotted(decorator) for decorator in function.decorator_list] != ["triton.jit"]:
            kernel.note("computed mask", function, "decorators")
        *statements, last = function.body
        if not (isinstance(last, ast.Return) and isinstance(last.value, ast.Name)):
            kernel.note("computed mask", last)
        for statement in statements:
            self._check_statement(statement)
        for node in ast.walk(ast.Module(statements, [])):
            if isinstance(node, ast.Call):
                self._check_call(node, elementwise)
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                kernel.note("division", node)
            elif isinstance(node, (ast.Lambda, ast.comprehension, ast.NamedExpr, ast.Starred, ast.IfExp)):
                kernel.note("computed mask", node, type(node).__name__)
            elif isinstance(node, ast.Name) and node.id == "captured":
                self._reads_captured += 1
        unpacked = [
            name for s in statements for name, v in assigned(s) if _CAPTURED.fullmatch(kernel.text(v))
        ]
        places = [self._value(s) for s in statements if _CAPTURED.fullmatch(self._value(s))]
        if self._reads_captured != len(places) or places != [f"captured[{n}]" for n in range(len(places))]:
            kernel.note("computed mask", function, "captured is not unpacked")
        if kernel.text_of("captured") != f"({', '.join(unpacked)}{',' if unpacked else ''})":
            kernel.note("computed mask", kernel.assignments.get("captured"))

    _reads_captured = 0

    def _value(self, statement: ast.stmt) -> str:
        return self.kernel.text(statement.value) if isinstance(statement, ast.Assign) else ""

    def _check_statement(self, statement: ast.stmt) -> None:
        is_assert = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        is_assert = is_assert and dotted(statement.value.func) == "tl.device_assert"  # type: ignore[attr-defined]
        names = [name for name, value in assigned(statement) if value is not None]
        is_plain = isinstance(statement, ast.Assign) and len(names) == 1
        if not (is_assert or is_plain):
            self.kernel.note("computed mask", statement)
        for name in names:
            if not re.fullmatch(r"\w+", name) or name in (*_PARAMETERS, "tl", "triton_helpers"):
                self.kernel.note("computed mask", statement, f"{name} is rebound")

    def _check_call(self, call: ast.Call, elementwise: frozenset[str]) -> None:
        name = dotted(call.func)
        owner, _, function = name.rpartition(".")
        is_known = function in _CALLS.get(owner, ()) or owner in elementwise
        is_cast = isinstance(call.func, ast.Attribute) and call.func.attr == "to" and not (name and is_known)
        if not (name and is_known) and not is_cast:
            self.kernel.note("computed mask", call)
