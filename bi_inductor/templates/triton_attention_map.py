"""The map of a mask's tiles (``attention_tiles.py``) on a GPU: a program for each 16 queries of a group's heads.

It computes the mask of all keys as attention's kernels would (``computed.py``), or reads it where memory has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import empty
from torch._inductor.select_algorithm import SymbolicGridFn
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv

from bi_inductor.attention_tiles import GRANULE, map_size
from bi_inductor.templates.computed import computed, loaded
from bi_inductor.templates.emission import emit, realized
from bi_inductor.templates.triton_attention import AttentionTemplate

MAP = r"""
{{def_kernel("MAP")}}
    program = tl.program_id(0).to(INDEX_DTYPE)
    granule = program % ({{size("MAP", 2)}})
    group = program // ({{size("MAP", 2)}}) % ({{size("MAP", 1)}})
    idx_b = program // ({{size("MAP", 2)}}) // ({{size("MAP", 1)}})
    captured = {{computed("mask")}}
    row = MAP + program * ({{size("MAP", 3)}})
    QUERIES = {{computed_size("mask", 2)}}
    KEYS = {{computed_size("mask", 3)}}
    SCORES: tl.constexpr = (False, 1, 1.0, None, None, True, computed_mask)
    last = attention.map_row(
        row, captured, idx_b, group * HEADS, granule * GRANULE, QUERIES, KEYS, SCORES, HEADS, BLOCK_N, GRANULE
    )
    idx_row = program + tl.arange(0, 1)
    last = last + tl.zeros((1,), tl.int32)
    {{store_output(("idx_row",), "last", val_shape=("1",))}}
"""


@SymbolicGridFn
def map_grid(rows: Any, meta: dict[str, Any], *, cdiv: Callable[[Any, Any], Any]) -> tuple[Any, int, int]:
    """One program for each row of the map."""
    return (rows, 1, 1)


map_template = AttentionTemplate("batchinv_attention_map", grid=map_grid, source=MAP)


def attention_map(visible: ir.TensorBox, groups: int, tile: int) -> ir.TensorBox:
    """Lowering of ``bi_inductor::attention_map``; shapes and result as there."""
    size, device = visible.get_size(), visible.get_device()
    heads = V.graph.sizevars.guard_int(size[1])
    made = map_size([size[0], heads, *size[2:]], groups, tile, CeilDiv)
    stored = empty(made, dtype=torch.int32, device=device)
    rows = made[0] * made[1] * made[2]
    emit(
        map_template,
        [realized(stored)],
        ir.FixedLayout(device, torch.int32, [rows]),
        num_warps=8,
        num_stages=1,
        mutated_inputs=[realized(stored)],
        call_sizes=[rows],
        subgraphs=[computed(visible) or loaded(visible), None, None],
        HEADS=heads // made[1],
        BLOCK_N=tile,
        GRANULE=GRANULE,
    )
    return stored
