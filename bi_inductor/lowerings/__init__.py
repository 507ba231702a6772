"""Canonical lowerings by op, looked up before Inductor's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def table() -> dict[Any, Callable[..., Any]]:
    """Op overload -> lowering. Built on first use, since importing Inductor's lowerings takes a second."""
    from .. import attention_backward_op, attention_op, attention_tiles, ops
    from . import gradients, grouped, matmul, quantized, segments
    from .attention import attention, attention_backward, attention_map

    return {
        **matmul.LOWERINGS,
        **gradients.LOWERINGS,
        **quantized.LOWERINGS,
        **grouped.LOWERINGS,
        attention_op.OVERLOAD: attention,
        attention_backward_op.OVERLOAD: attention_backward,
        attention_tiles.attention_map: attention_map,
        ops.segment_tree: segments.segment_tree,
        ops.block_scan: segments.block_scan,
        ops.row_major: segments.row_major,
        ops.store_rows: segments.store_rows,
    }
