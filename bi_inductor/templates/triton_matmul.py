"""Matrix products on a GPU in canonical form, as an Inductor template with one choice and no extern kernel.

    out[m, n] = round(alpha * chain(m, n) + beta * bias[m, n])
    chain(m, n) = (((0 + a[m, 0] b[0, n]) + a[m, 1] b[1, n]) + ...), k ascending in the steps of the
    hardware's MMA, one accumulator per output (fp32; fp64 for fp64), operands in their own dtype, K padded
    with zeros to whole steps

then ``+ 0.0`` once, so that a chain that underflowed to -0.0 is the same with and without padding. alpha and
beta multiply and add in the accumulator's dtype, unfused; there is one rounding, to the output's dtype, and a
fused epilogue reads the rounded value, as it would have read the stored one.

Shapes, tiles, strides and hints choose the schedule only (``tile_table.py``). M = 1, N = 1 and a batch of 1
take the same path as everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._inductor import config, ir
from torch._inductor.lowering import expand, full, mul, to_dtype
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate, TritonTemplateKernel
from torch._inductor.virtualized import V

from bi_inductor.templates.tile_table import Tile, tile_for

#: Rows of tiles that walk the columns together, so that both operands are found in L2.
GROUP_M = 8
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

SOURCE = r"""
{{def_kernel("A", "B")}}
    M = {{size("A", -2)}}
    N = {{size("B", -1)}}
    K = {{size("A", -1)}}
    stride_am = {{stride("A", -2)}}
    stride_ak = {{stride("A", -1)}}
    stride_bk = {{stride("B", -2)}}
    stride_bn = {{stride("B", -1)}}
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0).to(INDEX_DTYPE)
{% if BATCHED %}
    idx_b = tile // (grid_m * grid_n)
    tile = tile % (grid_m * grid_n)
    A += idx_b * ({{stride("A", 0)}})
    B += idx_b * ({{stride("B", 0)}})
{% endif %}
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
    k = tl.arange(0, BLOCK_K).to(INDEX_DTYPE)
{% if SWAP %}
    a_block = A + (a_rows[None, :] * stride_am + k[:, None] * stride_ak)
    b_block = B + (b_columns[:, None] * stride_bn + k[None, :] * stride_bk)
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC_TYPE)
{% else %}
    a_block = A + (a_rows[:, None] * stride_am + k[None, :] * stride_ak)
    b_block = B + (b_columns[None, :] * stride_bn + k[:, None] * stride_bk)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC_TYPE)
{% endif %}
    for step in tl.range(0, tl.cdiv(K, BLOCK_K)):
{% if EVEN_K %}
        a = tl.load(a_block)
        b = tl.load(b_block)
{% else %}
        inside = k < K - step * BLOCK_K
        a = tl.load(a_block, mask={{"inside[:, None]" if SWAP else "inside[None, :]"}}, other=0.0)
        b = tl.load(b_block, mask={{"inside[None, :]" if SWAP else "inside[:, None]"}}, other=0.0)
{% endif %}
        acc = tl.dot({{"b, a" if SWAP else "a, b"}}, acc, input_precision=INPUT_PRECISION, out_dtype=ACC_TYPE)
        a_block += BLOCK_K * stride_ak
        b_block += BLOCK_K * stride_bk
    acc = {{"tl.trans(acc)" if SWAP else "acc"}} + 0.0
    idx_m = rows[:, None]
    idx_n = columns[None, :]
    mask = (idx_m < M) & (idx_n < N)
{% if BATCHED %}
    {{store_output(("idx_b", "idx_m", "idx_n"), "acc", "mask", val_shape=("BLOCK_M", "BLOCK_N"))}}
{% else %}
    {{store_output(("idx_m", "idx_n"), "acc", "mask", val_shape=("BLOCK_M", "BLOCK_N"))}}
{% endif %}
"""


@SymbolicGridFn
def chain_matmul_grid(*sizes_and_meta: Any, cdiv: Callable[[Any, Any], Any]) -> tuple[Any, int, int]:
    """One program per tile: ([B,] M, N, meta) -> (B * tiles of M * tiles of N, 1, 1)."""
    *batch, m, n, meta = sizes_and_meta
    tiles = cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"])
    return (batch[0] * tiles if batch else tiles, 1, 1)


class ChainMatmulKernel(TritonTemplateKernel):
    """The stock template kernel, except that run-time sizes are int64 whenever addresses are (2.11: not)."""

    @property
    def index_dtype(self) -> str:
        is_wide = "INDEX_DTYPE : tl.constexpr = tl.int64" in getattr(self, "defines", "")
        return "tl.int64" if is_wide else super().index_dtype


class ChainMatmulTemplate(TritonTemplate):
    """The template of ``SOURCE``."""

    kernel_type = ChainMatmulKernel


chain_matmul_template = ChainMatmulTemplate("batchinv_chain_matmul", grid=chain_matmul_grid, source=SOURCE)


def chain_matmul(
    a: ir.TensorBox,
    b: ir.TensorBox,
    *,
    bias: ir.TensorBox | None = None,
    alpha: float = 1,
    beta: float = 1,
    out_dtype: torch.dtype,
) -> ir.TensorBox:
    """round(alpha * a @ b + beta * bias) as one kernel.

    a: [M, K] or [B, M, K]; b: [K, N] or [B, K, N], both bf16, fp16, fp32 or fp64 on a GPU, with any strides;
    sizes may be symbolic, 0 or 1. bias: broadcastable to the output, or None; it is not read if beta is 0.
    out_dtype: the dtype of the one rounding; may be wider than a's. Returns [M, N] or [B, M, N], row-major.
    """
    if a.get_dtype() not in _DTYPES:
        raise NotImplementedError(f"no matrix product of {a.get_dtype()} on a GPU; convert to a float dtype")
    size = [*a.get_size()[:-1], b.get_size()[-1]]
    if bias is not None:
        bias = None if beta == 0 else expand(bias, size)
    if any(V.graph.sizevars.statically_known_equals(length, 0) for length in [*size, a.get_size()[-1]]):
        return _without_products(size, a.get_device(), bias, beta, out_dtype)
    operands = [_realized(x) for x in ([a, b] if bias is None else [bias, a, b])]
    a_operand, b_operand = operands[-2:]
    layout = ir.FixedLayout(a.get_device(), out_dtype, size)
    tile = _tile_of(a_operand, b_operand, layout)
    choices: list[Any] = []
    error = chain_matmul_template.maybe_append_choice(
        choices,
        input_nodes=tuple(operands),
        layout=layout,
        num_stages=tile.num_stages,
        num_warps=tile.num_warps,
        prefix_args=len(operands) - 2,
        epilogue_fn=_finish(alpha, beta, _accumulator(a.get_dtype()), out_dtype),
        triton_meta={"enable_fp_fusion": False, "disable_ftz": config.eager_numerics.disable_ftz},
        **_constants(a_operand, b_operand, tile),
    )
    if error is not None:
        raise error
    return choices[0].output_node()


def tf32_is_allowed() -> bool:
    """True if the user's torch settings let fp32 products run on TF32 tensor cores."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _without_products(
    size: list[Any], device: torch.device, bias: ir.TensorBox | None, beta: float, out_dtype: torch.dtype
) -> ir.TensorBox:
    """The result when it is empty or K is 0: beta * bias, or zeros."""
    if bias is None:
        return full(size, 0, dtype=out_dtype, device=device)
    return to_dtype(mul(to_dtype(bias, _accumulator(bias.get_dtype())), beta), out_dtype)


