"""The map of a mask's tiles (``attention_tiles.py``) on a GPU, from bounds or from all pairs.

A computed mask that has bounds (``bounds.py``) is asked about 16 queries and a tile of keys at a time, by a program for
HEIGHT rows of the map. Of others a program for each row computes the mask of all keys, as attention's kernels would
(``computed.py``), or reads it where memory has it.
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
from bi_inductor.templates.bounds import has_bounds
from bi_inductor.templates.computed import INDICES, ComputingKernel, computed, loaded
from bi_inductor.templates.emission import Template, emit, realized

PAIRWISE = r"""
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
    last = attention_map.pairwise_row(
        row, captured, idx_b, group * HEADS, granule * GRANULE, QUERIES, KEYS, SCORES, HEADS, BLOCK_N, GRANULE
    )
    idx_row = program + tl.arange(0, 1)
    last = last + tl.zeros((1,), tl.int32)
    {{store_output(("idx_row",), "last", val_shape=("1",))}}
"""


BOUNDED = r"""
{{def_kernel("MAP")}}
    program = tl.program_id(0).to(INDEX_DTYPE)
    granules = {{size("MAP", 2)}}
    parts = tl.cdiv(granules, HEIGHT)
    part = program % parts
    group = program // parts % ({{size("MAP", 1)}})
    idx_b = program // parts // ({{size("MAP", 1)}})
    captured = {{bounded()}}
    tiles = MAP + program // parts * granules * ({{size("MAP", 3)}})
    QUERIES = {{computed_size("mask", 2)}}
    KEYS = {{computed_size("mask", 3)}}
    SCORES: tl.constexpr = (computed_bounds,)
    last = attention_map.bounded_rows(
        tiles, captured, idx_b, group * HEADS, part * HEIGHT, granules, QUERIES, KEYS, SCORES[0], HEADS, BLOCK_N,
        GRANULE, HEIGHT
    )
    idx_row = program * HEIGHT + tl.arange(0, HEIGHT)
    {{store_output(("idx_row",), "last", val_shape=("HEIGHT",))}}
"""

#: Rows of the map that one program bounds: they share what is computed of keys alone.
HEIGHT = 4


@SymbolicGridFn
def map_grid(rows: Any, meta: dict[str, Any], *, cdiv: Callable[[Any, Any], Any]) -> tuple[Any, int, int]:
    """One program for each row of the map, or HEIGHT of them."""
    return (rows, 1, 1)


class MapKernel(ComputingKernel):
    """A template kernel that may call ``runtime/attention_map.py``."""

    @classmethod
    def gen_common_triton_imports(cls) -> str:
        return super().gen_common_triton_imports() + "from bi_inductor.runtime import attention_map\n"


class MapTemplate(Template):
    """A template of such a kernel."""

    kernel_type = MapKernel


pairwise_template = MapTemplate("batchinv_attention_map", grid=map_grid, source=PAIRWISE)
bounded_template = MapTemplate("batchinv_attention_map_of_bounds", grid=map_grid, source=BOUNDED)


def attention_map(visible: ir.TensorBox, groups: int, tile: int) -> ir.TensorBox:
    """Lowering of ``bi_inductor::attention_map``; shapes and result as there."""
    size, device = visible.get_size(), visible.get_device()
    heads = V.graph.sizevars.guard_int(size[1])
    made = map_size([size[0], heads, *size[2:]], groups, tile, CeilDiv)
    stored = empty(made, dtype=torch.int32, device=device)
    function = computed(visible)
    is_bounded = function is not None and has_bounds(function.body, list(INDICES))
    height: dict[str, Any] = {"HEIGHT": HEIGHT} if is_bounded else {}
    programs = made[0] * made[1] * (CeilDiv(made[2], HEIGHT) if is_bounded else made[2])
    emit(
        bounded_template if is_bounded else pairwise_template,
        [realized(stored)],
        ir.FixedLayout(device, torch.int32, [programs * HEIGHT if is_bounded else programs]),
        num_warps=8,
        num_stages=1,
        mutated_inputs=[realized(stored)],
        call_sizes=[programs],
        subgraphs=[function or loaded(visible), None, None],
        HEADS=heads // made[1],
        BLOCK_N=tile,
        GRANULE=GRANULE,
        **height,
    )
    return stored
