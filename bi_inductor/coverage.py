"""One verdict for each op of PyTorch's operator database, found out by compiling it at several batch sizes.

A case (``coverage_cases.py``) is compiled statically for one row, and once for ``BATCHES`` with the batch as a symbol,
or all sizes; every row's bits are compared with those it has alone. Where a certificate says Drawn, a row's bits
follow its slot, so rows in one slot are compared.

    canonical    compiled, with a sum in a named order      refused     BatchInvarianceError
    invariant    compiled, without one                      uncaptured  no graph reaches any backend, or stock fails too
    VIOLATION    some row's bits changed                    ERROR       anything else
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bi_inductor import coverage_cases
from bi_inductor.certificate import Certificate, certificates
from bi_inductor.coverage_cases import BATCHES, ROWS, Case, close, tensors_in
from bi_inductor.coverage_stock import fallbacks
from bi_inductor.errors import BatchInvarianceError, NotCompiledError
from bi_inductor.interpreter import interpreting
from bi_inductor.testing import count_changed_rows

#: From the best to the worst; an op has the worst of its cases.
VERDICTS = ("invariant", "canonical", "uncaptured", "refused", "ERROR", "VIOLATION")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compiled, and for what.

    ``target``: "cpu" or "cuda" compile, run and compare, and so does "interpreter" with the kernels for an H100, in
    Triton's interpreter; "sm_90" and its like generate code for a GPU that need not be there, and so does "cpu" with
    ``lower_only``. ``samples``: per op. ``backward``: gradients of the inputs
    too. ``backend``: "inductor" shows what the same cases find in stock. ``dynamic``: all sizes are symbols where
    many rows are compiled, not the batch alone.
    """

    target: str = "cpu"
    backend: str = "batchinv"
    samples: int = 2
    backward: bool = False
    lower_only: bool = False
    dynamic: bool = False

    @property
    def runs(self) -> bool:
        """Whether bits are compared."""
        return self.target in ("cpu", "cuda", "interpreter") and not self.lower_only

    @property
    def device(self) -> str:
        """Where the inputs are."""
        return "cuda" if self.target == "cuda" and self.runs else "cpu"

    def compiler(self) -> str | Callable[..., Any]:
        """What ``torch.compile`` takes as a backend."""
        return interpreting() if self.target == "interpreter" else self.backend


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """One compile: its verdict, the reason behind it, rows compared, rows changed, whether eager's values are near.

    ``cases``: how many were compiled together. ``stock``: for what is refused, the ATen kernels that stock Inductor
    calls for it, "none", or "no graph".
    """

    sample: int
    lift: str
    verdict: str
    reason: str = ""
    rows: int = 0
    changed: int = 0
    near_eager: bool = True
    cases: int = 1
    stock: str = ""


@dataclasses.dataclass(frozen=True)
class OpResult:
    """All cases of one op on one target."""

    op: str
    target: str
    cases: tuple[CaseResult, ...]
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """The worst of the cases' verdicts."""
        return max((case.verdict for case in self.cases), key=VERDICTS.index, default="uncaptured")

    @property
    def reason(self) -> str:
        """Behind the worst verdict."""
        return next((case.reason for case in self.cases if case.verdict == self.verdict), "")

    @property
    def is_lowered_by_stock(self) -> bool:
        """Refused here, though stock Inductor has a lowering for all of it, in some case."""
        return self.verdict == "refused" and any(case.stock == "none" for case in self.cases)

    @property
    def rows(self) -> int:
        """Rows compared."""
        return sum(case.rows for case in self.cases)

    @property
    def counts(self) -> dict[str, int]:
        """Number of cases per verdict."""
        found: Counter[str] = Counter()
        for case in self.cases:
            found[case.verdict] += case.cases
        return dict(found)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> OpResult:
        """The inverse of ``dataclasses.asdict``."""
        return cls(**{**fields, "cases": tuple(CaseResult(**case) for case in fields["cases"])})


def judge_op(name: str, settings: Settings) -> OpResult:
    """The verdict on one entry of the database; whatever goes wrong is in it."""
    started = time.monotonic()
    try:
        op = coverage_cases.entries()[name]
        cases = list(coverage_cases.cases_of(op, settings.samples, device=settings.device))
        results = _judge_together(cases, settings)
    except Exception as error:  # the samples themselves
        results = [CaseResult(0, "none", "ERROR", _described(error))]
    return OpResult(name, settings.target, tuple(results), round(time.monotonic() - started, 1))


