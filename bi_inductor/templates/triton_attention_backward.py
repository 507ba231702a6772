"""The gradients of attention on a GPU in canonical form: one kernel for dq, one for dk and dv, no atomics.

``runtime/attention_backward.py`` has the form and its order of additions; here are the programs around it. A program of
dq has BLOCK_M rows of one key head, packed as those of the forward (``triton_attention.py``), and walks the keys. A
program of dk and dv has BLOCK_N keys, and walks the queries of all heads that share them, head after head. Both
compute scores and probabilities again: nothing of [queries, keys] is in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import empty, expand, permute
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import SymbolicGridFn
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import FloorDiv

from bi_inductor import contract
from bi_inductor.attention_tiles import GRANULE
from bi_inductor.templates.computed import ComputingKernel, Functions
from bi_inductor.templates.emission import Template, emit, realized
from bi_inductor.templates.triton_attention import (
    ROWS,
    attention_grid,
    functions_of,
    head,
    mask_kind,
    padded,
    static_size,
)
from bi_inductor.templates.triton_matmul import tf32_is_allowed

_CONSTANTS = r"""
    SHAPE: tl.constexpr = (BLOCK_M, BLOCK_N, D, BLOCK_D, DV, BLOCK_DV, INDEX_DTYPE)
    SCORES: tl.constexpr = (
        CAUSAL, MASK, SCALE, INPUT_PRECISION, NARROW, COMPUTED, {{"computed_mask" if COMPUTED else 0}},
        {{"True, computed_score, computed_derivative" if SCORED else "False, 0, 0"}}
    )
    STAGES: tl.constexpr = (FULL_STAGES, EDGE_STAGES)
"""

QUERY_GRADIENTS = (
    head(["Q", "K", "V", "G", "LSE", "DELTA"], "TILES", [])
    + ROWS
    + _CONSTANTS
    + r"""
    dims = tl.arange(0, BLOCK_D)[None, :]
    q = attention_backward.load_rows(
        q_base, idx_m, dims, {{stride("Q", 2)}}, {{stride("Q", 3)}}, exists, D
    )
    g_base = G + idx_b * ({{stride("G", 0)}}) + idx_h * ({{stride("G", 1)}})
    g = attention_backward.load_rows(g_base, idx_m, idx_d, {{stride("G", 2)}}, {{stride("G", 3)}}, exists, DV)
    row = (idx_b * {{size("Q", 1)}} + idx_h) * {{size("Q", 2)}} + idx_m
    statistics = attention_backward.load_statistics(LSE + row, DELTA + row, exists)
    acc = attention_backward.query_gradients(
        q, g, statistics, k_and_v, mask_and_rows, full, end, KEYS, SHAPE, SCORES, STAGES
    )
    out = attention_backward.finish(acc) * tl.full((), SCALE, tl.float32)
    out = out.to(Q.dtype.element_ty).to(tl.float32)
    inside_d = exists & (dims < D)
    {{store_output(("idx_b", "idx_h", "idx_m", "dims"), "out", "inside_d", val_shape=("BLOCK_M", "BLOCK_D"))}}
