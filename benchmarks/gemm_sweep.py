"""Time every plausible tile of the chain template on every shape; ``tile_table.py`` was filled from this.

    python benchmarks/gemm_sweep.py --out benchmarks/results/gemm_sweep.csv --seconds 150

A row is one tile on one shape: its median time beside that of ``torch.mm``, interleaved. ``bits`` numbers the
different outputs over the tiles of a shape: it has to be 0 everywhere (one class).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator
from functools import partial

import gemm_kernel
import gemm_shapes
import timing
import torch
from torch import Tensor

from bi_inductor.templates.tile_table import Tile
from bi_inductor.testing import same_bits

SHARED_BYTES = 232448
ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
Problem = tuple[int, int, int]
#: What a row says of its tile.
_COLUMNS = tuple(field.name for field in dataclasses.fields(Tile) if field.name not in ("rate", "cost"))


def candidates() -> Iterator[Tile]:
    """Every tile worth trying for bf16 on Hopper: one block of a full SM, or two that share it."""
    sides = (16, 32, 64, 128, 256)
    for bm, bn, bk, swap, tma in itertools.product(
        sides, sides, (64, 128, 256), (False, True), (False, True)
    ):
        area, wide = bm * bn, bn if swap else bm  # the 64 rows of a wgmma run along ``wide``
        if wide < 64 or area > 128 * 256 or (area >= 128 * 128 and bk > 64) or (bk == 64 and area < 64 * 64):
            continue
        if bk == 256 and area >= 64 * 64:
            continue
        if max(bm, bn) > 8 * min(bm, bn) or (swap and (bm > bn or area > 128 * 128)):
            continue
        for warps in (8,) if area > 128 * 128 else (4, 8) if area == 128 * 128 and tma else (4,):
            yield from _staged(Tile(bm, bn, bk, warps, 0, swap, tma))
    yield from wide_candidates()
    for group_m, stages, tma in itertools.product((4, 16), (3, 4), (False, True)):
        yield Tile(128, 256, 64, 8, stages, False, tma, group_m=group_m)
        yield Tile(256, 128, 64, 8, stages, False, tma, group_m=group_m)


def wide_candidates() -> Iterator[Tile]:
    """Tiles of widths that are no powers of two."""
    halves = [(bm, bn, bn // part) for bm in (64, 128, 256) for bn in (64, 128, 256) for part in (2, 4, 8)]
    for (bm, bn, extra), bk, tma in itertools.product(halves, (64, 128), (False, True)):
        area = bm * (bn + extra)
        if extra < 16 or area > 128 * 320 or (bk == 128 and area > 64 * 192) or bm > bn + extra:
            continue
        for warps in (4, 8):
            if 16 <= area // (32 * warps) <= 160 and warps * 16 <= bm:
                yield from _staged(Tile(bm, bn, bk, warps, 0, False, tma, extra_n=extra))


def _staged(tile: Tile) -> Iterator[Tile]:
    """``tile`` with as many stages as one block of an SM may have, and as two."""
    scratch = 4096 + tile.block_m * tile.columns * tile.tma  # what a TMA tile is stored through, and barriers
    tile = dataclasses.replace(tile, num_stages=1)
    for programs in (1, 2):
        room = SHARED_BYTES // programs - scratch
        stages = min(6, room // tile.shared_bytes(2))
        if stages >= 3:
            yield dataclasses.replace(tile, num_stages=stages)


def plausible(tile: Tile, m: int, n: int) -> bool:
    """False if the tile pads M or N more than twice, or would leave most of a large product's reuse unused."""
    if tile.block_m >= max(32, 2 * m) and not (tile.block_m == 64 and tile.block_n <= 32 and m <= 64):
        return False
    if tile.columns >= max(32, 2 * n):
        return False
    least = min(64 * 64, m * 32) if m <= 256 else 64 * 128 if m <= 512 else 128 * 128
    if tile.block_m * tile.columns < least and not (m <= 64 and tile.block_n <= 32):
        return False
    if m > 256 and tile.block_m * tile.columns < least:
        return False
    return m >= 512 or tile.group_m == 8


