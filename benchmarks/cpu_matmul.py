"""Matrix products on the CPU beside stock Inductor and torch.mm (both MKL for fp32 on x86) in one run.

    python benchmarks/cpu_matmul.py --out benchmarks/results/cpu_matmul.csv    # about three minutes

All are called from Python on the same inputs, taking turns; the time of each is its fastest call, which other work
on the machine disturbs least. A compiled call costs some 20-50 us before its kernel starts, stock or not, so
``price`` is batchinv's time over stock Inductor's: below 1 is faster.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import timing
import torch
from torch import Tensor

# (batch, M, N, K, layout of b): "weight" is a stored [N, K] read as [K, N], as a linear layer does.
PROJECTIONS = [(1, 1024, n, k, "weight") for n, k in ((384, 384), (1536, 384), (384, 1536), (1024, 1024))]
FEW_ROWS = [(1, m, 1536, 384, layout) for layout in ("weight", "plain") for m in (1, 2, 4, 8, 16, 64)]
LARGE_WEIGHT = [(1, m, 4096, 4096, layout) for layout in ("weight", "plain") for m in (1, 16)]
ATTENTION = [
    shape
    for length in (16, 32, 64, 128)
    for shape in ((192, length, length, 32, "weight"), (192, length, 32, length, "plain"))
]
FP32 = [*PROJECTIONS, *FEW_ROWS, *LARGE_WEIGHT, *ATTENTION]
OTHER = [(1, 256, 1536, 384, "weight"), (1, 1, 1536, 384, "weight"), (1, 256, 1536, 384, "plain")]


def inputs(shape: tuple[int, int, int, int, str], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[B, M, K] and [B, K, N], without the batch where it is 1."""
    batch, m, n, k, layout = shape
    torch.manual_seed(m * 31 + n * 7 + k)
    a = torch.randn(batch, m, k, dtype=dtype)
    b = (
        torch.randn(batch, n, k, dtype=dtype).mT
        if layout == "weight"
        else torch.randn(batch, k, n, dtype=dtype)
    )
    return (a, b) if batch > 1 else (a[0], b[0])


def fastest(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The shortest call of each function in microseconds; the functions take turns."""
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], (time.perf_counter() - start) * 1e6)
    return best


def compare(seconds: float, threads: int) -> Iterator[dict[str, object]]:
    """One record per shape and dtype."""
    torch.set_num_threads(threads)
    cases = [(torch.float32, shape) for shape in FP32]
    cases += [(dtype, shape) for dtype in (torch.float64, torch.bfloat16, torch.float16) for shape in OTHER]
    for dtype, shape in cases:
        batch, m, n, k, _ = shape
        operation = torch.mm if batch == 1 else torch.bmm
        functions = {"torch": operation}
        for backend in ("inductor", "batchinv"):
            functions[backend] = torch.compile(operation, backend=backend, dynamic=False)
        operands = inputs(shape, dtype)
        times = fastest({name: partial(function, *operands) for name, function in functions.items()}, seconds)
        gflop = 2e-9 * batch * m * n * k
        yield {
            "dtype": str(dtype).removeprefix("torch."),
            **dict(zip(("batch", "m", "n", "k", "layout_of_b"), shape, strict=True)),
            "threads": threads,
            **{f"{name}_us": round(us, 1) for name, us in times.items()},
            **{f"{name}_gflops": round(gflop / us * 1e6, 1) for name, us in times.items()},
            "price": round(times["batchinv"] / times["inductor"], 3),
        }


def cpu_name() -> str:
    """As the kernel reports it, or the architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", help="CSV file to write")
    parser.add_argument("--seconds", type=float, default=1.0, help="per shape")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 256
    versions = {"torch": torch.__version__, "cpu": cpu_name()}
    records = []
    with torch.no_grad():
        for threads in arguments.threads:
            for record in compare(arguments.seconds, threads):
                records.append({**record, **versions})
                print(*record.values(), sep="\t", flush=True)
    if arguments.out:
        timing.write_csv(arguments.out, records, "python benchmarks/cpu_matmul.py " + " ".join(sys.argv[1:]))


if __name__ == "__main__":
    main()
