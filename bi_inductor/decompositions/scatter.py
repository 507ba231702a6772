"""Writes to computed places: index_put, scatter and their relatives, hence the gradients of gathers.

Two contributions to one place may come from any two threads, so atomics add them in any order and plain stores
keep any one. Here contributions are sorted by destination, stably, so that each destination's are one segment
in source order; the segment is reduced as a tree (or its last row is taken), and *every* row of it then stores
the same result. Stores of equal bits may come in any order.

    accumulate   out[v] = round(base[v] + tree(values[t] for t ascending with rows[t] = v))
    assign       out[v] = values[t] for the last t with rows[t] = v; base[v] without one
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import block_scan, segment_tree, store_rows, wide_dtype

aten = torch.ops.aten


def bit_count(length: Any) -> int:
    """Least b with 2**b >= length. A dynamic length is guarded between two powers of two, no closer."""
    bits = 0
    while (1 << bits) < length:
        bits += 1
    return bits


def put_rows(
    base: Tensor,
    rows: Tensor,
    values: Tensor,
    combine: str = "assign",
    *,
    include_self: bool = True,
    distinct: bool = False,
) -> Tensor:
    """``base`` [V, D] with ``values`` [T, D] put at ``rows`` [T] in [0, V).

    ``combine``: assign, sum, prod, amax, amin or mean; ``include_self``: whether base takes part where there is
    a contribution; ``distinct``: no row occurs twice, so nothing has to be sorted.
    """
    count = rows.shape[0]
    if count == 0 or base.numel() == 0:
        return base.clone()
    if distinct:
        keys, ranked = rows, values
        start = torch.arange(count, device=rows.device)
        end, bits = start + 1, 0
    else:
        keys, order = torch.sort(rows, stable=True)
        start, end = torch.searchsorted(keys, keys), torch.searchsorted(keys, keys, right=True)
        ranked, bits = values[order], bit_count(count)
    if combine == "assign":
        return store_rows(base, keys, ranked if distinct else ranked[end - 1])
    tree = "sum" if combine == "mean" else combine
    total = segment_tree(ranked, start, end, tree, bits)
    total = total if distinct else total[start]
    return store_rows(
        base, keys, _with_base(base[keys], total, (end - start)[:, None], combine, include_self)
    )


def _with_base(base: Tensor, total: Tensor, count: Tensor, combine: str, include_self: bool) -> Tensor:
    """One rounding, after base has been added in the accumulator's dtype."""
    if include_self:
        wide = base.to(wide_dtype(base.dtype))
        join = {"prod": torch.mul, "amax": torch.maximum, "amin": torch.minimum}.get(combine, torch.add)
        total, count = join(wide, total), count + 1
    return (total / count if combine == "mean" else total).to(base.dtype)


# ---------------------------------------------------------------- index_put


def _index_put(
    self: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
    unsafe: bool = False,
) -> Tensor:
    given = [index for index in indices if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for index in given):
        return _masked_put(self, indices, values, accumulate)
    if not given:
        return NotImplemented
    if accumulate and (self.dtype.is_complex or self.dtype == torch.bool):
        return NotImplemented
    indexed = [dim for dim, index in enumerate(indices) if index is not None]
    kept = [dim for dim in range(self.dim()) if dim not in indexed]
    sizes = [self.shape[dim] for dim in indexed]
    tensors = torch.broadcast_tensors(*given)
    rows = _linear([_wrapped(t.long(), n) for t, n in zip(tensors, sizes, strict=True)], sizes).reshape(-1)

    # Where the broadcast indices stand in the shape of self[indices]: in place if adjacent, else in front.
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    before = indexed[0] if adjacent else 0
    rest = [self.shape[dim] for dim in kept]
    shape = tensors[0].shape
    values = values.to(self.dtype).expand([*rest[:before], *shape, *rest[before:]])
    inside = list(range(before, before + len(shape)))
    outside = [dim for dim in range(values.dim()) if dim not in inside]
    columns = math.prod(rest)
    values = values.permute([*inside, *outside]).reshape(rows.shape[0], columns)

    permutation = [*indexed, *kept]
    base = self.permute(permutation).reshape(math.prod(sizes), columns)
    result = put_rows(base, rows, values, "sum" if accumulate else "assign")
    inverse = sorted(range(self.dim()), key=permutation.__getitem__)
    return result.reshape([self.shape[dim] for dim in permutation]).permute(inverse)


