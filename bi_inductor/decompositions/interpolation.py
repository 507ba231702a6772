"""Gradients of linear interpolation, as products with the transposed table of weights, one dimension after another.

forward  out[o] = (1 - t) x[low(o)] + t x[high(o)]       (torch's own decomposition)
gradient grad[j] = sum_o g[o] w[o, j]                    a CHAIN over o for each dimension, the last one first
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _weights(size: int, count: int, align_corners: bool, scale: float | None, like: Tensor) -> Tensor:
    """w [count, size]: what each output takes of each input."""
    place = torch.arange(count, dtype=like.dtype, device=like.device)
    if align_corners:
        source = place * ((size - 1) / (count - 1) if count > 1 else 0.0)
    else:
        step = 1 / scale if scale is not None and scale > 0 else size / count
        source = (step * (place + 0.5) - 0.5).clamp(min=0)
    low = source.long()
    high = (low + 1).clamp(max=size - 1)
    part = (source - low)[:, None]
    here = torch.arange(size, device=like.device)
    return torch.where(here == low[:, None], 1 - part, 0.0) + torch.where(here == high[:, None], part, 0.0)


def _linear_backward(dims: int) -> Callable[..., Tensor]:
    def backward(
        grad_output: Tensor,
        output_size: Sequence[Any],
        input_size: Sequence[Any],
        align_corners: bool,
        *scales: float | None,
    ) -> Tensor:
        g = grad_output
        given = [*scales, *[None] * dims]
        for dim in reversed(range(dims)):
            size, count = int(input_size[2 + dim]), int(output_size[dim])
            table = _weights(size, count, align_corners, given[dim], g)
            moved = g.movedim(2 + dim, -1)
            rows = moved.reshape(math.prod(moved.shape[:-1]), count)
            g = torch.mm(rows, table).reshape(*moved.shape[:-1], size).movedim(-1, 2 + dim)
        return g.contiguous()

    return backward


TABLE: dict[Any, Callable[..., Any]] = {
    aten.upsample_linear1d_backward.default: _linear_backward(1),
    aten.upsample_trilinear3d_backward.default: _linear_backward(3),
}
