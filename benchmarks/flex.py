"""flex_attention beside stock's under the same masks and soft-cap, in one run.

    python benchmarks/flex.py --out benchmarks/results/flex.csv             # some minutes
    python benchmarks/flex.py --work forward --masks causal window          # a part of it
    python benchmarks/flex.py --head-dims 128 --masks document --kernels 6  # where the time goes

bf16, 32 query heads over 8 key heads; ``flex`` is batchinv's time over stock's (``torch.compile`` of the same
function): below 1 is faster. BlockMasks are made beforehand, as stock needs them; batchinv evaluates ``mask_mod`` at
every call, which is in its time. ``window``: 1024 keys up to the query's own; ``document``: causal in packed documents
of random lengths; ``soft_cap``: causal, scores through 30 tanh(score / 30).
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable

import timing
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

HEADS, KEY_HEADS = 32, 8
WINDOW, CAP = 1024, 30.0
#: (batch, queries, keys); one query is decoding, the last of its sequence.
CASES = {
    "forward": ((4, 2048, 2048), (1, 8192, 8192), (1, 32768, 32768)),
    "training": ((4, 2048, 2048), (1, 8192, 8192)),
    "decode": ((16, 1, 8192), (64, 1, 2048)),
}


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return CAP * torch.tanh(score / CAP)


def mask_of(name: str, queries: int, keys: int) -> Callable[..., Tensor]:
    first = keys - queries

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q + first >= k

    def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q + first >= k) & (q + first - k < WINDOW)

    if name != "document":
        return window if name == "window" else causal
    generator = torch.Generator().manual_seed(0)
    borders = torch.rand(keys, generator=generator) < 1 / 700
    documents = borders.cumsum(0).to("cuda")

    def document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q + first >= k) & (documents[q + first] == documents[k])

    return document


def measure(
    work: str, mask: str, head_dim: int, batch: int, queries: int, keys: int, kernels: int
) -> dict[str, object]:
    """One row of the result; prints the ``kernels`` that take longest."""
    torch._dynamo.reset()
    sizes = ((HEADS, queries), (KEY_HEADS, keys), (KEY_HEADS, keys))
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": work == "training"}
    inputs = [torch.randn(batch, heads, length, head_dim, **options) for heads, length in sizes]
    grad = torch.randn(batch, HEADS, queries, head_dim, device="cuda", dtype=torch.bfloat16)
    blocks = create_block_mask(mask_of(mask, queries, keys), None, None, queries, keys, device="cuda")
    modification = soft_cap if mask == "soft_cap" else None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flex_attention(query, key, value, modification, blocks, enable_gqa=True)

    def step(compiled: Callable[..., Tensor]) -> object:
        if work != "training":
            return compiled(*inputs)
        return torch.autograd.grad(compiled(*inputs), inputs, grad)

    compiled = {
        backend: torch.compile(attend, backend=backend, dynamic=False) for backend in ("batchinv", "inductor")
    }
    candidates = {name: lambda fn=fn: step(fn) for name, fn in compiled.items()}
    times = timing.interleaved_medians(candidates, 20)
    timing.print_longest_kernels(candidates, kernels)
    return {
        "work": work, "mask": mask, "head_dim": head_dim, "batch": batch, "queries": queries, "keys": keys,
        "batchinv_us": round(times["batchinv"], 1), "stock_us": round(times["inductor"], 1),
        "flex": round(times["batchinv"] / times["inductor"], 3),
    }  # fmt: skip


def main() -> None:
    """Parse the command line and measure."""
    masks = ("causal", "window", "document", "soft_cap")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="CSV file to write")
    parser.add_argument("--work", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--masks", nargs="+", default=list(masks), choices=masks)
    parser.add_argument("--kernels", type=int, default=0, help="print this many of the longest kernels")
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128, 64])
    arguments = parser.parse_args()
    records: list[dict[str, object]] = []
    for work, head_dim, mask in itertools.product(arguments.work, arguments.head_dims, arguments.masks):
        for case in CASES[work]:
            try:
                record = measure(work, mask, head_dim, *case, arguments.kernels)
            except Exception as error:
                print(work, mask, head_dim, *case, "failed:", repr(error)[-300:], flush=True)
                continue
            print(*record.values(), flush=True)
            records.append({**record, **timing.machine()})
            if arguments.out:
                timing.write_csv(arguments.out, records, "python " + " ".join(sys.argv))
    for work in arguments.work:
        prices = [math.log(float(str(r["flex"]))) for r in records if r["work"] == work]
        if prices:
            print(f"{work} against stock flex: geomean {math.exp(statistics.fmean(prices)):.3f}")


if __name__ == "__main__":
    main()
