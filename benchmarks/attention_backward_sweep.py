"""Search schedules of attention's gradients; the tables in templates/triton_attention_backward.py are filled from this.

    python benchmarks/attention_backward_sweep.py --out benchmarks/results/attention_backward_sweep.csv   # four minutes

bf16, causal, 32 query heads over 8 key heads, 8192 tokens in sequences of 4096. A kernel's candidates are timed with
the other kernel's schedule from the table: ``us`` is the time of both, ``ratio`` that over the table's. All candidates
must give the same bits; the number of their classes is printed and has to be 1. One that does not fit is left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import timing
import torch
from torch import Tensor
from torch._inductor import config

from bi_inductor.attention_backward_op import attention_backward
from bi_inductor.templates import triton_attention_backward as templates
from bi_inductor.templates.triton_attention_backward import Schedule
from bi_inductor.testing import same_bits

BATCH, HEADS, KEY_HEADS, LENGTH = 2, 32, 8, 4096
#: (rows, keys, warps, stages without a mask, with one)
CANDIDATES = {
    ("query", 128): [
        (128, 64, 8, 2, 1), (128, 64, 8, 2, 2), (128, 64, 8, 3, 2), (128, 128, 8, 2, 1), (64, 64, 4, 2, 1),
        (64, 64, 4, 3, 1), (64, 128, 4, 2, 1), (128, 32, 8, 3, 1), (128, 64, 4, 2, 1),
    ],
    ("key", 128): [
        (64, 128, 8, 2, 1), (64, 128, 8, 2, 2), (64, 128, 8, 3, 2), (32, 128, 8, 3, 1), (64, 64, 4, 2, 1),
        (64, 64, 4, 2, 2), (64, 64, 8, 2, 1), (32, 64, 4, 3, 1), (128, 64, 8, 2, 1),
    ],
    ("query", 64): [
        (128, 64, 8, 3, 2), (128, 64, 8, 3, 1), (128, 128, 8, 2, 1), (64, 64, 4, 3, 1), (64, 128, 4, 2, 1),
        (128, 64, 4, 3, 1), (128, 128, 8, 3, 1),
    ],
    ("key", 64): [
        (64, 128, 8, 2, 2), (64, 128, 8, 3, 2), (64, 128, 8, 2, 1), (128, 128, 8, 2, 1), (64, 64, 4, 2, 1),
        (64, 64, 4, 3, 2), (64, 128, 4, 2, 1), (128, 64, 8, 2, 1), (128, 64, 4, 2, 1),
    ],
}  # fmt: skip


def operands(width: int) -> list[Tensor]:
    """grad, query, key, value as views of [B, L, H, D]; logsumexp and delta."""
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    heads = (HEADS, HEADS, KEY_HEADS, KEY_HEADS)
    tensors = [torch.randn(BATCH, LENGTH, h, width, **options).transpose(1, 2) for h in heads]
    return [*tensors, *(torch.randn(2, BATCH, HEADS, LENGTH, device="cuda") + 5).unbind()]


def gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor) -> object:
    return attention_backward(grad, query, key, value, None, lse, delta, True, query.shape[-1] ** -0.5)


def compiled(kernel: str, schedule: Schedule | None, inputs: list[Tensor]) -> Callable[[], object]:
    """The op with ``schedule`` for one of its kernels; None: both from the table. Compiled when it returns."""
    torch._dynamo.reset()
    fn = torch.compile(gradients, backend="batchinv", dynamic=False)
    stock = getattr(templates, f"{kernel}_schedule_for")
    chosen = stock if schedule is None else lambda *_: schedule
    with (
        config.patch(force_disable_caches=True),
        mock.patch.object(templates, f"{kernel}_schedule_for", chosen),
    ):
        fn(*inputs)
    return partial(fn, *inputs)


def sweep(kernel: str, width: int, rounds: int) -> list[dict[str, object]]:
    """One record per candidate that fits."""
    inputs = operands(width)
    table = compiled(kernel, None, inputs)
    graphs, results = {"table": timing.captured(table)}, [table()]
    for candidate in CANDIDATES[kernel, width]:
        try:
            fn = compiled(kernel, Schedule(*candidate), inputs)
            results.append(fn())
            graphs[str(candidate)] = timing.captured(fn)
        except Exception as error:
            print(kernel, width, candidate, "left out:", repr(error)[-200:], flush=True)
    classes: list[object] = []
    for result in results:
        if not any(all(map(same_bits, result, known)) for known in classes):
            classes.append(result)
    times = timing.interleaved_graphs(graphs, rounds)
    records = [
        {
            "kernel": kernel, "head_dim": width, "schedule": name, "us": round(us, 1),
            "ratio": round(us / times["table"], 3), "classes": len(classes),
        }
        for name, us in sorted(times.items(), key=lambda item: item[1])
    ]  # fmt: skip
    for record in records:
        print(*record.values(), flush=True)
    return records


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", help="CSV file to write")
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 64], choices=[64, 128])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    began, records = time.perf_counter(), []
    for width in arguments.widths:
        for kernel in ("key", "query"):
            records += sweep(kernel, width, arguments.rounds)
    print(f"{timing.machine()} in {time.perf_counter() - began:.0f} s")
    if arguments.out:
        timing.write_csv(arguments.out, [{**r, **timing.machine()} for r in records], " ".join(sys.argv))


if __name__ == "__main__":
    main()
