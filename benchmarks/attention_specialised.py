"""The ATTENTION form with warps of two kinds, in Gluon: one loads keys and values, groups of four compute.

    python benchmarks/attention_specialised.py --offline --out benchmarks/results/attention_specialised.csv  # no GPU
    python benchmarks/attention_specialised.py --out attention_specialised_gpu.csv                            # a GPU

Causal or full attention of [B, H, S, 128] in bf16, the form of ``contract.attention_form``: its tiles, chunks and sums.
``--offline``: registers, bytes of stack and of shared memory for sm_90. On a GPU: time, that time over those of
batchinv, flash and cuDNN in one run, and whether the bits are batchinv's. What Triton's own specialisation does for
matrix products is in ``gemm_warp_specialised.py``; here barriers and registers are written out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from functools import partial
from typing import NamedTuple

import timing
import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bi_inductor import contract
from bi_inductor.offline import resources_of
from bi_inductor.testing import same_bits

HEADS, HEAD_DIM = 32, 128
FORM = contract.attention_form(HEAD_DIM, HEAD_DIM, torch.bfloat16)
LOWEST = gl.constexpr(-3.4028234663852886e38)
LOG2_E = 1.4426950408889634


class Variant(NamedTuple):
    """A schedule: key tiles in flight, and whether the next scores are begun before values are added."""

    stages: int
    overlap: bool
    consumer_registers: int = 240
    producer_registers: int = 24


VARIANTS = [Variant(*fields) for fields in itertools.product((2, 3, 4), (False, True))]


@gluon.jit
def tree(x):
    """[M, n, 4] -> [M, 4]: adjacent pairs over the middle axis."""
    if x.shape[1] > 2:
        result = tree(gl.sum(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2, 4]), 2))
    else:
        result = gl.sum(x, 1)
    return result


@gluon.jit
def lane_sums(p):
    """[M, N] -> [M, 4]: p[8 g + 2 i] + p[8 g + 2 i + 1], then the tree over g."""
    return tree(gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2]), 3))


@gluon.jit
def total(sums):
    """[M, 4] -> [M]: (l0 + l1) + (l2 + l3)."""
    return gl.sum(gl.sum(gl.reshape(sums, [sums.shape[0], 2, 2]), 2), 1)


@gluon.jit
def join(m, sums, acc, next_m, next_sums, next_acc):
    """The chunks so far and the next one, as ``runtime/attention.py`` joins them."""
    highest = gl.maximum(m, next_m)
    old, new = gl.exp2(m - highest), gl.exp2(next_m - highest)
    by_row: gl.constexpr = sums.type.layout
    sums = gl.fma(sums, gl.convert_layout(old, by_row), next_sums * gl.convert_layout(new, by_row))
    by_column: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    old, new = gl.convert_layout(old, by_column), gl.convert_layout(new, by_column)
    acc = gl.fma(acc, old[:, None] + gl.zeros_like(acc), next_acc * new[:, None])
    return highest, sums, acc


@gluon.jit
def produce(tiles_q, tiles_k, tiles_v, buffers, barriers, row, key_row, count, STAGES: gl.constexpr):
    """Load the queries once, then each tile of keys and of values into a buffer that the consumers have left."""
    q_buffer, k_buffer, v_buffer = buffers
    q_full, k_full, v_full, k_empty, v_empty = barriers
    BLOCK_N: gl.constexpr = k_buffer.shape[1]
    mbarrier.expect(q_full, tiles_q.block_type.nbytes)
    tma.async_copy_global_to_shared(tiles_q, [row, 0], q_full, q_buffer)
    for tile in range(count):
        stage, phase = tile % STAGES, (tile // STAGES + 1) & 1
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_full.index(stage), tiles_k.block_type.nbytes)
        place = [key_row + tile * BLOCK_N, 0]
        tma.async_copy_global_to_shared(tiles_k, place, k_full.index(stage), k_buffer.index(stage))
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_full.index(stage), tiles_v.block_type.nbytes)
        tma.async_copy_global_to_shared(tiles_v, place, v_full.index(stage), v_buffer.index(stage))


@gluon.jit
def scores_of(q, k_buffer, k_full, tile, exists, zeros, STAGES: gl.constexpr):
    """The product of queries and the keys of a tile, begun."""
    stage = tile % STAGES
    mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1, pred=exists)
    return warpgroup_mma(q, k_buffer.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def consume(
    GROUP: gl.constexpr, common,
    STAGES: gl.constexpr, OVERLAP: gl.constexpr, CAUSAL: gl.constexpr,
    NEAR_CHUNK: gl.constexpr, NEAR_KEYS: gl.constexpr, FAR_CHUNK: gl.constexpr,
):  # fmt: skip
    """64 rows of queries, over all tiles of keys in ascending order."""
    output, buffers, barriers, row, first_query, count, factor = common
    q_buffer, k_buffer, v_buffer = buffers
    q_full, k_full, v_full, k_empty, v_empty = barriers
    BLOCK_N: gl.constexpr = k_buffer.shape[1]
    D: gl.constexpr = k_buffer.shape[2]
    over_keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    over_values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, over_keys)
    zeros = gl.zeros([64, BLOCK_N], gl.float32, over_keys)
    m = gl.full([64], LOWEST, gl.float32, by_row)
    sums = lane_sums(zeros)
    acc = gl.zeros([64, D], gl.float32, over_values)
    old_m, old_sums, old_acc = m, total(sums), acc
    queries = first_query + GROUP * 64 + gl.arange(0, 64, by_row)
    q = q_buffer.slice(GROUP * 64, 64)
    mbarrier.wait(q_full, 0)
    if OVERLAP:
        t = warpgroup_mma_wait(0, [scores_of(q, k_buffer, k_full, 0, True, zeros, STAGES)])
        mbarrier.arrive(k_empty.index(0))
    for tile in range(count):
        stage, phase = tile % STAGES, (tile // STAGES) & 1
        if not OVERLAP:
            t = warpgroup_mma_wait(0, [scores_of(q, k_buffer, k_full, tile, True, zeros, STAGES)])
            mbarrier.arrive(k_empty.index(stage))
        if CAUSAL:  # noqa: SIM102  # one is a constant, the other is not
            if tile * BLOCK_N + BLOCK_N > first_query:
                keys = tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, over_keys))
                t = gl.where(queries[:, None] >= keys[None, :], t, float("-inf"))
        highest = gl.maximum(m, gl.max(t, 1) * factor)
        rescale = gl.exp2(m - highest)
        p = gl.exp2(gl.fma(t, factor + zeros, gl.zeros_like(t) - highest[:, None]))
        m = highest
        sums = sums * gl.convert_layout(rescale, gl.SliceLayout(1, sums.type.layout))[:, None] + lane_sums(p)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, over_values))[:, None]
        rounded = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, over_values, 2))
        mbarrier.wait(v_full.index(stage), phase)
        token = warpgroup_mma(rounded, v_buffer.index(stage), acc, is_async=True)
        if OVERLAP:
            more = tile + 1 < count
            t = scores_of(q, k_buffer, k_full, tile + 1, more, zeros, STAGES)
            acc = warpgroup_mma_wait(1, [token])
            mbarrier.arrive(v_empty.index(stage))
            t = warpgroup_mma_wait(0, [t])
            mbarrier.arrive(k_empty.index((tile + 1) % STAGES), pred=more)
        else:
            acc = warpgroup_mma_wait(0, [token])
            mbarrier.arrive(v_empty.index(stage))
        end = (tile + 1) * BLOCK_N
        length = gl.where(end > NEAR_KEYS, FAR_CHUNK, NEAR_CHUNK)
        if end % length == 0:
            old_m, old_sums, old_acc = join(old_m, old_sums, old_acc, m, total(sums), acc)
            m = gl.full([64], LOWEST, gl.float32, by_row)
            sums = gl.zeros_like(sums)
            acc = gl.zeros_like(acc)
    old_m, old_sums, old_acc = join(old_m, old_sums, old_acc, m, total(sums), acc)
    inverse = gl.convert_layout(1.0 / old_sums, gl.SliceLayout(1, over_values))
    rows = row + GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, over_values))
    columns = gl.arange(0, D, gl.SliceLayout(0, over_values))
    result = (old_acc * inverse[:, None]).to(gl.bfloat16)
    gl.store(output + rows[:, None] * D + columns[None, :], result)


@gluon.jit
def attention(
    tiles_q, tiles_k, tiles_v, output, length, heads_a_group, factor,
    STAGES: gl.constexpr, OVERLAP: gl.constexpr, CAUSAL: gl.constexpr,
    NEAR_CHUNK: gl.constexpr, NEAR_KEYS: gl.constexpr, FAR_CHUNK: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """o [B H S, D] of 128 queries a program, the longest rows first; ``length`` is a multiple of 128."""
    BLOCK_N: gl.constexpr = tiles_k.block_type.shape[0]
    D: gl.constexpr = tiles_k.block_type.shape[1]
    first_query = (length // 128 - 1 - gl.program_id(0)) * 128
    head = gl.program_id(1)
    count = length // BLOCK_N
    if CAUSAL:
        count = gl.cdiv(first_query + 128, BLOCK_N)
    q_buffer = gl.allocate_shared_memory(gl.bfloat16, [128, D], tiles_q.layout)
    k_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, D], tiles_k.layout)
    v_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, D], tiles_v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    buffers = (q_buffer, k_buffer, v_buffer)
    barriers = (q_full, k_full, v_full, k_empty, v_empty)
    row = head * length + first_query
    key_row = head // heads_a_group * length
    common = (output, buffers, barriers, row, first_query, count, factor)
    loads = (tiles_q, tiles_k, tiles_v, buffers, barriers, row, key_row, count, STAGES)
    gl.warp_specialize(
        [
            (consume, (0, common, STAGES, OVERLAP, CAUSAL, NEAR_CHUNK, NEAR_KEYS, FAR_CHUNK)),
            (consume, (1, common, STAGES, OVERLAP, CAUSAL, NEAR_CHUNK, NEAR_KEYS, FAR_CHUNK)),
            (produce, loads),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def constants_of(variant: Variant, causal: bool) -> dict[str, object]:
    """The kernel's constants."""
    assert FORM is not None
    return {
        "STAGES": variant.stages, "OVERLAP": variant.overlap, "CAUSAL": causal,
        "NEAR_CHUNK": FORM.near_chunk, "NEAR_KEYS": FORM.near_keys, "FAR_CHUNK": FORM.far_chunk,
        "CONSUMER_REGISTERS": variant.consumer_registers, "PRODUCER_REGISTERS": variant.producer_registers,
    }  # fmt: skip


