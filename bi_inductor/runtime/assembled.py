"""Kernels that are assembled without the step of ptxas that loses an addition.

ptxas of CUDA 12.8 and 12.9, which Triton 3.6 to 3.8 bring, adds a constant to two 16-bit integers in one register
(``add.s16x2``, on Hopper and later). Where only one of the two sums is used by what follows, it keeps as much of the
constant as that needs, but of the wrong half: zero. LLVM writes such additions where a thread has two elements whose
places along an axis are small numbers, ``(1 + x1) // 2 % 2`` of a scan or a padding; so some tiles of one source load
from wrong places, and others do not. A kernel that has one is assembled again at a lower level, which leaves it whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch._inductor.runtime.triton_heuristics import CachingAutotuner, DebugAutotuner

#: What ptxas gets wrong at its levels 2 and 3; it is right at 1.
_PAIR = re.compile(r"\badd\.[su]16x2\b")
_LEVEL = "--opt-level 1"


class Assembled:
    """Mixed into Inductor's autotuners."""

    _lower_level = False

    def _create_compile_options(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        options = super()._create_compile_options(*args, **kwargs)  # type: ignore[misc]
        if self._lower_level:
            from triton import knobs

            options["ptx_options"] = " ".join(filter(None, (knobs.nvidia.ptxas_options, _LEVEL)))
        return options

    def _precompile_config(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._precompile_config(*args, **kwargs)  # type: ignore[misc]
        if not has_a_lost_addition(intermediate(result.kernel, "ptx")):
            return result
        self._lower_level = True
        try:
            return super()._precompile_config(*args, **kwargs)  # type: ignore[misc]
        finally:
            del self._lower_level


class AssembledKernel(Assembled, CachingAutotuner):
    """The kernel of an emitted decorator."""


class AssembledDebugKernel(Assembled, DebugAutotuner):
    """The same where Inductor's ``profile_bandwidth`` is set."""


_CLASSES = {CachingAutotuner: AssembledKernel, DebugAutotuner: AssembledDebugKernel}


def assembled(decorator: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``decorator`` of ``triton_heuristics``, which names the class of its kernels itself, with kernels of ours."""

    def decorate(function: Any) -> Any:
        stock = decorator(function)
        kernel = object.__new__(_CLASSES[type(stock)])
        vars(kernel).update(vars(stock))
        return kernel

    return decorate


def has_a_lost_addition(ptx: str) -> bool:
    """True if ptxas may lose an addition of ``ptx``; also where Triton was told to keep binaries only."""
    return not ptx or bool(_PAIR.search(ptx))


def intermediate(kernel: Any, kind: str) -> str:
    """What ``kernel`` was made from, "ttir", "ttgir" or "ptx", or "" where Triton was told to keep binaries only.

    A kernel for Inductor's own launcher knows its cubin's place alone, beside which Triton left the others.
    """
    if hasattr(kernel, "asm"):
        return kernel.asm.get(kind, "")
    file = Path(kernel.cubin_path).with_suffix(f".{kind}")
    return file.read_text() if file.exists() else ""
