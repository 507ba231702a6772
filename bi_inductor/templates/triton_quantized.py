"""Matrix products of 8-bit operands on a GPU: int8 with int32 sums, and the fp8 formats with fp32 sums.

    int8           out[m, n] = sum_k a[m, k] b[k, n] in int32: exact, so any order has the same bits
    fp8            out[m, n] = round(chain * scale_a * scale_b + bias), chain as in ``triton_matmul.py``: one
                   accumulator inside the tensor core, k ascending in its steps (``use_fast_accum=True``)
    fp8 in chunks  the same with ((c0 + c1) + c2) + ... instead of the chain: c_i is the chain over the i-th 128 of K,
                   from 0, and the additions are fp32's. A Hopper tensor core keeps about 14 bits of a sum of fp8
                   products; chunks bound what that can cost (``use_fast_accum=False``)
    block scales   the same with c_i * scale_a[m, i] * scale_b[i, n], unfused, instead of c_i: up to K = 128 the bits
                   of the line above, so whether the scales of few rows look like blocks has no say

K is padded with zeros to whole steps; sums end ``+ 0.0``; scales multiply one after the other, unfused, then the
bias is added in fp32, then there is one rounding. fp8 tiles are of one MMA family (``mma_family.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import expand, full, to_dtype
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import SymbolicGridFn
from torch._inductor.virtualized import V

from bi_inductor.contract import FP8_CHUNK
from bi_inductor.templates.chain_source import OPERANDS, POINTERS
from bi_inductor.templates.emission import ProductTemplate, emit, is_empty, is_multiple, realized, rounded
from bi_inductor.templates.quantized_tiles import tile_for
from bi_inductor.templates.tile_table import Tile

#: Rows of tiles that walk the columns together, so that both operands are found in L2.
GROUP_M = 8

SOURCE = (
    r"""
{{def_kernel("A", "B", "A_SCALE", "B_SCALE") if BLOCK_SCALES else def_kernel("A", "B")}}
    M = {{size("A", 0)}}
    N = {{size("B", 1)}}
    K = {{size("A", 1)}}
    stride_am = {{stride("A", 0)}}
    stride_ak = {{stride("A", 1)}}
    stride_bk = {{stride("B", 0)}}
    stride_bn = {{stride("B", 1)}}
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0).to(INDEX_DTYPE)
    group_tiles = GROUP_M * grid_n
    first_m = tile // group_tiles * GROUP_M
    group_m = tl.minimum(grid_m - first_m, GROUP_M)
    tile_m = first_m + tile % group_tiles % group_m
    tile_n = tile % group_tiles // group_m
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past an edge, rows and columns that exist are computed again and not stored: no mask in the loop.
    a_rows = {{"rows" if EVEN_M else "rows % M"}}
    b_columns = {{"columns" if EVEN_N else "columns % N"}}
"""
    + POINTERS
    + r"""
{% if BLOCK_SCALES %}
    a_scales = A_SCALE + a_rows // A_SCALE_ROWS * ({{stride("A_SCALE", 0)}})
    b_scales = B_SCALE + b_columns // B_SCALE_COLUMNS * ({{stride("B_SCALE", 1)}})
{% endif %}
    for step in tl.range(0, tl.cdiv(K, BLOCK_K)):
"""
    + OPERANDS
    + r"""
{% if CHUNKED %}
        chunk = tl.dot({{"b, a" if SWAP else "a, b"}}, max_num_imprecise_acc=BLOCK_K, out_dtype=ACC_TYPE)
{% if BLOCK_SCALES %}
        a_scale = tl.load(a_scales + step * ({{stride("A_SCALE", 1)}}))
        b_scale = tl.load(b_scales + step * ({{stride("B_SCALE", 0)}}))
        acc += chunk * {{"a_scale[None, :] * b_scale[:, None]" if SWAP else "a_scale[:, None] * b_scale[None, :]"}}
{% else %}
        acc += chunk
{% endif %}
{% else %}
        acc = tl.dot({{"b, a" if SWAP else "a, b"}}, acc, out_dtype=ACC_TYPE)
{% endif %}
        a_block += BLOCK_K * stride_ak
        b_block += BLOCK_K * stride_bk
{% if SWAP %}
    acc = tl.trans(acc)
{% endif %}
{% if not INTEGER %}
    acc = tl.where(acc == 0.0, 0.0, acc)
{% endif %}
    idx_m = rows[:, None]
    idx_n = columns[None, :]
    mask = (idx_m < M) & (idx_n < N)
    {{store_output(("idx_m", "idx_n"), "acc", "mask", val_shape=("BLOCK_M", "BLOCK_N"))}}
