"""Kernels with dots, which are read after they are compiled: a compiler pass must not have moved an addition.

The source of a kernel is verified when it is emitted (``verifier``). Triton's passes then rewrite it, and for products
they do not promise to keep the order of additions; ``ttgir`` says what is looked for. It takes milliseconds per kernel.
Emitted templates import this module in the place of ``triton_heuristics``, whose other names it passes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.hints import HeuristicType
from torch._inductor.runtime.triton_heuristics import Config

from ..errors import BatchInvarianceError
from ..ttgir import wrong_sums
from .assembled import AssembledKernel, intermediate


def __getattr__(name: str) -> Any:
    return getattr(triton_heuristics, name)


class CheckedKernel(AssembledKernel):
    """A kernel that is refused if its products are not added in ascending k from zero."""

    def _precompile_config(self, cfg: Config) -> Any:
        result = super()._precompile_config(cfg)
        wrong = wrong_sums(*(intermediate(result.kernel, kind) for kind in ("ttgir", "ttir")))
        if wrong:
            raise BatchInvarianceError(
                f"the compiled kernel {self.inductor_meta.get('kernel_name')} ({cfg})",
                f"its GPU IR has {wrong[0]}" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""),
                "please report the graph: this is a bug of batchinv or of Triton, and nothing was run",
            )
        return result


_GLUON = threading.RLock()


class GluonKernel(CheckedKernel):
    """Such a kernel in Gluon. Inductor names the class of Triton's sources, where Gluon has another."""

    def _precompile_config(self, cfg: Config) -> Any:
        from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

        stock = triton_heuristics.ASTSource

        def source(fn: Any, *arguments: Any) -> Any:
            return (GluonASTSource if isinstance(fn, GluonJITFunction) else stock)(fn, *arguments)

        with _GLUON, mock.patch.object(triton_heuristics, "ASTSource", source):
            return super()._precompile_config(cfg)


def template(
    num_stages: int,
    num_warps: int,
    triton_meta: dict[str, Any],
    inductor_meta: dict[str, Any],
    filename: str | None = None,
    **_: Any,
) -> Callable[[Any], Any]:
    """Decorator of emitted templates with one configuration, in the place of ``triton_heuristics.template``.

    With Inductor's ``profile_bandwidth`` they are checked and not profiled: its kernels are of another class.
    """
    inductor_meta["profile_bandwidth"] = None

    def decorate(function: Any) -> Any:
        is_gluon = getattr(function, "is_gluon", None)  # the interpreter's functions have none
        decorator: Callable[[Any], Any] = triton_heuristics.cached_autotune(
            None,
            [Config({}, num_warps=num_warps, num_stages=num_stages)],
            triton_meta=triton_meta,
            inductor_meta=inductor_meta,
            heuristic_type=HeuristicType.TEMPLATE,
            filename=filename,
            caching_autotuner_cls=GluonKernel if is_gluon and is_gluon() else CheckedKernel,
        )
        return decorator(function)

    return decorate
