"""Products of 8-bit operands on a GPU: ``_int_mm`` and scaled products become one kernel each.

On a CPU they were decomposed into ordinary products (``decompositions/``) and do not get here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.ir import TensorBox

from ..product_ops import scaled_product

aten = torch.ops.aten


def _int_mm(a: TensorBox, b: TensorBox) -> TensorBox:
    from ..templates.triton_quantized import int8_matmul

    return int8_matmul(a, b)


def _scaled_product(
    a: TensorBox,
    b: TensorBox,
    scale_a: TensorBox,
    scale_b: TensorBox,
    bias: TensorBox | None,
    block_scales: bool,
    fast_accumulation: bool,
    out_dtype: torch.dtype,
) -> TensorBox:
    from ..templates.triton_quantized import fp8_matmul

    return fp8_matmul(
        a,
        b,
        scale_a,
        scale_b,
        bias,
        block_scales=block_scales,
        fast_accumulation=fast_accumulation,
        out_dtype=out_dtype,
    )


LOWERINGS: dict[Any, Callable[..., Any]] = {
    aten._int_mm.default: _int_mm,
    scaled_product: _scaled_product,
}
