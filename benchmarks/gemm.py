"""Linear layers of language models, x @ w.t() with w stored [N, K], compiled, beside torch.mm in one run.

    python benchmarks/gemm.py --out benchmarks/results/gemm.csv                   # every layer, M = 1 ... 8192
    python benchmarks/gemm.py --layers "Llama-3-8B" --static 16 256 2048          # and graphs of one size beside

One graph with a dynamic batch is compiled for each (N, K) and timed at every M; ``price`` is its time over
torch.mm's: below 1 is faster. ``static`` is the time of a graph compiled for that M alone over the dynamic one's.
``same_bits`` says whether the bits are those of torch.mm, which sums K in one chain too wherever it does not split K.
The CSV has a plot beside it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import gemm_shapes
import price_plot
import timing
import torch
from torch import Tensor

from bi_inductor.testing import same_bits

Record = dict[str, object]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[M, K] @ [N, K]^T -> [M, N]."""
    return x @ weight.t()


class DynamicLinear:
    """``linear`` compiled once for ``weight``, with a dynamic batch."""

    def __init__(self, weight: Tensor, hint: int) -> None:
        self.weight, self.run = weight, torch.compile(linear, backend="batchinv")
        x = torch.randn(hint, weight.shape[1], device="cuda", dtype=weight.dtype)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            self.run(x, weight)

    def prepare(self, inputs: Sequence[Tensor]) -> None:
        """Compile the tiles that ``inputs`` ask for, several at a time."""
        with ThreadPoolExecutor(16) as pool, torch.no_grad():
            list(pool.map(self, inputs))

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.run(x, self.weight)


def measure_layer(
    n: int, k: int, rows: Sequence[int], static: Sequence[int], dtype: torch.dtype, rounds: int
) -> Iterator[Record]:
    """One record per M."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 2 * len(rows) + 2  # past it Dynamo would run torch.mm
    torch.manual_seed(n * 7 + k)
    weight = torch.randn(n, k, device="cuda", dtype=dtype)
    whole = torch.randn(max(rows), k, device="cuda", dtype=dtype)
    dynamic = DynamicLinear(weight, hint=64)
    dynamic.prepare([whole[:m] for m in rows])
    for m in rows:
        x = whole[:m]
        functions = {"batchinv": partial(dynamic, x), "torch.mm": partial(linear, x, weight)}
        if m in static:
            alone = torch.compile(linear, backend="batchinv", dynamic=False)
            functions["static"] = partial(alone, x, weight)
        with torch.no_grad():
            times = timing.interleaved_medians(functions, rounds)
            equal = same_bits(dynamic(x), linear(x, weight))
        record: Record = {"n": n, "k": k, "m": m, "dtype": str(dtype).removeprefix("torch.")}
        record |= {f"{name}_us": round(times[name], 2) for name in ("torch.mm", "batchinv")}
        record["price"] = round(times["batchinv"] / times["torch.mm"], 4)
        record["static"] = round(times["static"] / times["batchinv"], 4) if m in static else ""
        record["tflops"] = round(2 * m * n * k / times["batchinv"] / 1e6, 1)
        yield record | {"same_bits": equal}


def main() -> None:
    """Parse the command line, measure, write a CSV and a plot, and print the geometric means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/gemm.csv")
    parser.add_argument("--layers", default="", help="only layers whose name contains this")
    parser.add_argument(
        "--few-columns", action="store_true", help="router gates, LoRA and MLA projections instead"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=gemm_shapes.ROWS, help="values of M")
    parser.add_argument(
        "--static", type=int, nargs="*", default=[], help="values of M with a graph of their own"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32", "float64"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=540, help="stop after this time")
    options = parser.parse_args()
    began, command = time.perf_counter(), "python " + " ".join(sys.argv)
    layers = (
        dict.fromkeys(gemm_shapes.FEW_COLUMNS, "few columns") if options.few_columns else gemm_shapes.shapes()
    )
    records: list[Record] = []
    for (n, k), layer in layers.items():
        if options.layers not in layer or time.perf_counter() - began > options.seconds:
            continue
        how = (options.rows, options.static, getattr(torch, options.dtype), options.rounds)
        for record in measure_layer(n, k, *how):
            records.append({"layer": layer, **record, **timing.machine()})
        timing.write_csv(options.out, records, command)
        print(layer, n, k, *(record["price"] for record in records[-len(options.rows) :]), flush=True)
    points = [(int(str(record["m"])), float(str(record["price"]))) for record in records]
    title = f"Time over torch.mm's, {options.dtype}, {timing.machine()['gpu']}"
    Path(options.out).with_suffix(".svg").write_text(price_plot.draw(points, title))
    prices = [price for _, price in points]
    same = sum(record["same_bits"] is True for record in records)
    print(f"geomean {statistics.geometric_mean(prices):.4f}, worst {max(prices):.3f}, {len(prices)} shapes,")
    print(f"bits of torch.mm in {same}; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