"""
)

KEY_GRADIENTS = (
    head(["Q", "K", "V", "G", "LSE", "DELTA"], "SPANS", ["DV_OUT"])
    + r"""
    KEY_HEADS = {{size("K", 1)}}
    KEYS = {{size("K", 2)}}
    QUERIES = {{size("Q", 2)}}
    GROUP = {{size("Q", 1)}} // KEY_HEADS
    key_tiles = tl.cdiv(KEYS, BLOCK_N)
    program = tl.program_id(0).to(INDEX_DTYPE)
    # The first keys first: under a causal mask they have the most queries.
    key_tile = program % key_tiles
    idx_b = program // key_tiles // KEY_HEADS
    key_head = program // key_tiles % KEY_HEADS
    first_head = key_head * GROUP
    idx_n = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    exists = idx_n < KEYS
    dims = tl.arange(0, BLOCK_D)[None, :]
    idx_d = tl.arange(0, BLOCK_DV)[None, :]
    k_base = K + idx_b * ({{stride("K", 0)}}) + key_head * ({{stride("K", 1)}})
    v_base = V + idx_b * ({{stride("V", 0)}}) + key_head * ({{stride("V", 1)}})
    k = attention_backward.load_rows(k_base, idx_n, dims, {{stride("K", 2)}}, {{stride("K", 3)}}, exists, D)
    v = attention_backward.load_rows(v_base, idx_n, idx_d, {{stride("V", 2)}}, {{stride("V", 3)}}, exists, DV)
    q_base = Q + idx_b * ({{stride("Q", 0)}}) + first_head * ({{stride("Q", 1)}})
    g_base = G + idx_b * ({{stride("G", 0)}}) + first_head * ({{stride("G", 1)}})
    first_row = (idx_b * {{size("Q", 1)}} + first_head) * QUERIES
    q_rows = (q_base, {{stride("Q", 1)}}, {{stride("Q", 2)}}, {{stride("Q", 3)}})
    g_rows = (g_base, {{stride("G", 1)}}, {{stride("G", 2)}}, {{stride("G", 3)}})
    queries = (q_rows, g_rows, LSE + first_row, DELTA + first_row)
{% if SCORED %}
    captured_by_score = {{scored()}}
    scored = (captured_by_score, idx_b, first_head)
{% else %}
    scored = 0
{% endif %}
{% if COMPUTED %}
    captured = {{computed("mask")}}
    mask_base = (captured, idx_b, first_head)
    mask_and_keys = (mask_base, (0, 0, 0), idx_n, exists, KEYS, scored)
{% elif MASK %}
    mask_base = MASKS + idx_b * ({{stride("MASKS", 0)}}) + first_head * ({{stride("MASKS", 1)}})
    mask_strides = ({{stride("MASKS", 1)}}, {{stride("MASKS", 2)}}, {{stride("MASKS", 3)}})
    mask_and_keys = (mask_base, mask_strides, idx_n, exists, KEYS, scored)
{% else %}
    mask_and_keys = (0, (0, 0, 0), idx_n, exists, KEYS, scored)
{% endif %}
{% if MASK == 3 %}
    spans_base = SPANS + idx_b * ({{stride("SPANS", 0)}}) + key_head * ({{stride("SPANS", 1)}})
    span = attention_backward.span_of(
        spans_base, {{stride("SPANS", 2)}}, {{stride("SPANS", 3)}}, key_tile * BLOCK_N, KEYS, SPAN, BLOCK_N
    )
{% else %}
    span = (0, QUERIES, 0, QUERIES)
{% endif %}
"""
    + _CONSTANTS
    + r"""
    dk, dv = attention_backward.key_gradients(
        k, v, queries, mask_and_keys, span, key_tile * BLOCK_N, GROUP, QUERIES, SHAPE, SCORES, STAGES
    )
    dv = attention_backward.finish(dv).to(V.dtype.element_ty)
    dv_row = (idx_b * KEYS + idx_n) * KEY_HEADS + key_head
    tl.store(DV_OUT + dv_row * DV + idx_d, dv, mask=exists & (idx_d < DV))
    out = attention_backward.finish(dk) * tl.full((), SCALE, tl.float32)
    out = out.to(K.dtype.element_ty).to(tl.float32)
    inside_d = exists & (dims < D)
    {{store_output(("idx_b", "key_head", "idx_n", "dims"), "out", "inside_d", val_shape=("BLOCK_N", "BLOCK_D"))}}
"""
)


@SymbolicGridFn
def key_grid(
    pairs: Any, keys: Any, meta: dict[str, Any], *, cdiv: Callable[[Any, Any], Any]
) -> tuple[Any, Any, int]:
    """(batch * key heads, keys) -> one program per tile of keys."""
    return (pairs * cdiv(keys, meta["BLOCK_N"]), 1, 1)


class AttentionBackwardKernel(ComputingKernel):
    """A template kernel that may call ``runtime/attention_backward.py``."""

    @classmethod
    def gen_common_triton_imports(cls) -> str:
        return super().gen_common_triton_imports() + "from bi_inductor.runtime import attention_backward\n"


class AttentionBackwardTemplate(Template):
    """A template of such a kernel."""

    kernel_type = AttentionBackwardKernel


query_template = AttentionBackwardTemplate(
    "batchinv_attention_query_gradients", grid=attention_grid, source=QUERY_GRADIENTS
)
key_template = AttentionBackwardTemplate(
    "batchinv_attention_key_gradients", grid=key_grid, source=KEY_GRADIENTS
)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What is free: rows and keys of a tile, warps, and stages of the loops over tiles without and with a mask."""

    block_m: int
    block_n: int
    num_warps: int
    full_stages: int
    edge_stages: int


