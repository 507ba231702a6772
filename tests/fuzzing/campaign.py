"""Draw graphs, compare them in bundles, count, and cut the violations down."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import random
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import NonInteractiveExampleWarning

import bi_inductor
from bi_inductor import BatchInvarianceError
from bi_inductor.errors import NotCompiledError
from bi_inductor.interpreter import interpreting

from .comparison import FEW, HISTORIES, SIZES, WHOLE, Case, Tally, compare
from .program import Program, bundled
from .records import Counts
from .shrinking import shrunk
from .strategies import programs

#: The target whose kernels, for sm_90, are run by Triton's interpreter, for FEW rows.
INTERPRETER = "interpreter"


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


@dataclasses.dataclass(frozen=True)
class _Trial:
    """What a bundle goes through: sizes that the batch is cut into, and compile histories."""

    pieces: tuple[int, ...]
    histories: tuple[str, ...]


@dataclasses.dataclass
class Outcome:
    """Of one bundle: counts, first lines of errors and how often, what is to be printed, violations cut down."""

    counts: Counts = dataclasses.field(default_factory=Counts)
    messages: Counter[str] = dataclasses.field(default_factory=Counter)
    report: str = ""
    seconds: float = 0.0
    shrunk: int = 0


class _Campaign:
    """The graphs of one bundle; ``seed`` is for what they go through."""

    def __init__(self, arguments: argparse.Namespace, seed: str) -> None:
        self.arguments, self.outcome = arguments, Outcome()
        self.counts, self.messages = self.outcome.counts, self.outcome.messages
        self.random = random.Random(seed)

    @property
    def runs(self) -> bool:
        """False if fingerprints are compared, one for all graphs of a bundle."""
        return self.arguments.target in ("cpu", "cuda", INTERPRETER)

    def bundle(self, group: Sequence[Program]) -> None:
        """Compare ``group``; one that is refused or fails is looked at graph by graph."""
        trial = self._trial(group)
        try:
            tally = self._tally(group, trial)
        except Exception as error:
            self._without_the_culprit(error, group)
            return
        if tally.violations and not self.runs and len(group) > 1:  # whose is it?
            for program in group:
                self.bundle([program])
            return
        self._count(tally, group, "")
        if tally.violations:
            self._report(tally, group, trial)
        if self.arguments.stock and self.runs:
            self._count_stock(group, trial)

    def _trial(self, group: Sequence[Program]) -> _Trial:
        """Sizes and histories for ``group``: few for scatters, where almost every size is a compile."""
        pieces = min(self.arguments.pieces, 2) if group[0].scatters else self.arguments.pieces
        sizes = SIZES
        if self.arguments.target == INTERPRETER:
            pieces, sizes = 1, tuple(size for size in SIZES if size < FEW)
        return _Trial(
            tuple(self.random.sample(sizes, pieces)),
            tuple(self.random.sample(sorted(HISTORIES), self.arguments.histories)),
        )

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

    def _tally(self, group: Sequence[Program], trial: _Trial, backend: str = "batchinv") -> Tally:
        rest = trial.histories, self.arguments.contents, trial.pieces
        if self.arguments.target == INTERPRETER:
            return compare(Case(group), interpreting() if backend == "batchinv" else backend, *rest, FEW)
        if self.runs:
            return compare(Case(group, device=self.arguments.target), backend, *rest)
        return compare_generated(group, self.arguments.target, (WHOLE, 1, max(trial.pieces)))

    def _count(self, tally: Tally, group: Sequence[Program], prefix: str) -> None:
        self.counts[f"{prefix}graphs"] += len(group)
        self.counts[f"{prefix}rows"] += tally.rows
        self.counts[f"{prefix}changed"] += tally.changed
        self.counts[f"{prefix}violating"] += len(tally.violating_graphs)

    def _count_stock(self, group: Sequence[Program], trial: _Trial) -> None:
        try:
            self._count(self._tally(group, trial, "inductor"), group, "stock ")
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

    def _report(self, tally: Tally, group: Sequence[Program], trial: _Trial) -> None:
        for graph in tally.violating_graphs:
            found = [violation for violation in tally.violations if violation.graph == graph]
            print(
                f"VIOLATION {found[:4]}\n{group[graph].source()}", *map(str, group[graph].arguments), sep="\n"
            )
            if self.arguments.shrink > self.outcome.shrunk and self.runs:
                self.outcome.shrunk += 1
                smallest = shrunk(group[graph], lambda p: self._still_violates(p, trial))
                print(f"SHRUNK\n{smallest.snippet(WHOLE, 0, found[0].comparison)}", flush=True)

    def _still_violates(self, program: Program, trial: _Trial) -> bool:
        """False once the time is over."""
        return time.time() < self.arguments.deadline and bool(self._tally([program], trial).violations)


def compare_generated(
    group: Sequence[Program], target: str, batches: Sequence[int], backward: bool = True
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
        try:
            made = bi_inductor.inspect(function, *arguments, target=target, backward=backward)
            fingerprints[batch] = made.fingerprint
        except NotCompiledError:  # it returns its inputs
            fingerprints[batch] = "nothing"
    tally.note(0, "fingerprint", str(fingerprints), len(batches), len(set(fingerprints.values())) - 1)
    return tally


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def run_bundle(arguments: argparse.Namespace, seed: str, graphs: Sequence[Program]) -> Outcome:
    """Compare ``graphs``; ``seed``: of the sizes and histories that are drawn for them."""
    running, begun, printed = _Campaign(arguments, seed), time.monotonic(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        running.bundle(graphs)
    running.outcome.seconds = time.monotonic() - begun
    running.outcome.report = printed.getvalue()
    return running.outcome
