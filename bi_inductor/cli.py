"""Command line: ``python -m bi_inductor`` (installed as ``batchinv``); one module per command in ``commands/``.

Exit codes: 0 done; 1 the answer is no (refused, fingerprints, bits or orders that differ); 2 the command cannot be
carried out as given (one line on stderr says why).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence

from bi_inductor import commands
from bi_inductor.commands.reporting import CommandError, one_line
from bi_inductor.errors import BatchInvarianceError, MissingDependencyError, OptionError

_EXIT_CODES = """exit codes: 0 done; 1 the answer is no (refused, fingerprints, bits or orders that differ);
2 the command cannot be carried out as given"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (CommandError, OptionError, MissingDependencyError) as error:
        print(f"batchinv: {one_line(error)}", file=sys.stderr)
        return 2
    except BatchInvarianceError as error:
        print(str(error).split("\n\n")[0], file=sys.stderr)  # Dynamo appends advice for its own developers
        if options.json:
            refused = {name: getattr(error, name) for name in ("op", "source", "reason", "remedy")}
            print(json.dumps({"refused": refused}, indent=1))
        return 1
    except BrokenPipeError:  # the reader has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="batchinv",
        description="Batch-invariant torch.compile: look inside.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in commands.NAMES:
        module = importlib.import_module(f"{commands.__name__}.{name}")
        command = subparsers.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY,
            epilog=f"{module.EXAMPLE}\n\n{_EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="print one JSON object")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
