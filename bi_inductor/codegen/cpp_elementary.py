"""Elementary functions in C++: the vector implementation defines each one, scalars are computed as a lane.

Inductor evaluates ``exp`` of a scalar with libm and of a vector with Sleef; which of the two a value meets follows
the shape, the strides and the tail. Here both come from one expression:

    vector-defined   the expression Inductor emits for vectors; a scalar goes through ``batchinv::in_lane``
    guarded          sin, cos, tan: Sleef reduces all lanes as the largest needs, so large lanes go one by one
    scalar-defined   the vector expression is inexact; a vector goes element by element

Without a vector instruction set there are only scalars, and Inductor's own expressions serve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._inductor import cpu_vec_isa
from torch._inductor.codegen import cpp
from torch._inductor.codegen.common import IndentedBuffer
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.virtualized import V, ops

from .cpp_nan import NARROW_FLOATS, WIDE_FLOATS, settled, settled_branches

#: Name -> number of arguments. That lanes are independent is tested, function by function. (Division and square roots
#: are exact in IEEE arithmetic, so every implementation of them is the same.)
VECTOR_DEFINED = {
    **dict.fromkeys(
        "exp exp2 expm1 log log2 log10 log1p sigmoid tanh sinh cosh asinh acosh atanh".split(), 1
    ),
    **dict.fromkeys("asin acos atan erf erfc lgamma".split(), 1),
    **dict.fromkeys("pow atan2 hypot fmod nextafter copysign maximum minimum".split(), 2),
}
#: |x| up to which Sleef reduces every argument the same way, with room to spare (its own bounds: 125 and 15).
GUARDED = {name: {torch.float32: 64, torch.float64: 8} for name in ("sin", "cos", "tan")}


class _Lane(str):
    """The name of a vector argument inside a lambda; Inductor's overrides look at the dtype of arguments."""

    dtype = torch.float32
    is_vec = True


def has_vectors() -> bool:
    """True if kernels are compiled with a vector instruction set."""
    return bool(cpu_vec_isa.pick_vec_isa())


def _is_float(x: Any) -> bool:
    return getattr(x, "dtype", None) in WIDE_FLOATS


def _vector_lambda(name: str, arity: int) -> str:
    """Inductor's vector expression for ``name`` as a C++ lambda of ``arity`` vectors."""
    names = [_Lane(letter) for letter in "ab"[:arity]]
    expression = getattr(cpp.CppVecOverrides, name)(*names)
    text = expression.getvalue() if isinstance(expression, IndentedBuffer) else str(expression)
    parameters = ", ".join(f"auto {letter}" for letter in names)
    return f"[]({parameters}) {{ return {' '.join(text.split())}; }}"


def _as_lane(name: str, arity: int) -> Callable[..., Any]:
    stock = getattr(cpp.CppOverrides, name)

    def scalar(*args: Any) -> Any:
        if not has_vectors() or not _is_float(args[0]):
            return stock(*args)
        return f"batchinv::in_lane({_vector_lambda(name, arity)}, {', '.join(map(str, args))})"

    scalar.__name__ = name
    return scalar


def _remainder(a: Any, b: Any) -> Any:
    if not _is_float(a):
        return cpp.CppOverrides.remainder(a, b)
    return f"batchinv::remainder({a}, {b})"


_remainder.__name__ = "remainder"