def _realized(x: ir.TensorBox) -> ir.IRNode:
    """x as something with an address and strides that can no longer change, since they enter the source."""
    x = ir.ExternKernel.realize_input(x)
    storage, layout = ir.as_storage_and_layout(x, freeze=True)
    if isinstance(layout, ir.FlexibleLayout):
        storage.freeze_layout()
    return x


def _multiple(expression: Any, divisor: int) -> bool:
    return V.graph.sizevars.statically_known_multiple_of(sympy.sympify(expression), divisor)


def _rows_are_aligned(x: ir.IRNode) -> bool:
    """True if one dimension is dense and every run along it starts at a multiple of 16 bytes."""
    elements = 16 // x.get_dtype().itemsize
    strides = [stride for stride, length in zip(x.get_stride(), x.get_size(), strict=True) if length != 1]
    steps = [stride for stride in strides if stride != 1]
    return len(steps) < max(1, len(strides)) and all(
        _multiple(step, elements) for step in [*steps, x.get_layout().offset]
    )


def _tile_of(a: ir.IRNode, b: ir.IRNode, layout: ir.Layout) -> Tile:
    """The tile for these operands, from their sizes or the hints for them."""
    device = DeviceProperties.create(layout.device)
    *batch, m, n, k = V.graph.sizevars.optimization_hints([*layout.size, a.get_size()[-1]])
    return tile_for(
        m,
        n,
        k,
        str(a.get_dtype()).removeprefix("torch."),
        batch=batch[0] if batch else 1,
        sm_count=device.multi_processor_count,
        capability=device.cc,
        tf32=tf32_is_allowed(),
        aligned=_rows_are_aligned(a) and _rows_are_aligned(b),
    )


def template_constants(
    dtype: torch.dtype, tile: Tile, *, batched: bool, even: tuple[bool, bool, bool], tf32: bool = False
) -> dict[str, Any]:
    """The constants of ``SOURCE``; the numerics, accumulator and input precision, are among them.

    even: whether M, N and K are known to be multiples of the tile's sizes.
    """
    return {
        "ACC_TYPE": "tl.float64" if dtype == torch.float64 else "tl.float32",
        "INPUT_PRECISION": "'tf32'" if dtype == torch.float32 and tf32 else "'ieee'",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": GROUP_M,
        "SWAP": tile.swap,
        "BATCHED": batched,
        "EVEN_M": even[0],
        "EVEN_N": even[1],
        "EVEN_K": even[2],
    }


def _constants(a: ir.IRNode, b: ir.IRNode, tile: Tile) -> dict[str, Any]:
    (m, k), n = a.get_size()[-2:], b.get_size()[-1]
    even = (_multiple(m, tile.block_m), _multiple(n, tile.block_n), _multiple(k, tile.block_k))
    batched = len(a.get_size()) == 3
    return template_constants(a.get_dtype(), tile, batched=batched, even=even, tf32=tf32_is_allowed())


def _finish(
    alpha: float, beta: float, accumulator: torch.dtype, out_dtype: torch.dtype
) -> Callable[..., Any]:
    """What follows the chain: alpha, then beta * bias, then the one rounding."""

    def epilogue(acc: Any, bias: Any = None) -> Any:
        if alpha != 1:
            acc = V.ops.mul(acc, V.ops.constant(alpha, accumulator))
        if bias is not None:
            if beta != 1:
                bias = V.ops.mul(bias, V.ops.constant(beta, accumulator))
            acc = V.ops.add(acc, bias)
        if out_dtype == accumulator:
            return acc
        rounded = V.ops.to_dtype(acc, out_dtype, src_dtype=accumulator, use_compute_types=False)
        return V.ops.to_dtype(rounded, accumulator, src_dtype=out_dtype)

    return epilogue
