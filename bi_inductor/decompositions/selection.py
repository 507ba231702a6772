"""Elements picked by rank: running maxima, order statistics, the commonest value, what a mask selects.

Everything is made of stable sorts, scans of integers (exact in every order) and gathers, so there is one answer:

    cummax, cummin     the last of equal extremes, NaN beyond all; as eager
    kthvalue, median   of the stable sort, so the first of equal elements; median takes the lower middle
    mode               the least of the commonest values, at the last place where it stands
    masked_scatter     the elements of the source in order, one for each element that the mask selects
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import block_scan, store_rows
from .order import sort_key
from .scatter import bit_count, mask_rank

aten = torch.ops.aten


def _scanned(x: Tensor, dim: int, combine: str) -> Tensor:
    return block_scan(x, dim, combine, bit_count(x.shape[dim] + 1))


def _running(largest: bool) -> Callable[..., Any]:
    def running(self: Tensor, dim: int) -> Any:
        if self.dim() == 0 or self.numel() == 0:
            return self.clone(), torch.zeros_like(self, dtype=torch.int64)
        if self.dtype.is_complex:
            return NotImplemented
        dim = dim % self.dim()
        key, combine = _extreme_key(self, largest)
        extreme = _scanned(key, dim, combine)
        shape = [-1 if axis == dim else 1 for axis in range(self.dim())]
        place = torch.arange(self.shape[dim], device=self.device).reshape(shape)
        index = _scanned(torch.where(key == extreme, place, -1), dim, "amax")
        return torch.gather(self, dim, index), index

    return running


def _extreme_key(x: Tensor, largest: bool) -> tuple[Tensor, str]:
    """Integers whose running ``combine`` is where the running extreme of ``x`` is; NaN is beyond both extremes."""
    if not x.is_floating_point():
        return x.long(), "amax" if largest else "amin"
    key = sort_key(x).long()
    return (key if largest else torch.where(x != x, key, -key)), "amax"


# ---------------------------------------------------------------- order statistics


def _taken(self: Tensor, order: Tensor, position: Tensor, dim: int, keepdim: bool) -> Any:
    """(values, indices) at ``position`` (with ``dim`` kept) of the sorted ``order``."""
    index = order.gather(dim, position)
    values = self.gather(dim, index)
    return (values, index) if keepdim else (values.squeeze(dim), index.squeeze(dim))


def _kthvalue(self: Tensor, k: Any, dim: int = -1, keepdim: bool = False) -> Any:
    if self.dim() == 0:
        return self.clone(), torch.zeros_like(self, dtype=torch.int64)
    _, order = torch.sort(self, dim=dim, stable=True)
    return _taken(self, order, torch.full_like(order.narrow(dim, 0, 1), k - 1), dim, keepdim)


def _median_dim(ignore_nan: bool) -> Callable[..., Any]:
    def median(self: Tensor, dim: int, keepdim: bool = False) -> Any:
        if self.dim() == 0:
            return self.clone(), torch.zeros_like(self, dtype=torch.int64)
        _, order = torch.sort(self, dim=dim, stable=True)
        length = self.shape[dim]
        numbers = (self == self).sum(dim, keepdim=True)
        if ignore_nan:
            position = (numbers - 1).clamp(min=0) // 2
        else:  # a NaN, and they are sorted last, is the median
            position = torch.where(numbers < length, numbers, (length - 1) // 2)
        return _taken(self, order, position, dim, keepdim)

    return median


def _median(ignore_nan: bool) -> Callable[..., Tensor]:
    def median(self: Tensor) -> Tensor:
        if self.numel() == 0:
            return NotImplemented
        return _median_dim(ignore_nan)(self.reshape(-1), 0)[0]

    return median


def _mode(self: Tensor, dim: int = -1, keepdim: bool = False) -> Any:
    if self.dim() == 0:
        return self.clone(), torch.zeros_like(self, dtype=torch.int64)
    if self.dtype.is_complex:
        return NotImplemented
    key = (sort_key(self) if self.is_floating_point() else self).movedim(dim, -1).contiguous()
    ranked, order = torch.sort(key, dim=-1, stable=True)
    past = torch.searchsorted(ranked, ranked, right=True)
    count = past - torch.searchsorted(ranked, ranked)
    commonest = count.argmax(-1, keepdim=True)
    index = order.gather(-1, past.gather(-1, commonest) - 1).movedim(-1, dim)
    values = self.gather(dim, index)
    return (values, index) if keepdim else (values.squeeze(dim), index.squeeze(dim))


# ---------------------------------------------------------------- masks


def _masked_scatter(self: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    self, mask = torch.broadcast_tensors(self, mask)
    if self.numel() == 0 or source.numel() == 0:
        return self.clone()
    rank = mask_rank(mask.reshape(-1)).clamp(max=source.numel() - 1)
    return torch.where(mask, source.reshape(-1)[rank].reshape(self.shape), self)


def _masked_scatter_backward(grad_output: Tensor, mask: Tensor, sizes: Sequence[Any]) -> Tensor:
    grad_output, mask = torch.broadcast_tensors(grad_output, mask)
    return selected_rows(mask.reshape(-1), grad_output.reshape(-1, 1), math.prod(sizes), 0).reshape(sizes)


def selected_rows(mask: Tensor, rows: Tensor, count: Any, fill: float) -> Tensor:
    """The first ``count`` of the rows [T, D] that a flat ``mask`` selects; ``fill`` where it selects fewer."""
    base = torch.full((count + 1, rows.shape[1]), fill, dtype=rows.dtype, device=rows.device)
    place = torch.where(mask, mask_rank(mask).clamp(max=count), count)
    kept = (mask & (place < count))[:, None]  # every row beside them stores the same value: any order will do
    return store_rows(base, place, torch.where(kept, rows, base[:1]))[:count]


def _nonzero_static(self: Tensor, *, size: Any, fill_value: int = -1) -> Tensor:
    if self.dim() == 0 or self.numel() == 0:
        return torch.full((size, self.dim()), fill_value, dtype=torch.int64, device=self.device)
    flat = torch.arange(self.numel(), device=self.device)
    coordinates = []
    for length in reversed(self.shape):
        coordinates.append(flat % length)
        flat = flat // length
    rows = torch.stack(coordinates[::-1], 1)
    return selected_rows((self != 0).reshape(-1), rows, size, fill_value)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.cummax.default: _running(True),
    aten.cummin.default: _running(False),
    aten.kthvalue.default: _kthvalue,
    aten.median.dim: _median_dim(False),
    aten.median.default: _median(False),
    aten.nanmedian.dim: _median_dim(True),
    aten.nanmedian.default: _median(True),
    aten.mode.default: _mode,
    aten.masked_scatter.default: _masked_scatter,
    aten.masked_scatter_backward.default: _masked_scatter_backward,
    aten.nonzero_static.default: _nonzero_static,
}
