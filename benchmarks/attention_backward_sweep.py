"""Search schedules of attention's gradients; the tables in templates/triton_attention_backward.py are filled from this.

    python benchmarks/attention_backward_sweep.py --out benchmarks/results/attention_backward_sweep.csv  # three minutes

bf16, 32 query heads over 8 key heads, 8192 tokens: causal, and under a window of 1024 keys, a mask that the kernels
compute, with its map. Both kernels are compiled with a candidate each; ``us``: mean of eight calls, by the profiler.
All candidates must give the same bits: ``classes`` has to be 1. One that does not fit is left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from unittest import mock

import timing
import torch
from torch import Tensor

from bi_inductor.attention_backward_op import attention_backward
from bi_inductor.attention_tiles import attention_map, query_spans
from bi_inductor.templates import triton_attention_backward as templates
from bi_inductor.templates.triton_attention_backward import Schedule
from bi_inductor.testing import same_bits

HEADS, KEY_HEADS, LENGTH, WINDOW, CALLS = 32, 8, 8192, 1024, 8
#: Head dim -> (rows, keys, warps, stages without a mask, with one) of the gradients of queries, and of keys and values.
CANDIDATES = {
    128: [
        ((128, 64, 8, 2, 2), (64, 128, 8, 2, 2)), ((64, 64, 4, 2, 1), (64, 64, 4, 2, 1)),
        ((64, 64, 4, 2, 2), (64, 64, 4, 2, 2)), ((64, 64, 4, 3, 1), (32, 64, 4, 3, 2)),
        ((128, 64, 8, 3, 1), (64, 64, 4, 1, 1)), ((64, 64, 8, 2, 2), (64, 64, 8, 2, 2)),
        ((64, 64, 8, 3, 2), (32, 128, 8, 2, 2)),
    ],
    64: [
        ((128, 64, 8, 3, 2), (64, 128, 8, 2, 2)), ((64, 64, 4, 2, 1), (64, 64, 4, 2, 1)),
        ((64, 64, 4, 3, 1), (64, 64, 4, 3, 2)), ((128, 64, 8, 2, 1), (64, 128, 4, 2, 1)),
        ((64, 64, 4, 3, 2), (32, 128, 4, 3, 2)), ((128, 64, 4, 3, 1), (64, 128, 8, 3, 2)),
    ],
}  # fmt: skip


def operands(width: int) -> list[Tensor]:
    """grad, query, key, value; logsumexp and delta."""
    torch.manual_seed(0)
    heads = (HEADS, HEADS, KEY_HEADS, KEY_HEADS)
    tensors = [torch.randn(1, h, LENGTH, width, device="cuda", dtype=torch.bfloat16) for h in heads]
    return [*tensors, *(torch.randn(2, 1, HEADS, LENGTH, device="cuda") + 5).unbind()]


def causal(grad: Tensor, query: Tensor, *others: Tensor) -> object:
    key, value, lse, delta = others
    return attention_backward(grad, query, key, value, None, lse, delta, True, query.shape[-1] ** -0.5)


def window(grad: Tensor, query: Tensor, *others: Tensor) -> object:
    key, value, lse, delta = others
    places = torch.arange(LENGTH, device=query.device)
    mask = ((places[:, None] >= places) & (places[:, None] - places < WINDOW))[None, None]
    tiles = attention_map(mask, KEY_HEADS, 64)
    maps = (tiles, query_spans(tiles, LENGTH))
    return attention_backward(
        grad, query, key, value, mask, lse, delta, False, query.shape[-1] ** -0.5, *maps
    )


def measured(fn: Callable[[], object]) -> list[float]:
    """Microseconds of the gradients of queries, and of keys and values."""
    for _ in range(3):
        fn()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CALLS):
            fn()
        torch.cuda.synchronize()
    found = [event for event in profile.key_averages() if "attention_backward" in event.key]
    return [
        e.self_device_time_total / CALLS for e in sorted(found, key=lambda e: int(e.key.rpartition("_")[2]))
    ]


def sweep(width: int, gradients: Callable[..., object]) -> list[dict[str, object]]:
    """Two records per pair of candidates that fits."""
    inputs, classes, records = operands(width), [], []
    for pair in CANDIDATES[width]:
        query_schedule, key_schedule = (Schedule(*candidate) for candidate in pair)
        torch._dynamo.reset()
        fn = torch.compile(gradients, backend="batchinv", dynamic=False)
        with (
            mock.patch.dict(templates._QUERY_SCHEDULES, {(False, width): query_schedule}),
            mock.patch.dict(templates._KEY_SCHEDULES, {(False, width): key_schedule}),
        ):
            try:
                result = fn(*inputs)
                times = measured(lambda fn=fn: fn(*inputs))
            except Exception as error:
                print(width, pair, "left out:", repr(error)[-200:], flush=True)
                continue
        if not any(all(map(same_bits, result, known)) for known in classes):
            classes.append(result)
        for kernel, candidate, us in zip(("queries", "keys and values"), pair, times, strict=True):
            records.append({
                "head_dim": width, "mask": gradients.__name__, "gradients of": kernel,
                "rows": candidate[0], "keys": candidate[1], "warps": candidate[2], "stages": candidate[3],
                "edge_stages": candidate[4], "us": round(us),
            })  # fmt: skip
            print(*records[-1].values(), flush=True)
    return [{**record, "classes": len(classes)} for record in records]


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", help="CSV file to write")
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 64], choices=[64, 128])
    arguments = parser.parse_args()
    began, records = time.perf_counter(), []
    for width in arguments.widths:
        for gradients in (causal, window):
            records += sweep(width, gradients)
    print(f"{timing.machine()} in {time.perf_counter() - began:.0f} s")
    if arguments.out:
        timing.write_csv(arguments.out, [{**r, **timing.machine()} for r in records], " ".join(sys.argv))


if __name__ == "__main__":
    main()
