"""What a boolean mask is in a whole tile of keys, for 16 queries at once, from the bounds of what it compares.

A mask is read here as a function of its indices, the operations of a ``Computed`` mask (``computed.py``). What depends
on the query alone, or on the key alone, is computed as it is. Where they meet an operation is done on bounds:

    a >= b    everywhere, if lowest(a) >= highest(b); somewhere, only if highest(a) >= lowest(b)
    a == b    everywhere, if all four bounds are one number; somewhere, only if the bounds overlap
    a & b     everywhere, if both are; somewhere, only if both are

Such a pair of bools is never wrong, but may say "somewhere" too often. For causal masks, windows, documents whose
numbers ascend and padding it is exact wherever one comparison decides. A mask with other operations, or that compares
floats (NaN has no bounds), has no bounds: all of its pairs are asked.
"""

from __future__ import annotations

import dataclasses
import operator
from functools import reduce
from typing import Any

import sympy
import torch
from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
from torch._inductor.loop_body import LoopBody
from torch._inductor.ops_handler import DefaultHandler
from torch._inductor.utils import sympy_index_symbol
from torch._inductor.virtualized import V

_COMPARED = frozenset([torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
_COMPARISONS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_AND = ("bitwise_and", "logical_and", "and_")
_OR = ("bitwise_or", "logical_or", "or_")
_NOT = ("bitwise_not", "logical_not", "invert")
_POSITIONS = {sympy_index_symbol(name) for name in ("idx_m", "idx_n")}


class HasNoBounds(Exception):
    """The mask has an operation that bounds do not follow."""


@dataclasses.dataclass(frozen=True)
class Exact:
    """A value that the query or the key decides, or neither: ``axes`` of "idx_m" and "idx_n", at most one."""

    value: Any
    dtype: torch.dtype
    axes: frozenset[str]
    is_read: bool = False


@dataclasses.dataclass(frozen=True)
class Bounds:
    """A value that both decide: between ``low`` and ``high``; of bools, everywhere and somewhere."""

    low: Any
    high: Any
    dtype: torch.dtype


class BoundsHandler(DefaultHandler):
    """Operations on Exact and Bounds; ``elements`` writes those of exact values, ``write(line, dtype)`` a line."""

    def __init__(self, elements: Any, write: Any) -> None:
        self.elements = elements
        self.write = write
        self.axes: dict[str, frozenset[str]] = {name: frozenset([name]) for name in ("idx_m", "idx_n")}
        self.read: set[str] = set()

    def _default(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(callable(x) for x in (*args, *kwargs.values())):  # ``masked``: operations of its own
            raise HasNoBounds(name)
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, (Exact, Bounds))]
        axes: frozenset[str] = frozenset().union(*(x.axes for x in given if isinstance(x, Exact)))
        if len(axes) < 2 and not any(isinstance(x, Bounds) for x in given):
            values = [x.value if isinstance(x, Exact) else x for x in args]
            options = {key: x.value if isinstance(x, Exact) else x for key, x in kwargs.items()}
            result = getattr(self.elements, name)(*values, **options)
            if isinstance(result, tuple):
                raise HasNoBounds(name)
            return Exact(result, result.dtype, axes, any(x.is_read for x in given if isinstance(x, Exact)))
        if kwargs or len(given) != len(args):
            raise HasNoBounds(name)
        return self._mixed(name, given)

    def load(self, name: str, index: sympy.Expr) -> Exact:
        axes, _ = self._of(index)
        result = self.elements.load(name, index)
        return Exact(result, result.dtype, axes, True)

    def index_expr(self, expression: sympy.Expr, dtype: torch.dtype) -> Any:
        """An expression of both indices is a sum, each of whose terms one of them decides."""
        if isinstance(expression, sympy.Abs) and len(expression.free_symbols & _POSITIONS) == 2:
            return self._mixed("abs", [self.index_expr(expression.args[0], dtype)])
        parts: dict[frozenset[str], sympy.Expr] = {}
        for term in sympy.Add.make_args(sympy.expand(expression)):
            axes, _ = self._of(term)
            parts[axes] = parts.get(axes, sympy.S.Zero) + term
        rest = parts.pop(frozenset(), sympy.S.Zero)
        first, *second = parts.items() or [(frozenset(), sympy.S.Zero)]
        values = []
        for (axes, part), more in zip((first, *second), (rest, sympy.S.Zero), strict=False):
            result = self.elements.index_expr(part + more, dtype)
            values.append(Exact(result, result.dtype, axes, self._of(part)[1]))
        return values[0] if len(values) == 1 else self._mixed("add", values)

    def indirect_indexing(
        self, index: Any, size: Any, check: bool = True, wrap_neg: bool = True
    ) -> sympy.Symbol:
        if not isinstance(index, Exact):
            raise HasNoBounds("an index")
        symbol = self.elements.indirect_indexing(index.value, size, check, wrap_neg)
        self.axes[str(symbol)] = index.axes
        if index.is_read:
            self.read.add(str(symbol))
        return symbol

    def check_bounds(self, index: sympy.Expr, size: sympy.Expr, lower: bool, upper: bool) -> None:
        self.elements.check_bounds(index, size, lower, upper)

    def to_dtype(self, x: Any, dtype: torch.dtype, *rest: Any, **options: Any) -> Any:
        if isinstance(x, Bounds):
            if x.dtype != dtype:
                raise HasNoBounds("a conversion")
            return x
        result = self.elements.to_dtype(x.value, dtype, *rest, **options)
        return Exact(result, dtype, x.axes, x.is_read)

    def of(self, body: LoopBody, indices: list[str]) -> Bounds:
        """The bounds of what ``body`` computes. Raises HasNoBounds."""
        with V.set_ops_handler(self):
            return self.bounds(body([sympy_index_symbol(name) for name in indices]))

    def bounds(self, x: Any) -> Bounds:
        """The bounds of ``x`` in tiles."""
        if isinstance(x, Bounds):
            return x
        if x.dtype not in _COMPARED:
            raise HasNoBounds(str(x.dtype))
        if not x.axes:
            return Bounds(x.value, x.value, x.dtype)
        (axis,) = x.axes
        of = "rows" if axis == "idx_m" else "keys"
        low, high = (
            self.write(f"attention_map.{end}_of_{of}({x.value})", torch.int64)
            for end in ("lowest", "highest")
        )
        if x.dtype == torch.bool:
            low, high = (self.write(f"{end} != 0", torch.bool) for end in (low, high))
        return Bounds(low, high, x.dtype)

    def _of(self, expression: sympy.Expr) -> tuple[frozenset[str], bool]:
        """What decides an index, and whether it is read from memory."""
        names = [str(symbol) for symbol in expression.free_symbols]
        nothing: frozenset[str] = frozenset()
        axes = reduce(operator.or_, (self.axes.get(name, nothing) for name in names), nothing)
        if len(axes) > 1:
            raise HasNoBounds("an index")
        return axes, any(name in self.read for name in names)

    def _mixed(self, name: str, given: list[Any]) -> Bounds:
        x, *rest = (self.bounds(value) for value in given)
        is_bool = all(value.dtype == torch.bool for value in (x, *rest))
        if name in _NOT and is_bool and not rest:
            return self._bools(f"~({x.high})", f"~({x.low})")
        if name == "abs" and x.dtype == torch.int64:
            low, high = f"tl.maximum(tl.maximum({x.low}, -{x.high}), 0)", f"tl.maximum(-{x.low}, {x.high})"
            return Bounds(self.write(low, x.dtype), self.write(high, x.dtype), x.dtype)
        if len(rest) != 1:
            raise HasNoBounds(name)
        (y,) = rest
        if name in _AND and is_bool:
            return self._bools(f"{x.low} & {y.low}", f"{x.high} & {y.high}")
        if name in _OR and is_bool:
            return self._bools(f"{x.low} | {y.low}", f"{x.high} | {y.high}")
        if is_bool:
            raise HasNoBounds(name)
        if name in ("ge", "gt"):
            sign = _COMPARISONS[name]
            return self._bools(f"{x.low} {sign} {y.high}", f"{x.high} {sign} {y.low}")
        if name in ("le", "lt"):
            sign = _COMPARISONS[name]
            return self._bools(f"{x.high} {sign} {y.low}", f"{x.low} {sign} {y.high}")
        if name in ("eq", "ne"):
            same = self.write(
                f"({x.low} == {x.high}) & ({y.low} == {y.high}) & ({x.low} == {y.low})", torch.bool
            )
            meet = self.write(f"({x.low} <= {y.high}) & ({y.low} <= {x.high})", torch.bool)
            return Bounds(same, meet, torch.bool) if name == "eq" else self._bools(f"~({meet})", f"~({same})")
        # Of what was read, a sum may wrap around; positions do not.
        if name in ("add", "sub") and not any(isinstance(v, Exact) and v.is_read for v in given):
            ends = (y.low, y.high) if name == "add" else (y.high, y.low)
            sign = "+" if name == "add" else "-"
            low, high = (
                self.write(f"{a} {sign} {b}", x.dtype) for a, b in zip((x.low, x.high), ends, strict=True)
            )
            return Bounds(low, high, x.dtype)
        raise HasNoBounds(name)

    def _bools(self, low: str, high: str) -> Bounds:
        return Bounds(self.write(low, torch.bool), self.write(high, torch.bool), torch.bool)


@dataclasses.dataclass(frozen=True)
class _Typed:
    """A value of which nothing but the dtype is asked."""

    dtype: torch.dtype


class _Dtypes(DefaultHandler):
    """What ``elements`` is where nothing is to be written."""

    def _default(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _Typed(getattr(DtypePropagationOpsHandler(), name)(*args, **kwargs))

    def load(self, name: str, index: sympy.Expr) -> _Typed:
        return _Typed(V.graph.get_dtype(name))

    def index_expr(self, expression: sympy.Expr, dtype: torch.dtype) -> _Typed:
        return _Typed(dtype)

    def to_dtype(self, x: Any, dtype: torch.dtype, *rest: Any, **options: Any) -> _Typed:
        return _Typed(dtype)

    def indirect_indexing(self, index: Any, *rest: Any) -> sympy.Symbol:
        self.count = getattr(self, "count", 0) + 1
        return sympy_index_symbol(f"indirect{self.count}")

    def check_bounds(self, *arguments: Any) -> None:
        pass


def has_bounds(body: LoopBody, indices: list[str]) -> bool:
    """True if every operation of ``body`` is one that bounds follow."""
    try:
        BoundsHandler(_Dtypes(), lambda line, dtype: _Typed(dtype)).of(body, indices)
    except HasNoBounds:
        return False
    return True
