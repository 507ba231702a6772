"""``_grouped_mm`` by the dims of its operands; ``offs[g]`` is where group g ends.

    [T, K] x [G, K, N]      grouped_rows: row t times the matrix of its group
    [G, M, K] x [K, T]      the same, transposed: column t is a row of the transposed product
    [M, T] x [T, N]         grouped_depth: one product for each group of t
    [G, M, K] x [G, K, N]   bmm

Gradients of grouped products are grouped products, so they get here by themselves.

Transformers (``integrations/moe.py``) has custom ops for experts in a dtype that torch's op does not take, and for what
their gradients are: loops of products over the same groups, so they are the same two ops here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bi_inductor.product_ops import grouped_depth, grouped_rows

aten = torch.ops.aten


def _grouped_mm(
    self: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if bias is not None or out_dtype not in (None, self.dtype):
        return NotImplemented
    if offs is None:
        return torch.bmm(self, mat2)
    if self.dim() == 2:
        return (grouped_rows if mat2.dim() == 3 else grouped_depth)(self, mat2, offs)
    return grouped_rows(mat2.t(), self.transpose(1, 2), offs).t().contiguous()


def _grouped_mm_fallback(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return grouped_rows(input, weight, offs.to(torch.int32))


def _grouped_mm_fallback_backward(
    input: Tensor, weight: Tensor, offs: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor]:
    ends = offs.to(torch.int32)
    return grouped_rows(grad_output, weight.transpose(1, 2), ends), grouped_depth(
        input.t(), grad_output, ends
    )


def table() -> dict[Any, Callable[..., Any]]:
    """With the rules of transformers' ops as soon as it has registered them."""
    rules: dict[Any, Callable[..., Any]] = {aten._grouped_mm.default: _grouped_mm}
    for rule in (_grouped_mm_fallback, _grouped_mm_fallback_backward):
        packet = getattr(torch.ops.transformers, rule.__name__.removeprefix("_"), None)
        if packet is not None:
            rules[packet.default] = rule
    return rules
