"""Samples of an image at the places of a grid, as torch's own decomposition has them, in training too.

ATen's gradient adds what each pixel gave by atomics. Differentiated op by op instead, the gradient of each gather is a
sorted scatter: a TREE over the samples in the order in which they stand in the grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bi_inductor.ops import composite
from bi_inductor.passes.retarget import Retarget, argument


@composite(
    "grid_sampler(Tensor input, Tensor grid, int interpolation_mode, int padding_mode, bool align_corners)"
    " -> Tensor"
)
def grid_sampler(
    input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Tensor:
    """``input [N, C, H, W]``, ``grid [N, P, Q, 2]`` -> ``[N, C, P, Q]``, computed in fp32 (fp64), rounded once."""
    from torch._decomp.decompositions import grid_sampler_2d

    return grid_sampler_2d(input, grid, interpolation_mode, padding_mode, align_corners)


def _is_a_volume(node: Node) -> bool:
    image = argument(node, 0, "input")
    return not isinstance(image, Tensor) or image.dim() != 4


def _by_number(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``F.grid_sample``, whose modes are words."""
    operands = [node.args[i] if len(node.args) > i else node.kwargs[name] for i, name in enumerate(_OPERANDS)]
    mode = _MODES.index(argument(node, 2, "mode", "bilinear"))
    padding = _PADDINGS.index(argument(node, 3, "padding_mode", "zeros"))
    return (*operands, mode, padding, bool(argument(node, 4, "align_corners"))), {}


_OPERANDS = ("input", "grid")
_MODES = ("bilinear", "nearest", "bicubic")
_PADDINGS = ("zeros", "border", "reflection")
_ATEN = {
    torch.grid_sampler,
    torch.grid_sampler_2d,
    torch.ops.aten.grid_sampler.default,
    torch.ops.aten.grid_sampler_2d.default,
}

SAMPLING = (
    Retarget("grid_sampler", frozenset(_ATEN), grid_sampler, leave=_is_a_volume),
    Retarget(
        "grid_sample",
        frozenset({torch.nn.functional.grid_sample}),
        grid_sampler,
        leave=_is_a_volume,
        arguments=_by_number,
    ),
)
