"""Eager code beside the graphs keeps no promise; where Dynamo cut a function, or gave it up, the user is told once."""

from __future__ import annotations

import functools
import os
import traceback
import warnings
from collections.abc import Sequence
from types import CodeType
from typing import Any

import torch

from .errors import BatchInvarianceError

PADDING = (
    "pad the sequences (torch.nn.utils.rnn.pad_sequence) and pass them as a tensor: padding behind a row's end "
    "changes no bit before it"
)


def report_graph_break(reason: Any) -> None:
    """Warn if ``reason``, a Dynamo GraphCompileReason or None, is one for going back to Python; once for each line."""
    if reason is not None and getattr(reason, "graph_break", False):
        _warn_of_break(_where(reason.user_stack), _first_line(reason.reason), _remedy(reason.user_stack))


def report_skipped_function(code: CodeType, error: Exception) -> None:
    """Warn that Dynamo gave up a whole function, which then runs eagerly; once for each function."""
    stack = getattr(error, "real_stack", None) or ()
    function = f"{code.co_filename}:{code.co_firstlineno}: {code.co_name}"
    _warn_of_function(function, _where(stack), _first_line(error), _remedy(stack))


def packed_refusal(error: Exception) -> BatchInvarianceError | None:
    """Dynamo fails where it traces sequences whose lengths it cannot know; None if it failed at something else."""
    stack = getattr(error, "real_stack", None) or ()
    if not _is_recurrent(stack):
        return None
    return BatchInvarianceError("a PackedSequence", "its batch sizes are data", PADDING, _where(stack))


def _where(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line that is not torch's own."""
    own = os.path.dirname(torch.__file__) + os.sep
    theirs = [frame for frame in stack if not frame.filename.startswith(own)] or stack
    return f"{theirs[-1].filename}:{theirs[-1].lineno}: {theirs[-1].line}" if theirs else "an unknown line"


def _first_line(reason: object) -> str:
    return str(reason).strip().partition("\n")[0]


def _remedy(stack: Sequence[traceback.FrameSummary]) -> str:
    return (
        f" A recurrent layer of a PackedSequence is not compiled: {PADDING}." if _is_recurrent(stack) else ""
    )


def _is_recurrent(stack: Sequence[traceback.FrameSummary]) -> bool:
    """Whether Dynamo stopped in a recurrent layer, or in what packs and pads for one."""
    files = tuple(os.path.join("torch", "nn", folder, "rnn.py") for folder in ("modules", "utils"))
    return any(frame.filename.endswith(files) for frame in stack)


@functools.cache
def _warn_of_break(where: str, reason: str, remedy: str) -> None:
    warnings.warn(
        f"graph break at {where} ({reason}): what runs eagerly there, before the next graph, is not "
        f"batch-invariant by this backend. torch.compile(..., fullgraph=True) makes it an error.{remedy}",
        stacklevel=2,
    )


@functools.cache
def _warn_of_function(function: str, where: str, reason: str, remedy: str) -> None:
    warnings.warn(
        f"{function} runs eagerly as a whole, because of {where} ({reason}): nothing that it computes itself is "
        f"batch-invariant by this backend. torch.compile(..., fullgraph=True) makes it an error.{remedy}",
        stacklevel=2,
    )
