"""Attention on a GPU in canonical form: one kernel for long queries, two for decoding.

``runtime/attention.py`` has the form and its order of additions; here are the programs around it. A program has
BLOCK_M rows of one key head: the queries of all heads that share it, position by position, so that keys and values
are read once for the group. With few rows the chunks of keys are computed side by side, each by its own program, and
joined from left to right by a second kernel; with many, one after the other. Both are the same sums. A graph that
learns at run time how many queries there are has the kernels of both, and those that are not wanted are launched
without a program, which Triton's launchers and Inductor's take for no launch. On Hopper many queries without a mask
have a kernel of their own (``triton_attention_specialised.py``), with the same sums.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import empty, empty_strided, expand
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import SymbolicGridFn
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv, FloorDiv, Max, Min

from bi_inductor import contract
from bi_inductor.attention_tiles import GRANULE
from bi_inductor.templates.computed import Computed, ComputingKernel, Functions, computed, programmed
from bi_inductor.templates.emission import Template, emit, realized
from bi_inductor.templates.triton_attention_specialised import are_many, is_suited, specialised
from bi_inductor.templates.triton_matmul import tf32_is_allowed


def head(before: list[str], of_map: str, after: list[str]) -> str:
    """The kernel's operands: a mask between those that are always there, if memory holds one, then its map."""
    mask = f'(["MASKS"] if MASK and not COMPUTED else []) + (["{of_map}"] if MASK == 3 else [])'
    return "\n{{def_kernel(*(" + f"{before} + {mask} + {after}" + "))}}\n"


ROWS = r"""
    KEY_HEADS = {{size("K", 1)}}
    KEYS = {{size("K", 2)}}
    GROUP = {{size("Q", 1)}} // KEY_HEADS
    ROWS = {{size("Q", 2)}} * GROUP
    row_tiles = tl.cdiv(ROWS, BLOCK_M)
    program = tl.program_id(0).to(INDEX_DTYPE)
    # The last rows first: under a causal mask they have the most keys.
    tile = row_tiles - 1 - program % row_tiles
    idx_b = program // row_tiles // KEY_HEADS
    key_head = program // row_tiles % KEY_HEADS
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    exists = rows < ROWS
    idx_m = rows // GROUP
    idx_h = key_head * GROUP + rows % GROUP
    idx_d = tl.arange(0, BLOCK_DV)[None, :]
    inside = exists & (idx_d < DV)
    q_base = Q + idx_b * ({{stride("Q", 0)}}) + idx_h * ({{stride("Q", 1)}})
    k_base = K + idx_b * ({{stride("K", 0)}}) + key_head * ({{stride("K", 1)}})
    v_base = V + idx_b * ({{stride("V", 0)}}) + key_head * ({{stride("V", 1)}})
    k_and_v = (k_base, {{stride("K", 2)}}, {{stride("K", 3)}}, v_base, {{stride("V", 2)}}, {{stride("V", 3)}})
{% if CAUSAL or MASK == 3 %}
    first_position = tile * BLOCK_M // GROUP
    last_position = (tl.minimum(tile * BLOCK_M + BLOCK_M, ROWS) - 1) // GROUP
{% endif %}
{% if MASK == 3 %}
    tiles_base = TILES + idx_b * ({{stride("TILES", 0)}}) + key_head * ({{stride("TILES", 1)}})
    granules = (first_position // GRANULE, last_position // GRANULE)
    tiles = (tiles_base, {{stride("TILES", 2)}}, {{stride("TILES", 3)}}, granules[0], granules[1])
{% else %}
    tiles = 0
{% endif %}
{% if SCORED %}
    captured_by_score = {{scored() if DERIVED else computed("score")}}
    scored = (captured_by_score, idx_b, idx_h, tl.minimum(idx_m, {{size("Q", 2)}} - 1))
{% else %}
    scored = 0
{% endif %}
{% if COMPUTED %}
    captured = {{computed("mask")}}
    mask_base = (captured, idx_b, idx_h, tl.minimum(idx_m, {{size("Q", 2)}} - 1))
    mask_and_rows = (mask_base, 0, idx_m, exists, tiles, scored)
{% elif MASK %}
    mask_base = MASKS + idx_b * ({{stride("MASKS", 0)}}) + idx_h * ({{stride("MASKS", 1)}})
    mask_base += idx_m * ({{stride("MASKS", 2)}})
    mask_and_rows = (mask_base, {{stride("MASKS", 3)}}, idx_m, exists, tiles, scored)
{% else %}
    mask_and_rows = (0, 0, idx_m, exists, tiles, scored)
{% endif %}
{% if CAUSAL %}
    end = tl.minimum(KEYS, last_position + 1)
    full = tl.minimum(KEYS, first_position + 1) // BLOCK_N * BLOCK_N
{% else %}
    end = KEYS
    full = KEYS // BLOCK_N * BLOCK_N
{% endif %}
"""