def _judge_together(cases: list[Case], settings: Settings) -> list[CaseResult]:
    """Those with rows in one compile, which is most of the time; each alone if anything is wrong with that."""
    together = [case for case in cases if case.mapped] if settings.runs else []
    if settings.backward:
        together = [case for case in together if _is_differentiable(case)]
    results = []
    if len(together) > 1:
        found = judge(coverage_cases.joined(together), settings)
        if found.verdict in ("invariant", "canonical") and found.near_eager:
            results.append(dataclasses.replace(found, cases=len(together)))
            cases = [case for case in cases if case not in together]
    return results + [judge(case, settings) for case in cases]


def judge(case: Case, settings: Settings) -> CaseResult:
    """Compile one case under ``settings`` and say what came of it."""
    try:
        fields = _compared(case, settings) if settings.runs else _lowered(case, settings)
    except BatchInvarianceError as error:
        reason = f"{error.op}: {error.reason}"
        fields = {"verdict": "refused", "reason": reason, "stock": _described_stock(case, settings)}
    except _uncaptured() as error:
        if isinstance(error, NotCompiledError) and _is_captured(case):
            fields = {"verdict": "invariant", "reason": "it returns its inputs: nothing is compiled"}
        else:
            fields = {"verdict": "uncaptured", "reason": _described_uncaptured(case, error)}
    except Exception as error:  # what this table exists to find
        if _WITHOUT_DATA in str(error) and settings.target == "cpu" and settings.lower_only:
            return judge(
                case, dataclasses.replace(settings, lower_only=False)
            )  # it reads what fakes do not have
        fails = settings.backend != "inductor" and _fails_in_stock(case, settings)
        verdict, prefix = ("uncaptured", "stock fails too: ") if fails else ("ERROR", "")
        fields = {"verdict": verdict, "reason": prefix + _described(error)}
    return CaseResult(case.sample, case.lift, **fields)


def _uncaptured() -> tuple[type[Exception], ...]:
    """What Dynamo, or eager code on fakes after it gave up, raises for a function that is no graph."""
    from torch._dynamo import exc
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    shapes = DataDependentOutputException, DynamicOutputShapeException
    return exc.Unsupported, exc.UserError, NotCompiledError, *shapes


def _is_captured(case: Case) -> bool:
    """Whether Dynamo takes the function as one graph; one that only returns its inputs is not compiled."""
    torch._dynamo.reset()
    try:
        torch.compile(case.call, backend="eager", fullgraph=True)(*case.arguments(0, 2))
    except Exception:  # whatever Dynamo says of it
        return False
    return True


def _fails_in_stock(case: Case, settings: Settings) -> bool:
    try:
        for history in ("static", _many(settings)):
            run = _compiled(case, "inductor", history)
            _outputs(run, case, 0, 2, settings.backward and _is_differentiable(case))
    except Exception:  # its own bug, or a sample that eager does not take on this device
        return True
    return False


#: Says torch of fakes, where sizes are read from a tensor.
_WITHOUT_DATA = "its data is not allocated yet"


def _described(error: BaseException) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:300]}"


def _described_uncaptured(case: Case, error: BaseException) -> str:
    try:
        outputs = tensors_in(case.call(*case.arguments(0, 2)))
    except Exception as of_eager:  # an op of another device
        return f"eager fails too: {_described(of_eager)}"
    if any(x.layout != torch.strided for x in outputs):
        return "its result is a sparse tensor, of which Dynamo makes no graph"
    return _described(error)


def _described_stock(case: Case, settings: Settings) -> str:
    found = fallbacks(case, settings.backward and _is_differentiable(case))
    return "no graph" if found is None else ", ".join(found) or "none"


def _lowered(case: Case, settings: Settings) -> dict[str, Any]:
    from bi_inductor.inspection import inspect

    backward = settings.backward and _is_differentiable(case)
    inputs = _arguments(case, 0, 2, backward)
    torch._dynamo.reset()
    found = inspect(case.call, *inputs, target=settings.target, backward=backward)
    return {"verdict": _verdict(list(found.certificates))}


def _verdict(found: list[Certificate]) -> str:
    return "canonical" if any("CANONICAL" in made.counts for made in found) else "invariant"


