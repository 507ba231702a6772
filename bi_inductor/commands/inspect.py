"""``python -m bi_inductor inspect``: generated code, verdicts and fingerprints of a function at several batches."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from bi_inductor.commands import script
from bi_inductor.commands.reporting import CommandError, progress
from bi_inductor.commands.side_by_side import side_by_side

if TYPE_CHECKING:
    from bi_inductor.inspection import Inspection
    from bi_inductor.offline import CompiledKernel

SUMMARY = "Show generated code, verdicts and fingerprints of a function."
EXAMPLE = f"""example:
  model.py:   def step(x): return torch.softmax(x @ weight, -1)
              def example_inputs(batch): return (torch.randn(batch, 512),)
  command:    python -m bi_inductor inspect model.py:step --batch 1,64 --target sm_90

{script.FUNCTION_HELP} No GPU is needed.
Where the code differs between the first batch size and another, both are shown side by side (the tile may differ: it
is free; the fingerprint may not). Exit code 1: refused, or the fingerprints differ."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    script.add_function(parser)
    script.add_batches(parser, "1,64")
    script.add_target(parser)
    parser.add_argument(
        "--resources", action="store_true", help="compile to cubins: registers, shared memory, spills"
    )


def run(options: argparse.Namespace) -> int:
    """Inspect at every batch size; 1 if the fingerprints differ."""
    from bi_inductor.inspection import inspect

    script.check_target(options.target)
    batches = script.batches(options.batch)
    loaded = script.load(options.function)
    inspections: dict[int, Inspection] = {}
    for batch in batches:
        progress(f"inspecting at batch {batch}")
        inputs = loaded.inputs(batch)
        with loaded.failures(batch):
            inspections[batch] = inspect(
                loaded.function,
                *inputs,
                target=options.target,
                dynamic=options.dynamic,
                backward=options.backward,
            )
    resources = _resources(inspections, options.target) if options.resources else {}
    _show(inspections, resources, as_json=options.json)
    return 0 if len({inspection.fingerprint for inspection in inspections.values()}) == 1 else 1


def _resources(inspections: dict[int, Inspection], target: str) -> dict[int, list[CompiledKernel]]:
    from bi_inductor.offline import compile_offline

    if target == "cpu":
        raise CommandError("--resources counts registers and shared memory of a GPU: give a GPU as --target")
    made = {}
    for batch, inspection in inspections.items():
        progress(f"compiling {len(inspection.kernels)} kernels to cubins at batch {batch}")
        made[batch] = compile_offline(inspection, target)
    return made


def _show(
    inspections: dict[int, Inspection], resources: dict[int, list[CompiledKernel]], *, as_json: bool
) -> None:
    fingerprints = {batch: inspection.fingerprint for batch, inspection in inspections.items()}
    (first_batch, first), *others = inspections.items()
    same = len(set(fingerprints.values())) == 1
    if as_json:
        report = {"same_fingerprint": same, "fingerprints": fingerprints, **first.to_json()}
        if resources:
            report["resources"] = {batch: [k.resources() for k in made] for batch, made in resources.items()}
        print(json.dumps(report, indent=2))
        return
    for batch, fingerprint in fingerprints.items():
        print(f"batch {batch:>6}: fingerprint {fingerprint}")
    print("equal at every batch size\n" if same else "THE FINGERPRINTS DIFFER\n")
    for batch, made in resources.items():
        print(f"batch {batch}:", *(f"  {kernel}" for kernel in made), sep="\n")
    print(first)
    for batch, other in others:
        print(f"\n{side_by_side(first, other, (f'batch {first_batch}', f'batch {batch}'))}")
