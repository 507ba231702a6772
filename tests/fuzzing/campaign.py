"""Draw graphs, compare them in bundles, count, and cut the violations down."""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import NonInteractiveExampleWarning

import bi_inductor
from bi_inductor import BatchInvarianceError

from .comparison import HISTORIES, WHOLE, Case, Tally, compare
from .program import Program, bundled
from .shrinking import shrunk
from .strategies import programs

_BATCHES = (WHOLE, 1, 2, 8)


def drawn(number: int, start: int) -> Iterator[Program]:
    """``number`` graphs, no two equal, the same for the same ``start``."""
    found: dict[Program, None] = {}

    @seed(start)
    @settings(
        max_examples=number * 2,  # Hypothesis repeats itself among the small ones
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def collect(program: Program) -> None:
        if len(program.steps) > 1:
            found[program] = None

    warnings.simplefilter("ignore", NonInteractiveExampleWarning)
    collect()
    return itertools.islice(found, number)


def in_bundles(programs: Iterable[Program], size: int) -> Iterator[list[Program]]:
    """``size`` at a time; those with scatters, which make the whole bundle be compiled again, by themselves."""
    waiting: dict[bool, list[Program]] = {False: [], True: []}
    for program in programs:
        group = waiting[program.scatters]
        group.append(program)
        if len(group) == size:
            yield list(group)
            group.clear()
    yield from filter(None, waiting.values())


class Counts(Counter[str]):
    """graphs, rows, changed, violating, refused, failed; the same with ``stock`` in front."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {self[name]}" for name in sorted(self))


class _Campaign:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.counts = arguments, Counts(graphs=0, rows=0, changed=0, violating=0)
        self.random = random.Random(arguments.seed)
        self.messages: Counter[str] = Counter()

    @property
    def runs(self) -> bool:
        return self.arguments.target in ("cpu", "cuda")

    def bundle(self, group: Sequence[Program]) -> None:
        """Compare ``group``; one that is refused or fails is looked at graph by graph."""
        histories = self.random.sample(sorted(HISTORIES), self.arguments.histories)
        try:
            tally = self._tally(group, histories)
        except Exception as error:
            self._without_the_culprit(error, group)
            return
        if (
            tally.violations and not self.runs and len(group) > 1
        ):  # a fingerprint is one for all: whose is it?
            for program in group:
                self.bundle([program])
            return
        self._count(tally, group, "")
        if tally.violations:
            self._report(tally, group, histories)
        if self.arguments.stock and self.runs:
            self._count_stock(group, histories)

    def _without_the_culprit(self, error: Exception, group: Sequence[Program]) -> None:
        """Go on without the graph a refusal names; after another error look at each half."""
        named = re.search(r"<graph(\d+) ", str(error)) if len(group) > 1 else None
        if len(group) == 1 or named:
            culprit = int(named[1]) if named else 0
            self._note_error(error, group[culprit])
            rest = [program for i, program in enumerate(group) if i != culprit]
            if rest:
                self.bundle(rest)
        else:
            self.bundle(group[: len(group) // 2])
            self.bundle(group[len(group) // 2 :])

    def _tally(self, group: Sequence[Program], histories: Sequence[str], backend: str = "batchinv") -> Tally:
        if self.runs:
            return compare(
                Case(group, device=self.arguments.target), backend, histories, self.arguments.contents
            )
        return compare_generated(group, self.arguments.target)

    def _count(self, tally: Tally, group: Sequence[Program], prefix: str) -> None:
        self.counts[f"{prefix}graphs"] += len(group)
        self.counts[f"{prefix}rows"] += tally.rows
        self.counts[f"{prefix}changed"] += tally.changed
        self.counts[f"{prefix}violating"] += len(tally.violating_graphs)

    def _count_stock(self, group: Sequence[Program], histories: Sequence[str]) -> None:
        try:
            self._count(self._tally(group, histories, "inductor"), group, "stock ")
        except Exception as error:
            self.counts["stock failed"] += len(group)
            self.messages[f"stock: {_first_line(error)}"] += 1

    def _note_error(self, error: Exception, program: Program) -> None:
        refused = isinstance(error, BatchInvarianceError) or "refuses" in str(error)[:60]
        self.counts["refused" if refused else "failed"] += 1
        self.messages[_first_line(error)] += 1
        if not refused:
            print(f"FAILED\n{program.source()}", *map(str, program.arguments), sep="\n")
            print("".join(traceback.format_exception(error)[-6:])[-3000:], flush=True)

    def _report(self, tally: Tally, group: Sequence[Program], histories: Sequence[str]) -> None:
        for graph in tally.violating_graphs:
            found = [violation for violation in tally.violations if violation.graph == graph]
            print(
                f"VIOLATION {found[:4]}\n{group[graph].source()}", *map(str, group[graph].arguments), sep="\n"
            )
            if self.arguments.shrink > 0 and self.runs:
                self.arguments.shrink -= 1
                smallest = shrunk(group[graph], lambda p: bool(self._tally([p], histories).violations))
                print(f"SHRUNK\n{smallest.snippet(WHOLE, 0, found[0].comparison)}", flush=True)


def compare_generated(
    group: Sequence[Program], target: str, batches: Sequence[int] = _BATCHES, backward: bool = True
) -> Tally:
    """Fingerprints of one graph at several batch sizes; the verifier reads each as it is made."""
    tally, fingerprints = Tally(), {}
    function = bundled(group)
    for batch in batches:
        torch._dynamo.reset()
        arguments = [
            torch.empty([batch if n == -1 else n for n in value.shape], dtype=value.dtype, device="meta")
            for program in group
            for value in program.arguments
        ]
        for argument, value in zip(arguments, (v for p in group for v in p.arguments), strict=True):
            argument.requires_grad_(backward and -1 in value.shape)
        made = bi_inductor.inspect(function, *arguments, target=target, backward=backward)
        fingerprints[batch] = made.fingerprint
    tally.note(0, "fingerprint", str(fingerprints), len(batches), len(set(fingerprints.values())) - 1)
    return tally


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def campaign(arguments: argparse.Namespace) -> int:
    """Run it, print the counts, write the CSV; 1 if anything was violated or failed."""
    torch.set_num_threads(2)
    running, start = _Campaign(arguments), time.monotonic()
    for group in in_bundles(drawn(arguments.graphs, arguments.seed), arguments.bundle):
        running.bundle(group)
        minutes = (time.monotonic() - start) / 60
        print(f"{minutes:.1f} min: {running.counts}", flush=True)
        if arguments.minutes and minutes > arguments.minutes:
            break
    for message, times in running.messages.most_common(30):
        print(f"{times:5} {message}")
    if arguments.csv:
        _write(arguments, running.counts, time.monotonic() - start)
    return int(bool(running.counts["violating"] or running.counts["failed"]))


def _write(arguments: argparse.Namespace, counts: Counts, seconds: float) -> None:
    """Append one line: target, seed, versions and counts."""
    names = ("graphs", "rows", "changed", "violating", "refused", "failed")
    names += tuple(f"stock {name}" for name in ("graphs", "rows", "changed", "violating", "failed"))
    path, row = Path(arguments.csv), {"target": arguments.target, "seed": arguments.seed}
    row |= {"torch": torch.__version__, **{name: counts[name] for name in names}, "seconds": round(seconds)}
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
