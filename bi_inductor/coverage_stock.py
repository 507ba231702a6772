"""Which ops stock Inductor hands to ATen: what it lowers without one of these should be canonical here."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from bi_inductor.coverage_cases import Case


def fallbacks(case: Case) -> tuple[str, ...] | None:
    """The ATen kernels that stock Inductor's code for ``case`` would call; None if it generates none.

    Matrix products and convolutions of a library do not count: stock chooses these. Nothing is compiled or run.
    """
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    lowered: list[list[str]] = []

    def stop(graph: Any) -> Any:
        lowered.append([_name(operation) for operation in graph.operations if _is_fallback(operation)])
        raise RuntimeError("lowered")

    torch._dynamo.reset()
    with mock.patch.object(GraphLowering, "compile_to_module", stop), config.patch(fx_graph_cache=False):
        try:
            torch.compile(case.call, backend="inductor", fullgraph=True)(*case.arguments(0, 2))
        except Exception:  # "lowered", as Inductor wraps it, or that there is no graph
            torch._dynamo.reset()
    return tuple(sorted({name for names in lowered for name in names})) if lowered else None


def _is_fallback(operation: Any) -> bool:
    return any("Fallback" in kind.__name__ for kind in type(operation).__mro__)


def _name(operation: Any) -> str:
    return str(getattr(operation, "op_overload", None) or type(operation).__name__)