def _index_add(self: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    if self.dim() == 0:
        return _index_add(self.reshape(1), 0, index.reshape(-1), source.reshape(-1), alpha=alpha).reshape([])
    values = source if alpha == 1 else source * alpha
    return _index_put(self, [*[None] * (dim % self.dim()), index.reshape(-1)], values, accumulate=True)


def _index_reduce(
    self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    if reduce == "mean" and not self.is_floating_point():
        return NotImplemented
    if self.dim() == 0:
        args = index.reshape(-1), source.reshape(-1), reduce
        return _index_reduce(self.reshape(1), 0, *args, include_self=include_self).reshape([])
    first, values = self.movedim(dim, 0), source.movedim(dim, 0)
    columns = math.prod(first.shape[1:])
    base = first.reshape(first.shape[0], columns)
    values = values.reshape(values.shape[0], columns)
    rows = _wrapped(index.reshape(-1), base.shape[0])
    result = put_rows(base, rows, values, {**_REDUCE, "mean": "mean"}[reduce], include_self=include_self)
    return result.reshape(first.shape).movedim(0, dim)


def _index_copy(self: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    if self.dim() == 0:
        return _index_copy(self.reshape(1), 0, index.reshape(-1), source.reshape(-1)).reshape([])
    return _index_put(self, [*[None] * (dim % self.dim()), index.reshape(-1)], source)


def _masked_put(self: Tensor, indices: Sequence[Any], values: Tensor, accumulate: bool) -> Tensor:
    """One boolean mask: a ``where``. Of several values, each selected place takes the next."""
    if len(indices) != 1 or (accumulate and self.dtype.is_complex):
        return NotImplemented
    mask = indices[0].bool()
    rest = self.shape[mask.dim() :]
    values = values.to(self.dtype)
    if values.dim() == len(rest) + 1 and values.shape[0] != 1:
        values = values[mask_rank(mask.reshape(-1)).clamp(max=values.shape[0] - 1)]
        values = values.expand(values.shape[0], *rest).reshape(*mask.shape, *rest)
    elif values.dim() == len(rest) + 1:
        values = values.squeeze(0)
    mask = mask.reshape(*mask.shape, *[1] * len(rest))
    return torch.where(mask, self + values if accumulate else values, self)


def mask_rank(mask: Tensor) -> Tensor:
    """For each element of a flat ``mask``, how many selected ones stand before it."""
    selected = mask.to(torch.int64)
    return block_scan(selected, 0, "sum", bit_count(mask.shape[0] + 1)) - selected


def _masked_accumulate(self: Tensor, mask: Tensor, indices: Sequence[Any], values: Tensor) -> Tensor:
    """Where ``mask`` is off, nothing is added and the index may point anywhere."""
    inside = [
        None if index is None else index.clamp(-size, size - 1)
        for index, size in zip(indices, self.shape, strict=False)
    ]
    return _index_put(
        self, inside, torch.where(mask, values, 0.0 if values.is_floating_point() else 0), accumulate=True
    )


def _embedding_dense_backward(
    grad_output: Tensor, indices: Tensor, num_weights: Any, padding_idx: Any, scale_grad_by_freq: bool
) -> Tensor:
    """Rows are rounded before they are stored, so that the table is written once, in its own dtype."""
    rows = indices.long().reshape(-1)
    values = grad_output.reshape(rows.shape[0], math.prod(grad_output.shape[indices.dim() :]))
    counted = ((rows >= 0) & (rows < num_weights))[:, None]
    rows = _wrapped(rows.clamp(-num_weights, num_weights - 1), num_weights)
    if scale_grad_by_freq:
        once = counted.long()
        how_often = put_rows(once.new_zeros(num_weights, 1), rows, once, "sum")[rows]
        values = values.to(wide_dtype(values.dtype)) / torch.where(counted, how_often, 1)
    values = torch.where(counted & (rows != padding_idx)[:, None], values, 0.0)
    table = grad_output.new_zeros(num_weights, values.shape[1])
    return put_rows(table, rows, values, "sum").reshape(num_weights, *grad_output.shape[indices.dim() :])


def _wrapped(index: Tensor, size: Any) -> Tensor:
    return torch.where(index < 0, index + size, index)


def _linear(coordinates: Sequence[Tensor], sizes: Sequence[Any]) -> Tensor:
    """Row-major position in a box of ``sizes``."""
    position = coordinates[0]
    for coordinate, size in itertools.islice(zip(coordinates, sizes, strict=True), 1, None):
        position = position * size + coordinate
    return position


# ---------------------------------------------------------------- scatter


def _scattered(
    self: Tensor, dim: int, index: Tensor, src: Any, combine: str, include_self: bool = True
) -> Tensor:
    """Each element of ``index`` names one place of ``self``: rows are elements, in index's row-major order."""
    if index.numel() == 0:
        return self.clone()
    if self.dim() == 0:
        place, row = self.reshape(1), index.reshape(-1)
        value = src.reshape(-1) if isinstance(src, Tensor) else src
        return _scattered(place, 0, row, value, combine, include_self).reshape([])
    dim = dim % self.dim()
    scalar = not isinstance(src, Tensor)
    if scalar:
        src = torch.full(index.shape, src, dtype=self.dtype, device=self.device)
    else:
        src = src[tuple(slice(0, size) for size in index.shape)]
    # Looked up, not computed: a size that a position is computed with would be in the fingerprint.
    positions = torch.arange(self.numel(), device=index.device).reshape(self.shape)
    rows = positions.gather(dim, _wrapped(index, self.shape[dim])).reshape(-1)
    equal_stores = scalar and combine == "assign"
    result = put_rows(
        self.reshape(-1, 1),
        rows,
        src.reshape(-1, 1),
        combine,
        include_self=include_self,
        distinct=equal_stores or index.shape[dim] == 1,
    )
    return result.reshape(self.shape)


def _scatter(self: Tensor, dim: int, index: Tensor, src: Any) -> Tensor:
    return _scattered(self, dim, index, src, "assign")


_REDUCE = {"add": "sum", "multiply": "prod", "sum": "sum", "prod": "prod", "amax": "amax", "amin": "amin"}


def _scatter_legacy_reduce(self: Tensor, dim: int, index: Tensor, src: Any, *, reduce: str) -> Tensor:
    return _scattered(self, dim, index, src, _REDUCE[reduce])


def _scatter_add(self: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    return _scattered(self, dim, index, src, "sum")


def _scatter_reduce(
    self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    if reduce == "mean" and not self.is_floating_point():
        return NotImplemented
    return _scattered(self, dim, index, src, {**_REDUCE, "mean": "mean"}[reduce], include_self)


def _has_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """Real numbers only: complex and boolean accumulation is left to be refused by name."""

    def decomposed(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.dtype.is_complex or self.dtype == torch.bool:
            return NotImplemented
        return function(self, *args, **kwargs)

    return decomposed


TABLE: dict[Any, Callable[..., Any]] = {
    aten.index_put.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
    aten._index_put_impl.default: _index_put,
    aten._unsafe_masked_index_put_accumulate.default: _masked_accumulate,
    aten.embedding_dense_backward.default: _embedding_dense_backward,
    aten.index_add.default: _index_add,
    aten.index_copy.default: _index_copy,
    aten.index_reduce.default: _has_order(_index_reduce),
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
    aten.scatter.reduce: _has_order(_scatter_legacy_reduce),
    aten.scatter.value_reduce: _has_order(_scatter_legacy_reduce),
    aten.scatter_add.default: _has_order(_scatter_add),
    aten.scatter_reduce.two: _has_order(_scatter_reduce),
}
