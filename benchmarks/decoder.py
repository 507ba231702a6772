"""A decoder layer of Llama-3-8B's sizes, compiled, beside stock torch.compile, bf16, in one run.

    python benchmarks/decoder.py --out benchmarks/results/decoder.csv
    python benchmarks/decoder.py --cached 8192 --batches 1 16
    python benchmarks/decoder.py --batches 128 --kernels 14    # where the time goes

Prefill: one sequence of ``--prefill`` tokens, causal. Decode: one token of each of B sequences after ``--cached``
others; keys and values are in a cache of that length and one more, where the new ones are written. RMSNorm, qkv, rotary
embedding, attention (32 heads over 8), output, RMSNorm, gate and up, SiLU, down. Each is compiled for its sizes and
captured in a CUDA graph; ``price`` is batchinv's time over stock's: below 1 is faster.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS, WIDTH = 4096, 14336, 32, 8, 128


class Layer(nn.Module):
    """One layer; the cache of keys and values is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KEY_HEADS) * WIDTH, bias=False)
        self.out = nn.Linear(HEADS * WIDTH, HIDDEN, bias=False)
        self.gate_up = nn.Linear(HIDDEN, 2 * INTERMEDIATE, bias=False)
        self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def projected(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, 32, L, 128], key and value [B, 8, L, 128] of ``x`` [B, L, hidden]."""
        parts = self.qkv(self.norm1(x)).unflatten(-1, (-1, WIDTH)).transpose(1, 2)
        query, key, value = parts.split([HEADS, KEY_HEADS, KEY_HEADS], 1)
        return rotated(query, cos, sin), rotated(key, cos, sin), value

    def behind(self, x: Tensor, attended: Tensor) -> Tensor:
        """What comes after attention: ``attended`` [B, 32, L, 128]."""
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def prefill(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = self.projected(x, cos, sin)
        return self.behind(
            x, F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        )

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        query, key, value = self.projected(x, cos, sin)
        keys[:, :, -1:], values[:, :, -1:] = key, value
        return self.behind(x, F.scaled_dot_product_attention(query, keys, values, enable_gqa=True))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding: ``x [B, H, L, 128]``, angles ``[L, 128]``."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def inputs(batch: int, length: int, cached: int) -> list[Tensor]:
    """Tokens and angles, and a cache where ``cached`` is not 0."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    angles = torch.randn(length, WIDTH, **options)
    made = [torch.randn(batch, length, HIDDEN, **options), angles.cos(), angles.sin()]
    if cached:
        made += [torch.randn(batch, KEY_HEADS, cached + 1, WIDTH, **options) for _ in range(2)]
    return made


def compiled(fn: Callable[..., Tensor], *arguments: Tensor) -> dict[str, Callable[[], Tensor]]:
    """One call by each backend, compiled for these sizes."""
    torch._dynamo.reset()
    made = {
        "batchinv": torch.compile(fn, backend="batchinv", dynamic=False),
        "stock": torch.compile(fn, dynamic=False),
    }
    for call in made.values():
        call(*arguments)
    return {name: partial(call, *arguments) for name, call in made.items()}


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="benchmarks/results/decoder.csv")
    parser.add_argument("--prefill", type=int, nargs="*", default=[4096], help="lengths of a prefill")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 128], help="batches of a decode")
    parser.add_argument("--cached", type=int, default=4096, help="tokens before the one that is decoded")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kernels", type=int, default=0, help="print this many of the longest kernels")
    options = parser.parse_args()
    torch.manual_seed(0)
    layer = Layer().cuda().bfloat16()
    records: list[dict[str, object]] = []
    cases = [("prefill", 1, length, 0) for length in options.prefill]
    cases += [("decode", batch, 1, options.cached) for batch in options.batches]
    with torch.no_grad():
        for kind, batch, length, cached in cases:
            calls = compiled(getattr(layer, kind), *inputs(batch, length, cached))
            timing.print_longest_kernels(calls, options.kernels)
            times = timing.interleaved_medians(calls, options.rounds)
            record: dict[str, object] = {"work": kind, "batch": batch, "tokens": length, "cached": cached}
            record |= {f"{name}_us": round(microseconds, 1) for name, microseconds in times.items()}
            record["price"] = round(times["batchinv"] / times["stock"], 4)
            records.append({**record, **timing.machine()})
            print(record, flush=True)
            del calls
    print(f"geomean {statistics.geometric_mean(float(str(record['price'])) for record in records):.4f}")
    timing.write_csv(options.out, records, "python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
