"""Operators for products that ATen's own ops describe by their shapes: scaled and grouped ones.

The decompositions turn ``_scaled_mm``, ``_scaled_mm_v2`` and ``_grouped_mm`` into these, which say in their
arguments what the former leave to be read off the shapes of scales and operands. What they compute is written out
below in plain torch; the order of additions is that of the lowering.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bi_inductor.ops import _LIBRARY

_LIBRARY.define(
    "scaled_product(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, bool block_scales, "
    "bool fast_accumulation, ScalarType out_dtype) -> Tensor"
)
_LIBRARY.define("grouped_rows(Tensor a, Tensor b, Tensor ends) -> Tensor")
_LIBRARY.define("grouped_depth(Tensor a, Tensor b, Tensor ends) -> Tensor")

scaled_product = torch.ops.bi_inductor.scaled_product.default
"""``scaled_product(a [M, K], b [K, N], scale_a, scale_b, bias, ...) -> [M, N]`` of ``out_dtype``; a, b: fp8.

Scales are fp32: broadcastable to [M, N]; or, with ``block_scales``, for blocks of 128 of K: scale_a [M, K / 128] or
[M / 128, K / 128], scale_b [K / 128, N] or [K / 128, N / 128], all rounded up.
"""

grouped_rows = torch.ops.bi_inductor.grouped_rows.default
"""``grouped_rows(a [T, K], b [G, K, N], ends [G]) -> [T, N]``: row t times ``b[g]``, ends[g-1] <= t < ends[g].

``ends``: int32, ascending. Rows from ends[G-1] on are 0.
"""

grouped_depth = torch.ops.bi_inductor.grouped_depth.default
"""``grouped_depth(a [M, T], b [T, N], ends [G]) -> [G, M, N]``: group g sums over t, ends[g-1] <= t < ends[g]."""


def spread(scales: Tensor, dim: int, length: int) -> Tensor:
    """Scales for every index of ``dim``: as they are, or each 128 times."""
    return (
        scales if scales.shape[dim] == length else scales.repeat_interleave(128, dim).narrow(dim, 0, length)
    )


@torch.library.impl(_LIBRARY, "scaled_product", "CompositeExplicitAutograd")
def _scaled_product_eager(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    block_scales: bool,
    fast_accumulation: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    if block_scales:
        total = torch.zeros(a.shape[0], b.shape[1], device=a.device)
        for index in range(scale_a.shape[1]):
            part = slice(128 * index, 128 * index + 128)
            rows = spread(scale_a[:, index : index + 1], 0, a.shape[0])
            columns = spread(scale_b[index : index + 1], 1, b.shape[1])
            total += a[:, part].float() @ b[part].float() * (rows * columns)
    else:
        total = a.float() @ b.float() * scale_a * scale_b
    return (total if bias is None else total + bias).to(out_dtype)


@torch.library.register_fake("bi_inductor::scaled_product", lib=_LIBRARY)
def _scaled_product_fake(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    block_scales: bool,
    fast_accumulation: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def _groups(ends: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in zip([0, *ends.tolist()[:-1]], ends.tolist(), strict=True)]


@torch.library.impl(_LIBRARY, "grouped_rows", "CompositeExplicitAutograd")
def _grouped_rows_eager(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    out = a.new_zeros(a.shape[0], b.shape[2])
    for rows, matrix in zip(_groups(ends), b, strict=True):
        out[rows] = a[rows] @ matrix
    return out


@torch.library.impl(_LIBRARY, "grouped_depth", "CompositeExplicitAutograd")
def _grouped_depth_eager(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return torch.stack([a[:, rows] @ b[rows] for rows in _groups(ends)])


@torch.library.register_fake("bi_inductor::grouped_rows", lib=_LIBRARY)
def _grouped_rows_fake(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[2]))


@torch.library.register_fake("bi_inductor::grouped_depth", lib=_LIBRARY)
def _grouped_depth_fake(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty((ends.shape[0], a.shape[0], b.shape[1]))
