"""Scaled products of fp8 matrices: ``_scaled_mm`` and ``_scaled_mm_v2``, by what their scales belong to.

    one number each        round(chain * scale_a * scale_b + bias)
    one for each row of a  the same
      and column of b
    one for each 128 of K  round(sum_i c_i * scale_a[m, i] * scale_b[i, n] + bias), c_i the i-th 128 of the chain
      in a row, or in
      128 rows

On a CPU the operands are widened to fp32, exactly, and the product is an ordinary one; blocks of 128 and
``scale_result`` are left to be refused, as are the formats that are scaled by 16 or 32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bi_inductor.product_ops import scaled_product

aten = torch.ops.aten

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

# Values of torch.nn.functional.ScalingType.
_TENSOR_WISE, _ROW_WISE, _BLOCKS_1X128, _BLOCKS_128X128 = 0, 1, 4, 5


def _scaled_mm(
    self: Tensor,
    mat2: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    if scale_result is not None or not _is_fp8(self, mat2) or scale_a.dtype != torch.float32:
        return NotImplemented
    is_plain = scale_a.numel() == scale_b.numel() == 1 or (
        scale_a.shape == (self.shape[0], 1) and scale_b.shape == (1, mat2.shape[1])
    )
    return _product(self, mat2, scale_a, scale_b, bias, out_dtype, blocks=not is_plain, fast=use_fast_accum)


def _scaled_mm_v2(
    self: Tensor,
    mat2: Tensor,
    scale_a: Sequence[Tensor],
    recipe_a: Sequence[int],
    swizzle_a: Sequence[int],
    scale_b: Sequence[Tensor],
    recipe_b: Sequence[int],
    swizzle_b: Sequence[int],
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    contraction_dim: Sequence[int] = (),
    use_fast_accum: bool = False,
) -> Tensor:
    recipes = [*recipe_a, *recipe_b]
    known = (_TENSOR_WISE, _ROW_WISE, _BLOCKS_1X128, _BLOCKS_128X128)
    if len(recipes) != 2 or any(recipe not in known for recipe in recipes) or not _is_fp8(self, mat2):
        return NotImplemented
    if contraction_dim or any([*swizzle_a, *swizzle_b]):
        return NotImplemented
    blocks = recipes[0] >= _BLOCKS_1X128
    left, right = scale_a[0], scale_b[0]
    if blocks:
        left = _by_rows(left, recipes[0], self.shape[1])
        right = _by_rows(right, recipes[1], self.shape[1]).t()
    elif recipes[0] == _ROW_WISE:
        right = right.reshape(1, mat2.shape[1])
    return _product(self, mat2, left, right, bias, out_dtype, blocks=blocks, fast=use_fast_accum)


def _by_rows(scales: Tensor, recipe: int, depth: int) -> Tensor:
    """Block scales as [rows or 128s of rows, 128s of K]; those of 128x128 come transposed and padded."""
    return scales.t()[:, : depth // 128] if recipe == _BLOCKS_128X128 else scales


def _is_fp8(*operands: Tensor) -> bool:
    return all(operand.dtype in FP8_DTYPES for operand in operands)


def _product(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    *,
    blocks: bool,
    fast: bool,
) -> Tensor:
    out_dtype = out_dtype or a.dtype
    if a.device.type == "cuda":
        return scaled_product(a, b, scale_a, scale_b, bias, blocks, fast, out_dtype)
    if blocks:
        return NotImplemented
    total = torch.mm(a.float(), b.float()) * scale_a * scale_b
    return (total if bias is None else total + bias).to(out_dtype)


TABLE: dict[Any, Callable[..., Any]] = {
    aten._scaled_mm.default: _scaled_mm,
    aten._scaled_mm_v2.default: _scaled_mm_v2,
}
