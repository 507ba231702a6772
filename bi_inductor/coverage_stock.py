"""Which ops stock Inductor hands to ATen: what it lowers without one of these should be canonical here."""

from __future__ import annotations

import types
from typing import Any
from unittest import mock

from bi_inductor.coverage_cases import Case


def fallbacks(case: Case, backward: bool = False) -> tuple[str, ...] | None:
    """The ATen kernels that stock Inductor's code for ``case`` would call; None if it generates none.

    ``backward``: those of the gradients too. Matrix products and convolutions of a library do not count: stock chooses
    these. Nothing is compiled or run.
    """
    import torch._functorch.config
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    lowered: list[list[str]] = []

    def note(graph: Any) -> Any:
        graph.codegen()
        lowered.append([_name(operation) for operation in graph.operations if _is_fallback(operation)])
        return types.SimpleNamespace(call=_stop, __file__="<lowered>")

    torch._dynamo.reset()
    inputs = [x.requires_grad_(backward and x.is_floating_point()) for x in case.arguments(0, 2)]
    with (
        mock.patch.object(GraphLowering, "compile_to_module", note),
        config.patch(fx_graph_cache=False, compile_threads=1),
        torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True),
    ):
        try:
            torch.compile(case.call, backend="inductor", fullgraph=True)(*inputs)
        except Exception:  # of _stop, as Inductor wraps it, or that there is no graph
            torch._dynamo.reset()
    return tuple(sorted({name for names in lowered for name in names})) if lowered else None


def _stop(inputs: list[Any]) -> Any:
    raise RuntimeError("lowered, not compiled")


def _is_fallback(operation: Any) -> bool:
    return any("Fallback" in kind.__name__ for kind in type(operation).__mro__)


def _name(operation: Any) -> str:
    return str(getattr(operation, "op_overload", None) or type(operation).__name__)
