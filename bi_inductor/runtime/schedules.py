"""Tiles of emitted reduction kernels, chosen when the kernel is loaded.

Every tile computes the same TREE form, so what stands here is speed alone; the numbers come from
``benchmarks/reduction_sweep.py`` on an H100 and an H200. Emitted kernels import this module in the place of
``triton_heuristics``, whose other names it passes on; so are tiles with a second spatial axis.
"""

from __future__ import annotations

from typing import Any

from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.hints import HeuristicType, ReductionHint

from .assembled import assembled


def __getattr__(name: str) -> Any:
    return getattr(triton_heuristics, name)


Tile = tuple[int, int, int]  # XBLOCK, R0_BLOCK, num_warps

#: Elements that one thread holds of a contiguous row. More warps would wait for each other in every level of
#: the tree that crosses them (RMSNorm 2048x16384: 38.6 us with 64 elements, 56.5 us with 16).
_PER_THREAD = 32


def _power_of_two_in(value: int, low: int, high: int) -> int:
    return min(high, max(low, 1 << max(0, value - 1).bit_length()))


def persistent_tile(rows: int, length: int, inner: bool) -> Tile:
    """Tile of a kernel that holds whole rows: XBLOCK rows of ``length`` elements (a power of two).

    ``inner``: the reduced elements are adjacent in memory. If they are not, adjacent columns share a warp.
    """
    if inner:
        x = _power_of_two_in(1024 // length, 1, max(1, rows))
        return x, length, _power_of_two_in(x * length // (32 * _PER_THREAD), 1, 8)
    x = _power_of_two_in(2048 // length, 1, max(1, min(rows, 256)))
    return x, length, _power_of_two_in(x * length // 2048, 1, 8)


def looped_tile(rows: int, length: int, inner: bool) -> Tile:
    """Tile of a kernel that loops over blocks of the reduced axis.

    For contiguous rows (1, 16384, 16) is the winner of a search; shorter ones follow ``persistent_tile``, unmeasured.
    """
    if inner:
        r = _power_of_two_in(length, 64, 16384)
        x = _power_of_two_in(1024 // r, 1, max(1, rows))
        return x, r, _power_of_two_in(x * r // (32 * _PER_THREAD), 1, 16)
    x = _power_of_two_in(rows, 32, 128)
    return x, 2048 // x, 1


def pointwise(*args: Any, **kernel: Any) -> Any:
    """Decorator of kernels without a sum; arguments as ``triton_heuristics.pointwise``."""
    return assembled(triton_heuristics.pointwise(*args, **kernel))


def foreach(*args: Any, **kernel: Any) -> Any:
    """Decorator of several kernels in one; arguments as ``triton_heuristics.foreach``."""
    return assembled(triton_heuristics.foreach(*args, **kernel))


def reduction(size_hints: dict[str, int], reduction_hint: Any, **kernel: Any) -> Any:
    """Decorator of looped kernels; arguments as ``triton_heuristics.reduction``."""
    return _decorator("looped_tile", triton_heuristics.reduction, size_hints, reduction_hint, kernel)


def persistent_reduction(size_hints: dict[str, int], reduction_hint: Any, **kernel: Any) -> Any:
    """Decorator of persistent kernels; arguments as ``triton_heuristics.persistent_reduction``."""
    return _decorator(
        "persistent_tile", triton_heuristics.persistent_reduction, size_hints, reduction_hint, kernel
    )


def _decorator(tile: str, stock: Any, size_hints: Any, reduction_hint: Any, kernel: dict[str, Any]) -> Any:
    persistent = tile == "persistent_tile"
    inductor_meta = kernel["inductor_meta"]
    if set(size_hints) != {"x", "r0_"} or inductor_meta.get("no_x_dim"):
        return assembled(stock(size_hints=size_hints, reduction_hint=reduction_hint, **kernel))
    inductor_meta["reduction_hint"] = reduction_hint
    choose = globals()[tile]  # looked up by name: tests and sweeps force other tiles
    x, r, num_warps = choose(size_hints["x"], size_hints["r0_"], reduction_hint == ReductionHint.INNER)
    blocks = {"XBLOCK": x} if persistent else {"XBLOCK": x, "R0_BLOCK": r}
    config = triton_heuristics.Config(blocks, num_warps=num_warps, num_stages=1)
    config.dynamic_scale_rblock = True
    kind = HeuristicType.PERSISTENT_REDUCTION if persistent else HeuristicType.REDUCTION
    return assembled(triton_heuristics.cached_autotune(size_hints, [config], heuristic_type=kind, **kernel))
