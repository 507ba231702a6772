"""Sums over segments and prefixes, in aligned trees that are written level by level.

Both are trees whose leaves are found at run time, so no single reduction loop can be the tree: a level of it is
a pointwise kernel that combines eight values of the level before, itself written out as the tree over eight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.ir import TensorBox
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from ..ops import SEGMENT_COMBINES, combine_identity, wide_dtype

#: Tree levels per kernel. The values are equal for every choice; 3 reads each level's input once or less.
LEVELS = 3


def _logaddexp(a: Any, b: Any) -> Any:
    """log(exp(a) + exp(b)) = greater + log1p(exp(less - greater)); two equal infinities are themselves."""
    less, greater = ops.minimum(a, b), ops.maximum(a, b)
    total = ops.add(greater, ops.log1p(ops.exp(ops.sub(less, greater))))
    return ops.where(ops.logical_and(ops.eq(a, b), ops.isinf(a)), a, total)


_COMBINE = {
    "sum": ops.add,
    "prod": ops.mul,
    "amax": ops.maximum,
    "amin": ops.minimum,
    "logaddexp": _logaddexp,
}
assert set(_COMBINE) == set(SEGMENT_COMBINES)


def segment_tree(values: TensorBox, start: TensorBox, end: TensorBox, combine: str, bits: int) -> TensorBox:
    """``ops.segment_tree``: at the first row of each segment, the TREE over the segment; ``bits`` levels."""
    total = _wide(values)
    length, columns = values.get_size()
    for low in range(0, bits, LEVELS):
        total = _segment_level(total, start, end, combine, low, min(bits, low + LEVELS), [length, columns])
    if combine == "prod":
        return total
    load, dtype = total.make_loader(), total.get_dtype()
    zero = combine_identity("sum", dtype)  # -0.0 becomes 0.0
    return ir.Pointwise.create(
        device=total.get_device(),
        dtype=dtype,
        inner_fn=lambda index: ops.add(load(index), ops.constant(zero, dtype)),
        ranges=[length, columns],
    )


def _segment_level(
    values: TensorBox,
    start: TensorBox,
    end: TensorBox,
    combine: str,
    low: int,
    high: int,
    ranges: list[Any],
) -> TensorBox:
    """Subtrees of 2**high rows out of subtrees of 2**low rows; each is found at its first row."""
    load, load_start, load_end = values.make_loader(), start.make_loader(), end.make_loader()
    dtype = values.get_dtype()
    identity = combine_identity(combine, dtype)
    buffer = values.data.data
    is_constant = isinstance(buffer, ir.ComputedBuffer) and buffer.num_reads() == 0

    def inner_fn(index: Sequence[Any]) -> Any:
        row, column = index
        first, past = load_start([row]), load_end([row])
        here = ops.index_expr(row, torch.int64)
        offset = ops.bitwise_and(ops.sub(here, first), ops.constant((1 << high) - 1, torch.int64))
        begins = ops.eq(offset, ops.constant(0, torch.int64))

        def leaf(number: int) -> Any:
            position = row + (number << low)
            inside = ops.logical_and(begins, ops.lt(ops.index_expr(position, torch.int64), past))
            if is_constant:  # torch 2.11 has no C++ for a masked constant
                return ops.where(inside, load([position, column]), ops.constant(identity, dtype))
            return ops.masked(inside, lambda: load([position, column]), identity)

        return _written_out([leaf(number) for number in range(1 << (high - low))], combine)

    return _realized(values, dtype, inner_fn, ranges)


def block_scan(x: TensorBox, dim: int, combine: str, bits: int) -> TensorBox:
    """``ops.block_scan``: out[i] folds, left to right, the TREEs over the aligned blocks that make up 0 ... i."""
    size = list(x.get_size())
    levels = [_wide(x)]
    for _ in range(LEVELS, bits, LEVELS):
        levels.append(_block_level(levels[-1], dim, combine))
    loaders = [level.make_loader() for level in levels]
    dtype = levels[0].get_dtype()
    identity = combine_identity(combine, dtype)

    def inner_fn(index: Sequence[Any]) -> Any:
        count = index[dim] + 1  # elements in this prefix; its binary digits name its blocks
        total = ops.constant(identity, dtype)
        for bit in reversed(range(bits)):
            total = _COMBINE[combine](total, block(index, count, bit))
        return ops.add(total, ops.constant(0, dtype)) if combine == "sum" else total

    def block(index: Sequence[Any], count: Any, bit: int) -> Any:
        level, within = divmod(bit, LEVELS)
        first = FloorDiv(count, 1 << (bit + 1)) * (1 << (within + 1))
        digit = ops.index_expr(ModularIndexing(count, 1 << bit, 2), torch.int64)
        taken = ops.ne(digit, ops.constant(0, torch.int64))

        def value() -> Any:
            leaves = [loaders[level](_at(index, dim, first + i)) for i in range(1 << within)]
            return _written_out(leaves, combine)

        return ops.masked(taken, value, identity)

    return _realized(x, dtype, inner_fn, size)


def _block_level(values: TensorBox, dim: int, combine: str) -> TensorBox:
    """Whole blocks of eight along ``dim``; an incomplete last block is not needed by any prefix."""
    load = values.make_loader()
    size = list(values.get_size())
    size[dim] = FloorDiv(size[dim], 1 << LEVELS)

    def inner_fn(index: Sequence[Any]) -> Any:
        leaves = [load(_at(index, dim, index[dim] * (1 << LEVELS) + i)) for i in range(1 << LEVELS)]
        return _written_out(leaves, combine)

    return _realized(values, values.get_dtype(), inner_fn, size)


def store_rows(base: TensorBox, rows: TensorBox, values: TensorBox) -> TensorBox:
    """``ops.store_rows``: a copy of base [V, D] with values [T, D] stored at rows [T]."""
    from torch._inductor.lowering import clone

    result = clone(base)
    result.realize()
    load_row = rows.make_loader()
    scatter = ir.Scatter(
        device=base.get_device(),
        dtype=base.get_dtype(),
        inner_fn=values.make_loader(),
        ranges=list(values.get_size()),
        output_indexer=lambda index: [
            ops.indirect_indexing(load_row([index[0]]), base.get_size()[0]),
            index[1],
        ],
        scatter_mode=None,
    )
    buffer = ir.ComputedBuffer(name=None, layout=ir.MutationLayoutSHOULDREMOVE(result), data=scatter)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)
    return result


def row_major(x: TensorBox, shape: Sequence[Any]) -> TensorBox:
    """``ops.row_major``: a view of what is contiguous already, else a view of a copy."""
    from torch._inductor.lowering import clone, view

    if not ir.is_contiguous_storage_and_layout(x):
        x = clone(x)
        x.realize()
        x.freeze_layout()
    return view(x, list(shape))


def _written_out(level: list[Any], combine: str) -> Any:
    while len(level) > 1:
        level = [_COMBINE[combine](a, b) for a, b in zip(level[0::2], level[1::2], strict=True)]
    return level[0]


def _at(index: Sequence[Any], dim: int, position: sympy.Expr) -> list[Any]:
    return [*index[:dim], position, *index[dim + 1 :]]


def _wide(x: TensorBox) -> TensorBox:
    """``x`` in its accumulator's dtype, in memory: eight programs read each element."""
    dtype = wide_dtype(x.get_dtype())
    load, source = x.make_loader(), x.get_dtype()
    if dtype == source:
        x.realize()
        return x
    return _realized(x, dtype, lambda index: ops.to_dtype(load(index), dtype, src_dtype=source), x.get_size())


def _realized(
    like: TensorBox, dtype: torch.dtype, inner_fn: Callable[..., Any], ranges: Sequence[Any]
) -> TensorBox:
    result = ir.Pointwise.create(
        device=like.get_device(), dtype=dtype, inner_fn=inner_fn, ranges=list(ranges)
    )
    result.realize()
    return result
