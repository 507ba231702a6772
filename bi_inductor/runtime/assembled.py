"""Kernels without the additions that ptxas loses.

ptxas of CUDA 12.8 and 12.9, which Triton 3.6 to 3.8 bring, is wrong about ``add.s16x2``, the addition of two pairs of
16-bit integers that Hopper has: where only one of the two sums is used by what follows and the other operand is a
constant, it may add zero. At which level it does differs from kernel to kernel; at ``--opt-level 1`` too. LLVM writes
such additions where a thread has two or more elements whose places along an axis are small numbers, as in
``(1 + x0) // 2 % 2`` of a scan; so some tiles of one source load from wrong places, and others do not. In a kernel that
has them each pair is taken apart before it is assembled, which changes nothing else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch._inductor.runtime.triton_heuristics import CachingAutotuner, DebugAutotuner

_PAIR = "add.s16x2"
_ADDITION = re.compile(r"^[ \t]*add\.s16x2[ \t]+([^,;]+),[ \t]*([^,;]+),[ \t]*([^,;]+);", re.MULTILINE)
_APART = """\t{{
\t.reg .b32 a, b;
\t.reg .b16 a0, a1, b0, b1;
\tmov.b32 a, {1};
\tmov.b32 b, {2};
\tmov.b32 {{a0, a1}}, a;
\tmov.b32 {{b0, b1}}, b;
\tadd.s16 a0, a0, b0;
\tadd.s16 a1, a1, b1;
\tmov.b32 {0}, {{a0, a1}};
\t}}"""
#: The instruction of the machine, where no PTX is left to be read; at level 0 ptxas leaves it alone.
_INSTRUCTION = "VIADD.16x2"
_UNCHANGED = "--opt-level 0"


class Assembled:
    """Mixed into Inductor's autotuners."""

    _options: dict[str, str] = {}  # noqa: RUF012  # of the compile that runs

    def _create_compile_options(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super()._create_compile_options(*args, **kwargs) | self._options  # type: ignore[misc]

    def _precompile_config(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._precompile_config(*args, **kwargs)  # type: ignore[misc]
        options = mended(result.kernel)
        if not options:
            return result
        self._options = options
        try:
            return super()._precompile_config(*args, **kwargs)  # type: ignore[misc]
        finally:
            del self._options


class AssembledKernel(Assembled, CachingAutotuner):
    """The kernel of an emitted decorator."""


class AssembledDebugKernel(Assembled, DebugAutotuner):
    """The same where Inductor's ``profile_bandwidth`` is set."""


_CLASSES = {CachingAutotuner: AssembledKernel, DebugAutotuner: AssembledDebugKernel}


def assembled(decorator: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``decorator`` of ``triton_heuristics``, which names the class of its kernels itself, with kernels of ours."""

    def decorate(function: Any) -> Any:
        stock = decorator(function)
        if not isinstance(stock, CachingAutotuner):
            return stock  # of Triton's interpreter: nothing is assembled
        kernel = object.__new__(_CLASSES[type(stock)])
        vars(kernel).update(vars(stock))
        return kernel

    return decorate


def mended(kernel: Any) -> dict[str, str]:
    """Triton's options for compiling ``kernel`` again so that no addition is lost; none if it has no such addition."""
    ptx = intermediate(kernel, "ptx")
    if not ptx:
        return {"ptx_options": _UNCHANGED} if _INSTRUCTION in _disassembled(kernel) else {}
    if _PAIR not in ptx:
        return {}
    taken_apart = apart(ptx)
    return {"ptx_options": _UNCHANGED} if _PAIR in taken_apart else {"ir_override": _stored(taken_apart)}


def apart(ptx: str) -> str:
    """``ptx`` with two additions of 16 bits in the place of each of a pair; one under a predicate is left."""
    return _ADDITION.sub(lambda found: _APART.format(*found.groups()), ptx)


def _stored(ptx: str) -> str:
    """Path of ``ptx`` in Triton's cache."""
    from triton.runtime.cache import get_cache_manager

    key = hashlib.sha256(ptx.encode()).hexdigest()
    return str(get_cache_manager(key).put(ptx, "pairs_apart.ptx", binary=False))


def intermediate(kernel: Any, kind: str) -> str:
    """What ``kernel`` was made from, "ttir", "ttgir" or "ptx", or "" where Triton was told to keep binaries only.

    A kernel for Inductor's own launcher knows its cubin's place alone, beside which Triton left the others.
    """
    if hasattr(kernel, "asm"):
        return kernel.asm.get(kind, "")
    file = Path(kernel.cubin_path).with_suffix(f".{kind}")
    return file.read_text() if file.exists() else ""


def _disassembled(kernel: Any) -> str:
    """The machine's instructions; "" for what is no kernel of an NVIDIA GPU."""
    from triton.tools.disasm import get_sass

    if not hasattr(kernel, "asm"):
        return get_sass(Path(kernel.cubin_path).read_bytes())
    return get_sass(kernel.asm["cubin"]) if "cubin" in kernel.asm else ""
