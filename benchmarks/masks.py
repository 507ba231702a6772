"""What a mask costs attention: none, bools and floats, beside SDPA's efficient kernel under the same mask, in one run.

    python benchmarks/masks.py --out benchmarks/results/masks.csv    # a minute

bf16, 32 query heads, 8 key heads (repeated for SDPA's kernel, outside the time), head dim 128. ``of_unmasked`` is the
time over that of the same call without a mask; ``efficient`` is batchinv's time over SDPA's: below 1 is faster.
"""

from __future__ import annotations

import argparse
import sys

import timing
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KEY_HEADS, WIDTH = 32, 8, 128
#: (batch, queries, keys): decoding, a chunk of a prefill, a prefill.
CASES = ((16, 1, 8192), (64, 1, 2048), (4, 128, 4096), (4, 2048, 2048))


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def measure(batch: int, queries: int, keys: int) -> list[dict[str, object]]:
    torch._dynamo.reset()
    options = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(batch, HEADS, queries, WIDTH, **options)
    key, value = (torch.randn(batch, KEY_HEADS, keys, WIDTH, **options) for _ in range(2))
    visible = torch.rand(batch, 1, queries, keys, device="cuda") < 0.9
    masks = {"none": None, "bool": visible, "bfloat16": torch.zeros_like(visible, dtype=torch.bfloat16)}
    compiled = torch.compile(attention, backend="batchinv", dynamic=False)
    graphs = {
        name: timing.captured(lambda m=mask: compiled(query, key, value, m)) for name, mask in masks.items()
    }
    wide = [x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (key, value)]
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        for name, mask in masks.items():
            graphs[f"efficient {name}"] = timing.captured(lambda m=mask: attention(query, *wide, m))
    times = timing.interleaved_graphs(graphs)
    return [
        {
            "batch": batch,
            "queries": queries,
            "keys": keys,
            "mask": name,
            "batchinv_us": round(times[name], 1),
            "efficient_us": round(times[f"efficient {name}"], 1),
            "of_unmasked": round(times[name] / times["none"], 3),
            "efficient": round(times[name] / times[f"efficient {name}"], 3),
        }
        for name in masks
    ]


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="benchmarks/results/masks.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    records = []
    for case in CASES:
        for record in measure(*case):
            print(*record.values(), flush=True)
            records.append({**record, **timing.machine()})
        timing.write_csv(options.out, records, "python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
