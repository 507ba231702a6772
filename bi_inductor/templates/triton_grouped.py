"""Grouped matrix products on a GPU, one kernel for all groups; who is in which group is read when it runs.

    rows    out[t, n] = round(chain over k of a[t, k] b[g, k, n])                g: the group of row t
    depth   out[g, m, n] = round(chain over the rows t of group g of a[m, t] b[t, n])

Chains are those of ``triton_matmul.py``: k ascending from 0, or from the first row of the group, in the steps of the
hardware's MMA, one accumulator, K padded with zeros to whole steps, then ``+ 0.0`` and one rounding. So a row has the
bits of an ordinary product with its group's matrix, whatever the other rows are and wherever it stands.

rows: tiles are numbered group by group. A program adds up the groups' numbers of tiles, which are integers, to find
its group and its place there; rows behind the last group are like those of one more, without products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import full
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import SymbolicGridFn
from torch._inductor.virtualized import V

from bi_inductor.templates.chain_source import OPERANDS, POINTERS
from bi_inductor.templates.emission import ProductTemplate, emit, is_empty, is_multiple, realized, rounding
from bi_inductor.templates.tile_table import Tile, tile_for
from bi_inductor.templates.triton_matmul import rows_are_aligned

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_LOOP = (
    POINTERS
    + r"""
    for step in tl.range(0, steps):
"""
    + OPERANDS
    + r"""
        acc = tl.dot({{"b, a" if SWAP else "a, b"}}, acc, input_precision=INPUT_PRECISION, out_dtype=ACC_TYPE)
        a_block += BLOCK_K * stride_ak
        b_block += BLOCK_K * stride_bk
{% if SWAP %}
    acc = tl.trans(acc)
{% endif %}
    acc = tl.where(acc == 0.0, 0.0, acc)
"""
)

ROWS_SOURCE = (
    r"""
{{def_kernel("A", "B", "ENDS")}}
    M = {{size("A", 0)}}
    N = {{size("B", 2)}}
    K = {{size("A", 1)}}
    stride_am = {{stride("A", 0)}}
    stride_ak = {{stride("A", 1)}}
    stride_bk = {{stride("B", 1)}}
    stride_bn = {{stride("B", 2)}}
    groups = {{size("B", 0)}}
    number = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    ends = tl.minimum(tl.load(ENDS + group * ({{stride("ENDS", 0)}}), mask=group < groups, other=0), M)
    before = (group > 0) & (group < groups)
    starts = tl.load(ENDS + (group - 1) * ({{stride("ENDS", 0)}}), mask=before, other=0)
    sizes = tl.maximum(ends - starts, 0)
    tiles = tl.cdiv(sizes, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    mine = tl.sum(((tl.cumsum(tiles, 0) <= number) & (group < groups)).to(tl.int32), 0)
    first_tile = tl.sum(tl.where(group < mine, tiles, 0), 0)
    first_row = tl.sum(tl.where(group < mine, sizes, 0), 0)
    own_rows = tl.sum(tl.where(group == mine, sizes, 0), 0)
    # Behind the last group: the rows that belong to none.
    last_row = tl.minimum(tl.where(mine < groups, first_row + own_rows, M), M)
    # The tiles of one group that share columns are neighbours, so that its matrix is read from memory once.
    grid_m = tl.maximum(tl.cdiv(last_row - first_row, BLOCK_M), 1)
    tile_m = (number - first_tile) % grid_m
    tile_n = (number - first_tile) // grid_m
    rows = (first_row + tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX_DTYPE)
    columns = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX_DTYPE)
    # Rows of the next group and columns past the edge are computed and not stored: no mask in the loop.
    a_rows = tl.minimum(rows, M - 1)
    b_columns = columns % N
    B += tl.minimum(mine, groups - 1).to(INDEX_DTYPE) * ({{stride("B", 0)}})
    steps = tl.where(mine < groups, tl.cdiv(K, BLOCK_K), 0)
"""
    + _LOOP
    + r"""
    idx_m = rows[:, None]
    idx_n = columns[None, :]
    mask = (idx_m < last_row) & (idx_n < N)
    {{store_output(("idx_m", "idx_n"), "acc", "mask", val_shape=("BLOCK_M", "BLOCK_N"))}}
"""
)

DEPTH_SOURCE = (
    r"""
{{def_kernel("A", "B", "ENDS")}}
    M = {{size("A", 0)}}
    N = {{size("B", 1)}}
    stride_am = {{stride("A", 0)}}
    stride_ak = {{stride("A", 1)}}
    stride_bk = {{stride("B", 0)}}
    stride_bn = {{stride("B", 1)}}
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    number = tl.program_id(0)
    idx_b = (number // (grid_m * grid_n)).to(INDEX_DTYPE)
    tile_m = number % (grid_m * grid_n) % grid_m
    tile_n = number % (grid_m * grid_n) // grid_m
    last_k = tl.minimum(tl.load(ENDS + idx_b * ({{stride("ENDS", 0)}})), {{size("A", 1)}})
    first_k = tl.load(ENDS + (idx_b - 1) * ({{stride("ENDS", 0)}}), mask=idx_b > 0, other=0)
    K = last_k - first_k
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX_DTYPE)
    columns = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX_DTYPE)
    a_rows = rows % M
    b_columns = columns % N
    A += first_k.to(INDEX_DTYPE) * stride_ak
    B += first_k.to(INDEX_DTYPE) * stride_bk
    steps = tl.cdiv(K, BLOCK_K)