#: By (elements of more than 2 bytes, padded head dim): what fits the shared memory of an A100. For elements of 2 bytes
#: and widths up to 128 the fastest on an H200 (attention_backward_sweep.csv); the others were not timed.
_QUERY_SCHEDULES = {
    (False, 64): Schedule(64, 64, 4, 3, 1),
    (False, 128): Schedule(128, 64, 8, 3, 1),
    (False, 256): Schedule(64, 32, 8, 2, 1),
    (True, 64): Schedule(32, 32, 8, 2, 1),
    (True, 128): Schedule(32, 32, 8, 2, 1),
    (True, 256): Schedule(16, 16, 8, 1, 1),
}
_KEY_SCHEDULES = {
    (False, 64): Schedule(64, 64, 4, 3, 2),
    (False, 128): Schedule(64, 64, 4, 2, 2),
    (False, 256): Schedule(32, 64, 8, 2, 1),
    (True, 64): Schedule(32, 32, 8, 2, 1),
    (True, 128): Schedule(32, 32, 8, 2, 1),
    (True, 256): Schedule(16, 16, 8, 1, 1),
}
#: Before Hopper, whose tensor cores read operands from shared memory, those need more registers: where the schedules
#: above spill under a mask, by up to 5 KB a thread, these do not.
_QUERY_SCHEDULES_BEFORE_HOPPER = {**_QUERY_SCHEDULES, (False, 128): Schedule(64, 64, 4, 2, 1)}
_KEY_SCHEDULES_BEFORE_HOPPER = {
    **_KEY_SCHEDULES,
    (False, 64): Schedule(32, 64, 4, 2, 2),
    (False, 128): Schedule(64, 64, 8, 2, 2),
}


def query_schedule_for(rows: int | None, width: int, itemsize: int, major: int) -> Schedule:
    """The schedule of dq for ``rows`` of each key head (None: only known at run time).

    ``width``: the larger of the two head dims, padded; ``major``: of the compute capability.
    """
    table = _QUERY_SCHEDULES if major >= 9 else _QUERY_SCHEDULES_BEFORE_HOPPER
    schedule = table[itemsize > 2, max(64, width)]
    return dataclasses.replace(schedule, block_m=_shortened(schedule.block_m, rows))


def key_schedule_for(keys: int | None, width: int, itemsize: int, major: int) -> Schedule:
    """The schedule of dk and dv for ``keys`` of each key head; as :func:`query_schedule_for`."""
    table = _KEY_SCHEDULES if major >= 9 else _KEY_SCHEDULES_BEFORE_HOPPER
    schedule = table[itemsize > 2, max(64, width)]
    return dataclasses.replace(schedule, block_n=_shortened(schedule.block_n, keys))


def _shortened(tile: int, length: int | None) -> int:
    return tile if length is None or length > 64 else min(tile, padded(length))


def schedules(width: int, itemsize: int) -> tuple[tuple[Schedule, ...], tuple[Schedule, ...]]:
    """Every schedule of dq, and of dk and dv, that may be chosen for heads of ``width`` padded elements."""
    sizes = [(length, width, itemsize, major) for major in (9, 8) for length in (16, 32, 64, None)]
    return (
        tuple(dict.fromkeys(query_schedule_for(*size) for size in sizes)),
        tuple(dict.fromkeys(key_schedule_for(*size) for size in sizes)),
    )


