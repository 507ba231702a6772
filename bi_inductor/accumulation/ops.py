"""Operators of continued gradients, in the ``bi_inductor`` namespace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("bi_inductor", "FRAGMENT")
#: Rows of one block of a continued sum. A micro-batch that is not the last holds a multiple of them.
BLOCK = 64

_LIBRARY.define("continuing(Tensor parameter, Tensor start) -> Tensor")
_LIBRARY.define("continued(Tensor start, Tensor gradient) -> Tensor")
_LIBRARY.define("mm_from(Tensor start, Tensor a, Tensor b) -> Tensor")
_LIBRARY.define("sum_from(Tensor start, Tensor x, int[] dim, int block) -> Tensor")

continuing = torch.ops.bi_inductor.continuing.default
"""``continuing(parameter, start)``: the parameter; its gradient is ``continued(start, gradient)``."""

continued = torch.ops.bi_inductor.continued.default
"""``continued(start, gradient)``: a mark. The sum behind ``gradient`` is to begin with ``start``, not with 0."""

mm_from = torch.ops.bi_inductor.mm_from.default
"""``mm_from(start [M, N] fp32, a [M, K], b [K, N]) -> [M, N] fp32``: the chain of ``mm`` from ``start``, unrounded."""

sum_from = torch.ops.bi_inductor.sum_from.default
"""``sum_from(start, x, dim, block)``: ``x`` summed over ``dim`` in fp32, from ``start``.

Blocks of ``block`` consecutive elements of the reduced dims, row-major, are trees of adjacent pairs, padded with 0;
they are added to ``start`` from left to right.
"""


@torch.library.impl(_LIBRARY, "continuing", "CompositeExplicitAutograd")
def _continuing_eager(parameter: Tensor, start: Tensor) -> Tensor:
    return parameter.clone()


def continuing_decomposed(parameter: Tensor, start: Tensor) -> Tensor:
    """What ``continuing`` is in a forward graph: nothing."""
    return parameter


@torch.library.impl(_LIBRARY, "continued", "CompositeExplicitAutograd")
def _continued_eager(start: Tensor, gradient: Tensor) -> Tensor:
    return start + gradient


@torch.library.impl(_LIBRARY, "mm_from", "CompositeExplicitAutograd")
def _mm_from_eager(start: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return start + a.float() @ b.float()


@torch.library.impl(_LIBRARY, "sum_from", "CompositeExplicitAutograd")
def _sum_from_eager(start: Tensor, x: Tensor, dim: Sequence[int], block: int) -> Tensor:
    return start + x.float().sum(list(dim))


@torch.library.register_fake("bi_inductor::continuing", lib=_LIBRARY)
def _continuing_fake(parameter: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(parameter)


@torch.library.register_fake("bi_inductor::continued", lib=_LIBRARY)
def _continued_fake(start: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(start)


@torch.library.register_fake("bi_inductor::mm_from", lib=_LIBRARY)
def _mm_from_fake(start: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return start.new_empty(start.shape)


@torch.library.register_fake("bi_inductor::sum_from", lib=_LIBRARY)
def _sum_from_fake(start: Tensor, x: Tensor, dim: Sequence[int], block: int) -> Tensor:
    return start.new_empty(start.shape)


def _save_start(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _continuing_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (start,) = ctx.saved_tensors
    return continued(start, gradient), None


torch.library.register_autograd(
    "bi_inductor::continuing", _continuing_backward, setup_context=_save_start, lib=_LIBRARY
)
