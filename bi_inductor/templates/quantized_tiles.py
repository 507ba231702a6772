"""Which tile a product of 8-bit operands runs with: a pure function of the shape, the kind and the device.

As in ``tile_table.py`` every tile of one kind computes the same sums, with one difference: for fp8 only tiles of one
MMA family do (``mma_family.py``), so there are no others here.

    int8           exact in every order
    fp8            one chain
    fp8 in chunks  chunks of 128 of K, each a chain; a chunk is one step of the kernel, so BLOCK_K is 128
"""

from __future__ import annotations

import dataclasses

from bi_inductor.contract import FP8_CHUNK
from bi_inductor.templates.tile_table import DRAM_BYTES_PER_CLOCK, L2_BYTES_PER_CLOCK, Tile

#: Multiply-adds per clock and SM out of shared memory, of an H100's 4096: twice what bf16 sustains.
_RATE = 3480

_NARROW = (
    Tile(16, 64, FP8_CHUNK, 4, 6, swap=True, rate=_RATE),
    Tile(32, 64, FP8_CHUNK, 4, 6, swap=True, rate=_RATE),
    Tile(64, 64, FP8_CHUNK, 4, 5, swap=True, rate=_RATE),
    Tile(64, 128, FP8_CHUNK, 4, 5, swap=True, rate=_RATE),
    Tile(64, 16, FP8_CHUNK, 4, 6, rate=_RATE),
)
#: The sums of a chunk and those of all chunks so far both stay in registers: at most 64 of each a thread.
_CHUNKED = (*_NARROW, Tile(128, 128, FP8_CHUNK, 8, 4, rate=2600))
_CHAINED = (
    *_NARROW,
    Tile(128, 128, FP8_CHUNK, 4, 4, rate=_RATE),
    Tile(128, 256, FP8_CHUNK, 8, 3, rate=_RATE),
)

KINDS = ("int8", "fp8", "fp8 in chunks")
_SHARED_BYTES = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}
_SMALLEST_SHARED_BYTES = 101376


def candidates(kind: str, capability: int) -> tuple[Tile, ...]:
    """Every tile that ``tile_for`` may choose for a product of ``kind``, one of ``KINDS``."""
    tiles: tuple[Tile, ...] = _CHUNKED if kind == "fp8 in chunks" else _CHAINED
    if capability < 90:  # operands of mma.sync are in registers, too many of them beside 128 sums a thread
        tiles = tuple(tile for tile in tiles if tile.block_n < 256)
    return tuple(_fit(tile, capability) for tile in tiles)


def _fit(tile: Tile, capability: int) -> Tile:
    limit = _SHARED_BYTES.get(capability, _SMALLEST_SHARED_BYTES)
    while tile.shared_bytes(1) > limit and tile.num_stages > 2:
        tile = dataclasses.replace(tile, num_stages=tile.num_stages - 1)
    return tile


def tile_for(m: int, n: int, k: int, kind: str, *, sm_count: int, capability: int) -> Tile:
    """The tile for [m, k] @ [k, n] (sizes may be hints): the least estimated time, as in ``tile_table.tile_for``."""
    m, n, k = max(m, 1), max(n, 1), max(k, 1)
    dram = (m * k + k * n + 2 * m * n) / (DRAM_BYTES_PER_CLOCK * sm_count)

    def clocks(tile: Tile) -> float:
        tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
        multiply = tile.block_m * tile.block_n / tile.rate
        load = (tile.block_m + tile.block_n) / L2_BYTES_PER_CLOCK
        return max(dram, -(-tiles // sm_count) * k * max(multiply, load))

    return min(candidates(kind, capability), key=lambda tile: (clocks(tile), tile.block_m * tile.block_n))
