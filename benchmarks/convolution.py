"""ResNet-50 in bf16, channels last, inference, beside stock Inductor (whose convolutions are cuDNN's), in one run.

    python benchmarks/convolution.py --out benchmarks/results/convolution.csv    # five minutes
    python benchmarks/convolution.py --batches 8 --kernels 12                    # where the time goes

``stock`` is batchinv's time over stock's: below 1 is faster. The weights are random; needs torchvision.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import timing
import torch
from torch import Tensor

BACKENDS = ("batchinv", "inductor")


def network() -> Callable[[Tensor], Tensor]:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    return resnet50().eval().cuda().to(torch.bfloat16, memory_format=torch.channels_last)


def compiled(backend: str, batch: int) -> Callable[[], Tensor]:
    """One call of the compiled network on ``batch`` images."""
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    images = images.to(memory_format=torch.channels_last)
    fn = torch.compile(network(), backend=backend, dynamic=False)
    began = time.perf_counter()
    with torch.no_grad():
        fn(images)
    print(f"{backend} at batch {batch}: compiled in {time.perf_counter() - began:.0f} s", flush=True)
    return partial(inferred, fn, images)


@torch.no_grad()
def inferred(fn: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return fn(images)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--kernels", type=int, default=0, help="print this many of the longest kernels")
    parser.add_argument("--out", help="CSV file to write")
    options = parser.parse_args()
    records: list[dict[str, object]] = []
    for batch in options.batches:
        torch._dynamo.reset()
        candidates = {backend: compiled(backend, batch) for backend in BACKENDS}
        times = timing.interleaved_medians(candidates, options.rounds)
        record = {
            "model": "resnet50", "batch": batch,
            **{f"{name}_us": round(value, 1) for name, value in times.items()},
            "stock": round(times["batchinv"] / times["inductor"], 3),
        }  # fmt: skip
        print(*record.values(), flush=True)
        records.append({**record, **timing.machine()})
        if options.out:
            timing.write_csv(options.out, records, "python " + " ".join(sys.argv))
        timing.print_longest_kernels(candidates, options.kernels)


if __name__ == "__main__":
    main()
