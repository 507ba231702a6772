"""How a command talks: results on stdout, progress and one-line errors on stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator


class CommandError(Exception):
    """The command cannot be carried out as given: exit code 2; the message becomes one line."""


def one_line(error: BaseException) -> str:
    """The message of ``error`` without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def progress(text: str) -> None:
    """Say on stderr what is about to take a while."""
    print(f"batchinv: {text} ...", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """What fails is said in one line of ours; torch's own logs come back with TORCH_LOGS."""
    before = logging.root.manager.disable
    if "TORCH_LOGS" not in os.environ:
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