_CONSTANTS = r"""
    SHAPE: tl.constexpr = (BLOCK_N, D, BLOCK_D, DV, BLOCK_DV, INDEX_DTYPE, BLOCK_REST)
    SCORES: tl.constexpr = (
        CAUSAL, MASK, SCALE, INPUT_PRECISION, NARROW, COMPUTED, {{"computed_mask" if COMPUTED else 0}}, SCALE_FIRST,
        {{"True, computed_score" if SCORED else "False, 0"}}
    )
    CHUNKS: tl.constexpr = (NEAR_CHUNK, NEAR_CHUNKS, FAR_CHUNK)
    STAGES: tl.constexpr = (FULL_STAGES, EDGE_STAGES)
    q = attention.load_query(q_base, idx_m, {{stride("Q", 2)}}, {{stride("Q", 3)}}, exists, SHAPE)
"""

WHOLE = (
    head(["Q", "K", "V"], "TILES", ["LSE"])
    + ROWS
    + _CONSTANTS
    + r"""
    m, sums, acc = attention.all_chunks(q, k_and_v, mask_and_rows, full, end, KEYS, SHAPE, SCORES, CHUNKS, STAGES)
    out, lse = attention.finish(m, sums, acc)
    out = out.to(Q.dtype.element_ty).to(tl.float32)
    lse_row = (idx_b * {{size("Q", 1)}} + idx_h) * {{size("Q", 2)}} + idx_m
    tl.store(LSE + lse_row, lse[:, None], mask=exists)
    {{store_output(("idx_b", "idx_h", "idx_m", "idx_d"), "out", "inside", val_shape=("BLOCK_M", "BLOCK_DV"))}}
"""
)

ONE_CHUNK = (
    head(["Q", "K", "V"], "TILES", ["MAXIMA", "SUMS"])
    + ROWS
    + _CONSTANTS
    + r"""
    # The last chunks first: they have the most keys.
    idx_c = attention.chunk_count(KEYS, NEAR_CHUNK, NEAR_CHUNKS, FAR_CHUNK) - 1 - tl.program_id(1).to(INDEX_DTYPE)
    low = attention.chunk_start(idx_c, NEAR_CHUNK, NEAR_CHUNKS, FAR_CHUNK)
    high = tl.minimum(attention.chunk_start(idx_c + 1, NEAR_CHUNK, NEAR_CHUNKS, FAR_CHUNK), end)
    m, sums, acc = attention.one_chunk(q, k_and_v, mask_and_rows, low, full, high, KEYS, SHAPE, SCORES, STAGES)
    state_row = ((idx_c * {{size("Q", 0)}} + idx_b) * {{size("Q", 1)}} + idx_h) * {{size("Q", 2)}} + idx_m
    tl.store(MAXIMA + state_row, m[:, None], mask=exists)
    tl.store(SUMS + state_row, sums[:, None], mask=exists)
    {{store_output(
        ("idx_c", "idx_b", "idx_h", "idx_m", "idx_d"), "acc", "inside", val_shape=("BLOCK_M", "BLOCK_DV")
    )}}
"""
)

FOLD = r"""
{{def_kernel("PARTIAL", "MAXIMA", "SUMS", "LSE")}}
    CHUNK_TOTAL = {{size("PARTIAL", 0)}}
    HEADS = {{size("PARTIAL", 2)}}
    QUERIES = {{size("PARTIAL", 3)}}
    ROWS = {{size("PARTIAL", 1)}} * HEADS * QUERIES
    row = tl.program_id(0).to(INDEX_DTYPE)
    m, sums, acc = attention.fold_chunks(PARTIAL, MAXIMA, SUMS, row, ROWS, CHUNK_TOTAL, DV, BLOCK_DV)
    out, lse = attention.finish(m, sums, acc)
    out = out.to(OUT_TYPE).to(tl.float32)
    tl.store(LSE + row + tl.arange(0, 1), lse)
    idx_b = row // (HEADS * QUERIES)
    idx_h = row // QUERIES % HEADS
    idx_m = row % QUERIES
    idx_d = tl.arange(0, BLOCK_DV)[None, :]
    inside = idx_d < DV
    {{store_output(("idx_b", "idx_h", "idx_m", "idx_d"), "out", "inside", val_shape=("1", "BLOCK_DV"))}}
"""

