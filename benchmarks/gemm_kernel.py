"""The chain template as a Triton kernel of its own: its source, rendered without Inductor, launched with any tile."""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bi_inductor.templates.chain_source import TILE_PARAMETERS
from bi_inductor.templates.tile_table import Tile
from bi_inductor.templates.triton_matmul import many_tiles_template, tile_constants

_NAMES = {("A", -2): "size_m", ("A", -1): "size_k", ("B", -1): "size_n"}
_STRIDES = {("A", -2): "step_am", ("A", -1): "step_ak", ("B", -2): "step_bk", ("B", -1): "step_bn"}
_ARGUMENTS = ["A", "B", "C", *_NAMES.values(), *_STRIDES.values()]
_CONSTANTS = ["ACC_TYPE", "INPUT_PRECISION", "INDEX_DTYPE", *TILE_PARAMETERS]


@functools.cache
def rendered_kernel() -> Any:
    """``chain_matmul(A, B, C, sizes, strides, constants)`` for A [M, K] and B [K, N] with dense K; C is dense."""
    declared = ", ".join([*_ARGUMENTS, *(f"{name}: tl.constexpr" for name in _CONSTANTS)])
    store = "tl.store(C + (idx_m * N + idx_n), acc.to(C.dtype.element_ty), mask=mask)"
    steps = {"step_ak": "1", "step_bk": "1"}
    body = many_tiles_template.template.render(
        def_kernel=lambda *_: f"@triton.jit\ndef chain_matmul({declared}):",
        size=lambda name, index: _NAMES[name, index],
        stride=lambda name, index: steps.get(_STRIDES[name, index], _STRIDES[name, index]),
        store_output=lambda *_, **__: store,
        BATCHED=False,
        A_K_IS_DENSE=True,
        B_K_IS_DENSE=True,
    )
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write("import triton\nimport triton.language as tl\n" + body)
    spec = importlib.util.spec_from_file_location(f"chain_{os.path.basename(file.name)[:-3]}", file.name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.chain_matmul


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for tensor descriptors."""
    return torch.empty(size, device="cuda", dtype=torch.int8)


def constants(dtype: torch.dtype, tile: Tile, m: int, n: int, k: int) -> dict[str, Any]:
    """Constant arguments and launch options of the kernel."""
    even = (m % tile.block_m == 0, n % tile.columns == 0, k % tile.block_k == 0)
    accumulator = tl.float64 if dtype == torch.float64 else tl.float32
    return {
        **tile_constants(tile, even),
        "ACC_TYPE": accumulator,
        "INPUT_PRECISION": "ieee",
        "INDEX_DTYPE": tl.int32,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": False,
    }


def launch(x: Tensor, weight: Tensor, output: Tensor, tile: Tile, sm_count: int = 132) -> None:
    """output = x @ weight.t() with ``tile``; x [M, K], weight [N, K] and output [M, N] are dense."""
    (m, k), n = x.shape, weight.shape[0]
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.columns)
    grid = (min(tiles, sm_count) if tile.tma else tiles,)
    arguments = (x, weight, output, m, k, n, k, 1, 1, k)
    triton.set_allocator(_scratch)
    rendered_kernel()[grid](*arguments, **constants(x.dtype, tile, m, n, k))


def warm_up(dtype: torch.dtype, tile: Tile, m: int, n: int, k: int) -> Any:
    """Compile what ``launch`` would for these sizes; needs no tensors."""
    operand = triton.MockTensor(dtype, [0])
    arguments = (operand, operand, operand, m, k, n, k, 1, 1, k)
    return rendered_kernel().warmup(*arguments, grid=(1,), **constants(dtype, tile, m, n, k))