def layout_of(rows: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, HEAD_DIM], gl.bfloat16)


def compiled_offline(variant: Variant, causal: bool) -> dict[str, object]:
    """What one variant needs of an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    assert FORM is not None
    tiles = [f"tensordesc<bf16[{rows}, {HEAD_DIM}],{layout_of(rows)!r}>" for rows in (128, FORM.tile)]
    constants = constants_of(variant, causal)
    types = [tiles[0], tiles[1], tiles[1], "*bf16", "i32", "i32", "fp32", *["constexpr"] * len(constants)]
    signature = dict(zip(attention.arg_names, types, strict=True))
    places = {(attention.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(attention, signature, places, {(3,): [["tt.divisibility", 16]]})
    options = {"num_warps": 4, "enable_fp_fusion": False}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    registers, stack_bytes = resources_of(kernel.asm["cubin"])
    found = {"registers": registers, "stack_bytes": stack_bytes, "shared_bytes": kernel.metadata.shared}
    return {"causal": causal, **variant._asdict(), **found}


def launch(variant: Variant, inputs: list[Tensor], output: Tensor, causal: bool) -> None:
    """output [B, H, S, D] of contiguous q, k and v."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    assert FORM is not None
    batch, heads, length, head_dim = output.shape
    tiles = [
        TensorDescriptor.from_tensor(x.view(-1, head_dim), [rows, head_dim], layout_of(rows))
        for x, rows in zip(inputs, (128, FORM.tile, FORM.tile), strict=True)
    ]
    attention[(length // 128, batch * heads)](
        *tiles, output, length, heads // inputs[1].shape[1], LOG2_E / math.sqrt(head_dim),
        **constants_of(variant, causal), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def stock(backend: SDPBackend, inputs: list[Tensor], causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(*inputs, causal)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def measure(length: int, group: int, causal: bool, rounds: int) -> list[dict[str, object]]:
    """One record for each variant, beside the same others."""
    torch.manual_seed(0)
    sizes = [(max(1, 8192 // length), heads, length, HEAD_DIM) for heads in (HEADS, *[HEADS // group] * 2)]
    inputs = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes]
    torch._dynamo.reset()
    ours = torch.compile(sdpa, backend="batchinv", dynamic=True)
    expected, outputs = ours(*inputs, causal), [torch.empty(sizes[0]).to(inputs[0]) for _ in VARIANTS]
    candidates = {
        str(v): partial(launch, v, inputs, o, causal) for v, o in zip(VARIANTS, outputs, strict=True)
    }
    candidates["batchinv"] = partial(ours, *inputs, causal)
    candidates["flash"] = partial(stock, SDPBackend.FLASH_ATTENTION, inputs, causal)
    candidates["cudnn"] = partial(stock, SDPBackend.CUDNN_ATTENTION, inputs, causal)
    times = timing.interleaved_medians(candidates, rounds)
    records = []
    for variant, output in zip(VARIANTS, outputs, strict=True):
        us = times[str(variant)]
        ratios = {name: round(us / times[name], 3) for name in ("batchinv", "flash", "cudnn")}
        is_equal = same_bits(output, expected)
        case = {"length": length, "group": group, "causal": causal, **variant._asdict()}
        records.append({**case, "us": round(us, 2), **ratios, "same_bits": is_equal, **timing.machine()})
        print(*list(records[-1].values())[:12], flush=True)
    return records


def main() -> None:
    """Parse the command line; compile or measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="CSV file to write")
    parser.add_argument("--offline", action="store_true", help="compile for sm_90 and run nothing")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 1024, 16384])
    parser.add_argument("--groups", type=int, nargs="+", default=[4])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    records: list[dict[str, object]] = []
    if options.offline:
        for variant, causal in itertools.product(VARIANTS, (False, True)):
            records.append(compiled_offline(variant, causal) | {"triton": triton.__version__})
            print(*records[-1].values(), flush=True)
    else:
        for length, group, causal in itertools.product(options.lengths, options.groups, (True, False)):
            records += measure(length, group, causal, options.rounds)
    if options.out:
        timing.write_csv(options.out, records, "python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
