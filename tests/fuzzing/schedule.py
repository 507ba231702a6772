"""What a campaign does next: draw seeds, hand out their graphs in bundles, write a line of the CSV for each bundle.

The bundles of one seed are run in order, so that the lines of a seed say how many of its graphs are done.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

from .campaign import Outcome, drawn, in_bundles, run_bundle
from .program import Program
from .records import Counts, append, finished

#: Graphs of one seed.
_GRAPHS_A_SEED = 48


@dataclasses.dataclass(frozen=True)
class Draw:
    """Task: the graphs of a seed."""

    seed: int

    def __call__(self) -> list[Program]:
        return list(drawn(_GRAPHS_A_SEED, self.seed))


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Task: ``graphs`` of ``seed`` compared, the first of which is its ``first``."""

    arguments: argparse.Namespace
    seed: int
    first: int
    graphs: tuple[Program, ...]

    def __call__(self) -> Outcome:
        return run_bundle(self.arguments, f"{self.seed} {self.first}", self.graphs)


Task: TypeAlias = Draw | Bundle


class Schedule:
    """Tasks for one worker or several, until there are enough graphs or the time is over.

    ``next`` gives a task, or None if there is nothing to do until another one is finished; ``finish`` takes its result.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.start = arguments, time.time()
        arguments.deadline = self.start + 60 * (math.inf if arguments.minutes is None else arguments.minutes)
        self._wanted = arguments.graphs or (_GRAPHS_A_SEED if arguments.minutes is None else math.inf)
        self.total, self.messages = Counts(), Counter[str]()
        self._finished = finished(arguments.csv, arguments.target) if arguments.csv else Counter[int]()
        self._known: set[Program] = set()
        self._drawn: dict[int, list[Program]] = {}
        self._next_drawn = self._next_taken = arguments.seed
        self._waiting: dict[int, list[Bundle]] = {}  # by seed, what is left of it
        self._running: set[int] = set()  # seeds

    def next(self) -> Task | None:
        if time.time() > self.arguments.deadline:
            return None
        for seed, bundles in self._waiting.items():
            if seed not in self._running and bundles:
                self._running.add(seed)
                return bundles.pop(0)
        if self._graphs_in_sight() >= self._wanted:
            return None
        self._next_drawn += 1
        return Draw(self._next_drawn - 1)

    def finish(self, task: Task, result: list[Program] | Outcome) -> None:
        if isinstance(task, Draw):
            assert isinstance(result, list)
            self._drawn[task.seed] = result
            while self._next_taken in self._drawn:
                self._take(self._next_taken, self._drawn.pop(self._next_taken))
                self._next_taken += 1
        else:
            assert isinstance(result, Outcome)
            self._running.discard(task.seed)
            self._note(task, result)

    def patience(self) -> float | None:
        """Seconds to wait for tasks that run: a quarter longer than the time for beginning them."""
        if self.arguments.minutes is None:
            return None
        return max(self.arguments.deadline + 15 * self.arguments.minutes - time.time(), 0.0)

    def drop(self, tasks: Sequence[Task]) -> None:
        """Forget ``tasks``, which were not finished: the next campaign begins with them."""
        if tasks:
            print(f"{len(tasks)} bundles were begun and not finished")

    def _take(self, seed: int, graphs: Sequence[Program]) -> None:
        """Bundles of those that no lower seed has and no line of the CSV counts."""
        fresh = [program for program in graphs if program not in self._known]
        self._known.update(fresh)
        place, self._waiting[seed] = 0, []
        for group in in_bundles(fresh, self.arguments.bundle):
            left = group[max(self._finished[seed] - place, 0) :]
            place += len(group)
            if left:
                self._waiting[seed].append(Bundle(self.arguments, seed, place - len(left), tuple(left)))

    def _note(self, task: Bundle, outcome: Outcome) -> None:
        self.total += outcome.counts
        self.messages += outcome.messages
        self.arguments.shrink -= outcome.shrunk
        if outcome.report:
            print(outcome.report, flush=True)
        if self.arguments.csv:
            append(self.arguments.csv, self.arguments.target, task.seed, outcome.counts, outcome.seconds)
        if not self._waiting[task.seed]:
            minutes = (time.time() - self.start) / 60
            print(f"{minutes:.1f} min, seed {task.seed}: {self.total}", flush=True)

    def _graphs_in_sight(self) -> int:
        """Run, running, waiting and being drawn."""
        drawing = _GRAPHS_A_SEED * (self._next_drawn - self._next_taken)
        waiting = sum(len(bundle.graphs) for bundles in self._waiting.values() for bundle in bundles)
        return self.total["graphs"] + waiting + drawing + self.arguments.bundle * len(self._running)
