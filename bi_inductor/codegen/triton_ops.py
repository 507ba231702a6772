"""Inductor's elementwise ops in Triton, but for those whose value would follow a schedule.

Random floats are drawn by position alone (``runtime/draws.py``); random integers already are. A masked load gives
``other`` where the mask is false even if the kernel has just computed what it loads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor.codegen.triton import TritonKernelOverrides
from torch._inductor.virtualized import V

IMPORT = "from bi_inductor.runtime import draws\n"


class TritonOps(TritonKernelOverrides):
    """What the kernels of ``triton.py`` and all templates emit an op of a loop body with."""

    @staticmethod
    def rand(seed: Any, offset: Any) -> str:
        return f"draws.uniform({seed}, ({offset}).to(tl.uint32))"

    @staticmethod
    def randn(seed: Any, offset: Any) -> str:
        return f"draws.normal({seed}, ({offset}).to(tl.uint32))"

    @staticmethod
    def masked(mask: Any, body: Callable[[], Any], other: Any) -> Any:
        """``body()`` where ``mask`` is true, else ``other``.

        Where the body is a load, Inductor leaves ``other`` to ``tl.load``, and emits none for what the same kernel has
        stored (2.11 to 2.13): the mask was lost if producer and consumer were fused, and only then.
        """
        is_in_register = any(name in V.kernel.cse.store_cache for name in _loaded(body))
        value = TritonKernelOverrides.masked(mask, body, other)
        if not is_in_register:
            return value
        constant = bool(other) if value.bounds.is_bool else other
        return V.ops.where(mask, value, V.ops.constant(constant, value.dtype))


def _loaded(body: Any) -> list[str]:
    """Names of the buffers whose loads are all that ``body``, of Inductor's loop IR, returns."""
    (output,) = body.graph.find_nodes(op="output")
    return [argument.args[1] for argument in output.args if argument.target == "load"]