#: The same into an output that another kernel writes where there are many rows; what it returns is its logsumexp.
FOLD_INTO = FOLD.replace('"LSE")', '"LSE", "OUT")').rpartition("    {{store_output")[0] + (
    """    tl.store(OUT + ((idx_b * QUERIES + idx_m) * HEADS + idx_h) * DV + idx_d, out, mask=inside)
    idx_row = row + tl.arange(0, 1)
    {{store_output(("idx_row",), "lse", val_shape=("1",))}}
"""
)


@SymbolicGridFn
def attention_grid(
    pairs: Any, rows: Any, chunks: Any, meta: dict[str, Any], *, cdiv: Callable[[Any, Any], Any]
) -> tuple[Any, Any, int]:
    """(batch * key heads, rows of one, chunks computed side by side) -> one program per tile of rows and chunk."""
    return (pairs * cdiv(rows, meta["BLOCK_M"]), chunks, 1)


class AttentionKernel(ComputingKernel):
    """A template kernel that may call ``runtime/attention.py``."""

    @classmethod
    def gen_common_triton_imports(cls) -> str:
        return super().gen_common_triton_imports() + "from bi_inductor.runtime import attention\n"


class AttentionTemplate(Template):
    """A template of such a kernel."""

    kernel_type = AttentionKernel


whole_template = AttentionTemplate("batchinv_attention", grid=attention_grid, source=WHOLE)
chunk_template = AttentionTemplate("batchinv_attention_chunk", grid=attention_grid, source=ONE_CHUNK)
fold_template = AttentionTemplate("batchinv_attention_fold", grid=attention_grid, source=FOLD)
fold_into_template = AttentionTemplate("batchinv_attention_fold_into", grid=attention_grid, source=FOLD_INTO)

_NOTHING = Functions()
#: So many rows of each key head have their chunks side by side in a graph that learns at run time how many there are.
FEW_ROWS = 32
#: Bytes of accumulators of one chunk, at most, that are stored to be joined.
_MOST_STORED = 1 << 24


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What is free: rows in a tile, warps, stages of the loop over keys, chunks side by side or in sequence."""

    block_m: int
    num_warps: int
    num_stages: int
    split: bool


def schedule_for(
    rows: int | None,
    pairs: int,
    keys: int,
    form: contract.Attention,
    width: int,
    itemsize: int,
    sm_count: int,
    major: int,
) -> Schedule:
    """The schedule for ``rows`` (None: only known at run time) of each of ``pairs`` key heads over ``keys`` keys.

    ``width``: the larger of the two head dims, padded; ``major``: of the compute capability. From a sweep on an H100,
    beyond a width of 256 from registers and shared memory alone; no number here reaches a bit.
    """
    small = 16 if rows is not None and rows <= 16 else 32 if rows is not None and rows <= 32 else 64
    if itemsize > 2:
        small = min(small, 32 if width <= 128 else 16)
    programs = pairs * -(-(rows or 1 << 20) // small)
    split = keys > form.near_chunk and rows is not None and (programs < sm_count or rows <= 32)
    split = split and programs * small * width * 4 <= _MOST_STORED
    if width > 256 and not split and major < 9:
        small = 16  # of more rows the two states do not fit in registers beside queries, which wgmma reads elsewhere
    warps = 8 if width > 128 or itemsize > 2 else 2 if small == 16 else 4
    stages = 3 if width <= 128 and itemsize == 2 else 2
    return Schedule(small, warps, stages, split)


def schedules(form: contract.Attention, width: int, itemsize: int) -> tuple[Schedule, ...]:
    """Every schedule that ``schedule_for`` can return, for heads of ``width`` and elements of ``itemsize`` bytes."""
    lengths = (form.near_chunk, form.near_chunk + 1)
    found = [
        schedule_for(rows, pairs, keys, form, width, itemsize, sm_count=132, major=major)
        for major in (8, 9)
        for rows in (1, 17, 33, None)
        for pairs in (1, 1 << 20)
        for keys in lengths
    ]
    return tuple(dict.fromkeys(found))


def static_size(length: Any) -> int | None:
    """``length``, or None if it is only known at run time."""
    return int(length) if sympy.sympify(length).is_number else None


def padded(length: int) -> int:
    """The size of a tile's dimension that holds ``length`` elements."""
    return max(16, 1 << (length - 1).bit_length())


def pieces(head_dim: int) -> tuple[int, int]:
    """Sizes of the one or two dimensions of tiles that hold ``head_dim`` elements; 0 for no second one."""
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    if head_dim <= 128 or rest == 0 or first + padded(rest) == padded(head_dim):
        return padded(head_dim), 0
    return first, padded(rest)


