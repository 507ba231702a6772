"""``rand`` and ``randn`` of Triton kernels by position alone; see ``runtime/draws.py``."""

from __future__ import annotations

from typing import Any

from torch._inductor.codegen.triton import TritonKernelOverrides

IMPORT = "from bi_inductor.runtime import draws\n"


class DrawsByPosition(TritonKernelOverrides):
    """Inductor's ops, except for random floats. (Random integers are drawn by position already.)"""

    @staticmethod
    def rand(seed: Any, offset: Any) -> str:
        return f"draws.uniform({seed}, ({offset}).to(tl.uint32))"

    @staticmethod
    def randn(seed: Any, offset: Any) -> str:
        return f"draws.normal({seed}, ({offset}).to(tl.uint32))"
