"""Reductions in Inductor's IR: one flattened reduced axis in logical order, split only at subtree borders.

Replaces ``ir.Reduction.create`` for float ``sum`` and ``prod`` while one of our graphs is lowered.
Exact reductions (maxima, integers, any) keep Inductor's own lowering: no order can change them.

Three schedules, one form (the TREE of ``contract.py``):
    short static lengths   unrolled into a pointwise expression that is the tree written out
    few outputs, long sums chunks of 2**k elements summed by separate programs, then the tree over the chunks
    all others             one kernel, persistent or looped as Inductor's heuristics like
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.runtime.hints import DeviceProperties, ReductionHint
from torch._inductor.utils import is_gpu, sympy_product
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import CeilDiv

from .. import contract
from ..choices import PERSISTENT_LENGTH, rows_fill_the_device
from ..errors import BatchInvarianceError

_UNROLLED_LENGTH = 8  # as Inductor's unroll_reductions_threshold
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_IDENTITY = {"sum": 0.0, "prod": 1.0}
#: Elements per program of a contiguous sum too long for one (benchmarks/reduction_sweep.py, H200).
INNER_CHUNK = 4096
#: Rows per program of a long column sum, at least; columns per program; programs per multiprocessor aimed at.
OUTER_CHUNK = 64
OUTER_COLUMNS = 128
OUTER_PROGRAMS_PER_SM = 16


def create(
    stock_create: Callable[..., ir.TensorBox],
    device: torch.device,
    dst_dtype: torch.dtype,
    src_dtype: torch.dtype,
    inner_fn: Callable[..., Any],
    ranges: Sequence[Any],
    reduction_ranges: Sequence[Any],
    reduction_type: str,
    reduction_hint: ReductionHint = ReductionHint.DEFAULT,
    input_node: ir.IRNode | None = None,
    **version_specific: Any,
) -> ir.TensorBox:
    """``ir.Reduction.create``, with every sum and product of floats in the TREE form."""
    try:
        contract.reduction_form(reduction_type, 1, src_dtype)
    except ValueError as error:
        raise BatchInvarianceError(
            f"a {reduction_type} reduction",
            str(error),
            "please report the graph; every lowering should produce sums instead",
        ) from None
    numel = V.graph.sizevars.simplify(sympy_product(reduction_ranges))
    if not contract.is_ordered(reduction_type, src_dtype) or numel == 0:
        result = stock_create(
            device=device,
            dst_dtype=dst_dtype,
            src_dtype=src_dtype,
            inner_fn=inner_fn,
            ranges=ranges,
            reduction_ranges=reduction_ranges,
            reduction_type=reduction_type,
            reduction_hint=reduction_hint,
            input_node=input_node,
            **version_specific,
        )
        is_extremum = reduction_type in ("max", "min") and dst_dtype.is_floating_point
        return _with_one_zero(result, dst_dtype) if is_extremum else result
    if isinstance(numel, sympy.Integer) and int(numel) < _UNROLLED_LENGTH:
        unrolled = _unrolled(inner_fn, reduction_ranges, reduction_type, src_dtype, dst_dtype)
        return ir.Pointwise.create(device=device, dtype=dst_dtype, inner_fn=unrolled, ranges=list(ranges))
    reduction = _Ordered(device, dst_dtype, src_dtype, reduction_type, list(ranges))
    return reduction.over(_flattened(inner_fn, reduction_ranges, numel), numel, reduction_hint)


def _with_one_zero(extremum: ir.TensorBox, dtype: torch.dtype) -> ir.TensorBox:
    """max(-0.0, 0.0) is either, by order; adding 0.0 makes it 0.0 and every NaN the same NaN."""
    extremum.realize()
    load = extremum.make_loader()
    return ir.Pointwise.create(
        device=extremum.get_device(),
        dtype=dtype,
        inner_fn=lambda index: ops.add(load(index), ops.constant(0.0, dtype)),
        ranges=list(extremum.get_size()),
    )


def _flattened(
    inner_fn: Callable[..., Any], reduction_ranges: Sequence[Any], numel: sympy.Expr
) -> Callable[..., Any]:
    """``inner_fn`` over one reduced axis, row-major, so that no stride can reorder the dimensions."""
    reindex = ir.View.dynamic_reshape_indexer(list(reduction_ranges), [numel])
    return lambda index, reduced: inner_fn(index, reindex(reduced))


def _unrolled(
    inner_fn: Callable[..., Any],
    reduction_ranges: Sequence[Any],
    kind: str,
    src_dtype: torch.dtype,
    dst_dtype: torch.dtype,
) -> Callable[..., Any]:
    """The tree of a short static length, written out."""
    lengths = [int(length) for length in V.graph.sizevars.guard_int_seq(reduction_ranges)]
    combine = {"sum": ops.add, "prod": ops.mul}[kind]

    def value(index: Sequence[Any]) -> Any:
        positions = itertools.product(*(range(length) for length in lengths))
        accumulator = torch.float64 if src_dtype == torch.float64 else torch.float32
        level = [
            ops.to_dtype(
                inner_fn(index, [sympy.Integer(i) for i in position]), accumulator, src_dtype=src_dtype
            )
            for position in positions
        ]
        while len(level) > 1:
            pairs = [combine(a, b) for a, b in zip(level[0::2], level[1::2], strict=False)]
            level = pairs + level[len(pairs) * 2 :]
        total = ops.add(level[0], ops.constant(0.0, accumulator)) if kind == "sum" else level[0]
        return rounded(total, dst_dtype)

    return value


def rounded(value: Any, dtype: torch.dtype) -> Any:
    """``value`` as if it had been stored as ``dtype`` and loaded again."""
    if dtype not in _LOW_PRECISION:
        return value
    return ops.to_dtype(ops.to_dtype(value, dtype, use_compute_types=False), dtype)


class _Ordered:
    """What stays the same while one float reduction is lowered: dtypes, kind, output ranges."""

    def __init__(
        self,
        device: torch.device,
        dst_dtype: torch.dtype,
        src_dtype: torch.dtype,
        kind: str,
        ranges: list[Any],
    ) -> None:
        self.device, self.kind, self.ranges = device, kind, ranges
        self.dst_dtype, self.src_dtype = dst_dtype, src_dtype

    def over(self, inner_fn: Callable[..., Any], numel: sympy.Expr, hint: ReductionHint) -> ir.TensorBox:
        """Reduce ``inner_fn(index, [i])`` over i = 0 ... numel - 1."""
        if not is_gpu(self.device.type):
            return self._node(self.dst_dtype, inner_fn, self.ranges, numel, hint)
        hint = self._hint(inner_fn, numel) if hint == ReductionHint.DEFAULT else hint
        chunk = self._chunk(numel, hint)
        if chunk is None:
            return self._node(self.dst_dtype, inner_fn, self.ranges, numel, hint)
        return self._in_chunks(inner_fn, numel, chunk, hint)

    def _hint(self, inner_fn: Callable[..., Any], numel: sympy.Expr) -> ReductionHint:
        """INNER if the reduced elements are adjacent in memory, OUTER if not: as Inductor finds it in the strides.

        It does not look when there are many outputs, so it is shown two along each dimension.
        """
        hints = V.graph.sizevars.optimization_hints(self.ranges)
        few = [sympy.Integer(min(2, hint)) for hint in hints]
        hint, _ = ir.Reduction.num_splits(
            self.device, self.dst_dtype, self.src_dtype, inner_fn, few, [numel], self.kind, numel
        )
        return hint

    def _node(
        self,
        dtype: torch.dtype,
        inner_fn: Callable[..., Any],
        ranges: list[Any],
        numel: sympy.Expr,
        hint: ReductionHint,
    ) -> ir.TensorBox:
        return ir.TensorBox.create(
            ir.Reduction(
                device=self.device,
                dtype=dtype,
                inner_fn=inner_fn,
                ranges=ranges,
                reduction_ranges=[numel],
                reduction_type=self.kind,
                src_dtype=self.src_dtype,
                reduction_hint=hint,
            )
        )

    def _chunk(self, numel: sympy.Expr, hint: ReductionHint) -> int | None:
        """Elements per program if the sum is split over programs: a power of two, so a subtree; or None."""
        length = V.graph.sizevars.optimization_hint(numel)
        columns = V.graph.sizevars.optimization_hint(sympy_product(self.ranges))
        if hint != ReductionHint.OUTER:
            fits = length <= PERSISTENT_LENGTH or rows_fill_the_device(columns, self.device)
            return None if fits else INNER_CHUNK
        programs = max(1, columns // OUTER_COLUMNS)
        wanted = OUTER_PROGRAMS_PER_SM * DeviceProperties.create(self.device).multi_processor_count
        chunk = _next_power_of_two(max(OUTER_CHUNK, length * programs // wanted))
        return chunk if length >= 2 * chunk else None

    def _in_chunks(
        self, inner_fn: Callable[..., Any], numel: sympy.Expr, chunk: int, hint: ReductionHint
    ) -> ir.TensorBox:
        """The tree cut at subtrees of ``chunk`` leaves: partial[..., c], then the tree over c."""
        partial = self.partial(inner_fn, numel, chunk, hint)
        load = partial.make_loader()
        chunks = partial.get_size()[-1]
        return self.over(lambda index, reduced: load([*index, *reduced]), chunks, ReductionHint.DEFAULT)

    def partial(
        self, inner_fn: Callable[..., Any], numel: sympy.Expr, chunk: int, hint: ReductionHint
    ) -> ir.TensorBox:
        """[*ranges, chunks]: the tree over each ``chunk`` consecutive elements, the last one padded."""
        chunks = V.graph.sizevars.simplify(CeilDiv(numel, chunk))
        fits = V.graph.sizevars.statically_known_lt(numel + chunk, 2**31)
        index_dtype = torch.int32 if fits else torch.int64
        divisible = V.graph.sizevars.statically_known_multiple_of(numel, chunk)

        def chunk_fn(index: Sequence[Any], reduced: Sequence[Any]) -> Any:
            *outer, number = index
            position = number * chunk + reduced[0]
            if divisible:
                return inner_fn(outer, [position])
            inside = ops.lt(ops.index_expr(position, index_dtype), ops.index_expr(numel, index_dtype))
            return ops.masked(inside, lambda: inner_fn(outer, [position]), _IDENTITY[self.kind])

        accumulator = torch.float64 if self.src_dtype == torch.float64 else torch.float32
        partial_ranges = [*self.ranges, chunks]
        partial = self._node(accumulator, chunk_fn, partial_ranges, sympy.Integer(chunk), hint)
        partial.realize()
        return partial


def in_blocks(
    device: torch.device,
    inner_fn: Callable[..., Any],
    ranges: Sequence[Any],
    reduction_ranges: Sequence[Any],
    block: int,
) -> ir.TensorBox:
    """[*ranges, blocks] in fp32: the tree over each ``block`` consecutive elements of the reduced axes."""
    numel = V.graph.sizevars.simplify(sympy_product(reduction_ranges))
    flat = _flattened(inner_fn, reduction_ranges, numel)
    if block > 1:
        ordered = _Ordered(device, torch.float32, torch.float32, "sum", list(ranges))
        return ordered.partial(flat, numel, block, ReductionHint.OUTER)
    return ir.Pointwise.create(
        device=device,
        dtype=torch.float32,
        inner_fn=lambda index: flat(index[:-1], index[-1:]),
        ranges=[*ranges, numel],
    )


def _next_power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
