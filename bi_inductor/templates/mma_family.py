"""Which MMA instructions a tile of a matrix product runs on, and which of them its dtype is pinned to.

bf16, fp16, tf32 and fp32 gave one set of bits whatever family Triton picked on an H100; fp8 does not. On Hopper a
tile of fp8 with fewer than 64 rows is widened to fp16 and runs on ``mma.sync`` with 16 products a step; from 64 rows
on it runs on ``wgmma`` with 32. Both are right and their bits differ, so one of them is the form, and a product of a
single row is padded to the 64 that it takes. What holds on the GPU at hand, ``python -m bi_inductor doctor`` measures.
"""

from __future__ import annotations

from bi_inductor.templates.tile_table import Tile

#: Rows of the smallest ``wgmma`` and ``tcgen05`` instruction.
_WIDE_ROWS = 64
#: Compute capability -> family of fp8 products. What is not listed has not been looked into.
FP8_FAMILY = {89: "mma_k32", 90: "wgmma_k32", 100: "tcgen05_k32", 103: "tcgen05_k32"}


def fp8_family(capability: int) -> str | None:
    """The family that fp8 products of compute capability ``capability`` (90 for 9.0) are pinned to, or None."""
    return FP8_FAMILY.get(capability)


def rows_of_mma(tile: Tile) -> int:
    """What a tile gives to the rows of an MMA: its columns if the transposed product is computed."""
    return tile.block_n if tile.swap else tile.block_m


def _is_wide(tile: Tile) -> bool:
    return rows_of_mma(tile) >= _WIDE_ROWS and tile.num_warps % 4 == 0


def fp8_family_of(tile: Tile, capability: int) -> str | None:
    """The family that Triton 3.6 to 3.8 compile ``tile`` of fp8 operands to (measured from their PTX)."""
    return fp8_family(capability) if capability < 90 or _is_wide(tile) else "mma_k16"


def family_of(tile: Tile, capability: int) -> str:
    """The same for bf16, fp16 and tf32 operands: ``mma.sync``, ``wgmma`` or ``tcgen05``."""
    wide = {9: "wgmma", 10: "tcgen05"}.get(capability // 10)
    return wide if wide and _is_wide(tile) else "mma.sync"