"""
)


@SymbolicGridFn
def one_program_per_tile(m: Any, n: Any, meta: dict[str, Any], *, cdiv: Callable[[Any, Any], Any]) -> tuple:
    """(M, N, meta) -> (tiles of M * tiles of N, 1, 1)."""
    return (cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), 1, 1)


quantized_matmul_template = ProductTemplate(
    "batchinv_quantized_matmul", grid=one_program_per_tile, source=SOURCE
)


def int8_matmul(a: ir.TensorBox, b: ir.TensorBox) -> ir.TensorBox:
    """a [M, K] @ b [K, N], both int8 with any strides -> [M, N] int32."""
    size = [a.get_size()[0], b.get_size()[1]]
    if is_empty([*size, a.get_size()[1]]):
        return full(size, 0, dtype=torch.int32, device=a.get_device())
    operands = [realized(a), realized(b)]
    layout = ir.FixedLayout(a.get_device(), torch.int32, size)
    return _emit([], operands, layout, "int8", lambda acc: acc)


def fp8_matmul(
    a: ir.TensorBox,
    b: ir.TensorBox,
    scale_a: ir.TensorBox,
    scale_b: ir.TensorBox,
    bias: ir.TensorBox | None,
    *,
    block_scales: bool,
    fast_accumulation: bool,
    out_dtype: torch.dtype,
) -> ir.TensorBox:
    """The scaled product of a [M, K] and b [K, N], each of an fp8 dtype with any strides, as one kernel.

    scale_a, scale_b: fp32; with ``block_scales`` [M, K / 128] or [M / 128, K / 128] and [K / 128, N] or
    [K / 128, N / 128], rounded up; otherwise broadcastable to [M, N]. bias: broadcastable to [M, N], or None.
    Returns [M, N] of ``out_dtype``, row-major.
    """
    size = [a.get_size()[0], b.get_size()[1]]
    epilogue = [expand(x, size) for x in ([] if block_scales else [scale_a, scale_b])]
    epilogue += [] if bias is None else [expand(bias, size)]
    if is_empty([*size, a.get_size()[1]]):
        total = full(size, 0, dtype=torch.float32, device=a.get_device())
        return to_dtype(total if bias is None else to_dtype(epilogue[-1], torch.float32), out_dtype)
    operands = [realized(x) for x in ([a, b, scale_a, scale_b] if block_scales else [a, b])]
    chunked = block_scales or not fast_accumulation
    layout = ir.FixedLayout(a.get_device(), out_dtype, size)
    finish = _finish(out_dtype, scales=0 if block_scales else 2)
    kind = "fp8 in chunks" if chunked else "fp8"
    return _emit([realized(x) for x in epilogue], operands, layout, kind, finish)


def _emit(
    epilogue: list[Any], operands: list[Any], layout: ir.Layout, kind: str, finish: Callable[..., Any]
) -> ir.TensorBox:
    a, b, *scales = operands
    tile = _tile_of(a, b, kind)
    return emit(
        quantized_matmul_template,
        [*epilogue, *operands],
        layout,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        prefix_args=len(epilogue),
        epilogue_fn=finish,
        **_constants(a, b, scales, tile, kind),
    )


def _tile_of(a: ir.IRNode, b: ir.IRNode, kind: str) -> Tile:
    """The tile for these operands, from their sizes or the hints for them."""
    device = DeviceProperties.create(a.get_device())
    m, n, k = V.graph.sizevars.optimization_hints([*a.get_size()[:1], b.get_size()[1], a.get_size()[1]])
    return tile_for(m, n, k, kind, sm_count=device.multi_processor_count, capability=device.cc)


def _constants(a: ir.IRNode, b: ir.IRNode, scales: list[Any], tile: Tile, kind: str) -> dict[str, Any]:
    (m, k), n = a.get_size(), b.get_size()[1]
    constants = {
        "ACC_TYPE": "tl.int32" if kind == "int8" else "tl.float32",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": GROUP_M,
        "SWAP": tile.swap,
        "EVEN_M": is_multiple(m, tile.block_m),
        "EVEN_N": is_multiple(n, tile.block_n),
        "EVEN_K": is_multiple(k, tile.block_k),
        "INTEGER": kind == "int8",
        "CHUNKED": kind == "fp8 in chunks",
        "BLOCK_SCALES": bool(scales),
    }
    if scales:
        constants["A_SCALE_ROWS"] = _extent(scales[0].get_size()[0], m)
        constants["B_SCALE_COLUMNS"] = _extent(scales[1].get_size()[1], n)
    return constants


def _extent(scales: Any, length: Any) -> int:
    """Rows (or columns) that share a scale: one, or 128."""
    return 1 if V.graph.sizevars.statically_known_equals(scales, length) else FP8_CHUNK


def _finish(out_dtype: torch.dtype, *, scales: int) -> Callable[..., Any]:
    """What follows the sums: the scales one by one, the bias, then the one rounding."""

    def epilogue(acc: Any, *values: Any) -> Any:
        for scale in values[:scales]:
            acc = V.ops.mul(acc, scale)
        for bias in values[scales:]:
            acc = V.ops.add(acc, bias)
        return rounded(acc, torch.float32, out_dtype)

    return epilogue
