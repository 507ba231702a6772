"""``python -m bi_inductor certify``: certificates of a function at several batch sizes, compared with each other."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from bi_inductor.commands import script
from bi_inductor.commands.reporting import CommandError, one_line, progress

if TYPE_CHECKING:
    from bi_inductor.certification import Certification
    from bi_inductor.measurement import Measurement

SUMMARY = "Certify that a function computes one thing at every batch size, without running it."
EXAMPLE = f"""examples:
  python -m bi_inductor certify model.py:step --batch 1,64 --target sm_90
  python -m bi_inductor certify train.py:step --batch 32 --backward --output trained.json
  python -m bi_inductor certify serve.py:step --batch 1 --against trained.json
  python -m bi_inductor certify serve.py:step --batch 1 --measured h100.json

{script.FUNCTION_HELP} No GPU is needed. Each batch size is compiled as it is and with the size as a symbol.
Exit code 1: refused, digests differ, the batch became a constant, or the other certification computes other bits."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    script.add_function(parser)
    script.add_batches(parser, "1,64")
    script.add_target(parser)
    parser.add_argument(
        "--batch-dim", type=int, default=0, help="the batch in every input (default: %(default)s)"
    )
    parser.add_argument("--against", metavar="FILE.json", type=Path, help="compare with what --output wrote")
    parser.add_argument("--output", metavar="FILE.json", type=Path, help="write the first certification here")
    parser.add_argument(
        "--ir", action="store_true", help="rebuild orders from the compiler's IR too (GPU targets)"
    )
    parser.add_argument(
        "--measured", metavar="FILE.json", type=Path, help="what doctor --json wrote on the target's GPU"
    )


def run(options: argparse.Namespace) -> int:
    """Certify at every batch size; 1 if the digests differ or the batch is not free."""
    script.check_target(options.target)
    batches = script.batches(options.batch)
    other = _read(options.against) if options.against else None
    if options.output and not options.output.resolve().parent.is_dir():
        raise CommandError(f"there is no directory {options.output.parent} to write {options.output.name} to")
    measured = _read_measurement(options.measured) if options.measured else None
    loaded = script.load(options.function)
    made = {batch: _certify(loaded, batch, options, measured) for batch in batches}
    if options.output:
        options.output.write_text(made[batches[0]].to_json(), encoding="utf-8")
    differences = _differences(made, other, options.against)
    _show(made, differences, as_json=options.json)
    return 1 if differences else 0


def _certify(
    loaded: script.Script, batch: int, options: argparse.Namespace, measured: Measurement | None
) -> Certification:
    from bi_inductor.certification import certify

    progress(f"certifying at batch {batch}")
    inputs = loaded.inputs(batch)
    with loaded.failures(batch):
        return certify(
            loaded.function,
            *inputs,
            batch_dim=options.batch_dim,
            target=options.target,
            dynamic=options.dynamic,
            backward=options.backward,
            ir=options.ir,
            measured=measured,
        )


def _read_measurement(path: Path) -> Measurement:
    from bi_inductor.measurement import Measurement

    try:
        return Measurement.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {path}: {one_line(error)}") from error


def _read(path: Path) -> Certification:
    from bi_inductor.certification import Certification

    try:
        return Certification.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {path}: {one_line(error)}") from error


def _differences(made: dict[int, Certification], other: Certification | None, path: Path | None) -> list[str]:
    """What keeps the digests from being one, each with the node at which two certificates part."""
    first_batch, first = next(iter(made.items()))
    found = [
        f"batch {first_batch} against {batch}: {first.same_numerics(each)}"
        for batch, each in made.items()
        if each.digest != first.digest
    ]
    found += [
        f"batch {batch}: {each.batch.reason}"
        for batch, each in made.items()
        if each.batch is not None and not each.batch.holds
    ]
    compared = first.same_numerics(other) if other is not None else True
    return found if compared else [*found, f"against {path}: {compared}"]


def _show(made: dict[int, Certification], differences: list[str], *, as_json: bool) -> None:
    digests = {batch: each.digest for batch, each in made.items()}
    first = next(iter(made.values()))
    if as_json:
        report = {
            "same_digest": len(set(digests.values())) == 1,
            "digests": digests,
            "differences": differences,
        }
        print(json.dumps({**report, "certification": json.loads(first.to_json())}, indent=1))
        return
    for batch, digest in digests.items():
        print(f"batch {batch:>6}: digest {digest}")
    print("\n".join(differences) if differences else "one digest, whatever the batch")
    print(f"\n{first}")
