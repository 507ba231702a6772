"""The device that a graph is traced for, where it is not the one that its tensors are on.

Training graphs for a GPU that is not there are traced on the CPU and moved before they are lowered (``dry_run.py``).
What a pass decides by device, it has to decide by where the graph will run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_moved_to: ContextVar[str | None] = ContextVar("what graphs traced on the CPU are moved to", default=None)


def device_type(x: torch.Tensor) -> str:
    """ "cuda", "cpu" ...: where the graph with ``x`` in it will run."""
    return _moved_to.get() or x.device.type if x.device.type == "cpu" else x.device.type


@contextlib.contextmanager
def moved_to(device: str) -> Iterator[None]:
    """Graphs traced on the CPU in this context will run on ``device`` ("cuda:0")."""
    token = _moved_to.set(device.split(":")[0])
    try:
        yield
    finally:
        _moved_to.reset(token)
