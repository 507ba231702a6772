"""Attention and its gradients: the kernels of the GPU, or constants where there is nothing to attend to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import full
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv

from ..attention_tiles import map_size


def attention(
    query: TensorBox,
    key: TensorBox,
    value: TensorBox,
    mask: TensorBox | None,
    is_causal: bool,
    scale: float,
    tiles: TensorBox | None = None,
    score: str = "",
    derivative: str = "",
    captured: Sequence[TensorBox] | None = None,
) -> tuple[TensorBox, TensorBox]:
    """Shapes and results as in ``attention_op.py``."""
    from ..templates import triton_attention

    if _is_empty(query, key):
        size, device = query.get_size(), query.get_device()
        output = full([*size[:3], value.get_size()[3]], 0, dtype=query.get_dtype(), device=device)
        return output, full(size[:3], -math.inf, dtype=torch.float32, device=device)
    return triton_attention.attention(query, key, value, mask, is_causal, scale, tiles, score, captured)


def attention_backward(
    grad: TensorBox,
    query: TensorBox,
    key: TensorBox,
    value: TensorBox,
    mask: TensorBox | None,
    logsumexp: TensorBox,
    delta: TensorBox,
    is_causal: bool,
    scale: float,
    tiles: TensorBox | None = None,
    spans: TensorBox | None = None,
    score: str = "",
    derivative: str = "",
    captured: Sequence[TensorBox] | None = None,
) -> tuple[TensorBox, TensorBox, TensorBox]:
    """Shapes and results as in ``attention_backward_op.py``."""
    from ..templates import triton_attention_backward

    if _is_empty(query, key):
        zeros = (
            full(x.get_size(), 0, dtype=x.get_dtype(), device=x.get_device()) for x in (query, key, value)
        )
        return tuple(zeros)  # type: ignore[return-value]
    return triton_attention_backward.attention_backward(
        grad,
        query,
        key,
        value,
        mask,
        logsumexp,
        delta,
        is_causal,
        scale,
        tiles,
        spans,
        score,
        derivative,
        captured,
    )


def attention_map(visible: TensorBox, groups: int, tile: int) -> TensorBox:
    """Shapes and result as in ``attention_tiles.py``."""
    from ..templates import triton_attention_map

    sizes = visible.get_size()
    if any(V.graph.sizevars.statically_known_equals(size, 0) for size in sizes):
        shape = map_size(sizes, groups, tile, CeilDiv)
        return full(shape, 0, dtype=torch.int32, device=visible.get_device())
    return triton_attention_map.attention_map(visible, groups, tile)


def _is_empty(query: TensorBox, key: TensorBox) -> bool:
    """True if there are no queries, or no keys."""
    sizes = [*query.get_size()[:3], key.get_size()[2]]
    return any(V.graph.sizevars.statically_known_equals(size, 0) for size in sizes)
