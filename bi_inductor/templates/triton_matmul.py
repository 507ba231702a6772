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

import functools
import re
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._inductor import config, ir
from torch._inductor.lowering import expand, full, mul, to_dtype
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate
from torch._inductor.virtualized import V

from bi_inductor.templates.chain_source import SOURCE, TILE_PARAMETERS, source_of_tile
from bi_inductor.templates.emission import (
    ProductKernel,
    ProductTemplate,
    emit,
    is_empty,
    is_multiple,
    realized,
    rounded,
)
from bi_inductor.templates.tile_table import Tile, candidates, shortened, tile_for

#: Tile parameters that the source branches on.
_BRANCHES = ("EXTRA_N", "SWAP", "TMA", "EVEN_M", "EVEN_N", "EVEN_K")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@SymbolicGridFn
def programs_of_tile(
    *sizes_and_meta: Any, cdiv: Callable[[Any, Any], Any], min: Callable[[Any, Any], Any]
) -> Any:
    """([B,] M, N, meta) -> one program per tile of the output; with TMA no more than one per SM."""
    *batch, m, n, meta = sizes_and_meta
    tiles = cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"] + meta["EXTRA_N"])
    programs = batch[0] * tiles if batch else tiles
    return (min(programs, meta["SM_COUNT"]) if meta["TMA"] else programs, 1, 1)


@SymbolicGridFn
def output_sizes(*sizes_and_meta: Any) -> tuple[Any, Any, Any]:
    """What a kernel with several tiles is launched with in the place of a grid: ([B,] M, N, meta) -> (M, N, B)."""
    *batch, m, n, _ = sizes_and_meta
    return (m, n, batch[0] if batch else 1)


class ManyTilesKernel(ProductKernel):
    """A kernel whose tile's constants are its last parameters, so that one source serves all tiles."""

    @classmethod
    def gen_common_triton_imports(cls) -> str:
        imports = super().gen_common_triton_imports()
        return imports + "from bi_inductor.runtime import tiles as triton_heuristics\n"

    def def_kernel(self, *names: str) -> str:
        """The head of the kernel."""
        place = super().def_kernel(*names)
        head, parameters = (
            self.render_hooks[place],
            ", ".join(f"{name} : tl.constexpr" for name in TILE_PARAMETERS),
        )
        self.render_hooks[place] = lambda: re.sub(r"(?m)^(def .*)\):$", rf"\1, {parameters}):", head())
        return place


class ManyTilesTemplate(TritonTemplate):
    """The chain kernel with all tiles, one of which is chosen at each launch (``runtime/tiles.py``)."""

    kernel_type = ManyTilesKernel


many_tiles_template = ManyTilesTemplate("batchinv_chain_matmul_tiles", grid=output_sizes, source=SOURCE)


@functools.cache
def one_tile_template(*branches: str) -> TritonTemplate:
    """The template for tiles whose constants named in ``branches``, and no others, are true or not zero."""
    source = source_of_tile({name: name in branches for name in TILE_PARAMETERS})
    name = "_".join(["batchinv_chain_matmul", *map(str.lower, branches)])
    return ProductTemplate(name, grid=programs_of_tile, source=source)


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
    if is_empty([*size, a.get_size()[-1]]):
        return _without_products(size, a.get_device(), bias, beta, out_dtype)
    operands = [realized(x) for x in ([a, b] if bias is None else [bias, a, b])]
    a_operand, b_operand = operands[-2:]
    layout = ir.FixedLayout(a.get_device(), out_dtype, size)
    tiles, choice = _tiles_of(a_operand, b_operand, layout)
    constants, launch = _constants(a_operand, b_operand), None
    if len(tiles) == 1:
        tile = {name: tiles[0][name] for name in TILE_PARAMETERS}
        template = one_tile_template(*(name for name in _BRANCHES if tile[name]))
        constants |= {**tile, "SM_COUNT": choice["sm_count"]}
    else:
        template = many_tiles_template
        launch = {"tiles": tiles, "choice": choice}
    return emit(
        template,
        operands,
        layout,
        num_warps=tiles[0]["num_warps"],
        num_stages=tiles[0]["num_stages"],
        triton_meta=launch,
        prefix_args=len(operands) - 2,
        epilogue_fn=_finish(alpha, beta, _accumulator(a.get_dtype()), out_dtype),
        **constants,
    )


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