def _compared(case: Case, settings: Settings) -> dict[str, Any]:
    first_certificate = len(certificates())
    backward = settings.backward and _is_differentiable(case)
    rows, batches = (ROWS, BATCHES) if case.mapped else (1, (1,))
    run = _compiled(case, settings.compiler(), "static")
    alone = [_outputs(run, case, row, row + 1, backward) for row in range(rows)]
    run = _compiled(case, settings.compiler(), _many(settings))
    together = {n: _outputs(run, case, 0, n, backward) for n in batches}
    made = certificates()[first_certificate:]
    drawn = any(entry.form.startswith("Drawn") for one in made for entry in one.entries)
    changed, compared = _changed(case, alone, together, drawn)
    expected = tensors_in(case.call(*case.arguments(0, rows)))
    near = drawn or all(map(close, together[rows], expected))
    if changed:
        return {
            "verdict": "VIOLATION",
            "reason": f"{changed} rows of {compared}",
            "rows": compared,
            "changed": changed,
        }
    return {"verdict": _verdict(made), "rows": compared, "near_eager": near}


def _many(settings: Settings) -> str:
    """How the compile for many rows sees their sizes."""
    return "dynamic" if settings.dynamic else "batch"


def _compiled(case: Case, backend: str | Callable[..., Any], history: str) -> Callable[..., Any]:
    """``history``: "static"; "dynamic", all sizes as symbols; "batch", that size alone, if the case has one."""
    torch._dynamo.reset()
    if history != "batch" or not case.mapped:
        return torch.compile(case.call, backend=backend, dynamic=history != "static", fullgraph=True)
    compiled = torch.compile(case.call, backend=backend, fullgraph=True)

    def run(*inputs: Tensor) -> Any:
        for position in case.mapped:
            torch._dynamo.maybe_mark_dynamic(inputs[position], 0)
        return compiled(*inputs)

    return run


def _outputs(run: Callable[..., Any], case: Case, first: int, past: int, backward: bool) -> list[Tensor]:
    """Result, and with ``backward`` the mapped inputs' gradients, of rows first ... past - 1."""
    inputs = _arguments(case, first, past, backward)
    torch.manual_seed(0)
    outputs = tensors_in(run(*inputs))
    differentiable = [x for x in outputs if x.requires_grad]
    wanted = [x for i, x in enumerate(inputs) if x.requires_grad and i in case.mapped]
    if not differentiable or not wanted:
        return [x.detach() for x in outputs]
    upstream = [_upstream(x) for x in differentiable]
    gradients = torch.autograd.grad(differentiable, wanted, upstream, allow_unused=True)
    return [x.detach() for x in (*outputs, *gradients) if x is not None]


def _arguments(case: Case, first: int, past: int, backward: bool) -> list[Tensor]:
    return [
        x.requires_grad_(backward and (x.is_floating_point() or x.is_complex()))
        for x in case.arguments(first, past)
    ]


def _is_differentiable(case: Case) -> bool:
    """Whether eager mode records it: not in-place on a leaf, and with a derivative."""
    try:
        outputs = tensors_in(case.call(*_arguments(case, 0, 2, True)))
    except RuntimeError:
        return False
    return any(x.requires_grad for x in outputs)


def _upstream(x: Tensor) -> Tensor:
    """The same gradient for every row, different along it."""
    row = torch.linspace(-1, 1, x[0].numel() if x.dim() else 1, device=x.device)
    return row.reshape(x.shape[1:]).expand(x.shape).to(x.dtype)


def _changed(
    case: Case, alone: list[list[Tensor]], together: dict[int, list[Tensor]], drawn: bool
) -> tuple[int, int]:
    """(rows that changed, rows compared)"""
    if not case.mapped:
        pairs = [(x[None], y[None]) for x, y in zip(alone[0], together[1], strict=True)]
    else:
        pairs = []
        for batch in together.values():
            for position, x in enumerate(batch):
                if drawn:  # by slot: the first row alone, all of them in the largest batch
                    pairs.append((x[:1], alone[0][position]))
                    pairs.append((x, together[ROWS][position][: len(x)]))
                else:
                    pairs.append((x, torch.cat([row[position] for row in alone[: len(x)]])))
    return sum(count_changed_rows(x, y) for x, y in pairs), sum(len(x) for x, _ in pairs)
