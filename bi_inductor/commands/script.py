"""What commands take from the user's file: ``FILE.py:FUNCTION``, and its inputs at a batch size."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bi_inductor.commands.reporting import CommandError, one_line, quiet_torch
from bi_inductor.errors import BatchInvarianceError, MissingDependencyError, OptionError

FUNCTION_HELP = """FUNCTION is a function or an nn.Module. Its inputs come from FUNCTION_inputs(batch) or
example_inputs(batch), as a tuple (or a single tensor)."""


@dataclasses.dataclass(frozen=True)
class Script:
    """``function`` of the user's file, and what makes its inputs."""

    where: str
    function: Callable[..., Any]
    make_inputs: Callable[[int], Any]

    def inputs(self, batch: int) -> tuple[Any, ...]:
        """The arguments of the function at one batch size; raises CommandError for what cannot be called."""
        with self.failures(batch):
            inputs = self.make_inputs(batch)
        return inputs if isinstance(inputs, tuple) else (inputs,)

    @contextlib.contextmanager
    def failures(self, batch: int) -> Iterator[None]:
        """Anything that comes out of the user's code becomes one line; what is said of ours stays as it is."""
        try:
            with quiet_torch():
                yield
        except (BatchInvarianceError, OptionError, MissingDependencyError, CommandError):
            raise
        except Exception as error:
            raise CommandError(f"{self.where} fails at batch {batch}: {_said_by(error)[:300]}") from error


def _said_by(error: Exception) -> str:
    """The message in one line; of an error that Dynamo met when it traced, the words of that one alone."""
    text = one_line(error)
    met = re.search(r"got (\w+\((['\"]).+?\2\))", text) if "fake tensor" in text else None
    return met[1] if met else text


def add_function(parser: argparse.ArgumentParser) -> None:
    """The argument that ``load`` reads."""
    parser.add_argument("function", metavar="FILE.py:FUNCTION")


def add_batches(parser: argparse.ArgumentParser, default: str) -> None:
    """The option that ``batches`` reads."""
    parser.add_argument(
        "--batch", default=default, help="batch sizes, comma-separated (default: %(default)s)"
    )


def add_target(parser: argparse.ArgumentParser) -> None:
    """What code is generated for, and how."""
    parser.add_argument("--target", default="sm_90", help="cpu, sm_80, sm_86, sm_89, sm_90 or sm_100")
    parser.add_argument("--dynamic", action="store_true", help="compile with dynamic shapes")
    parser.add_argument("--backward", action="store_true", help="training: forward and backward graphs")


def check_target(target: str) -> None:
    """Raise OptionError for an unknown target, before anything takes time."""
    from bi_inductor.targets import find_target

    if target != "cpu":
        find_target(target)


def batches(text: str) -> list[int]:
    """``1,64`` as numbers; raises CommandError."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise CommandError(f"--batch takes positive integers separated by commas, not {text!r}")
    return list(dict.fromkeys(numbers))


def load(where: str) -> Script:
    """The function and the maker of its inputs that FILE.py:FUNCTION names; raises CommandError."""
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
    return Script(where, function, inputs)


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
        raise CommandError(f"cannot import {path}: {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.path.pop(0)
    return module
