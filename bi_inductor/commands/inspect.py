"""``python -m bi_inductor inspect``: generated code, verdicts and fingerprints of a function at several batches."""

from __future__ import annotations

import argparse
import json
from typing import Any

from bi_inductor.commands import script
from bi_inductor.commands.reporting import progress

SUMMARY = "Show generated code, verdicts and fingerprints of a function."
EXAMPLE = f"""example:
  model.py:   def step(x): return torch.softmax(x @ weight, -1)
              def example_inputs(batch): return (torch.randn(batch, 512),)
  command:    python -m bi_inductor inspect model.py:step --batch 1,64 --target sm_90

{script.FUNCTION_HELP} No GPU is needed.
Exit code 1: refused, or the fingerprints differ."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    script.add_function(parser)
    script.add_batches(parser, "1,64")
    parser.add_argument("--target", default="sm_90", help="cpu, sm_80, sm_86, sm_89, sm_90 or sm_100")
    parser.add_argument("--dynamic", action="store_true", help="compile with dynamic shapes")
    parser.add_argument("--backward", action="store_true", help="training: forward and backward graphs")


def run(options: argparse.Namespace) -> int:
    """Inspect at every batch size; 1 if the fingerprints differ."""
    from bi_inductor.inspection import Inspection, inspect
    from bi_inductor.targets import find_target

    if options.target != "cpu":
        find_target(options.target)
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
    _show(inspections, as_json=options.json)
    return 0 if len({inspection.fingerprint for inspection in inspections.values()}) == 1 else 1


def _show(inspections: dict[int, Any], *, as_json: bool) -> None:
    fingerprints = {batch: inspection.fingerprint for batch, inspection in inspections.items()}
    first = next(iter(inspections.values()))
    same = len(set(fingerprints.values())) == 1
    if as_json:
        report = {"same_fingerprint": same, "fingerprints": fingerprints, **first.to_json()}
        print(json.dumps(report, indent=2))
        return
    for batch, fingerprint in fingerprints.items():
        print(f"batch {batch:>6}: fingerprint {fingerprint}")
    print("equal at every batch size\n" if same else "THE FINGERPRINTS DIFFER\n")
    print(first)
