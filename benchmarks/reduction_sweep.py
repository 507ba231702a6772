"""Search tiles and chunks of ordered reductions; the table in runtime/schedules.py was filled from this.

    python benchmarks/reduction_sweep.py --out benchmarks/results/reduction_sweep.csv

Each case is compiled with every candidate and timed beside stock Inductor. All candidates must give the same
bits; their number of classes is printed and has to be 1.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import timing
import torch
from reductions import cases
from torch._inductor import config

from bi_inductor import choices
from bi_inductor.lowerings import reductions
from bi_inductor.runtime import schedules
from bi_inductor.testing import same_bits

Candidate = dict[str, Any]


def chunk_candidates() -> Iterator[Candidate]:
    """Chunk lengths, and elements per thread of the programs that sum them."""
    for chunk, per_thread in itertools.product((2048, 4096, 8192), (16, 32, 64)):
        yield {"INNER_CHUNK": chunk, "persistent": per_thread}


def long_row_candidates() -> Iterator[Candidate]:
    """Rows cut in chunks, or left to one program each that loops over them, by the tile of the loop."""
    yield {"LOOPED_ROWS_PER_SM": 10**6}
    for r, warps in [(2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 8), (16384, 16)]:
        yield {"LOOPED_ROWS_PER_SM": 0, "looped": (1, r, warps)}


def row_candidates() -> Iterator[Candidate]:
    """Elements per thread of kernels that hold whole rows, and rows cut in chunks instead."""
    for per_thread in (8, 16, 32, 64):
        yield {"persistent": per_thread}
        yield {"persistent": per_thread, "PERSISTENT_LENGTH": 8192}


def outer_candidates() -> Iterator[Candidate]:
    """Rows per program, looped tiles of one or two warps, and columns of programs that hold all their rows."""
    tiles = [(64, 32, 1), (128, 8, 1), (128, 16, 1), (256, 8, 1), (256, 16, 2)]
    for chunk, tile in itertools.product((64, 128, 256), tiles):
        yield {"OUTER_CHUNK": chunk, "looped": tile, "loop_always": True}
    for chunk, x, warps in [(64, 32, 1), (64, 64, 1), (64, 64, 2), (64, 128, 4), (32, 64, 1), (32, 128, 2)]:
        yield {"OUTER_CHUNK": chunk, "columns": (x, warps)}


SWEEPS = {
    "rms_norm 1x4096": row_candidates,
    "rms_norm 2048x16384": row_candidates,
    "rms_norm 8192x4096": row_candidates,
    "rms_norm 4096x32768": long_row_candidates,
    "layer_norm 8192x4096": row_candidates,
    "layer_norm 2048x16384": row_candidates,
    "softmax 256x128256": long_row_candidates,
    "softmax 2048x128256": long_row_candidates,
    "logsumexp 256x128256": long_row_candidates,
    "logsumexp 2048x128256": long_row_candidates,
    "sum 1x131072": chunk_candidates,
    "sum 512x131072": long_row_candidates,
    "sum 8192x16384": row_candidates,
    "column sum 8192x4096": outer_candidates,
    "column sum 65536x4096": outer_candidates,
    "column sum 65536x256": outer_candidates,
}


def captured(fn: Any, arguments: tuple, candidate: Candidate) -> tuple[Any, torch.Tensor]:
    """CUDA graph of ``fn`` compiled with the schedule of ``candidate``, and its output."""
    patches = [
        mock.patch.object(reductions, name, candidate[name])
        for name in ("INNER_CHUNK", "OUTER_CHUNK", "PERSISTENT_LENGTH")
        if name in candidate
    ]
    if "PERSISTENT_LENGTH" in candidate:
        length = candidate["PERSISTENT_LENGTH"]
        patches.append(mock.patch.object(choices, "PERSISTENT_LENGTH", length))
    if "LOOPED_ROWS_PER_SM" in candidate:
        patches.append(mock.patch.object(choices, "LOOPED_ROWS_PER_SM", candidate["LOOPED_ROWS_PER_SM"]))
    if "persistent" in candidate:
        patches.append(mock.patch.object(schedules, "persistent_tile", rows_tile(candidate["persistent"])))
    if "columns" in candidate:
        patches.append(mock.patch.object(schedules, "persistent_tile", columns_tile(*candidate["columns"])))
    if "looped" in candidate:
        patches.append(mock.patch.object(schedules, "looped_tile", lambda *_: candidate["looped"]))
    if candidate.get("loop_always"):
        never = staticmethod(lambda features, cooperative_reduction: False)
        patches.append(
            mock.patch.object(choices.BatchInvariantChoices, "should_use_persistent_reduction", never)
        )
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        run = torch.compile(fn, backend="batchinv", dynamic=False)
        output = run(*arguments)
        return timing.captured(lambda: run(*arguments)), output


def rows_tile(per_thread: int) -> Any:
    stock = schedules.persistent_tile

    def tile(rows: int, length: int, inner: bool) -> schedules.Tile:
        x, r, _ = stock(rows, length, inner)
        return x, r, min(32, max(1, x * r // (32 * per_thread)))

    return tile


def columns_tile(columns: int, num_warps: int) -> Any:
    stock = schedules.persistent_tile

    def tile(rows: int, length: int, inner: bool) -> schedules.Tile:
        return stock(rows, length, inner) if inner else (columns, length, num_warps)

    return tile


def sweep(name: str, fn: Any, arguments: tuple) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    stock = torch.compile(fn, backend="inductor", dynamic=False)
    graphs = {"inductor": timing.captured(lambda: stock(*arguments))}
    outputs = []
    for candidate in SWEEPS[name]():
        try:
            graphs[str(candidate)], output = captured(fn, arguments, candidate)
            outputs.append(output)
        except Exception as error:
            print(name, candidate, "failed:", str(error).splitlines()[0][:100], flush=True)
    classes = 1 + sum(not same_bits(outputs[0], output) for output in outputs[1:])
    times = timing.interleaved_graphs(graphs, rounds=15)
    baseline = times.pop("inductor")
    ranked = sorted(times.items(), key=lambda item: item[1])
    print(f"== {name}: inductor {baseline:.1f} us, {len(outputs)} candidates, classes {classes}", flush=True)
    for label, microseconds in ranked[:6]:
        print(f"   {microseconds:8.1f} {microseconds / baseline:6.3f} {label}", flush=True)
    return [
        {"case": name, "candidate": label, "us": round(us, 2), "ratio": round(us / baseline, 3)}
        for label, us in ranked
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="benchmarks/results/reduction_sweep.csv")
    parser.add_argument(
        "--only", default="", help="run only cases whose name contains one of these, comma-separated"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    config.compile_threads = 1  # forced tiles live in this process
    config.force_disable_caches = True
    rows: list[dict[str, Any]] = []
    for name, (fn, arguments, _) in cases().items():
        if name in SWEEPS and any(part in name for part in options.only.split(",")):
            rows += sweep(name, fn, arguments)
            timing.write_csv(options.out, rows, "python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