def rows_are_aligned(x: ir.IRNode) -> bool:
    """True if one dimension is dense and every run along it starts at a multiple of 16 bytes."""
    elements = 16 // x.get_dtype().itemsize
    strides = [stride for stride, length in zip(x.get_stride(), x.get_size(), strict=True) if length != 1]
    steps = [stride for stride in strides if stride != 1]
    return len(steps) < max(1, len(strides)) and all(
        is_multiple(step, elements) for step in [*steps, x.get_layout().offset]
    )


def _suits_tma(x: ir.IRNode) -> bool:
    """True if TMA can load tiles of x: one dimension is dense, the other's stride a multiple of 16 bytes."""
    strides = [V.graph.sizevars.simplify(stride) for stride in x.get_stride()]
    elements = 16 // x.get_dtype().itemsize
    is_spaced = any(
        strides[dense] == 1 and strides[1 - dense] != 0 and is_multiple(strides[1 - dense], elements)
        for dense in (0, 1)
    )
    return is_spaced and x.get_name() not in V.graph.unaligned_buffers and rows_are_aligned(x)


def _tiles_of(a: ir.IRNode, b: ir.IRNode, layout: ir.Layout) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The tiles that a product may run with, first the one for its sizes or the hints for them; what chooses.

    A product of static sizes has one tile, and so has one that is launched from C++; more only where
    ``max_autotune`` measures them.
    """
    device = DeviceProperties.create(layout.device)
    *batch, m, n, k = V.graph.sizevars.optimization_hints([*layout.size, a.get_size()[-1]])
    dtype = str(a.get_dtype()).removeprefix("torch.")
    is_tma = a.get_dtype().itemsize == 2 and not batch and _suits_tma(a) and _suits_tma(b)
    how = {
        "tf32": tf32_is_allowed(),
        "aligned": rows_are_aligned(a) and rows_are_aligned(b),
        "tma": is_tma,
        "wide": True,
    }
    where = {"sm_count": device.multi_processor_count, "capability": device.cc}
    tiles = [tile_for(m, n, k, dtype, batch=batch[0] if batch else 1, **where, **how)]
    is_dynamic = any(not isinstance(length, (int, sympy.Integer)) for length in layout.size)
    if (config.max_autotune or is_dynamic) and not V.graph.cpp_wrapper:
        others = [shortened(tile, k) for tile in candidates(dtype, device.cc, **how)]
        tiles = list(dict.fromkeys([*tiles, *others])) if tiles[0] in others else tiles
    return [_tile_source(tile, a, b) for tile in tiles], {"k": k, "dtype": dtype, **where, **how}


def _tile_source(tile: Tile, a: ir.IRNode, b: ir.IRNode) -> dict[str, Any]:
    """A tile as it stands in the source of a kernel."""
    (m, k), n = a.get_size()[-2:], b.get_size()[-1]
    even = (is_multiple(m, tile.block_m), is_multiple(n, tile.columns), is_multiple(k, tile.block_k))
    return {**tile_constants(tile, even), "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def tile_constants(tile: Tile, even: tuple[bool, bool, bool]) -> dict[str, int | bool]:
    """The values of ``TILE_PARAMETERS``. even: whether M, N and K are known to be multiples of the tile's sizes."""
    sizes = (tile.block_m, tile.block_n, tile.extra_n, tile.block_k, tile.group_m)
    return dict(zip(TILE_PARAMETERS, (*sizes, tile.swap, tile.tma, *even), strict=True))


def _constants(a: ir.IRNode, b: ir.IRNode) -> dict[str, Any]:
    """The constants that all tiles of a product share."""
    is_tf32 = a.get_dtype() == torch.float32 and tf32_is_allowed()
    return {
        "ACC_TYPE": "tl.float64" if a.get_dtype() == torch.float64 else "tl.float32",
        "INPUT_PRECISION": "'tf32'" if is_tf32 else "'ieee'",
        "BATCHED": len(a.get_size()) == 3,
        "A_K_IS_DENSE": _is_dense(a, -1),
        "B_K_IS_DENSE": _is_dense(b, -2),
    }


def _is_dense(x: ir.IRNode, dim: int) -> bool:
    return V.graph.sizevars.statically_known_equals(x.get_stride()[dim], 1)


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
        return rounded(acc, accumulator, out_dtype)

    return epilogue
