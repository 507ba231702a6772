"""Command line: ``python -m bi_inductor`` (installed as ``batchinv``).

Exit codes: 0 done; 1 the function is not batch-invariant (refused, or its fingerprints or orders differ); 2 the
command cannot be carried out as given (one line on stderr says why).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bi_inductor import __version__, order_command
from bi_inductor.errors import BatchInvarianceError, MissingDependencyError, OptionError

_INSPECT_EXAMPLE = """example:
  model.py:   def step(x): return torch.softmax(x @ weight, -1)
              def example_inputs(batch): return (torch.randn(batch, 512),)
  command:    python -m bi_inductor inspect model.py:step --batch 1,64 --target sm_90

FUNCTION is a function or an nn.Module. Its inputs come from FUNCTION_inputs(batch) or example_inputs(batch), as a
tuple (or a single tensor). No GPU is needed."""
_VERSIONS_EXAMPLE = "example:\n  python -m bi_inductor versions --json"


class CommandError(Exception):
    """The command cannot be carried out as given; the message is one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (CommandError, OptionError, MissingDependencyError) as error:
        print(f"batchinv: {_one_line(error)}", file=sys.stderr)
        return 2
    except BatchInvarianceError as error:
        print(str(error).split("\n\n")[0], file=sys.stderr)  # Dynamo appends advice for its own developers
        return 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="batchinv", description="Batch-invariant torch.compile: look inside."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], text: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--json", action="store_true", help="print one JSON object")
        added.set_defaults(command=run)
        return added

    inspect = command(
        "inspect", _inspect, "Show generated code, verdicts and fingerprints of a function.", _INSPECT_EXAMPLE
    )
    inspect.add_argument("function", metavar="FILE.py:FUNCTION")
    inspect.add_argument(
        "--batch", default="1,64", help="batch sizes, comma-separated (default: %(default)s)"
    )
    inspect.add_argument("--target", default="sm_90", help="cpu, sm_80, sm_86, sm_89, sm_90 or sm_100")
    inspect.add_argument("--dynamic", action="store_true", help="compile with dynamic shapes")
    inspect.add_argument("--backward", action="store_true", help="training: forward and backward graphs")
    order = command(
        "order", _order, "Measure and draw the order in which sums are added.", order_command.EXAMPLE
    )
    order_command.add_arguments(order)
    command("versions", _versions, "Show the versions that results depend on.", _VERSIONS_EXAMPLE)
    return parser


def _inspect(options: argparse.Namespace) -> int:
    from bi_inductor.inspection import Inspection, inspect
    from bi_inductor.targets import find_target

    if options.target != "cpu":
        find_target(options.target)
    batches = _batches(options.batch)
    function, example_inputs = _load(options.function)
    inspections: dict[int, Inspection] = {}
    for batch in batches:
        print(f"batchinv: inspecting at batch {batch} ...", file=sys.stderr, flush=True)
        try:
            inputs = example_inputs(batch)
            inputs = inputs if isinstance(inputs, tuple) else (inputs,)
            with _quiet_torch():
                inspections[batch] = inspect(
                    function,
                    *inputs,
                    target=options.target,
                    dynamic=options.dynamic,
                    backward=options.backward,
                )
        except (BatchInvarianceError, OptionError, MissingDependencyError):
            raise
        except Exception as error:  # the user's function or inputs; anything can come out of them
            raise CommandError(
                f"{options.function} fails at batch {batch}: {_one_line(error)[:300]}"
            ) from error
    _show(inspections, as_json=options.json)
    return 0 if len({inspection.fingerprint for inspection in inspections.values()}) == 1 else 1


def _order(options: argparse.Namespace) -> int:
    batches = _batches(options.batch)
    try:
        with _quiet_torch():
            return order_command.run(options, batches)
    except (ValueError, OSError) as error:  # an argument, a sum that has no one order, a file
        raise CommandError(_one_line(error)) from error


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """What fails is said in one line of ours; torch's own logs come back with TORCH_LOGS."""
    before = logging.root.manager.disable
    if "TORCH_LOGS" not in os.environ:
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


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


def _batches(text: str) -> list[int]:
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise CommandError(f"--batch takes positive integers separated by commas, not {text!r}")
    return batches


def _load(where: str) -> tuple[Callable[..., Any], Callable[[int], Any]]:
    """The function and the maker of its inputs that FILE.py:FUNCTION names."""
    path_name, _, name = where.rpartition(":")
    path = Path(path_name)
    if not path_name or not name:
        raise CommandError(f"expected FILE.py:FUNCTION, not {where!r}")
    if not path.is_file():
        raise CommandError(f"there is no file {path_name}")
    module = _import(path)
    function = getattr(module, name, None)
    if not callable(function):
        defined = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise CommandError(f"{path} defines no function {name!r}; it defines {', '.join(defined) or 'none'}")
    inputs = getattr(module, f"{name}_inputs", None) or getattr(module, "example_inputs", None)
    if not callable(inputs):
        raise CommandError(f"{path} defines neither {name}_inputs(batch) nor example_inputs(batch)")
    return function, inputs


def _import(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise CommandError(f"cannot import {path}: {type(error).__name__}: {_one_line(error)}") from error
    finally:
        sys.path.pop(0)
    return module


def _versions(options: argparse.Namespace) -> int:
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    versions = {
        "batchinv": __version__,
        "torch": str(torch.__version__),
        "triton": triton_version,
        "python": platform.python_version(),
    }
    print(json.dumps(versions) if options.json else "\n".join(f"{k:10}{v}" for k, v in versions.items()))
    return 0
