"""Which tile a matrix product runs with: a pure function of the shape, the dtype and the device.

A tile is a schedule, not a meaning: every tile here computes the same chain (``triton_matmul.py``), so this
choice may follow M, hints, SM counts or a benchmark and cannot change a bit. Two things are asked of the
table nevertheless: all tiles of one dtype and architecture use one family of MMA instructions (``mma.sync``,
``wgmma``, ``tcgen05`` or FMA; families need not agree with each other), and every tile fits the device.

The choice is the candidate with the least estimated time, the smallest area first among equals. j programs of a
tile on each SM take, in microseconds,

    start + max(j * K * step, bytes of the operands and the output / DRAM bandwidth) + j * store

with three numbers for each tile, fitted to measurements (``benchmarks/gemm_sweep.py``), or, where nobody measured,
estimated from what a tile loads and multiplies.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Iterable
from typing import NamedTuple

#: Clocks are per SM. From an H100's data sheet (989 TFLOP/s dense bf16, 3.35 TB/s) and from its GEMMs:
#: 128x256 tiles reach 700 TFLOP/s and 128x128 about 500, which is what 36 bytes per clock out of L2 allow.
L2_BYTES_PER_CLOCK = 36
DRAM_BYTES_PER_CLOCK = 14
_CLOCKS_PER_MICROSECOND = 1755
#: What kernels get of the DRAM's bandwidth, per SM: 2.9 TB/s on the 132 SMs of an H100.
_DRAM_BYTES_PER_MICROSECOND = 2.9e6 / 132


class Cost(NamedTuple):
    """What a tile takes on an SM of an H100: microseconds, and for ``step`` nanoseconds per element of K."""

    start: float
    step: float
    store: float


@dataclasses.dataclass(frozen=True)
class Tile:
    """One schedule of the kernel: sizes in elements.

    ``swap`` computes the transposed product, B^T A^T, so that N takes the 64 rows of an MMA and a small M its
    columns. ``tma``: operands come by TMA and one program per SM stays for all tiles, so that the next tile's
    operands are on their way while this one is stored. ``extra_n``: columns of a second accumulator beside the
    first; a width that is no power of two often leaves fewer SMs idle in the last round. ``group_m``: rows of tiles
    that walk the columns together, so that both operands are found in L2. ``rate``, where there is no ``cost``: the
    multiply-adds per clock and SM that the tile sustains out of shared memory.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    tma: bool = False
    extra_n: int = 0
    group_m: int = 8
    rate: int = 1740
    cost: Cost | None = None

    @property
    def columns(self) -> int:
        """Columns of the output that one program computes."""
        return self.block_n + self.extra_n

    @property
    def key(self) -> tuple[int, ...]:
        """What tells this tile from the others of a table."""
        shape = (self.block_m, self.block_n, self.extra_n, self.block_k, self.group_m, self.swap, self.tma)
        return (*shape, self.num_warps, self.num_stages)

    @property
    def transposed(self) -> Tile:
        """The same tile with M and N exchanged."""
        return dataclasses.replace(self, block_m=self.block_n, block_n=self.block_m, swap=not self.swap)

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory the pipelined operands take, and what a TMA tile is stored through."""
        operands = (self.block_m + self.columns) * self.block_k * itemsize * self.num_stages
        return operands + (self.block_m * self.block_n if self.tma else 0)


def _with_transposed(*tiles: Tile) -> tuple[Tile, ...]:
    return tuple(dict.fromkeys([*tiles, *(tile.transposed for tile in tiles)]))


#: bf16 and fp16. In products of few rows memory decides, and BLOCK_M is M or a little more. Up to two rounds of
#: programs, cp.async starts 3 us sooner than TMA; in more TMA wins, since it stores a tile while the next is loaded.
_HALF = (
    *_with_transposed(Tile(16, 64, 256, 4, 5, swap=True, cost=Cost(8.4, 1.1, 0.4))),
    *_with_transposed(Tile(32, 64, 128, 4, 6, swap=True, cost=Cost(6.8, 1.1, 1.3))),
    Tile(64, 64, 128, 4, 6, cost=Cost(5.2, 3.3, 1.3)),
    Tile(64, 64, 128, 4, 6, extra_n=16, cost=Cost(4.1, 3.3, 2.9)),
    Tile(64, 64, 128, 4, 5, extra_n=32, cost=Cost(5.2, 3.8, 2.2)),
    Tile(64, 128, 128, 4, 4, cost=Cost(5.1, 4.2, 1.4)),
    Tile(64, 128, 64, 4, 6, extra_n=32, cost=Cost(5.6, 4.5, 2.2)),
    Tile(64, 128, 64, 4, 6, extra_n=64, cost=Cost(4.2, 5.1, 2.4)),
    Tile(64, 256, 64, 4, 4, extra_n=64, cost=Cost(4.7, 7.3, 2.6)),
    Tile(128, 128, 64, 4, 6, cost=Cost(3.9, 6.0, 2.7)),
    Tile(128, 128, 64, 8, 5, extra_n=64, cost=Cost(3.7, 9.2, 3.1)),
    Tile(128, 256, 64, 8, 4, cost=Cost(3.2, 9.9, 5.5)),
    Tile(64, 256, 64, 4, 5, tma=True, cost=Cost(6.2, 6.9, 0.6)),
    Tile(128, 128, 64, 4, 6, tma=True, cost=Cost(8.3, 5.8, 0.6)),
    Tile(128, 256, 64, 8, 4, tma=True, group_m=16, cost=Cost(6.8, 10.0, 2.2)),
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


@functools.cache
def candidates(
    dtype: str,
    capability: int,
    *,
    tf32: bool = False,
    aligned: bool = True,
    tma: bool = False,
    wide: bool = False,
) -> tuple[Tile, ...]:
    """Every tile that ``tile_for`` may choose from for operands of ``dtype`` (``"bfloat16"`` ...).

    ``capability`` is 90 for compute capability 9.0; ``tma``: whether TMA can load the operands; ``wide``: whether the
    kernel knows extra columns. Raises KeyError for a dtype that has no chain kernel.
    """
    if capability < 90:  # no TMA, and registers for what wgmma and tcgen05 read from shared memory
        tma = wide = False
    half = tuple(tile for tile in _HALF if (tma or not tile.tma) and (wide or not tile.extra_n))
    tiles = {
        "bfloat16": half if aligned else _UNALIGNED_HALF,
        "float16": half if aligned else _UNALIGNED_HALF,
        "float32": _TF32 if tf32 else _FP32,
        "float64": _FP64 if capability < 100 else _FP64_FMA,
    }[dtype]
    return tuple(_fit(tile, itemsize_of(dtype), capability) for tile in tiles)


def itemsize_of(dtype: str) -> int:
    """Bytes of an element of ``dtype``."""
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
    tma: bool = False,
    wide: bool = False,
) -> Tile:
    """The tile for ``batch`` products [m, k] @ [k, n] of operands of ``dtype`` (sizes may be hints)."""
    tiles = candidates(dtype, capability, tf32=tf32, aligned=aligned, tma=tma, wide=wide)
    return fastest(1, tiles, m, n, k, itemsize_of(dtype), sm_count, batch)[0]


def fastest(
    count: int, tiles: Iterable[Tile], m: int, n: int, k: int, itemsize: int, sm_count: int, batch: int = 1
) -> list[Tile]:
    """The ``count`` tiles with the least estimated times, in that order; steps are no longer than K."""
    m, n, k, batch = max(m, 1), max(n, 1), max(k, 1), max(batch, 1)
    dram = batch * (m * k + k * n + m * n) * itemsize / (_DRAM_BYTES_PER_MICROSECOND * sm_count)

    def time(tile: Tile) -> tuple[bool, float, int]:
        programs = -(-batch * -(-m // tile.block_m) * -(-n // tile.columns) // sm_count)
        start, step, store = tile.cost or _estimated_cost(tile, itemsize)
        microseconds = start + max(programs * k * step / 1000, dram) + programs * store
        return not _suits(tile, m, n), microseconds, tile.block_m * tile.columns

    return [shortened(tile, k) for tile in heapq.nsmallest(count, tiles, time)]


def _suits(tile: Tile, m: int, n: int) -> bool:
    """False for a tile that was not measured because it computes or reads too much for nothing."""
    if tile.cost is None:
        return True
    if m <= 64:
        return tile.block_m == max(16, 1 << (m - 1).bit_length()) and tile.block_n >= min(32, n)
    return tile.block_m >= 64 and min(64, n) <= tile.block_n <= max(128, 2 * n)


def _estimated_cost(tile: Tile, itemsize: int) -> Cost:
    multiply = tile.block_m * tile.block_n / tile.rate
    load = (tile.block_m + tile.block_n) * itemsize / L2_BYTES_PER_CLOCK
    nanoseconds = 1000 * max(multiply, load) / _CLOCKS_PER_MICROSECOND
    return Cost(5.0, nanoseconds, 0.0)


def shortened(tile: Tile, k: int) -> Tile:
    """``tile`` with no more of K per step than there is: a tail is padded with zeros to a whole step.

    A single step has nothing to load ahead. With more than one stage Triton would keep their buffers beside those that
    an fp32 result is stored through: 64x320 tiles took 262,144 bytes of shared memory, more than an H100 has.
    """
    block_k = tile.block_k
    while block_k > 16 and block_k >= 2 * k:
        block_k //= 2
    return dataclasses.replace(tile, block_k=block_k, num_stages=1 if k <= block_k else tile.num_stages)
