"""Lowerings of sums that go on from a gradient: a product's chain, and blocks of rows added left to right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir, lowering
from torch._inductor.ir import TensorBox
from torch._inductor.utils import sympy_product

from ..accumulation import ops as accumulation
from ..errors import BatchInvarianceError
from .reductions import in_blocks


def _mm_from(start: TensorBox, a: TensorBox, b: TensorBox) -> TensorBox:
    """``mm_from``: the chain of a @ b, begun by ``start``."""
    if a.get_device().type != "cpu":
        raise BatchInvarianceError(
            "a continued weight gradient on a GPU",
            "the GPU's product template starts from 0",
            "compile without batchinv.continue_gradients",
        )
    from ..templates.cpp_matmul import chain_matmul

    return chain_matmul(a, b, start=start, out_dtype=torch.float32)


def _sum_from(start: TensorBox, x: TensorBox, dim: Sequence[int], block: int) -> TensorBox:
    """``sum_from``: trees over blocks, then a chain over the blocks whose other factor is 1."""
    made = lowering._make_reduction_inner(
        x, axis=list(dim), keepdims=False, dtype=torch.float32, override_return_dtype=None
    )
    ranges = list(made["ranges"])
    blocks = in_blocks(made["device"], made["inner_fn"], ranges, list(made["reduction_ranges"]), block)
    columns, count = sympy_product(ranges), blocks.get_size()[-1]
    partial = lowering.view(blocks, [columns, count])
    ones = lowering.full([count, sympy.Integer(1)], 1.0, dtype=torch.float32, device=made["device"])
    total = _mm_from(lowering.view(start, [columns, sympy.Integer(1)]), partial, ones)
    return lowering.view(total, ranges)


LOWERINGS: dict[Any, Callable[..., ir.TensorBox]] = {
    accumulation.mm_from: _mm_from,
    accumulation.sum_from: _sum_from,
}
