"""Matrix products, x @ w.t() with w stored [N, K], beside torch.mm and stock Inductor in one run.

    python benchmarks/gemm.py --out benchmarks/results/gemm.csv    # about a minute
    python benchmarks/gemm.py --sweep --seconds 240                # which tile is best for each shape

``price`` is batchinv's time over torch.mm's: below 1 is faster. ``same_bits`` says whether batchinv's output has
the bits of torch.mm's, which sums K in one chain too wherever it does not split K.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import timing
import torch
from torch import Tensor

from bi_inductor.testing import same_bits

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336))
ROWS = (1, 16, 256, 4096)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[M, K] @ [N, K]^T -> [M, N]."""
    return x @ weight.t()


def random_inputs(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[M, K] and [N, K], normally distributed."""
    torch.manual_seed(m * 31 + n * 7 + k)
    options = {"device": "cuda", "dtype": dtype}
    return torch.randn(m, k, **options), torch.randn(n, k, **options)


def compare(
    rows: Sequence[int], shapes: Sequence[tuple[int, int]], dtype: torch.dtype, rounds: int
) -> list[dict[str, object]]:
    """One record per shape, with the time of each implementation."""
    records = []
    for (n, k), m in itertools.product(shapes, rows):
        torch._dynamo.reset()
        inputs = random_inputs(m, n, k, dtype)
        functions: dict[str, Callable[..., Tensor]] = {"torch.mm": linear}
        for backend in ("inductor", "batchinv"):
            functions[backend] = torch.compile(linear, backend=backend, dynamic=False)
        with torch.no_grad():
            equal = same_bits(functions["batchinv"](*inputs), linear(*inputs))
            times = timing.interleaved_medians({k: partial(f, *inputs) for k, f in functions.items()}, rounds)
        record = {"n": n, "k": k, "m": m, "dtype": str(dtype)}
        record |= {f"{name}_us": round(time_us, 2) for name, time_us in times.items()}
        record["price"] = round(times["batchinv"] / times["torch.mm"], 3)
        record["tflops"] = round(2 * m * n * k / times["batchinv"] / 1e6, 1)
        record["same_bits"] = equal
        records.append(record)
        print(record, flush=True)
    return records


def geomean(prices: Sequence[float]) -> float:
    """The geometric mean of ``prices``."""
    return math.exp(statistics.fmean(map(math.log, prices)))


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", help="CSV file to write")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="values of M")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, type=lambda s: tuple(map(int, s.split(","))))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32", "float64"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sweep", action="store_true", help="search tiles instead")
    parser.add_argument("--seconds", type=float, default=240, help="time limit of a search")
    arguments = parser.parse_args()
    began, dtype = time.perf_counter(), getattr(torch, arguments.dtype)
    if arguments.sweep:
        from gemm_sweep import sweep

        records = sweep(arguments.rows, arguments.shapes, dtype, arguments.seconds)
    else:
        records = compare(arguments.rows, arguments.shapes, dtype, arguments.rounds)
        prices = [record["price"] for record in records]
        print(f"geomean price {geomean(prices):.3f}, worst {max(prices):.3f}")
    print(f"{timing.machine()} in {time.perf_counter() - began:.0f} s")
    if arguments.out:
        timing.write_csv(arguments.out, [{**r, **timing.machine()} for r in records], " ".join(sys.argv))


if __name__ == "__main__":
    main()
