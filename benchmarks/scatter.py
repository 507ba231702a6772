"""Scatters, and embeddings with gradients, beside eager's deterministic algorithms and stock Inductor, in one run.

    python benchmarks/scatter.py --out benchmarks/results/scatter.csv    # two minutes

``deterministic`` and ``stock`` are batchinv's time over theirs: below 1 is faster. Stock adds with atomics, whose order
changes from run to run. ``floor_us`` is one reading of the sources and one writing of the result by the datasheet.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable

import timing
import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(weight: Tensor, tokens: Tensor) -> Tensor:
    """[vocabulary, width], [tokens] -> [tokens, width]."""
    return F.embedding(tokens, weight)


def run(fn: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> Tensor:
    """One call; of an embedding, with the gradient of its weight for the last argument."""
    weight = arguments[0]
    if not weight.requires_grad:
        return fn(*arguments)
    (found,) = torch.autograd.grad(fn(*arguments[:2]), weight, arguments[2])
    return found


def add_rows(target: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """[rows, width], [sources], [sources, width] -> the target with the sources added to its rows."""
    return target.index_add(0, index, source)


def add_elements(target: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """[rows, width], both others [sources, width] -> the target with the sources added element by element."""
    return target.scatter_add(0, index, source)


def cases() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """name -> (function, arguments)."""

    def rows(count: int, width: int, **options: object) -> Tensor:
        return torch.randn(count, width, device="cuda", **options)  # type: ignore[arg-type]

    def below(limit: int, *size: int) -> Tensor:
        return torch.randint(limit, size, device="cuda")

    found = {}
    for tokens in (2048, 16384):
        weight = rows(32000, 1024, dtype=torch.bfloat16, requires_grad=True)
        grad = rows(tokens, 1024, dtype=torch.bfloat16)
        found[f"embedding and gradient {tokens} of 32000x1024"] = (
            embedding,
            (weight, below(32000, tokens), grad),
        )
    found["index_add 65536 to 4096x128"] = (add_rows, (rows(4096, 128), below(4096, 65536), rows(65536, 128)))
    found["scatter_add 65536x16 to 4096x16"] = (
        add_elements,
        (rows(4096, 16), below(4096, 65536, 16), rows(65536, 16)),
    )
    return found


def measure(name: str, fn: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> dict[str, object]:
    torch._dynamo.reset()
    compiled = {
        backend: torch.compile(fn, backend=backend, dynamic=False) for backend in ("batchinv", "inductor")
    }
    graphs = {backend: timing.captured(lambda fn=fn: run(fn, arguments)) for backend, fn in compiled.items()}
    torch.use_deterministic_algorithms(True)
    try:
        graphs["deterministic"] = timing.captured(lambda: run(fn, arguments))
    finally:
        torch.use_deterministic_algorithms(False)
    times = timing.interleaved_graphs(graphs)
    moved = sum(x.nbytes for x in arguments[1:]) + arguments[0].nbytes
    return {
        "case": name,
        "floor_us": round(moved / timing.memory_bandwidth() * 1e6, 1),
        **{f"{candidate}_us": round(us, 1) for candidate, us in times.items()},
        "deterministic": round(times["batchinv"] / times["deterministic"], 3),
        "stock": round(times["batchinv"] / times["inductor"], 3),
    }


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="benchmarks/results/scatter.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    records: list[dict[str, object]] = []
    for name, (fn, arguments) in cases().items():
        try:
            record = measure(name, fn, arguments)
        except Exception as error:  # one candidate that cannot be captured does not cost the others' rows
            print(name, "failed:", repr(error)[-300:], flush=True)
            continue
        print(*record.values(), flush=True)
        records.append({**record, **timing.machine()})
        timing.write_csv(options.out, records, "python " + " ".join(sys.argv))
    ratios = [math.log(float(str(record["deterministic"]))) for record in records]
    print(f"geomean against deterministic algorithms: {math.exp(statistics.fmean(ratios)):.3f}")


if __name__ == "__main__":
    main()
