"""Numbers made from sizes, as Triton source: what a dynamic graph computes in a kernel that a static one holds as a
constant.

In a static graph Python computes ``1 / x.shape[-1]``, in fp64, and the kernel rounds the result to the dtype of what it
meets. Stock Inductor computes it in a dynamic graph with Triton's fp32 division, which is not even rounded to nearest.
Here the operations that IEEE 754 rounds correctly (quotients and square roots) are done in fp64 too, so both graphs
meet the same number; those that no two libraries round alike (sines, other powers) are refused where a size reaches a
kernel as an expression: a second net, under ``host_numbers.py``, which refuses them with the user's line.
"""

from __future__ import annotations

import sympy
from torch._inductor.codegen.triton import TritonPrinter

from ..errors import BatchInvarianceError

#: What makes an integer, a literal or not, an fp64 number.
FP64_ONE = "tl.full([], 1.0, tl.float64)"
#: Functions that are refused, by the names that sympy expressions of torch have for them.
_REFUSED = "cos cosh acos sin sinh asin tan tanh atan log2".split()


class SizePrinter(TritonPrinter):
    """Prints a sympy expression over sizes with the bits that Python gives it."""

    def _print_IntTrueDiv(self, expr: sympy.Expr) -> str:
        return self._quotient(*expr.args)

    def _print_FloatTrueDiv(self, expr: sympy.Expr) -> str:
        return self._quotient(*expr.args)

    def _quotient(self, dividend: sympy.Expr, divisor: sympy.Expr) -> str:
        return f"({FP64_ONE} * ({self._print(dividend)}) / ({self._print(divisor)}))"

    def _helper_sqrt(self, expr: sympy.Expr) -> str:
        return f"libdevice.sqrt({FP64_ONE} * ({self._print(expr)}))"

    def _print_FloatPow(self, expr: sympy.Expr) -> str:
        base, exponent = expr.args
        if exponent == sympy.Float(0.5) or exponent == sympy.Rational(1, 2):
            return self._helper_sqrt(base)
        return _refuse(expr)


def _refuse(expr: sympy.Expr) -> str:
    raise BatchInvarianceError(
        f"the number {expr} of a dynamic graph",
        "no two libraries round this function alike, so a static graph would meet another number",
        "compute it before the graph, or mark the size static",
    )


def _refusing(self: SizePrinter, expr: sympy.Expr) -> str:
    return _refuse(expr)


for _name in _REFUSED:
    setattr(SizePrinter, f"_print_OpaqueUnaryFn_{_name}", _refusing)