class LaneOverrides(cpp.CppOverrides):
    """Scalar expressions, each equal in every bit to a lane of the vector expression."""

    remainder = staticmethod(_remainder)

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        return cpp.CppOverrides.where(condition, *settled_branches(a, b))

    @staticmethod
    def signbit(x: Any) -> Any:
        return cpp.CppOverrides.signbit(settled(x))

    @staticmethod
    def to_dtype_bitcast(x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> Any:
        return cpp.CppOverrides.to_dtype_bitcast(settled(x), dtype, src_dtype)

    @staticmethod
    def masked(mask: Any, body: Callable[[], Any], other: Any) -> Any:
        results = []

        def recorded() -> Any:
            results.append(body())
            return results[0]

        text = cpp.CppOverrides.masked(mask, recorded, other)
        value = V.kernel.cse.generate(V.kernel.compute, text)
        value.update_on_args("masked", (mask, body, other, *results), {})
        return value


for _name, _arity in {**VECTOR_DEFINED, **dict.fromkeys(GUARDED, 1)}.items():
    setattr(LaneOverrides, _name, staticmethod(_as_lane(_name, _arity)))


def _guarded(name: str) -> Callable[..., Any]:
    def vector(x: Any) -> str:
        return f"batchinv::near({_vector_lambda(name, 1)}, {x}, {GUARDED[name][x.dtype]})"

    return vector


def _elementwise_remainder(a: Any, b: Any) -> Any:
    return cpp.CppVecOverrides._scalarize(lambda x, y: f"batchinv::remainder({x}, {y})")(a, b)


class VectorLaneOverrides(cpp.CppVecOverrides, LaneOverrides):
    """Vector expressions whose lanes do not look at each other; what is not a vector is a LaneOverrides scalar.

    The bases are in this order because CppVecOverrides hands scalars to the next class after itself.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> VectorLaneOverrides:
        self = super().__new__(cls, *args, **kwargs)
        # CppVecOverrides puts its functions on the instance, where they hide methods of a subclass.
        for name in GUARDED:
            setattr(self, name, _for_float_vectors(_guarded(name), getattr(self, name)))
        self.remainder = _for_float_vectors(_elementwise_remainder, self.remainder)  # type: ignore[method-assign]
        for name in ("signbit", "to_dtype_bitcast", "copysign"):
            setattr(self, name, _of_settled(getattr(self, name)))
        stock_where = self.where
        self.where = lambda condition, a, b: stock_where(condition, *settled_branches(a, b))  # type: ignore[method-assign]
        return self

    @staticmethod
    def index_expr(expr: sympy.Expr, dtype: torch.dtype) -> Any:
        """An index as a float is the rounded integer; counting up in floats rounds twice."""
        if dtype not in (*WIDE_FLOATS, *NARROW_FLOATS) or not expr.is_integer:
            return cpp.CppVecOverrides.index_expr(expr, dtype)
        index = cpp.CppVecOverrides.index_expr(expr, torch.int64)
        converted = ops.to_dtype(index, dtype)
        return getattr(converted, "value", converted)

    @staticmethod
    def value_expr(expr: sympy.Expr, dtype: torch.dtype) -> Any:
        if not expr.is_integer:
            return cpp.CppVecOverrides.value_expr(expr, dtype)
        return VectorLaneOverrides.index_expr(expr, dtype)


class TileLaneOverrides(VectorLaneOverrides, cpp.CppTile2DOverrides):
    """VectorLaneOverrides inside a transposed tile."""

    @staticmethod
    def index_expr(expr: sympy.Expr, dtype: torch.dtype) -> Any:
        return VectorLaneOverrides.index_expr(V.kernel.transform_indexing(expr), dtype)

    @staticmethod
    def value_expr(expr: sympy.Expr, dtype: torch.dtype) -> Any:
        return VectorLaneOverrides.value_expr(V.kernel.transform_indexing(expr), dtype)


def _of_settled(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``stock``, an op that looks at the sign or the bits of its arguments."""
    return lambda *args: stock(*map(settled, args))


def _for_float_vectors(ours: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """``ours`` for float vectors, scalars among the arguments broadcast; ``stock`` for all else."""

    def dispatch(*args: Any) -> Any:
        if not any(arg.is_vec for arg in args) or not _is_float(args[0]):
            return stock(*args)
        return ours(*(arg if arg.is_vec else V.kernel.broadcast(arg) for arg in args))

    return dispatch


def converted_in_lane(value: Any, dtype: torch.dtype, source: torch.dtype) -> str | None:
    """The scalar ``value`` as ``dtype`` by the conversion that vectors use; None if stock does the same."""
    narrows = dtype in NARROW_FLOATS and source in WIDE_FLOATS
    saturates = dtype == torch.int8 and source in (*WIDE_FLOATS, torch.bfloat16, torch.float16)
    if not (narrows or saturates) or not has_vectors():
        return None
    return f"batchinv::convert_in_lane<{DTYPE_TO_CPP[dtype]}, {DTYPE_TO_CPP[source]}>({value})"
