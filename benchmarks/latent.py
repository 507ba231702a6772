"""Attention over MLA's latent cache, bf16, heads of 576 elements whose first 512 are the values, in one run.

    python benchmarks/latent.py --out benchmarks/results/latent.csv    # two minutes

All query heads share one key head. ``stock`` is batchinv's time over that of stock ``torch.compile``, which has no
flash kernel for these heads: below 1 is faster. ``of_floor``: one reading of the cache at the datasheet's bandwidth, or
the products at the tensor cores' rate if they take longer, over batchinv's time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import timing
import torch
import torch.nn.functional as F
from attention import TENSOR_RATE
from torch import Tensor

WIDTH, VALUES = 576, 512
#: (batch, query heads, queries, keys): decoding with all heads and with those of one of 8 ranks, and a prefill.
CASES = (
    (1, 128, 1, 4096),
    (16, 128, 1, 4096),
    (64, 128, 1, 4096),
    (16, 16, 1, 4096),
    (64, 16, 1, 8192),
    (1, 16, 1, 65536),
    (1, 128, 2048, 2048),
)


def attend(query: Tensor, cache: Tensor, is_causal: bool) -> Tensor:
    """``query [B, H, L, 576]``, ``cache [B, 1, S, 576]`` -> ``[B, H, L, 512]``."""
    return F.scaled_dot_product_attention(
        query, cache, cache[..., :VALUES], is_causal=is_causal, enable_gqa=True
    )


def measure(batch: int, heads: int, queries: int, keys: int) -> dict[str, object]:
    torch._dynamo.reset()
    options = {"device": "cuda", "dtype": torch.bfloat16}
    query, cache = (
        torch.randn(batch, n, length, WIDTH, **options) for n, length in ((heads, queries), (1, keys))
    )
    is_causal = queries > 1

    def step(backend: str) -> Callable[[], Tensor]:
        compiled = torch.compile(attend, backend=backend, dynamic=False)
        return lambda: compiled(query, cache, is_causal)

    times = timing.interleaved_medians({name: step(name) for name in ("batchinv", "inductor")}, 20)
    pairs = batch * heads * queries * keys / (2 if is_causal else 1)
    read = 2 * (cache.numel() + query.numel() * (WIDTH + VALUES) / WIDTH) / timing.memory_bandwidth()
    floor = max(2 * pairs * (WIDTH + VALUES) / TENSOR_RATE, read) * 1e6
    return {
        "batch": batch, "heads": heads, "queries": queries, "keys": keys,
        "batchinv_us": round(times["batchinv"], 1), "stock_us": round(times["inductor"], 1),
        "stock": round(times["batchinv"] / times["inductor"], 3), "of_floor": round(floor / times["batchinv"], 3),
    }  # fmt: skip


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="CSV file to write")
    options = parser.parse_args()
    records = []
    for case in CASES:
        record = measure(*case)
        print(*record.values(), flush=True)
        records.append({**record, **timing.machine()})
        if options.out:
            timing.write_csv(options.out, records, "python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
