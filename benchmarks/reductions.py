"""The price of ordered reductions: batchinv against stock Inductor, same mode, same run.

python benchmarks/reductions.py --out benchmarks/results/reductions.csv
"""

from __future__ import annotations

import argparse
import math
import sys

import timing
import torch
import torch.nn.functional as F


def cases() -> dict[str, tuple]:
    """name -> (function, arguments, bytes that must move at least)."""

    def rows(m: int, n: int) -> torch.Tensor:
        return torch.randn(m, n, device="cuda").bfloat16()

    def weight(n: int) -> torch.Tensor:
        return torch.randn(n, device="cuda").bfloat16()

    found = {}
    for m, n in [(1, 4096), (128, 4096), (8192, 4096), (2048, 16384), (4096, 32768)]:
        x, w = rows(m, n), weight(n)
        moved = 2 * x.nbytes
        found[f"rms_norm {m}x{n}"] = (lambda x, w: F.rms_norm(x, w.shape, w), (x, w), moved)
        found[f"layer_norm {m}x{n}"] = (lambda x, w: F.layer_norm(x, w.shape, w, w), (x, w), moved)
    for m in (1, 16, 256, 2048):
        x = rows(m, 128256)
        found[f"softmax {m}x128256"] = (lambda x: x.softmax(-1), (x,), 2 * x.nbytes)
        found[f"logsumexp {m}x128256"] = (lambda x: x.float().logsumexp(-1), (x,), x.nbytes)
    for m, n in [(1, 131072), (16, 131072), (512, 131072), (8192, 16384), (65536, 2048)]:
        x = rows(m, n)
        found[f"sum {m}x{n}"] = (lambda x: x.sum(-1, dtype=torch.float32), (x,), x.nbytes)
    for m, n in [(8192, 4096), (65536, 4096), (65536, 256)]:
        x = rows(m, n)
        found[f"column sum {m}x{n}"] = (lambda x: x.sum(0, dtype=torch.float32), (x,), x.nbytes)
    return found


def measure(name: str, fn, arguments: tuple, moved: int, bandwidth: float) -> dict[str, object]:
    torch._dynamo.reset()
    candidates = {}
    for backend in ("inductor", "batchinv"):
        compiled = torch.compile(fn, backend=backend, dynamic=False)
        candidates[backend] = lambda compiled=compiled: compiled(*arguments)
    times = timing.interleaved_medians(candidates)
    return {
        "case": name,
        "floor_us": round(moved / bandwidth * 1e6, 1),
        "inductor_us": round(times["inductor"], 1),
        "batchinv_us": round(times["batchinv"], 1),
        "ratio": round(times["batchinv"] / times["inductor"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="benchmarks/results/reductions.csv")
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = timing.memory_bandwidth()
    print(f"{timing.machine()}  memory {bandwidth / 1e12:.2f} TB/s by datasheet", flush=True)
    results = []
    for name, (fn, inputs, moved) in cases().items():
        if arguments.only in name:
            row = measure(name, fn, inputs, moved, bandwidth)
            print(" ".join(f"{value!s:>22}" for value in row.values()), flush=True)
            results.append({**row, **timing.machine()})
    geomean = math.exp(sum(math.log(float(row["ratio"])) for row in results) / len(results))
    print(f"geomean ratio {geomean:.3f}")
    timing.write_csv(arguments.out, results, "python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
