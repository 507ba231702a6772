"""fp32 products by FMAs in Gluon, as a kernel of its own: how far the chain is from cuBLAS without tensor cores.

    python benchmarks/gemm_fma.py --out benchmarks/results/gemm_fma.csv    # a minute

    out[m, n] = (((0 + a[m, 0] b[0, n]) + a[m, 1] b[1, n]) + ...), k ascending, each step one FMA

as in the template's ``tl.dot`` of fp32 operands; ``chain`` says whether the bits are the template's. Triton's own
layouts for such a product read shared memory element by element, up to 32 threads from one bank, for a tile of 4 x 4
per thread. Here threads beside each other have rows beside each other, each reads 16 bytes along K, tiles are
swizzled so that no two of them need one bank, and a thread's outputs are as many as registers allow.

Weights are [N, K] as a linear layer stores them. ``price`` is the time over torch.mm's, IEEE fp32 too.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from typing import Any

import gemm_kernel
import timing
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from bi_inductor.templates import tile_table
from bi_inductor.testing import same_bits

#: (N, K) of a linear layer of Llama-3-8B's sizes.
SHAPES = ((6144, 4096), (4096, 14336), (1536, 4096), (28672, 4096))
#: M -> (BLOCK_M, BLOCK_N, BLOCK_K, stages, warps along M, warps along N, lanes along M).
TILES = {
    1: [
        (1, 32, 128, 6, 1, 1, 1),
        (1, 64, 128, 4, 1, 2, 1),
        (1, 32, 64, 8, 1, 1, 1),
        (1, 128, 64, 5, 1, 4, 1),
    ],
    16: [
        (16, 32, 64, 5, 1, 4, 4),
        (16, 64, 64, 4, 1, 4, 4),
        (16, 32, 128, 3, 2, 2, 4),
        (16, 64, 32, 5, 2, 4, 2),
    ],
    64: [
        (64, 32, 32, 4, 2, 2, 4),
        (64, 64, 32, 4, 2, 2, 4),
        (32, 64, 32, 4, 2, 2, 4),
        (64, 64, 16, 5, 4, 2, 4),
    ],
    256: [
        (64, 64, 32, 4, 2, 2, 4),
        (64, 128, 16, 4, 2, 4, 4),
        (128, 64, 16, 4, 4, 2, 4),
        (64, 128, 16, 4, 2, 2, 4),
    ],
    2048: [
        (128, 128, 16, 4, 4, 2, 4),
        (128, 128, 16, 3, 2, 4, 4),
        (128, 128, 32, 3, 4, 2, 4),
        (64, 128, 16, 4, 2, 2, 4),
    ],
}


@gluon.jit
def _copy(stages, stage, pointer, first, K, ROWS: gl.constexpr, BLOCK_K: gl.constexpr, WARPS: gl.constexpr):
    """The next BLOCK_K of K of ROWS rows into one stage of the pipeline."""
    lanes: gl.constexpr = min(BLOCK_K // 4, 32)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32 // lanes, lanes], [WARPS, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    k = first + gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))[None, :]
    place = stages.index(stage % stages.shape[0])
    async_copy.async_copy_global_to_shared(place, pointer + row * K + k, mask=(k < K) & (row < ROWS))


@gluon.jit
def fma_matmul(
    A, B, C, M, N, K,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, LANES_M: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """C = A B^T for dense fp32 A [M, K] and B [N, K]; M and N are multiples of a tile's, K of BLOCK_K."""
    grid_m = M // BLOCK_M
    grid_n = N // BLOCK_N
    tile = gl.program_id(0)
    group_tiles = GROUP_M * grid_n
    first_m = tile // group_tiles * GROUP_M
    group_m = gl.minimum(grid_m - first_m, GROUP_M)
    m = (first_m + tile % group_tiles % group_m) * BLOCK_M
    n = tile % group_tiles // group_m * BLOCK_N

    acc_layout: gl.constexpr = gl.BlockedLayout([1, 1], [LANES_M, 32 // LANES_M], [WARPS_M, WARPS_N], [1, 0])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 0)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, acc_layout, 0)
    warps: gl.constexpr = WARPS_M * WARPS_N
    # Threads of neighbouring rows read 16 bytes each, of banks that differ.
    shared: gl.constexpr = gl.SwizzledSharedLayout(4, max(1, 32 // BLOCK_K), min(8, BLOCK_K // 4), [1, 0])
    a_stages = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M, BLOCK_K], shared)
    b_stages = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N, BLOCK_K], shared)
    a = A + m.to(gl.int64) * K
    b = B + n.to(gl.int64) * K

    for stage in gl.static_range(STAGES - 1):
        _copy(a_stages, stage, a, stage * BLOCK_K, K, BLOCK_M, BLOCK_K, warps)
        _copy(b_stages, stage, b, stage * BLOCK_K, K, BLOCK_N, BLOCK_K, warps)
        async_copy.commit_group()
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, acc_layout)
    for step in range(gl.cdiv(K, BLOCK_K)):
        async_copy.wait_group(STAGES - 2)
        gl.thread_barrier()
        ahead = step + STAGES - 1
        _copy(a_stages, ahead, a, ahead * BLOCK_K, K, BLOCK_M, BLOCK_K, warps)
        _copy(b_stages, ahead, b, ahead * BLOCK_K, K, BLOCK_N, BLOCK_K, warps)
        async_copy.commit_group()
        a_tile = a_stages.index(step % STAGES).load(a_layout)
        b_tile = b_stages.index(step % STAGES).permute((1, 0)).load(b_layout)
        acc = gl.dot_fma(a_tile, b_tile, acc)
    rows = m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, acc_layout))
    columns = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, acc_layout))
    gl.store(C + rows.to(gl.int64)[:, None] * N + columns[None, :], acc)