def chunk_total(keys: Any, form: contract.Attention) -> Any:
    """How many chunks ``keys`` keys have; at least one."""
    near = CeilDiv(Min(keys, form.near_keys), form.near_chunk)
    return Max(1, near + CeilDiv(Max(keys - form.near_keys, 0), form.far_chunk))


def attention(
    query: ir.TensorBox,
    key: ir.TensorBox,
    value: ir.TensorBox,
    mask: ir.TensorBox | None,
    is_causal: bool,
    scale: float,
    tiles: ir.TensorBox | None = None,
    score: str = "",
    captured: Sequence[ir.TensorBox] | None = None,
) -> tuple[ir.TensorBox, ir.TensorBox]:
    """Lowering of ``bi_inductor::attention``; shapes and results as there."""
    *_, queries, _ = size = query.get_size()
    batch, heads = size[:2]
    key_heads, keys = key.get_size()[1:3]
    mask = None if mask is None else expand(mask, [batch, heads, queries, keys])
    tiles = None if tiles is None else expand(tiles, [batch, key_heads, *tiles.get_size()[2:]])
    functions = functions_of(mask, score, "", captured, [batch, heads, queries, keys], query.get_device())
    in_memory = mask if functions.mask is None else None
    operands = [realized(x) for x in (query, key, value, in_memory, tiles) if x is not None]
    head_dim, value_dim = (V.graph.sizevars.guard_int(x.get_size()[-1]) for x in (query, value))
    dtype, device = query.get_dtype(), query.get_device()
    form = contract.attention_form(head_dim, value_dim, dtype, tf32=tf32_is_allowed())
    assert form is not None, "the ruling on this op came first"
    group = FloorDiv(heads, key_heads)
    properties = DeviceProperties.create(device)
    hints = V.graph.sizevars.optimization_hints([batch, key_heads, keys])
    sizes = (
        hints[0] * hints[1],
        hints[2],
        form,
        padded(max(head_dim, value_dim)),
        dtype.itemsize,
        properties.multi_processor_count,
        properties.major,
    )
    schedule = _with_warps_for(functions, schedule_for(static_size(queries * group), *sizes))
    kind = mask_kind(mask, tiles)
    rows = [batch, heads, queries]
    # Heads beside each other for one query: what follows joins them without a copy.
    strides = [queries * heads * value_dim, value_dim, heads * value_dim, 1]
    layout = ir.FixedLayout(device, dtype, [*rows, value_dim], strides)
    logsumexp = _empty(rows, device)
    pairs, per_pair = batch * key_heads, queries * group
    fold = {"DV": value_dim, "BLOCK_DV": padded(value_dim), "BLOCK_M": 1, "OUT_TYPE": _triton_name(dtype)}
    one_warp = Schedule(1, 1, 1, False)

    def states(chunks: Any, schedule: Schedule) -> list[ir.TensorBox]:
        """acc, m and sums of every chunk, each by a program of its own."""
        constants = _constants(form, schedule, head_dim, value_dim, dtype, kind, functions, is_causal, scale)
        stored = [_empty([chunks, *rows], device) for _ in range(2)]
        partial = ir.FixedLayout(device, torch.float32, [chunks, *rows, value_dim])
        grid = [pairs, per_pair, chunks]
        return [
            _call(
                chunk_template, [*operands, *stored], stored, partial, grid, schedule, constants, functions
            ),
            *stored,
        ]

    if schedule.split:
        inputs = [*states(chunk_total(keys, form), schedule), logsumexp]
        grid = [pairs, per_pair, 1]
        return _call(fold_template, inputs, [logsumexp], layout, grid, one_warp, fold), logsumexp
    # What is 1 at run time says which of up to four kernels have programs: those for few rows, or for many, or another.
    is_plain = mask is None and functions.score is None and is_suited(operands, scale)
    many = are_many(queries) if is_plain else 0
    if many == 1:
        out = empty_strided([*rows, value_dim], strides, dtype=dtype, device=device)
        specialised(operands, logsumexp, out, form, is_causal, scale, many)
        return out, logsumexp
    few = 0 if is_causal else _are_few(per_pair, pairs, keys, value_dim, form)
    constants = _constants(form, schedule, head_dim, value_dim, dtype, kind, functions, is_causal, scale)
    grid = [pairs, per_pair * (1 - few) * (1 - many), 1]
    inputs = [*operands, logsumexp]
    out = _call(
        whole_template,
        inputs,
        [logsumexp],
        layout,
        grid,
        schedule,
        constants,
        functions,
        may_be_idle=few != 0 or many != 0,
    )
    if many != 0:
        specialised(operands, logsumexp, out, form, is_causal, scale, many)
    if few != 0:
        short = _with_warps_for(functions, dataclasses.replace(schedule_for(FEW_ROWS, *sizes), split=True))
        inputs = [*states(chunk_total(keys, form) * few, short), logsumexp, out]
        returned = ir.FixedLayout(device, torch.float32, [batch * heads * queries * few])
        _call(fold_into_template, inputs, inputs[3:], returned, [pairs, per_pair * few, 1], one_warp, fold)
    return out, logsumexp