def problems(seed: int = 0) -> list[Problem]:
    """(M, N, K), in an order that covers all sizes evenly however far it is followed."""
    shapes = [*gemm_shapes.shapes(), *gemm_shapes.FEW_COLUMNS]
    found = [
        (m, n, k)
        for m, (n, k) in itertools.product(ROWS, shapes)
        if m * n * k < 2**42 and (n < 100_000 or m <= 1024)
    ]
    few = set(gemm_shapes.FEW_COLUMNS)
    found = [(m, n, k) for m, n, k in found if (n, k) not in few or m <= 256]
    random.Random(seed).shuffle(found)
    return found


def _compile(tile: Tile, m: int, n: int, k: int) -> str:
    """In a process without a GPU: put the cubin into Triton's cache on disk."""
    import triton

    from bi_inductor.virtual import virtual_gpu

    with virtual_gpu("sm_90"):
        triton.runtime.driver.active.get_current_stream = lambda device: 0
        try:
            gemm_kernel.warm_up(torch.bfloat16, tile, m, n, k)
        except Exception as error:
            return f"{tile}: {str(error)[-200:]}"
    return ""


def compile_all(everything: list[Problem]) -> None:
    """Every kernel that the problems need: sizes matter by which multiples they are."""
    jobs = {}
    for m, n, k in everything:
        for tile in candidates():
            if plausible(tile, m, n):
                even = (m % tile.block_m == 0, n % tile.columns == 0, k % tile.block_k == 0)
                jobs.setdefault((tile, even, m == 1, m % 16 == 0), (tile, m, n, k))
    began = time.perf_counter()
    context = multiprocessing.get_context("fork")  # torch is imported, no GPU is initialised
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        errors = {
            error for error in pool.map(_compile, *zip(*jobs.values(), strict=True), chunksize=4) if error
        }
    print(
        f"{len(jobs)} kernels compiled in {time.perf_counter() - began:.0f} s", *errors, sep="\n", flush=True
    )


def measure(problem: Problem, rounds: int) -> list[dict[str, object]]:
    """One record per tile."""
    m, n, k = problem
    x, weight = (torch.randn(rows, k, device="cuda").bfloat16() for rows in (m, n))
    graphs, classes, numbers = {}, [], {}
    output = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    for tile in dict.fromkeys(candidates()):
        if not plausible(tile, m, n):
            continue
        try:
            output.fill_(torch.nan)
            graphs[tile] = timing.captured(partial(gemm_kernel.launch, x, weight, output, tile), 1)
        except Exception as error:
            print(f"{problem} {tile}: {str(error)[-100:]}", flush=True)
            continue
        numbers[tile] = _class_of(output, classes)
    library = torch.mm(x, weight.t())
    graphs["torch.mm"] = timing.captured(lambda: torch.mm(x, weight.t(), out=library))
    times = timing.interleaved_graphs(graphs, rounds)
    baseline = times.pop("torch.mm")
    return [
        {
            "n": n,
            "k": k,
            "m": m,
            **{name: getattr(tile, name) for name in _COLUMNS},
            "us": round(us, 2),
            "torch.mm_us": round(baseline, 2),
            "price": round(us / baseline, 4),
            "bits": numbers[tile],
            "same_bits": same_bits(classes[numbers[tile]], library),
        }
        for tile, us in times.items()
    ]


def _class_of(output: Tensor, classes: list[Tensor]) -> int:
    for number, other in enumerate(classes):
        if same_bits(output, other):
            return number
    classes.append(output.clone())
    return len(classes) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/gemm_sweep.csv")
    parser.add_argument("--seconds", type=float, default=150, help="stop after this time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--compile-only", type=int, help="compile for this many problems and stop; needs no GPU"
    )
    options = parser.parse_args()
    began, everything = time.perf_counter(), problems()
    compile_all(everything[: options.compile_only])
    if options.compile_only:
        return
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    done = 0
    for problem in everything:
        if time.perf_counter() - began > options.seconds:
            break
        rows += measure(problem, options.rounds)
        done += 1
        if done % 20 == 0:
            timing.write_csv(options.out, rows, " ".join(sys.argv))
    timing.write_csv(options.out, rows, " ".join(sys.argv))
    split = {(row["m"], row["n"], row["k"]) for row in rows if row["bits"]}
    print(
        f"{done} of {len(everything)} problems, {len(rows)} times, more than one bit class in {len(split)}: {split}"
    )
    print(timing.machine(), f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
