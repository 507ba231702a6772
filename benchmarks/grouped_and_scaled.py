"""fp8 products beside torch._scaled_mm, grouped ones beside torch._grouped_mm, int8 beside torch._int_mm, in one run.

    python benchmarks/grouped_and_scaled.py --out benchmarks/results/grouped_and_scaled.csv    # about a minute

Grouped: the experts of Qwen3-30B-A3B (128 experts, hidden 2048, intermediate 768, 8 experts a token); tokens choose
their experts at random. ``price`` is batchinv's time over torch's: below 1 is faster. ``same_bits`` says whether the
bits are those of torch.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import timing
import torch
from torch import Tensor

from bi_inductor.testing import same_bits

EXPERTS, HIDDEN, INTERMEDIATE, CHOSEN = 128, 2048, 768, 8
#: (N, K) of Llama-3-8B's qkv, gate-up and down.
SHAPES = ((6144, 4096), (28672, 4096), (4096, 14336))
Case = tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]


def routed(tokens: int) -> tuple[int, Tensor]:
    """(rows, ends of the experts' rows) of ``tokens`` that choose ``CHOSEN`` different experts each."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    counts = torch.bincount(scores.topk(CHOSEN).indices.flatten(), minlength=EXPERTS)
    return tokens * CHOSEN, counts.cumsum(0).int().cuda()


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """[T, K] @ [G, N, K]^T by groups of rows."""
    return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)


def grouped_cases(tokens: Sequence[int]) -> Iterator[Case]:
    """Gate-up and down of every number of tokens."""
    for n, k, name in ((2 * INTERMEDIATE, HIDDEN, "gate-up"), (HIDDEN, INTERMEDIATE, "down")):
        weight = torch.randn(EXPERTS, n, k, device="cuda", dtype=torch.bfloat16)
        for count in tokens:
            rows, ends = routed(count)
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            yield f"grouped {name} tokens={count}", grouped, (x, weight, ends)


def gradient_of_experts(tokens: Sequence[int]) -> Iterator[Case]:
    """The gradient of the gate-up weights: groups are stretches of K."""
    for count in tokens:
        rows, ends = routed(count)
        x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
        gradient = torch.randn(rows, 2 * INTERMEDIATE, device="cuda", dtype=torch.bfloat16)

        def weights(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
            return torch._grouped_mm(gradient.t(), x, offs=ends)

        yield f"grouped weight gradient tokens={count}", weights, (gradient, x, ends)


def scaled(fast: bool, x: Tensor, weight: Tensor, scale_x: Tensor, scale_weight: Tensor) -> Tensor:
    """[M, K] @ [N, K]^T of fp8, times the scales, in bf16."""
    return torch._scaled_mm(
        x, weight.t(), scale_x, scale_weight, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def scaled_cases(rows: Sequence[int]) -> Iterator[Case]:
    """By tensor and by row, with fast accumulation and in chunks."""
    for n, k in SHAPES:
        weight = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
        for m in rows:
            x = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)
            # Of their own: cuBLAS wants scales at multiples of 16 bytes.
            by_tensor = torch.rand((), device="cuda") + 0.5, torch.rand((), device="cuda") + 0.5
            by_row = torch.rand(m, 1, device="cuda") + 0.5, torch.rand(1, n, device="cuda") + 0.5
            for fast in (True, False):
                name = f"fp8 {'fast' if fast else 'chunks'} m={m} n={n} k={k}"
                yield f"{name} by tensor", partial(scaled, fast), (x, weight, *by_tensor)
                if (n, k) == SHAPES[0]:
                    yield f"{name} by row", partial(scaled, fast), (x, weight, *by_row)


def int8_cases(rows: Sequence[int]) -> Iterator[Case]:
    """torch._int_mm takes more than 16 rows only."""
    n, k = SHAPES[0]
    weight = torch.randint(-128, 128, (n, k), device="cuda", dtype=torch.int8)
    for m in rows:
        if m > 16:
            x = torch.randint(-128, 128, (m, k), device="cuda", dtype=torch.int8)
            yield f"int8 m={m} n={n} k={k}", lambda x, weight: torch._int_mm(x, weight.t()), (x, weight)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One record: both times, their ratio and whether bits agree."""
    name, fn, inputs = case
    torch._dynamo.reset()
    ours = torch.compile(fn, backend="batchinv", dynamic=False)
    with torch.no_grad():
        equal = same_bits(ours(*inputs), fn(*inputs))
        times = timing.interleaved_medians(
            {"torch": partial(fn, *inputs), "batchinv": partial(ours, *inputs)}, rounds
        )
    record: dict[str, Any] = {"case": name}
    record |= {f"{key}_us": round(value, 2) for key, value in times.items()}
    return record | {"price": round(times["batchinv"] / times["torch"], 3), "same_bits": equal}


def summary(records: Sequence[dict[str, Any]]) -> list[str]:
    """One line per family of cases: geometric mean and worst price, share of equal bits."""
    lines = []
    for family in dict.fromkeys(" ".join(record["case"].split()[:2]) for record in records):
        chosen = [record for record in records if record["case"].startswith(family + " ")]
        prices = [record["price"] for record in chosen]
        mean = math.exp(statistics.fmean(map(math.log, prices)))
        same = sum(record["same_bits"] for record in chosen)
        lines.append(
            f"{family:22} geomean {mean:.3f} worst {max(prices):.3f} same bits {same} of {len(chosen)}"
        )
    return lines


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", help="CSV file to write")
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 16, 64, 256, 1024, 4096))
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 4, 16, 64, 256, 1024, 4096))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120, help="no new case after that long")
    options = parser.parse_args()
    began, records = time.perf_counter(), []
    cases = (
        *grouped_cases(options.tokens),
        *gradient_of_experts(options.tokens[-2:]),
        *scaled_cases(options.rows),
        *int8_cases(options.rows),
    )
    for case in cases:
        if time.perf_counter() - began > options.seconds:
            print(f"time is up before {case[0]}")
            break
        try:
            records.append(measure(case, options.rounds))
            print(records[-1], flush=True)
        except Exception as error:  # one case must not cost the others
            print(f"{case[0]}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        if options.out and records:
            timing.write_csv(options.out, [{**r, **timing.machine()} for r in records], " ".join(sys.argv))
    print("\n".join(summary(records)))
    print(f"{timing.machine()} in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