def launch(x: Tensor, weight: Tensor, output: Tensor, tile: tuple[int, ...]) -> None:
    """output = x @ weight.t() with ``tile`` of ``TILES``."""
    block_m, block_n, block_k, stages, warps_m, warps_n, lanes_m = tile
    (m, k), n = x.shape, weight.shape[0]
    fma_matmul[(m // block_m * (n // block_n),)](
        x, weight, output, m, n, k, block_m, block_n, block_k, stages, warps_m, warps_n, lanes_m, 8,
        num_warps=warps_m * warps_n, enable_fp_fusion=False,
    )  # fmt: skip


def measure(m: int, n: int, k: int, rounds: int) -> list[dict[str, Any]]:
    """One record per tile, and one for the template with the tile that the table chooses."""
    x, weight = (torch.randn(rows, k, device="cuda") for rows in (m, n))
    library, chain = torch.mm(x, weight.t()), torch.empty(m, n, device="cuda")
    chosen = tile_table.tile_for(m, n, k, "float32", sm_count=132, capability=90)
    graphs = {"template": timing.captured(partial(gemm_kernel.launch, x, weight, chain, chosen), 1)}
    is_chain = {"template": True}
    outputs = [torch.full_like(chain, torch.nan) for _ in TILES[m]]  # graphs hold no tensors
    for tile, output in zip(TILES[m], outputs, strict=True):
        graphs[str(tile)] = timing.captured(partial(launch, x, weight, output, tile), 1)
        is_chain[str(tile)] = same_bits(output, chain)
    graphs["torch.mm"] = timing.captured(lambda: torch.mm(x, weight.t(), out=library))
    times = timing.interleaved_graphs(graphs, rounds)
    baseline = times.pop("torch.mm")
    return [
        {
            "m": m,
            "n": n,
            "k": k,
            "tile": name,
            "us": round(us, 1),
            "torch.mm_us": round(baseline, 1),
            "price": round(us / baseline, 3),
            "tflops": round(2e-6 * m * n * k / us, 1),
            "chain": is_chain[name],
            "torch.mm_bits": same_bits(library, chain),
        }
        for name, us in times.items()
    ]


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="benchmarks/results/gemm_fma.csv")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=180, help="stop after this time")
    options = parser.parse_args()
    torch.manual_seed(0)
    records: list[dict[str, Any]] = []
    began = time.perf_counter()
    for n, k in SHAPES:
        for m in TILES:
            if time.perf_counter() - began > options.seconds:
                break
            for record in measure(m, n, k, options.rounds):
                print(*record.values(), flush=True)
                records.append({**record, **timing.machine()})
            timing.write_csv(options.out, records, "python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
