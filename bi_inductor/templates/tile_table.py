"""Which tile a matrix product runs with: a pure function of the shape, the dtype and the device.

A tile is a schedule, not a meaning: every tile here computes the same chain (``triton_matmul.py``), so this
choice may follow M, hints, SM counts or a benchmark and cannot change a bit. Two things are asked of the
table nevertheless: all tiles of one dtype and architecture use one family of MMA instructions (``mma.sync``,
``wgmma``, ``tcgen05`` or FMA; families need not agree with each other), and every tile fits the device.

The choice is the candidate with the least estimated time on one SM, smallest area first among equals:

    tiles per SM * K * max(BLOCK_M * BLOCK_N / rate,  (BLOCK_M + BLOCK_N) * itemsize / L2 bytes per clock)

and no less than what DRAM needs for the operands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

#: Clocks are per SM. From an H100's data sheet (989 TFLOP/s dense bf16, 3.35 TB/s) and from its GEMMs:
#: 128x256 tiles reach 700 TFLOP/s and 128x128 about 500, which is what 36 bytes per clock out of L2 allow.
L2_BYTES_PER_CLOCK = 36
DRAM_BYTES_PER_CLOCK = 14


@dataclasses.dataclass(frozen=True)
class Tile:
    """One schedule of the kernel: sizes in elements.

    ``swap`` computes the transposed product, B^T A^T, so that N takes the 64 rows of an MMA and a small M its
    columns. ``rate`` is the multiply-adds per clock and SM that the tile sustains out of shared memory.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    rate: int = 1740

    @property
    def transposed(self) -> Tile:
        """The same tile with M and N exchanged."""
        return dataclasses.replace(self, block_m=self.block_n, block_n=self.block_m, swap=not self.swap)

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory the pipelined operands take."""
        return (self.block_m + self.block_n) * self.block_k * itemsize * self.num_stages


def _with_transposed(*tiles: Tile) -> tuple[Tile, ...]:
    return tuple(dict.fromkeys([*tiles, *(tile.transposed for tile in tiles)]))


#: bf16 and fp16. The winners of searches on an H100 with K contiguous over M = 1 ... 8192 for (N, K) =
#: (4096, 4096), (6144, 4096), (28672, 4096) and (4096, 14336). The larger side of a small tile is 64, the
#: rows of one wgmma and the least of tcgen05.
_HALF = (
    *_with_transposed(
        Tile(16, 64, 128, 4, 6, swap=True),
        Tile(32, 64, 128, 4, 6, swap=True),
    ),
    Tile(64, 64, 128, 4, 6, swap=True),
    *_with_transposed(Tile(128, 64, 128, 4, 4)),
    Tile(128, 128, 64, 4, 4),
    Tile(128, 256, 64, 8, 3),
)
#: fp32 operands on TF32 tensor cores: the same with half the elements per byte.
_TF32 = (
    *_with_transposed(
        Tile(16, 64, 64, 4, 6, swap=True, rate=870),
        Tile(32, 64, 64, 4, 6, swap=True, rate=870),
    ),
    Tile(64, 64, 64, 4, 5, swap=True, rate=870),
    *_with_transposed(Tile(128, 64, 64, 4, 4, rate=870)),
    Tile(128, 128, 32, 8, 4, rate=870),
)
#: fp32 as IEEE asks: scalar FMAs. Larger tiles reload less from shared memory; beyond 64 accumulators a
#: thread, registers spill.
_FP32 = (
    *_with_transposed(Tile(16, 32, 32, 4, 4, rate=32), Tile(16, 64, 32, 4, 4, rate=48)),
    Tile(32, 32, 32, 4, 4, rate=56),
    *_with_transposed(Tile(32, 64, 32, 4, 4, rate=72)),
    Tile(64, 64, 16, 4, 4, rate=88),
    *_with_transposed(Tile(128, 64, 16, 8, 4, rate=92)),
    Tile(128, 128, 16, 8, 3, rate=104),
)
#: fp64: DMMA on Ampere and Hopper (m8n8k4 and m16n8k16, one instruction for all tiles of an architecture).
_FP64 = (
    *_with_transposed(Tile(16, 32, 16, 4, 4, rate=32)),
    Tile(32, 32, 16, 4, 4, rate=48),
    *_with_transposed(Tile(32, 64, 16, 4, 4, rate=56)),
    Tile(64, 64, 16, 4, 3, rate=64),
)
#: fp64 from Blackwell on: FMAs until Triton 3.7, which fails to compile tiles with a side of 64; DMMA from 3.8.
_FP64_FMA = (
    *_with_transposed(Tile(16, 32, 16, 4, 4, rate=16)),
    Tile(32, 32, 16, 4, 4, rate=24),
)
#: Rows that do not start at a multiple of 16 bytes are loaded element by element through registers.
_UNALIGNED_HALF = _with_transposed(Tile(16, 64, 32, 4, 3, swap=True), Tile(64, 64, 32, 4, 3))

#: Most shared memory one block may have, by compute capability (CUDA C++ Programming Guide).
_SHARED_BYTES = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448}
_SMALLEST_SHARED_BYTES = 101376


def candidates(dtype: str, capability: int, *, tf32: bool = False, aligned: bool = True) -> tuple[Tile, ...]:
    """Every tile that ``tile_for`` may choose from for operands of ``dtype`` (``"bfloat16"`` ...).

    ``capability`` is 90 for compute capability 9.0. Raises KeyError for a dtype that has no chain kernel.
    """
    tiles = {
        "bfloat16": _HALF if aligned else _UNALIGNED_HALF,
        "float16": _HALF if aligned else _UNALIGNED_HALF,
        "float32": _TF32 if tf32 else _FP32,
        "float64": _FP64 if capability < 100 else _FP64_FMA,
    }[dtype]
    return tuple(_fit(tile, _itemsize(dtype), capability) for tile in tiles)


def _itemsize(dtype: str) -> int:
    return {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}[dtype]


def _fit(tile: Tile, itemsize: int, capability: int) -> Tile:
    """``tile`` with fewer stages, then with shorter ones, until it fits the device's shared memory."""
    limit = _SHARED_BYTES.get(capability, _SMALLEST_SHARED_BYTES)
    while tile.shared_bytes(itemsize) > limit and tile.num_stages > 2:
        tile = dataclasses.replace(tile, num_stages=tile.num_stages - 1)
    while tile.shared_bytes(itemsize) > limit and tile.block_k > 16:
        tile = dataclasses.replace(tile, block_k=tile.block_k // 2)
    return tile


def tile_for(
    m: int,
    n: int,
    k: int,
    dtype: str,
    *,
    sm_count: int,
    capability: int,
    batch: int = 1,
    tf32: bool = False,
    aligned: bool = True,
) -> Tile:
    """The tile for ``batch`` products [m, k] @ [k, n] of operands of ``dtype`` (sizes may be hints)."""
    m, n, k, batch = max(m, 1), max(n, 1), max(k, 1), max(batch, 1)
    itemsize = _itemsize(dtype)
    tiles: Iterable[Tile] = candidates(dtype, capability, tf32=tf32, aligned=aligned)
    dram = batch * (m * k + k * n + m * n) * itemsize / (DRAM_BYTES_PER_CLOCK * sm_count)

    def clocks(tile: Tile) -> float:
        tiles = batch * -(-m // tile.block_m) * -(-n // tile.block_n)
        multiply = tile.block_m * tile.block_n / tile.rate
        load = (tile.block_m + tile.block_n) * itemsize / L2_BYTES_PER_CLOCK
        return max(dram, -(-tiles // sm_count) * k * max(multiply, load))

    best = min(tiles, key=lambda tile: (clocks(tile), tile.block_m * tile.block_n))
    return _shortened(best, k)


def _shortened(tile: Tile, k: int) -> Tile:
    """``tile`` with no more of K per step than there is: a tail is padded with zeros to a whole step."""
    block_k = tile.block_k
    while block_k > 16 and block_k >= 2 * k:
        block_k //= 2
    return dataclasses.replace(tile, block_k=block_k)
