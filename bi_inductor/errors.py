"""One class per mistake a user can make; each message says what to do instead."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from types import FrameType

from torch._dynamo.exc import ShortenTraceback


class BatchInvarianceError(ShortenTraceback):
    """An op cannot be put in canonical form, so the graph is refused instead of compiled.

    Attributes: ``op`` (name of the op), ``reason``, ``remedy``, ``source`` (the user's source line, or None).
    A kind of Dynamo error, so that ``torch.compile`` hands it to the user as it is.
    """

    def __init__(self, op: str, reason: str, remedy: str, source: str | None = None) -> None:
        self.op, self.reason, self.remedy, self.source = op, reason, remedy, source
        where = f"\n  where:  {source}" if source else ""
        message = f"batchinv refuses {op}{where}\n  reason: {reason}\n  remedy: {remedy}"
        super().__init__(message, first_useful_frame=None)

    def __reduce__(self) -> tuple[type[BatchInvarianceError], tuple[str | None, ...]]:
        """An error of a worker process reaches its parent with all of its parts."""
        return type(self), (self.op, self.reason, self.remedy, self.source)


class OptionError(ShortenTraceback, ValueError):
    """An entry of ``torch.compile(options=...)`` or ``mode=`` is unknown or would break the contract."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)  # type: ignore[call-arg]


class DeclarationError(ValueError):
    """``declare_invariant`` or ``undeclare`` was given an op or a reason that cannot be taken; the message says why."""


class OrderError(ValueError):
    """``reveal_order`` was given a function whose answers fit no order of additions; the message says which."""


class NotCompiledError(ValueError):
    """A function was to be inspected that Dynamo does not compile; the message names it."""


class MissingDependencyError(ImportError):
    """Something that needs an optional package was asked for without it; the message names the package."""


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Raise our own errors as they are, where Inductor has wrapped them in its own, and with a short traceback."""
    try:
        yield
    except Exception as error:
        ours = _find_ours(error)
        if ours is None:
            raise
        ours.first_useful_frame = _innermost_frame(ours)  # Dynamo leaves out all frames before this one
        raise ours from None


def _innermost_frame(error: BaseException) -> FrameType | None:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1] if frames else None


def _find_ours(error: BaseException | None) -> BatchInvarianceError | OptionError | None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, (BatchInvarianceError, OptionError)):
            return error
        seen.add(id(error))
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return None
