"""How long a cold compile takes, beside stock Inductor in the same process, on a GPU or on a CPU.

    python benchmarks/compile_time.py --out benchmarks/results/compile_time_cpu.csv    # without a GPU
    python benchmarks/compile_time.py --only attention --sizes batch                   # one of them

Caches are off. Each backend compiles something else first, so that what it imports is not counted; then each case is
compiled in turn by both, ``--rounds`` times, and the median counts. ``stock`` is batchinv's time over stock's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACKENDS = ("batchinv", "inductor")
SIZES = ("static", "batch", "all")
Case = tuple[Callable[[Tensor], Tensor], tuple[int, ...]]


class Norms(nn.Module):
    """What is fused into one kernel each: a LayerNorm and an RMSNorm, with activations around them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(F.gelu(F.layer_norm(torch.tanh(x), x.shape[-1:])) + x, x.shape[-1:])


class Block(nn.Module):
    """A layer of a Llama: attention with fewer key heads, and a gated MLP."""

    def __init__(self, width: int = 128, heads: int = 4, groups: int = 2):
        super().__init__()
        self.heads, self.groups = heads, groups
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, width * (heads + 2 * groups) // heads, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(rows, length, -1, width // self.heads).transpose(1, 2)
        q, k, v = parts.split([self.heads, self.groups, self.groups], 1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, length, width))
        gate, value = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class Images(nn.Module):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.Conv2d(16, 32, 1),
            nn.AdaptiveAvgPool2d(1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)


def attention(x: Tensor) -> Tensor:
    """Attention alone, ``x [B, H, L, D]``."""
    return F.scaled_dot_product_attention(x, x, x)


CASES: dict[str, Callable[[], Case]] = {
    "norms": lambda: (Norms(), (8, 1000)),
    "attention": lambda: (attention, (4, 2, 48, 64)),
    "llama layer": lambda: (Block(), (4, 24, 128)),
    "images": lambda: (Images().eval(), (4, 3, 32, 32)),
}


def seconds(case: Case, backend: str, sizes: str, training: bool, device: str) -> float:
    """One cold compile: forward and, in training, backward."""
    fn, shape = case
    torch._dynamo.reset()
    if isinstance(fn, nn.Module):
        fn = fn.to(device)
    x = torch.randn(shape, device=device, requires_grad=training)
    if sizes == "batch":
        torch._dynamo.maybe_mark_dynamic(x, 0)
    call = torch.compile(fn, backend=backend, dynamic={"static": False, "batch": None, "all": True}[sizes])
    began = time.perf_counter()
    with torch.set_grad_enabled(training):
        y = call(x)
        if training:
            y.square().sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES), help="cases")
    parser.add_argument(
        "--sizes", nargs="*", choices=SIZES, default=list(SIZES), help="which sizes are symbols"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="CSV to write")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, object]] = []
    with torch.compiler.config.patch(force_disable_caches=True):
        for backend in BACKENDS:
            seconds((torch.sin, (5, 7)), backend, "static", True, device)
        for name in arguments.only:
            case = CASES[name]()
            for sizes in arguments.sizes:
                for training in (False, True):
                    taken: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
                    for _ in range(arguments.rounds):
                        for backend in BACKENDS:
                            taken[backend].append(seconds(case, backend, sizes, training, device))
                    ours, stock = (statistics.median(taken[backend]) for backend in BACKENDS)
                    row = {
                        "case": name,
                        "symbols": sizes,
                        "mode": "training" if training else "inference",
                        "batchinv_s": f"{ours:.2f}",
                        "inductor_s": f"{stock:.2f}",
                        "stock": f"{ours / stock:.2f}",
                        "device": device,
                    }
                    print(row, flush=True)
                    rows.append(row)
    if arguments.out:
        timing.write_csv(arguments.out, rows, " ".join(sys.argv))


if __name__ == "__main__":
    main()
