"""Kernels with dots, which are read after they are compiled: a compiler pass must not have moved an addition.

The source of a kernel is verified when it is emitted (``verifier``). Triton's passes then rewrite it, and for products
they do not promise to keep the order of additions; ``ttgir`` says what is looked for. It takes milliseconds per kernel.
Emitted templates import this module in the place of ``triton_heuristics``, whose other names it passes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.hints import HeuristicType
from torch._inductor.runtime.triton_heuristics import CachingAutotuner, Config

from ..errors import BatchInvarianceError
from ..ttgir import wrong_sums


def __getattr__(name: str) -> Any:
    return getattr(triton_heuristics, name)


class CheckedKernel(CachingAutotuner):
    """A kernel that is refused if its products are not added in ascending k from zero."""

    def _precompile_config(self, cfg: Config) -> Any:
        result = super()._precompile_config(cfg)
        wrong = wrong_sums(*(_ir(result.kernel, kind) for kind in ("ttgir", "ttir")))
        if wrong:
            raise BatchInvarianceError(
                f"the compiled kernel {self.inductor_meta.get('kernel_name')} ({cfg})",
                f"its GPU IR has {wrong[0]}" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""),
                "please report the graph: this is a bug of batchinv or of Triton, and nothing was run",
            )
        return result


def _ir(kernel: Any, kind: str) -> str:
    """The IR that ``kernel`` was made from, "ttir" or "ttgir", or "" where Triton was told to keep binaries only.

    A kernel for Inductor's own launcher knows its cubin's place alone, beside which Triton left the IR.
    """
    if hasattr(kernel, "asm"):
        return kernel.asm.get(kind, "")
    file = Path(kernel.cubin_path).with_suffix(f".{kind}")
    return file.read_text() if file.exists() else ""


def template(
    num_stages: int,
    num_warps: int,
    triton_meta: dict[str, Any],
    inductor_meta: dict[str, Any],
    filename: str | None = None,
    **_: Any,
) -> Any:
    """Decorator of emitted templates with one configuration, in the place of ``triton_heuristics.template``."""
    return triton_heuristics.cached_autotune(
        None,
        [Config({}, num_warps=num_warps, num_stages=num_stages)],
        triton_meta=triton_meta,
        inductor_meta=inductor_meta,
        heuristic_type=HeuristicType.TEMPLATE,
        filename=filename,
        caching_autotuner_cls=CheckedKernel,
    )
