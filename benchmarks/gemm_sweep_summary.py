"""What a search for tiles says: per shape the tile that the table chooses and the best of all, beside torch.mm.

    python benchmarks/gemm_sweep_summary.py sweep.csv [...] --out benchmarks/results/gemm_sweep.csv

The inputs are outputs of ``gemm_sweep.py``; prices are ratios within one run, so several runs may be put together.
"""

from __future__ import annotations

import argparse
import collections
import csv
import itertools
import math
import statistics
import sys
from pathlib import Path

import gemm_shapes
import price_plot
import timing

from bi_inductor.templates.tile_table import Tile, tile_for

Problem = tuple[int, int, int]
Row = dict[str, str]


def read(paths: list[str]) -> dict[Problem, list[Row]]:
    """(M, N, K) -> its rows in all files."""
    found: dict[Problem, list[Row]] = collections.defaultdict(list)
    for path in paths:
        lines = (line for line in Path(path).read_text().splitlines() if not line.startswith("#"))
        for row in csv.DictReader(lines):
            found[int(row["m"]), int(row["n"]), int(row["k"])].append(row)
    return found


def name_of(tile: Tile) -> str:
    """A tile in one word."""
    return _name(
        *(tile.block_m, tile.block_n, tile.extra_n, tile.block_k, tile.num_warps, tile.num_stages),
        swap=tile.swap,
        tma=tile.tma,
        group_m=tile.group_m,
    )


def _name(
    m: int, n: int, extra: int, k: int, warps: int, stages: int, *, swap: bool, tma: bool, group_m: int
) -> str:
    columns = f"{n}+{extra}" if extra else f"{n}"
    kind = "-swap" * swap + "-tma" * tma + f"-g{group_m}" * (group_m != 8)
    return f"{m}x{columns}x{k}-w{warps}-s{stages}{kind}"


def _name_of_row(row: Row) -> str:
    names = ("block_m", "block_n", "extra_n", "block_k", "num_warps", "num_stages")
    sizes = [int(row.get(name) or 0) for name in names]
    swap, tma = row["swap"] == "True", row["tma"] == "True"
    return _name(*sizes, swap=swap, tma=tma, group_m=int(row["group_m"]))


def summary(problem: Problem, rows: list[Row]) -> dict[str, object]:
    """One line; the price of the chosen tile is empty if no run timed it."""
    m, n, k = problem
    chosen = name_of(tile_for(m, n, k, "bfloat16", sm_count=132, capability=90, tma=True, wide=True))
    prices: dict[str, float] = {}
    for row in rows:
        name = _name_of_row(row)
        prices[name] = min(float(row["price"]), prices.get(name, math.inf))
    best = min(prices, key=prices.__getitem__)
    return {
        "layer": gemm_shapes.shapes().get((n, k), "few columns"),
        "n": n,
        "k": k,
        "m": m,
        "torch.mm_us": statistics.median(float(row["torch.mm_us"]) for row in rows),
        "chosen": chosen,
        "price": round(prices[chosen], 3) if chosen in prices else "",
        "best": best,
        "best_price": round(prices[best], 3),
        "tiles": len(prices),
        "bit_classes": 1 + max(int(row["bits"]) for row in rows),
        "same_bits_as_torch.mm": rows[0]["same_bits"],
    }


def main() -> None:
    """Write the summary and its plot; print the geometric means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sweeps", nargs="+")
    parser.add_argument("--out", default="benchmarks/results/gemm_sweep.csv")
    options = parser.parse_args()
    lines = [summary(problem, rows) for problem, rows in sorted(read(options.sweeps).items())]
    timing.write_csv(options.out, lines, "python " + " ".join(sys.argv))
    priced = [line for line in lines if line["price"] != "" and line["layer"] != "few columns"]
    points = [(int(str(line["m"])), float(str(line["price"]))) for line in priced]
    title = "Time of the chosen tile over torch.mm's, bf16, H100, by M"
    Path(options.out).with_suffix(".svg").write_text(price_plot.draw(points, title))
    for m, group in itertools.groupby(sorted(points), key=lambda point: point[0]):
        prices = [price for _, price in group]
        print(f"M {m:5}: geomean {statistics.geometric_mean(prices):.3f}, worst {max(prices):.3f}")
    prices = [price for _, price in points]
    print(f"all: geomean {statistics.geometric_mean(prices):.3f}, worst {max(prices):.3f}")
    same = [line["same_bits_as_torch.mm"] == "True" for line in lines]
    print(f"{len(lines)} shapes, bits of torch.mm in {sum(same)}")


if __name__ == "__main__":
    main()
