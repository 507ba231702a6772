"""``python -m bi_inductor check``: a function run at several batch sizes, rows compared bit for bit."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from bi_inductor.commands import script
from bi_inductor.commands.reporting import CommandError, progress

SUMMARY = "Run a function at several batch sizes and count rows whose bits change, beside stock Inductor."
EXAMPLE = f"""example:
  python -m bi_inductor check model.py:step --batch 1,2,3,7,31,64

{script.FUNCTION_HELP} Inputs are made once, for the largest batch; every tensor with that many rows is cut to the
others. Each row is compared with the same row computed alone. It runs on the device of the inputs.
Exit code 1: refused, or a row changed under batchinv (the first op that parts is named)."""

_BACKENDS = ("batchinv", "inductor", "eager")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    script.add_function(parser)
    script.add_batches(parser, "1,2,3,7,31,64")
    parser.add_argument(
        "--backend", default="batchinv,inductor", help=f"of {', '.join(_BACKENDS)} (default: %(default)s)"
    )
    parser.add_argument("--unproven", action="store_true", help="compile stock lowerings of what has no form")


@dataclasses.dataclass(frozen=True)
class _Answer:
    """Rows that changed at each batch size under one backend, and the first op that parts."""

    backend: str
    changed: dict[int, int]
    first: str = ""


def run(options: argparse.Namespace) -> int:
    """Count changed rows for each backend; 1 if batchinv changed one."""
    batches = script.batches(options.batch)
    backends = options.backend.split(",")
    unknown = [name for name in backends if name not in _BACKENDS]
    if unknown:
        raise CommandError(f"unknown backend {unknown[0]!r}: take one of {', '.join(_BACKENDS)}")
    loaded = script.load(options.function)
    inputs = loaded.inputs(max(batches))
    answers = [_check(loaded, inputs, batches, backend, options) for backend in dict.fromkeys(backends)]
    changed = any(a.backend == "batchinv" and sum(a.changed.values()) for a in answers)
    if options.json:
        backends = [dataclasses.asdict(answer) for answer in answers]
        print(json.dumps({"batchinv_changed": changed, "backends": backends}))
    else:
        _show(answers)
    return 1 if changed else 0


def _check(
    loaded: script.Script,
    inputs: tuple[Any, ...],
    batches: list[int],
    backend: str,
    options: argparse.Namespace,
) -> _Answer:
    import torch

    from bi_inductor.testing import changed_rows_over_batches

    progress(f"{backend} at batch {', '.join(map(str, batches))}, and every row alone")
    settings = {"batchinv.unproven": "warn"} if options.unproven and backend == "batchinv" else None
    largest = max(batches)
    rows = [x for x in inputs if _is_rows(x, largest)]
    if not rows:
        raise CommandError(f"{loaded.where}: no input is a tensor of {largest} rows")

    def with_all_inputs(*parts: Any) -> Any:
        given = iter(parts)
        return compiled(*(next(given) if _is_rows(x, largest) else x for x in inputs))

    with loaded.failures(largest), torch.no_grad():
        torch._dynamo.reset()
        compiled = (
            loaded.function
            if backend == "eager"
            else torch.compile(loaded.function, backend=backend, options=settings)
        )
        changed = changed_rows_over_batches(with_all_inputs, rows, batches)
        worst = max(changed, key=changed.__getitem__)
        first = _first_op(loaded, inputs, backend, settings, worst) if changed[worst] else ""
    return _Answer(backend, changed, first)


def _is_rows(x: Any, batch: int) -> bool:
    import torch

    return isinstance(x, torch.Tensor) and x.ndim > 0 and x.shape[0] == batch


def _first_op(loaded: script.Script, inputs: tuple[Any, ...], backend: str, settings: Any, batch: int) -> str:
    from bi_inductor.comparison import compare
    from bi_inductor.variants import Variant

    progress(f"looking for the first op that changes under {backend}")
    largest = next(x.shape[0] for x in inputs if hasattr(x, "shape"))
    for row in range(min(batch, largest)):
        alone = Variant(loaded.function, backend, slice(row, row + 1), options=settings)
        together = Variant(loaded.function, backend, slice(0, batch), options=settings)
        compared = compare(alone, together, *inputs)
        if not compared:
            return f"row {row} alone and in a batch of {batch}: {compared}"
    return "no op: with all intermediate results kept nothing changes"


def _show(answers: list[_Answer]) -> None:
    batches = list(answers[0].changed)
    print(f"{'rows that changed':18}" + "".join(f"{batch:>8}" for batch in batches) + "   <- batch")
    for answer in answers:
        print(f"{answer.backend:18}" + "".join(f"{answer.changed[batch]:>8}" for batch in batches))
    for answer in answers:
        if answer.first:
            print(f"\n{answer.backend}: {answer.first}")
