"""Run a few graphs at many batch sizes and compile histories, and count the rows whose bits changed.

The reference is the whole batch, compiled once with gradients and the batch as a symbol. Compared with it, all rows
of all outputs and of all input gradients: consecutive pieces of the batch, a permutation, other contents in every
second row, and other histories. Parameter gradients sum over the batch, so they are compared where the whole batch
runs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bi_inductor.testing import count_changed_rows, same_bits

from .program import Program, bundled

#: Batch of the reference: no other dim of a graph has it, so no guard ties the batch to another size.
WHOLE = 131
#: The same where running is slow.
FEW = 11
PIECES = (1, 2, 3, 7, 8, 31, 64)
#: What a campaign draws from: the regime edges of loops, vectors and powers of two.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 130)
#: Contents of the neighbours, which no row may feel.
HOSTILE = (float("nan"), float("inf"), -6e4, 0.0)
_UNFUSED = {
    "max_fusion_size": 1,
    "epilogue_fusion": False,
    "realize_reads_threshold": 0,
    "realize_opcount_threshold": 0,
}


@dataclasses.dataclass(frozen=True)
class History:
    """How a graph is compiled: keyword arguments of torch.compile, the batch of its first call, grad mode.

    ``marked``: the batch is a symbol from the first call on, and the other sizes are not.
    """

    options: dict[str, object]
    marked: bool = False
    first: int = WHOLE
    gradients: bool = True
    checkpointed: bool = False


REFERENCE = History({}, marked=True)
HISTORIES = {
    "dynamic": History({"dynamic": True}),
    "static": History({"dynamic": False}),
    "small first": History({}, first=2),
    "one first": History({}, first=1),
    "inference": History({}, marked=True, gradients=False),
    "static inference": History({"dynamic": False}, gradients=False),
    "checkpointed": History({}, marked=True, checkpointed=True),
    "unfused": History({"options": _UNFUSED}, marked=True),
}


@dataclasses.dataclass(frozen=True)
class Violation:
    """Rows of one result that changed in one comparison."""

    graph: int
    result: str
    comparison: str
    rows: int


@dataclasses.dataclass
class Tally:
    """What was compared, and what changed."""

    rows: int = 0
    changed: int = 0
    violations: list[Violation] = dataclasses.field(default_factory=list)

    def add(self, comparison: str, expected: Results, actual: Results) -> None:
        for (graph, name), rows in actual.rows.items():
            self.note(
                graph, name, comparison, len(rows), count_changed_rows(rows, expected.rows[graph, name])
            )
        for (graph, name), whole in actual.totals.items():
            changed = not same_bits(whole, expected.totals[graph, name])
            self.note(graph, name, comparison, 1, int(changed))

    def note(self, graph: int, name: str, comparison: str, rows: int, changed: int) -> None:
        """Count one comparison of ``rows`` rows of a result."""
        self.rows += rows
        self.changed += changed
        if changed:
            self.violations.append(Violation(graph, name, comparison, changed))

    @property
    def violating_graphs(self) -> Counter[int]:
        return Counter(violation.graph for violation in self.violations)


Key = tuple[int, str]


@dataclasses.dataclass(frozen=True)
class Results:
    """By graph and name: results with the batch in front, and those that sum over the batch."""

    rows: dict[Key, Tensor]
    totals: dict[Key, Tensor]

    def at(self, index: Tensor) -> Results:
        """The same rows in another order or fewer; sums over the batch have no rows."""
        return Results({key: value[index] for key, value in self.rows.items()}, {})


class Case:
    """Graphs with their contents: what is run again and again."""

    def __init__(self, programs: Sequence[Program], seed: int = 0, device: str = "cpu") -> None:
        self.programs, self.device = tuple(programs), device
        self.function = bundled(programs)
        self._fill(seed)

    def _fill(self, seed: int) -> None:
        self.inputs: dict[Key, Tensor] = {}
        self.parameters: dict[Key, Tensor] = {}
        self.cotangents: dict[Key, Tensor] = {}
        for graph, program in enumerate(self.programs):
            for place, value in enumerate(program.inputs):
                self.inputs[graph, value.name] = value.tensor(WHOLE, self.device, seed + place)
            for place, value in enumerate(program.parameters):
                parameter = value.tensor(WHOLE, self.device, seed + 100 + place)
                self.parameters[graph, value.name] = parameter.requires_grad_()
            for place, value in enumerate(program.results):
                cotangent = value.tensor(WHOLE, self.device, seed + 200 + place)
                self.cotangents[graph, value.name] = cotangent.movedim(value.batch_dim, 0)

    def redrawn(self, seed: int) -> Case:
        """The same graphs, and the same function, with other contents."""
        other = Case.__new__(Case)
        vars(other).update(vars(self))
        other._fill(seed)
        return other

    def replaced(self, contents: float) -> Case:
        """The same case with ``contents`` in every second row of the inputs."""
        other = Case.__new__(Case)
        vars(other).update(vars(self))
        other.inputs = {key: x.clone() for key, x in self.inputs.items()}
        for x in other.inputs.values():
            x[1::2] = contents
        return other

    def run(
        self, function: Callable[..., Sequence[Tensor]], index: Tensor, history: History = REFERENCE
    ) -> Results:
        """``function`` of the rows ``index``, and the gradients of its results by fixed cotangents."""
        gradients = history.gradients
        inputs = {key: x[index].requires_grad_(gradients) for key, x in self.inputs.items()}
        if history.marked:
            for x in inputs.values():
                torch._dynamo.maybe_mark_dynamic(x, 0)
        with torch.set_grad_enabled(gradients):
            flat = function(*self._arguments(inputs))
        results = dict(zip(self.cotangents, flat, strict=True))
        rows = {
            (graph, name): result.movedim(self._batch_dim(graph, name), 0)
            for (graph, name), result in results.items()
        }
        totals: dict[Key, Tensor] = {}
        if gradients:
            self._differentiate(rows, inputs, totals, index)
        return Results({key: value.detach() for key, value in rows.items()}, totals)

    def _arguments(self, inputs: dict[Key, Tensor]) -> list[Tensor]:
        tensors = {**inputs, **self.parameters}
        return [
            tensors[graph, value.name]
            for graph, program in enumerate(self.programs)
            for value in program.arguments
        ]

    def _batch_dim(self, graph: int, name: str) -> int:
        return next(value.batch_dim for value in self.programs[graph].results if value.name == name)

    def _differentiate(
        self, rows: dict[Key, Tensor], inputs: dict[Key, Tensor], totals: dict[Key, Tensor], index: Tensor
    ) -> None:
        outputs = {key: value for key, value in rows.items() if value.requires_grad}
        wanted = {**inputs, **self.parameters}
        if not outputs or not wanted:
            return
        cotangents = [self.cotangents[key][index] for key in outputs]
        found = torch.autograd.grad([*outputs.values()], [*wanted.values()], cotangents, allow_unused=True)
        for (graph, name), gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                destination = rows if (graph, name) in inputs else totals
                destination[graph, f"{name}.grad"] = gradient


def compare(
    case: Case,
    backend: str | Callable[..., Any] = "batchinv",
    histories: Sequence[str] = (),
    contents: int = 1,
    pieces: Sequence[int] = PIECES,
    whole: int = WHOLE,
) -> Tally:
    """Everything that must be equal, compared. Compiles for any batch and for one row, and for each of ``histories``.

    ``contents``: how often the tensors are drawn for the same compiled code, which costs little. ``pieces``: sizes
    that the batch of ``whole`` rows is cut into. Gradients that scatter are compiled again where a size crosses a power
    of two, with all that is in the bundle.
    """
    tally = Tally()
    torch._dynamo.reset()
    run = torch.compile(case.function, backend=backend, **REFERENCE.options)
    everything = torch.arange(whole, device=case.device)
    expected = _compare_batches(case, run, everything, tally, pieces)
    for number in range(1, contents):
        _compare_batches(case.redrawn(1000 * number), run, everything, tally, pieces)
    for name in histories:
        _compare_history(case, backend, name, everything, expected, tally)
    return tally


def _compare_batches(
    case: Case,
    run: Callable[..., Sequence[Tensor]],
    everything: Tensor,
    tally: Tally,
    pieces: Sequence[int],
) -> Results:
    expected = case.run(run, everything)
    tally.add("again", expected, case.run(run, everything))
    for size in pieces:
        for index in _cut(everything, size):
            tally.add(f"batch {size}", expected.at(index), _without_totals(case.run(run, index)))
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0)).to(case.device)
    tally.add("permuted", expected.at(order), _without_totals(case.run(run, order)))
    for contents in HOSTILE:
        rows = case.replaced(contents).run(run, everything).at(everything[::2])
        tally.add(f"neighbours {contents}", expected.at(everything[::2]), rows)
    return expected


def _cut(rows: Tensor, size: int) -> list[Tensor]:
    """Pieces of ``size`` rows that cover all: the last overlaps the one before, so that no other size is compiled."""
    starts = [*range(0, len(rows) - size, size), len(rows) - size]
    return [rows[start : start + size] for start in starts]


def _without_totals(results: Results) -> Results:
    return Results(results.rows, {})


def _compare_history(
    case: Case,
    backend: str | Callable[..., Any],
    name: str,
    everything: Tensor,
    expected: Results,
    tally: Tally,
) -> None:
    history, function = HISTORIES[name], case.function
    options = dict(history.options)
    if backend == "inductor" and "options" in options:
        return  # stock's own fusion settings are not the question
    if history.checkpointed:

        def function(*arguments: Tensor) -> Sequence[Tensor]:
            return checkpoint(case.function, *arguments, use_reentrant=False)

    torch._dynamo.reset()
    run = torch.compile(function, backend=backend, **options)
    if history.first < len(everything):
        first = everything[: history.first]
        tally.add(f"{name}, first", expected.at(first), _without_totals(case.run(run, first, history)))
    tally.add(name, expected, case.run(run, everything, history))
