"""``bi_inductor::attention``: the kernels of the GPU, or constants where there is nothing to attend to."""

from __future__ import annotations

import math

import torch
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import full
from torch._inductor.virtualized import V


def attention(
    query: TensorBox, key: TensorBox, value: TensorBox, mask: TensorBox | None, is_causal: bool, scale: float
) -> tuple[TensorBox, TensorBox]:
    """Shapes and results as in ``attention_op.py``."""
    from ..templates import triton_attention

    sizes = [*query.get_size()[:3], key.get_size()[2]]
    if any(V.graph.sizevars.statically_known_equals(size, 0) for size in sizes):
        size, device = query.get_size(), query.get_device()
        output = full([*size[:3], value.get_size()[3]], 0, dtype=query.get_dtype(), device=device)
        return output, full(size[:3], -math.inf, dtype=torch.float32, device=device)
    return triton_attention.attention(query, key, value, mask, is_causal, scale)
