"""The stride of an index along one loop variable, found term by term.

Inductor asks for it for every load and every variable, and simplifies the whole index each time, which is slow where
sizes are symbols. An index is a sum; a term without the variable adds nothing to
its stride, and a term that is the variable times a factor adds the factor. Only quotients and remainders are left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import sympy


@functools.lru_cache(4096)
def stride_at_vec_range(
    index: sympy.Expr,
    var: sympy.Symbol,
    vec_length: int | None,
    stock: Callable[[sympy.Expr, sympy.Symbol, int | None], sympy.Expr],
) -> sympy.Expr:
    """``index`` at ``var + 1`` less ``index`` at ``var``, for ``var`` inside a vector of ``vec_length``.

    ``stock`` is Inductor's function of this name; it is given what is no plain ``var``, quotients and remainders.
    """
    stride = sympy.S.Zero
    for term in sympy.Add.make_args(sympy.expand(index)):
        if term.has(var):
            factor, dependent = term.as_independent(var, as_Add=False)
            stride += factor if dependent == var else factor * stock(dependent, var, vec_length)
    return stride
