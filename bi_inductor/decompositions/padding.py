"""Gradients of replication padding: what was copied from an edge adds up there, one dimension after another.

forward   out[o] = x[clamp(o - left, 0, n - 1)]
gradient  grad[0] = sum of the first left + 1 of g, grad[n - 1] = sum of the last right + 1, between them g itself:
          a TREE for each edge, the last dimension first, in the accumulator's dtype, with one rounding at the end

A negative pad cuts off elements, whose gradient is 0. ATen's kernel for a GPU adds in the order of its atomics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _along_the_last(g: Tensor, size: Any, left: int, right: int) -> Tensor:
    """[..., left + size + right] -> [..., size]."""
    g = torch.nn.functional.pad(g, (max(-left, 0), max(-right, 0)))
    left, right = max(left, 0), max(right, 0)
    if size == 1:
        return g.sum(-1, keepdim=True)
    first = g.narrow(-1, 0, left + 1).sum(-1, keepdim=True)
    last = g.narrow(-1, left + size - 1, right + 1).sum(-1, keepdim=True)
    return torch.cat([first, g.narrow(-1, left + 1, size - 2), last], -1)


def _replication_backward(dims: int) -> Callable[..., Tensor]:
    def backward(grad_output: Tensor, self: Tensor, padding: Sequence[int]) -> Tensor:
        if not grad_output.is_floating_point():
            return NotImplemented
        g = grad_output if grad_output.dtype == torch.float64 else grad_output.float()
        for place in range(dims):
            dim = -1 - place
            left, right = padding[2 * place], padding[2 * place + 1]
            g = _along_the_last(g.movedim(dim, -1), self.shape[dim], left, right).movedim(-1, dim)
        return g.to(grad_output.dtype).contiguous()

    return backward


TABLE: dict[Any, Callable[..., Any]] = {
    aten.replication_pad1d_backward.default: _replication_backward(1),
    aten.replication_pad2d_backward.default: _replication_backward(2),
    aten.replication_pad3d_backward.default: _replication_backward(3),
}
