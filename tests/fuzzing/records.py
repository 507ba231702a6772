"""The counts of campaigns as CSV, a line for each bundle: what a later run goes on from, and what is added up."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

COUNTED = ("graphs", "rows", "changed", "violating", "refused", "failed")
COUNTED += tuple(f"stock {name}" for name in ("graphs", "rows", "changed", "violating", "failed"))


class Counts(Counter[str]):
    """Those of COUNTED. ``rows`` of a target that is not run are fingerprints: one for all graphs of a bundle."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {self[name]}" for name in COUNTED if self[name] or "stock" not in name)


def lines(path: str | Path) -> Iterator[dict[str, str]]:
    """Lines of ``path`` as dicts, without comments; none if there is no such file."""
    if Path(path).exists():
        with Path(path).open(newline="") as file:
            yield from csv.DictReader(line for line in file if not line.startswith("#"))


def append(path: str | Path, target: str, seed: int, counts: Counts, seconds: float) -> None:
    """One line more: target, seed, version, counts and seconds."""
    is_new = not Path(path).exists()
    row: dict[str, object] = {"target": target, "seed": seed, "torch": torch.__version__}
    row |= {name: counts[name] for name in COUNTED} | {"seconds": round(seconds)}
    with Path(path).open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def finished(path: str | Path, target: str) -> Counter[int]:
    """Seed -> how many of its graphs were run for ``target``, refused or failed: the first ones."""
    done = Counter[int]()
    for line in lines(path):
        if line["target"] == target:
            done[int(line["seed"])] += sum(int(line[name]) for name in ("graphs", "refused", "failed"))
    return done


def summed(path: str | Path) -> dict[tuple[str, str], Counts]:
    """Counts and seconds by target and torch version."""
    totals: dict[tuple[str, str], Counts] = {}
    for line in lines(path):
        total = totals.setdefault((line["target"], line["torch"]), Counts())
        total.update({name: int(line[name]) for name in (*COUNTED, "seconds")})
    return totals


def summary(path: str | Path) -> str:
    """One line for each target and version."""
    return "\n".join(
        f"{target}, torch {version}: {counts}; {counts['seconds'] / max(counts['graphs'], 1):.1f} s a graph"
        for (target, version), counts in summed(path).items()
    )
