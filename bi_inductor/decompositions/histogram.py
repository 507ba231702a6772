"""Histograms: the bin of each element by itself, then a count (exact) or a canonical sum of weights for each bin.

hist[b] = tree(weight[t] for t ascending with edges[b] <= x[t] < edges[b + 1]); the last bin holds its right edge
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _histc(self: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    if not self.is_floating_point():
        return NotImplemented
    x = self.reshape(-1)
    low, high = _outer_edges(x, None if min == max else (min, max), 1.0)
    position = ((x - low) * bins / (high - low)).long().clamp(0, bins - 1)
    outside = (x < low) | (x > high) | (x != x)
    return _counted(torch.where(outside, bins, position), bins, None, self.dtype)


def _outer_edges(x: Tensor, given: Sequence[float] | None, margin: float) -> tuple[Any, Any]:
    """First and last edge; without one given, the extremes, moved apart by ``margin`` if they are equal."""
    if given is not None:
        return tuple(torch.full((), edge, dtype=x.dtype, device=x.device) for edge in given)  # type: ignore
    low, high = x.amin(), x.amax()
    return torch.where(low == high, low - margin, low), torch.where(low == high, high + margin, high)


def _counted(position: Tensor, bins: Any, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Contributions at each position 0 ... bins - 1; what stands at ``bins`` is left out."""
    if weight is None:
        ones = torch.ones_like(position)
        return (
            torch.zeros(bins + 1, dtype=torch.int64, device=ones.device)
            .scatter_add(0, position, ones)[:bins]
            .to(dtype)
        )
    return torch.zeros(bins + 1, dtype=dtype, device=weight.device).scatter_add(0, position, weight)[:bins]


def _edges(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """bins + 1 edges, each half computed from its own end, as ``linspace`` does."""
    step = (high - low) / bins
    number = torch.arange(bins + 1, device=low.device)
    return torch.where(number < (bins + 1) // 2, low + step * number, high - step * (bins - number))


def _histogram(
    columns: Sequence[Tensor], edges: Sequence[Tensor], weight: Tensor | None, density: bool
) -> Tensor:
    dtype = columns[0].dtype
    position, inside = torch.zeros_like(columns[0], dtype=torch.int64), True
    for x, edge in zip(columns, edges, strict=True):
        bins = edge.shape[0] - 1
        place = torch.searchsorted(edge.contiguous(), x.contiguous(), right=True) - 1
        inside = inside & (x >= edge[0]) & (x <= edge[-1])
        position = position * bins + place.clamp(0, bins - 1)
    shape = [edge.shape[0] - 1 for edge in edges]
    total = math.prod(shape)
    hist = _counted(torch.where(inside, position, total), total, weight, dtype).reshape(shape)
    if density:
        hist = hist / hist.sum()
        for dim, edge in enumerate(edges):
            hist = hist / edge.diff().reshape(-1, *[1] * (len(edges) - 1 - dim))
    return hist


def _histogram_bin_ct(
    self: Tensor,
    bins: int = 100,
    *,
    range: Sequence[float] | None = None,
    weight: Tensor | None = None,
    density: bool = False,
) -> Any:
    x = self.reshape(-1)
    edges = _edges(*_outer_edges(x, range, 0.5), bins)
    return _histogram([x], [edges], None if weight is None else weight.reshape(-1), density), edges


def _histogram_bins_tensor(
    self: Tensor, bins: Tensor, *, weight: Tensor | None = None, density: bool = False
) -> Any:
    weight = None if weight is None else weight.reshape(-1)
    return _histogram([self.reshape(-1)], [bins], weight, density), bins.clone()


def _bin_edges(
    self: Tensor,
    bins: Sequence[int],
    *,
    range: Sequence[float] | None = None,
    weight: Tensor | None = None,
    density: bool = False,
) -> list[Tensor]:
    x = self.reshape(-1, self.shape[-1])
    pairs = [None if range is None else range[2 * d : 2 * d + 2] for d in _dims(bins)]
    return [_edges(*_outer_edges(x[:, d], pairs[d], 0.5), bins[d]) for d in _dims(bins)]


def _dims(bins: Sequence[Any]) -> Sequence[int]:
    return list(range(len(bins)))


def _from_bin_cts(
    self: Tensor,
    bins: Sequence[int],
    *,
    range: Sequence[float] | None = None,
    weight: Tensor | None = None,
    density: bool = False,
) -> Tensor:
    return _from_bin_tensors(self, _bin_edges(self, bins, range=range), weight=weight, density=density)


def _from_bin_tensors(
    self: Tensor, bins: Sequence[Tensor], *, weight: Tensor | None = None, density: bool = False
) -> Tensor:
    columns = self.reshape(-1, self.shape[-1]).unbind(-1)
    return _histogram(columns, bins, None if weight is None else weight.reshape(-1), density)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.histc.default: _histc,
    aten.histogram.bin_ct: _histogram_bin_ct,
    aten.histogram.bins_tensor: _histogram_bins_tensor,
    aten._histogramdd_bin_edges.default: _bin_edges,
    aten._histogramdd_from_bin_cts.default: _from_bin_cts,
    aten._histogramdd_from_bin_tensors.default: _from_bin_tensors,
}