def _with_warps_for(functions: Functions, schedule: Schedule) -> Schedule:
    """Two warps read keys and values as fast as more do, but a ``score_mod`` is work for four."""
    return (
        schedule
        if functions.score is None
        else dataclasses.replace(schedule, num_warps=max(4, schedule.num_warps))
    )


def functions_of(
    mask: ir.TensorBox | None,
    score: str,
    derivative: str,
    captured: Sequence[ir.TensorBox] | None,
    size: list[Any],
    device: Any,
) -> Functions:
    """What kernels for scores of ``size``, [B, H, L, S], compute: the mask, if it may be, and the programs."""

    def of(program: str, is_derivative: bool) -> Computed | None:
        return (
            programmed(program, size, device, captured or (), is_derivative=is_derivative)
            if program
            else None
        )

    return Functions(None if mask is None else computed(mask), of(score, False), of(derivative, True))


def _are_few(rows: Any, pairs: Any, keys: Any, value_dim: int, form: contract.Attention) -> Any:
    """1 for few rows, else 0: a size of the run; 0 where the number of rows is known, or keys are one chunk."""
    if static_size(rows) is not None or (static_size(keys) or form.near_chunk + 1) <= form.near_chunk:
        return 0
    most_pairs = _MOST_STORED // (FEW_ROWS * 4 * padded(value_dim))
    return Min(1, Max(0, FEW_ROWS + 1 - rows)) * Min(1, Max(0, most_pairs + 1 - pairs))


def mask_kind(mask: ir.TensorBox | None, tiles: ir.TensorBox | None) -> int:
    """What kernels call MASK: 0 none, 1 of bools, 2 of floats, 3 of bools with a map of its tiles."""
    if mask is None:
        return 0
    return 2 if mask.get_dtype() != torch.bool else 1 if tiles is None else 3


def _triton_name(dtype: torch.dtype) -> str:
    return f"tl.{str(dtype).removeprefix('torch.')}"


def _empty(size: list[Any], device: torch.device) -> ir.TensorBox:
    """An fp32 buffer that a kernel writes besides its output."""
    box = empty(size, dtype=torch.float32, device=device)
    realized(box)
    return box


def _constants(
    form: contract.Attention,
    schedule: Schedule,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    kind: int,
    functions: Functions,
    is_causal: bool,
    scale: float,
) -> dict[str, Any]:
    return {
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": form.tile,
        "D": head_dim,
        "BLOCK_D": pieces(head_dim)[0],
        "BLOCK_REST": pieces(head_dim)[1],
        "DV": value_dim,
        "BLOCK_DV": padded(value_dim),
        "CAUSAL": is_causal,
        "MASK": kind,
        **functions.constants(dtype),
        "SCALE": scale,
        "SCALE_FIRST": kind == 2 or functions.score is not None or not (0 < scale < math.inf),
        "GRANULE": GRANULE,
        "INPUT_PRECISION": "'tf32'" if form.accumulator.startswith("tf32") else "'ieee'",
        "NEAR_CHUNK": form.near_chunk,
        "NEAR_CHUNKS": form.near_keys // form.near_chunk,
        "FAR_CHUNK": form.far_chunk,
        "FULL_STAGES": schedule.num_stages,
        "EDGE_STAGES": schedule.num_stages if schedule.split else min(schedule.num_stages, 2) if kind else 1,
    }


def _call(
    template: AttentionTemplate,
    inputs: list[Any],
    mutated: list[Any],
    layout: ir.Layout,
    grid: list[Any],
    schedule: Schedule,
    constants: dict[str, Any],
    functions: Functions = _NOTHING,
    may_be_idle: bool = False,
) -> ir.TensorBox:
    return emit(
        template,
        [realized(x) for x in inputs],
        layout,
        num_warps=schedule.num_warps,
        num_stages=schedule.num_stages,
        mutated_inputs=[realized(x) for x in mutated],
        call_sizes=grid,
        subgraphs=functions.subgraphs,
        may_be_idle=may_be_idle,
        **constants,
    )