"""
    + _LOOP
    + r"""
    idx_m = rows[:, None]
    idx_n = columns[None, :]
    mask = (idx_m < M) & (idx_n < N)
    {{store_output(("idx_b", "idx_m", "idx_n"), "acc", "mask", val_shape=("BLOCK_M", "BLOCK_N"))}}
"""
)


@SymbolicGridFn
def grouped_rows_grid(m: Any, n: Any, meta: Any, *, cdiv: Callable[[Any, Any], Any]) -> tuple[Any, int, int]:
    """As many programs as there can be tiles: every group may end with one that is not full."""
    full = cdiv(m + 1, meta["BLOCK_M"]) - 1
    return ((full + meta["GROUP_LIMIT"]) * cdiv(n, meta["BLOCK_N"]), 1, 1)


@SymbolicGridFn
def grouped_depth_grid(
    groups: Any, m: Any, n: Any, meta: Any, *, cdiv: Callable[[Any, Any], Any]
) -> tuple[Any, int, int]:
    """One program per tile of every group."""
    return (groups * cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), 1, 1)


grouped_rows_template = ProductTemplate("batchinv_grouped_rows", grid=grouped_rows_grid, source=ROWS_SOURCE)
grouped_depth_template = ProductTemplate(
    "batchinv_grouped_depth", grid=grouped_depth_grid, source=DEPTH_SOURCE
)


def grouped_rows(a: ir.TensorBox, b: ir.TensorBox, ends: ir.TensorBox) -> ir.TensorBox:
    """a [T, K], b [G, K, N], ends [G] int32 -> [T, N] of a's dtype, row-major; rows of no group are 0.

    Any strides; sizes but G may be symbolic, and any may be 0.
    """
    groups = V.graph.sizevars.guard_int(b.get_size()[0])
    size = [a.get_size()[0], b.get_size()[2]]
    if groups == 0 or is_empty([*size, a.get_size()[1]]):
        return full(size, 0, dtype=a.get_dtype(), device=a.get_device())
    operands = [realized(x) for x in (a, b, ends)]
    m, n, k = V.graph.sizevars.optimization_hints([*size, a.get_size()[1]])
    tile = _tile(operands, -(-m // groups), n, k, min(groups, m))
    layout = ir.FixedLayout(a.get_device(), a.get_dtype(), size)
    constants = {
        "GROUPS": 1 << (groups - 1).bit_length(),
        "GROUP_LIMIT": _most_groups(size[0], groups + 1),
        "EVEN_K": is_multiple(a.get_size()[1], tile.block_k),
    }
    return _emit(grouped_rows_template, operands, layout, tile, constants)


def grouped_depth(a: ir.TensorBox, b: ir.TensorBox, ends: ir.TensorBox) -> ir.TensorBox:
    """a [M, T], b [T, N], ends [G] int32 -> [G, M, N] of a's dtype, row-major; a group without rows is 0."""
    size = [ends.get_size()[0], a.get_size()[0], b.get_size()[1]]
    if is_empty([*size, a.get_size()[1]]):
        return full(size, 0, dtype=a.get_dtype(), device=a.get_device())
    operands = [realized(x) for x in (a, b, ends)]
    groups, m, n, k = V.graph.sizevars.optimization_hints([*size, a.get_size()[1]])
    tile = _tile(operands, m, n, -(-k // max(groups, 1)), groups)
    layout = ir.FixedLayout(a.get_device(), a.get_dtype(), size)
    return _emit(grouped_depth_template, operands, layout, tile, {"EVEN_K": False})


def _most_groups(rows: sympy.Expr, groups: int) -> int:
    """How many groups can have rows."""
    return min(groups, int(rows)) if isinstance(rows, (int, sympy.Integer)) else groups


def _tile(operands: list[ir.IRNode], m: int, n: int, k: int, batch: int) -> Tile:
    """The tile of a product of average size, as if there were ``batch`` of them."""
    a, b, _ = operands
    if a.get_dtype() not in _DTYPES or b.get_dtype() != a.get_dtype():
        raise NotImplementedError(f"no grouped product of {a.get_dtype()} and {b.get_dtype()} on a GPU")
    device = DeviceProperties.create(a.get_device())
    return tile_for(
        m,
        n,
        k,
        str(a.get_dtype()).removeprefix("torch."),
        batch=batch,
        sm_count=device.multi_processor_count,
        capability=device.cc,
        aligned=rows_are_aligned(a) and rows_are_aligned(b),
    )


def _emit(
    template: ProductTemplate,
    operands: list[ir.IRNode],
    layout: ir.Layout,
    tile: Tile,
    constants: dict[str, Any],
) -> ir.TensorBox:
    return emit(
        template,
        operands,
        layout,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        epilogue_fn=rounding(torch.float32, layout.dtype),
        ACC_TYPE="tl.float32",
        INPUT_PRECISION="'ieee'",
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SWAP=tile.swap,
        **constants,
    )
