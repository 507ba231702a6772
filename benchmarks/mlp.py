"""An MLP block, RMSNorm, gate and up, SiLU-mul, down, residual, beside stock torch.compile, bf16, in one run.

    python benchmarks/mlp.py --out benchmarks/results/mlp.csv
    python benchmarks/mlp.py --stock-mode max-autotune-no-cudagraphs --rows 1 256 8192

Both are compiled once with a dynamic batch and captured in CUDA graphs; ``price`` is batchinv's time over stock's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial

import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Hidden and intermediate size of Llama-3-8B.
HIDDEN, INTERMEDIATE = 4096, 14336
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 8192)


class Block(nn.Module):
    """x + down(silu(gate(norm(x))) * up(norm(x))), gate and up in one product."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[M, hidden] -> [M, hidden]."""
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/mlp.csv")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--stock-mode", default="default")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    block = Block(HIDDEN, INTERMEDIATE).cuda().bfloat16()
    compiled = {"batchinv": torch.compile(block, backend="batchinv")}
    compiled["stock"] = torch.compile(block, mode=options.stock_mode)
    records: list[dict[str, object]] = []
    with torch.no_grad():
        hint = torch.randn(64, HIDDEN, device="cuda", dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(hint, 0)
        for run in compiled.values():
            run(hint)
        for m in options.rows:
            x = torch.randn(m, HIDDEN, device="cuda", dtype=torch.bfloat16)
            times = timing.interleaved_medians(
                {name: partial(run, x) for name, run in compiled.items()}, options.rounds
            )
            record: dict[str, object] = {"m": m, "stock_mode": options.stock_mode}
            record |= {f"{name}_us": round(microseconds, 2) for name, microseconds in times.items()}
            record["price"] = round(times["batchinv"] / times["stock"], 4)
            records.append({**record, **timing.machine()})
            print(record, flush=True)
    print(f"geomean {statistics.geometric_mean(float(str(record['price'])) for record in records):.4f}")
    timing.write_csv(options.out, records, "python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