def attention_backward(
    grad: ir.TensorBox,
    query: ir.TensorBox,
    key: ir.TensorBox,
    value: ir.TensorBox,
    mask: ir.TensorBox | None,
    logsumexp: ir.TensorBox,
    delta: ir.TensorBox,
    is_causal: bool,
    scale: float,
    tiles: ir.TensorBox | None = None,
    spans: ir.TensorBox | None = None,
    score: str = "",
    derivative: str = "",
    captured: Sequence[ir.TensorBox] | None = None,
) -> tuple[ir.TensorBox, ir.TensorBox, ir.TensorBox]:
    """Lowering of ``bi_inductor::attention_backward``; shapes and results as there."""
    batch, heads, queries, _ = query.get_size()
    key_heads, keys = key.get_size()[1:3]
    head_dim, value_dim = (V.graph.sizevars.guard_int(x.get_size()[-1]) for x in (query, value))
    dtype, device = query.get_dtype(), query.get_device()
    width, pairs = padded(max(head_dim, value_dim)), batch * key_heads
    rows = queries * FloorDiv(heads, key_heads)
    major = DeviceProperties.create(device).major
    schedule = query_schedule_for(static_size(rows), width, dtype.itemsize, major)
    form = contract.attention_form(head_dim, value_dim, dtype)
    if form is None or schedule.block_n != form.tile:  # the map is of other tiles
        tiles = spans = None
    mask = None if mask is None else expand(mask, [batch, heads, queries, keys])
    functions = functions_of(mask, score, derivative, captured, [batch, heads, queries, keys], device)
    constants = _constants(head_dim, value_dim, dtype, mask_kind(mask, tiles), functions, is_causal, scale)
    constants["SPAN"] = 0 if form is None else form.tile
    statistics = [ir.ExternKernel.require_contiguous(realized(x)) for x in (logsumexp, delta)]
    operands = [realized(x) for x in (query, key, value, grad)] + statistics
    operands += [] if mask is None or functions.mask is not None else [realized(mask)]
    maps = [] if tiles is None or spans is None else [tiles, spans]
    tile_maps = [realized(expand(x, [batch, key_heads, *x.get_size()[2:]])) for x in maps]
    dq = _call(
        query_template,
        [*operands, *tile_maps[:1]],
        _beside_each_other(device, dtype, [batch, heads, queries, head_dim]),
        [pairs, rows, 1],
        schedule,
        constants,
        functions,
    )
    stored = empty([batch, keys, key_heads, value_dim], dtype=dtype, device=device)
    dk = _call(
        key_template,
        [*operands, *tile_maps[1:], realized(stored)],
        _beside_each_other(device, dtype, [batch, key_heads, keys, head_dim]),
        [pairs, keys],
        key_schedule_for(static_size(keys), width, dtype.itemsize, major),
        constants,
        functions,
        mutated_inputs=[realized(stored)],
    )
    return dq, dk, permute(stored, [0, 2, 1, 3])


def _beside_each_other(device: torch.device, dtype: torch.dtype, size: list[Any]) -> ir.Layout:
    """[B, H, L, D] with the heads of one position beside each other: what follows joins them without a copy."""
    _, heads, length, width = size
    return ir.FixedLayout(device, dtype, size, [length * heads * width, width, heads * width, 1])


def _constants(
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    kind: int,
    functions: Functions,
    is_causal: bool,
    scale: float,
) -> dict[str, Any]:
    is_tf32 = dtype == torch.float32 and tf32_is_allowed()
    return {
        "D": head_dim,
        "BLOCK_D": padded(head_dim),
        "DV": value_dim,
        "BLOCK_DV": padded(value_dim),
        "CAUSAL": is_causal,
        "MASK": kind,
        **functions.constants(dtype),
        "SCALE": scale,
        "INPUT_PRECISION": "'tf32'" if is_tf32 else "'ieee'",
    }


def _call(
    template: AttentionBackwardTemplate,
    operands: list[Any],
    layout: ir.Layout,
    grid: list[Any],
    schedule: Schedule,
    constants: dict[str, Any],
    functions: Functions,
    **arguments: Any,
) -> ir.TensorBox:
    return emit(
        template,
        operands,
        layout,
        num_warps=schedule.num_warps,
        num_stages=max(schedule.full_stages, schedule.edge_stages),
        call_sizes=grid,
        subgraphs=functions.subgraphs,
        BLOCK_M=schedule.block_m,
        BLOCK_N=schedule.block_n,
        GRANULE=GRANULE,
        FULL_STAGES=schedule.full_stages,
        EDGE_STAGES=min(schedule.full_stages, 2) if constants["MASK"] in (1, 2) else schedule.edge_stages,
        **constants,
        **arguments,
    )
