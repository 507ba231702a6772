"""Search schedules of decoding, and the length of far chunks, beside SDPA's flash kernel.

    python benchmarks/attention_decode_sweep.py --out benchmarks/results/attention_decode_sweep.csv  # two minutes

bf16, one query a sequence, 32 query heads over 8 key heads, D = 128. Warps and stages change no bit; the length of far
chunks is the form's, and changes it for every size (``contract.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any
from unittest import mock

import timing
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bi_inductor import contract
from bi_inductor.templates import triton_attention as templates

HEADS, KEY_HEADS, WIDTH = 32, 8, 128
#: (keys of a far chunk, warps, stages)
CANDIDATES = [
    (2048, 4, 3), (2048, 4, 4), (2048, 2, 3), (2048, 8, 3), (1024, 4, 3), (1024, 2, 3), (1024, 2, 4), (1024, 2, 5),
]  # fmt: skip
#: (batch, keys)
CASES = [
    (1, 4096), (1, 16384), (1, 32768), (1, 131072), (4, 16384), (4, 32768), (4, 131072), (16, 16384), (64, 4096),
]  # fmt: skip


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def measure(batch: int, keys: int, rounds: int) -> list[dict[str, object]]:
    """One record per candidate."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(batch, HEADS, 1, WIDTH, **options)
    key, value = (torch.randn(batch, KEY_HEADS, keys, WIDTH, **options) for _ in range(2))
    stock, graphs, compiled = templates.schedule_for, {}, []
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        graphs["flash"] = timing.captured(lambda: attend(query, key, value))
    for far_chunk, warps, stages in CANDIDATES:

        def schedule(*arguments: Any, warps: int = warps, stages: int = stages) -> templates.Schedule:
            return dataclasses.replace(stock(*arguments), num_warps=warps, num_stages=stages)

        torch._dynamo.reset()
        fn = torch.compile(attend, backend="batchinv", dynamic=False)
        compiled.append(fn)
        with (
            torch._inductor.config.patch(force_disable_caches=True),
            mock.patch.object(contract, "_FAR_CHUNK", far_chunk),
            mock.patch.object(templates, "schedule_for", schedule),
        ):
            graphs[f"{far_chunk} {warps} {stages}"] = timing.captured(lambda fn=fn: fn(query, key, value))
    times = timing.interleaved_graphs(graphs, rounds)
    flash = times.pop("flash")
    return [
        {
            "far_chunk": int(far_chunk), "first": "last chunk", "warps": int(warps), "stages": int(stages),
            "batch": batch, "keys": keys, "us": round(us, 1), "flash_us": round(flash, 1),
            "flash": round(us / flash, 3),
        }
        for name, us in times.items() for far_chunk, warps, stages in [name.split()]
    ]  # fmt: skip


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", help="CSV file to write")
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    records: list[dict[str, object]] = []
    for case in CASES:
        records += measure(*case, arguments.rounds)
        for record in records[-len(CANDIDATES) :]:
            print(*record.values(), flush=True)
    if arguments.out:
        timing.write_csv(arguments.out, [{**r, **timing.machine()} for r in records], " ".join(sys.argv))


if __name__ == "__main__":
    main()
