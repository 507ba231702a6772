"""The functions by which an attention kernel computes its mask, and what a score_mod makes of a score.

Each is a line of assignments without a loop or a branch; what it calls says nothing of other elements, of programs or
of tiles, so no schedule can reach its result. Where they are called is the business of ``triton_attention.py``.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

from .syntax import assigned, dotted

if TYPE_CHECKING:
    from .triton_kernel import TritonKernel

_INDICES = ["idx_b", "idx_h", "idx_m", "idx_n", "captured"]
#: Name -> parameters, and the tuple of the kernel that its last one is.
FUNCTIONS = {
    "computed_mask": (_INDICES, "captured"),
    "computed_bounds": (_INDICES, "captured"),
    "computed_score": (["score", *_INDICES], "captured_by_score"),
    "computed_derivative": (["kept", "gradient", *_INDICES], "captured_by_score"),
}
#: Constants that say whether there is one.
_FLAGS = {"COMPUTED": "computed_mask", "SCORED": "computed_score", "DERIVED": "computed_derivative"}
#: What a function of bounds takes of the queries of a granule, and of the keys of a tile.
_ENDS = frozenset(f"attention_map.{end}_of_{of}" for end in ("lowest", "highest") for of in ("rows", "keys"))
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


class ComputedFunctions:
    """The functions in the file of ``kernel``."""

    def __init__(self, kernel: TritonKernel) -> None:
        self.kernel = kernel
        self.functions = [
            node
            for node in kernel.module.body
            if isinstance(node, ast.FunctionDef) and node is not kernel.function and node.name in FUNCTIONS
        ]

    def check(self, elementwise: frozenset[str]) -> None:
        """``elementwise``: modules all of whose functions are."""
        names = [function.name for function in self.functions]
        if len(names) != len(set(names)):
            self.kernel.note("computed", self.functions[-1], "two functions of one name")
        used = set(re.findall(r"computed_\w+", self.kernel.text_of("SCORES")))
        if used != set(names):
            self.kernel.note(
                "computed", None, f"{', '.join(sorted(used ^ set(names)))} without a use or a meaning"
            )
        for flag, name in _FLAGS.items():
            if self.kernel.text_of(flag) not in ("", str(name in used)):
                self.kernel.note("computed", self.kernel.assignments[flag])
        for function in self.functions:
            self._check_function(function, elementwise)

    def _check_function(self, function: ast.FunctionDef, elementwise: frozenset[str]) -> None:
        kernel = self.kernel
        parameters, operands = FUNCTIONS[function.name]
        if [argument.arg for argument in function.args.args] != parameters:
            kernel.note("computed", function)
        if [dotted(decorator) for decorator in function.decorator_list] != ["triton.jit"]:
            kernel.note("computed", function, "decorators")
        *statements, last = function.body
        results = last.value if isinstance(last, ast.Return) else None
        is_bounds = function.name == "computed_bounds"
        has_derivative = "computed_derivative" in (other.name for other in self.functions)
        is_right = isinstance(results, ast.Name)
        if is_bounds or (function.name == "computed_score" and has_derivative):
            is_right = isinstance(results, ast.Tuple) and len(results.elts) == 2
            parts = results.elts if is_right else []  # type: ignore[union-attr]
            if not is_bounds and is_right and isinstance(parts[1], ast.Tuple):
                parts = [parts[0], *parts[1].elts]
            is_right = is_right and all(isinstance(part, ast.Name) for part in parts)
        if not is_right:
            kernel.note("computed", last)
        for statement in statements:
            self._check_statement(statement, parameters)
        reads = 0
        for node in ast.walk(ast.Module(statements, [])):
            if isinstance(node, ast.Call):
                self._check_call(node, elementwise, _ENDS if is_bounds else frozenset())
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                kernel.note("division", node)
            elif isinstance(node, (ast.Lambda, ast.comprehension, ast.NamedExpr, ast.Starred, ast.IfExp)):
                kernel.note("computed", node, type(node).__name__)
            elif isinstance(node, ast.Name) and node.id == "captured":
                reads += 1
        unpacked = [
            (name, kernel.text(value))
            for statement in statements
            for name, value in assigned(statement)
            if _CAPTURED.fullmatch(kernel.text(value))
        ]
        if [text for _, text in unpacked] != [f"captured[{n}]" for n in range(reads)]:
            kernel.note("computed", function, "captured is not unpacked")
        if (
            kernel.text_of(operands)
            != f"({', '.join(name for name, _ in unpacked)}{',' if unpacked else ''})"
        ):
            kernel.note("computed", kernel.assignments.get(operands), f"{operands} of {function.name}")

    def _check_statement(self, statement: ast.stmt, parameters: list[str]) -> None:
        is_assert = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        is_assert = is_assert and dotted(statement.value.func) == "tl.device_assert"  # type: ignore[attr-defined]
        names = [name for name, value in assigned(statement) if value is not None]
        is_plain = isinstance(statement, ast.Assign) and len(names) == 1
        if not (is_assert or is_plain):
            self.kernel.note("computed", statement)
        for name in names:
            if not re.fullmatch(r"\w+", name) or name in (*parameters, "tl", "triton_helpers"):
                self.kernel.note("computed", statement, f"{name} is rebound")

    def _check_call(self, call: ast.Call, elementwise: frozenset[str], others: frozenset[str]) -> None:
        name = dotted(call.func)
        owner, _, function = name.rpartition(".")
        is_known = function in _CALLS.get(owner, ()) or owner in elementwise or name in others
        is_cast = isinstance(call.func, ast.Attribute) and call.func.attr == "to" and not (name and is_known)
        if not (name and is_known) and not is_cast:
            self.kernel.note("computed", call)
