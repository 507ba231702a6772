"""Gradients of what is one row, or a slice: zeros beside it, and no zero in it that is negative.

Where a graph takes its rows one by one, the gradient of the whole is a sum of as many tensors as there are rows, each
of them zero but for one: g + 0.0 + 0.0 ..., which is g but for the sign of a zero. Of one row nothing is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _select_backward(grad: Tensor, input_sizes: Sequence[Any], dim: int, index: Any) -> Tensor:
    return torch.select_scatter(grad.new_zeros(input_sizes), _plus_zero(grad), dim, index)


def _slice_backward(
    grad: Tensor, input_sizes: Sequence[Any], dim: int, start: Any, end: Any, step: Any
) -> Tensor:
    return torch.slice_scatter(grad.new_zeros(input_sizes), _plus_zero(grad), dim, start, end, step)


def _plus_zero(x: Tensor) -> Tensor:
    """x + 0.0, written so that nobody leaves it out."""
    return x if x.is_complex() else torch.where(x == 0, 0.0, x)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.select_backward.default: _select_backward,
    aten.slice_backward.default: _slice_backward,
}
