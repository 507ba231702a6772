"""Every difference between the supported torch versions (>= 2.11, < 2.15), one small function each."""

from __future__ import annotations

from typing import Any

import torch


def inductor_config_defaults() -> dict[str, Any]:
    """Inductor's settings by dotted name, as this torch version knows them."""
    from torch._inductor import config

    return config.get_config_copy()


def mask_name(tree: Any) -> str:
    """The mask variable of an iteration-range root (a method of the root since torch 2.13)."""
    return tree.mask_name() if hasattr(tree, "mask_name") else f"{tree.prefix}mask"


def block_size_name(tree: Any) -> str:
    """The block size of an iteration-range root as emitted (a method of the root since torch 2.13)."""
    return tree.block_size_str() if hasattr(tree, "block_size_str") else f"{tree.prefix.upper()}BLOCK"


def fusion_settings() -> dict[str, Any]:
    """Settings that fuse more. Torch 2.11 reorders loops only after it has given up on the epilogue of a
    matmul with batch dimensions; with the reordering off it fuses. Later versions need nothing."""
    return {"loop_ordering_after_fusion": False} if torch.__version__ < (2, 12) else {}


def branching_kernel() -> Any:
    """The IR node of ``torch.cond`` (a case of ``torch.switch`` since torch 2.14)."""
    from torch._inductor import ir

    return ir.Switch if hasattr(ir, "Switch") else ir.Conditional


def compares_sizes_as_written() -> bool:
    """True where the analysis of tilings takes s*(t - 1) and s*t - s for two sizes, and fails with an assertion.

    Torch 2.13 is the first version known to ask for equal values; ``scope.py`` does no harm to one that does.
    """
    return torch.__version__ < (2, 13)
