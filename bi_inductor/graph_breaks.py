"""Eager code between two graphs keeps no promise; where Dynamo cut a function, the user is told once."""

from __future__ import annotations

import functools
import warnings

from torch.fx import GraphModule


def report_graph_break(gm: GraphModule) -> None:
    """Warn if ``gm`` ends where Dynamo went back to Python, once for each line."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return
    frame = reason.user_stack[-1] if reason.user_stack else None
    where = f"{frame.filename}:{frame.lineno}: {frame.line}" if frame else "an unknown line"
    _warn_once(where, str(reason.reason).strip().partition("\n")[0])


@functools.cache
def _warn_once(where: str, reason: str) -> None:
    warnings.warn(
        f"graph break at {where} ({reason}): what runs eagerly there, before the next graph, is not "
        "batch-invariant by this backend. torch.compile(..., fullgraph=True) makes it an error.",
        stacklevel=2,
    )
