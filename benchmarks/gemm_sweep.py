"""Search tiles for the chain template: its source, rendered without Inductor, launched with many tiles.

For every shape: the best tiles, the time of ``torch.mm`` beside them, the tile that ``tile_for`` would choose and
its rank, and the number of different outputs over all tiles that ran (bit classes), which has to be 1.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import timing
import torch
import triton
from gemm import linear, random_inputs
from torch import Tensor

from bi_inductor.templates.tile_table import Tile, candidates, tile_for
from bi_inductor.templates.triton_matmul import chain_matmul_template, template_constants
from bi_inductor.testing import same_bits

_NAMES = {("A", -2): "size_m", ("A", -1): "size_k", ("B", -1): "size_n"}
_STRIDES = {("A", -2): "step_am", ("A", -1): "step_ak", ("B", -2): "step_bk", ("B", -1): "step_bn"}
_ARGUMENTS = ["A", "B", "C", *_NAMES.values(), *_STRIDES.values()]
_CONSTEXPRS = ("ACC_TYPE", "INPUT_PRECISION", "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "INDEX_DTYPE")


@functools.cache
def rendered_kernel(swap: bool, even: tuple[bool, bool, bool]) -> Any:
    """The template as a kernel whose sizes, strides and tile are arguments; the output is dense."""
    declared = ", ".join([*_ARGUMENTS, *(f"{name}: tl.constexpr" for name in _CONSTEXPRS)])
    store = "tl.store(C + (idx_m * N + idx_n), acc.to(C.dtype.element_ty), mask=mask)"
    body = chain_matmul_template.template.render(
        def_kernel=lambda *_: f"@triton.jit\ndef chain_matmul({declared}):",
        size=lambda name, index: _NAMES[name, index],
        stride=lambda name, index: _STRIDES[name, index],
        store_output=lambda *_, **__: store,
        SWAP=swap,
        BATCHED=False,
        EVEN_M=even[0],
        EVEN_N=even[1],
        EVEN_K=even[2],
    )
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write("import triton\nimport triton.language as tl\n" + body)
    spec = importlib.util.spec_from_file_location(f"chain_{os.path.basename(file.name)[:-3]}", file.name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.chain_matmul


def launch(x: Tensor, weight: Tensor, *, tile: Tile, warm_up: bool = False) -> Tensor:
    """x @ weight.t() with ``tile``; with ``warm_up`` it is only compiled."""
    import triton.language as tl

    (m, k), n = x.shape, weight.shape[0]
    even = (m % tile.block_m == 0, n % tile.block_n == 0, k % tile.block_k == 0)
    constants = template_constants(x.dtype, tile, batched=False, even=even)
    accumulator = tl.float64 if x.dtype == torch.float64 else tl.float32
    constants |= {"ACC_TYPE": accumulator, "INPUT_PRECISION": "ieee", "INDEX_DTYPE": tl.int32}
    output = torch.empty(m, n, dtype=x.dtype, device=x.device)
    kernel = rendered_kernel(tile.swap, even)
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    arguments = [x, weight, output, m, k, n, x.stride(0), x.stride(1), weight.stride(1), weight.stride(0)]
    options = {name: constants[name] for name in _CONSTEXPRS}
    options |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}
    if warm_up:
        kernel.warmup(*arguments, grid=grid, **options)
    else:
        kernel[grid](*arguments, **options)
    return output


def plausible_tiles(m: int, dtype: torch.dtype) -> Iterator[Tile]:
    """Tiles worth trying for M = ``m``: the whole table, and for bf16 and fp16 on Hopper many more."""
    yield from candidates(str(dtype).removeprefix("torch."), 90)
    if dtype.itemsize != 2:
        return
    rows = [16] if m <= 16 else [r for r in (16, 32, 64, 128, 256) if min(128, m / 8) <= r <= max(64, 2 * m)]
    for bm, bn, bk, warps, swap in itertools.product(
        rows, (64, 128, 256), (64, 128, 256), (4, 8), (False, True)
    ):
        side = bn if swap else bm  # what the 64 rows of each warp group's MMA run along
        if side < 16 * warps or not 8 <= bm * bn // (32 * warps) <= 128:
            continue
        bytes_per_stage = (bm + bn) * bk * 2
        for shared in (232_448, 113_000):  # one block on an SM, or two
            stages = min(6, shared // bytes_per_stage)
            if stages >= 3:
                yield Tile(bm, bn, bk, warps, stages, swap)


def sweep(
    rows: Sequence[int], shapes: Sequence[tuple[int, int]], dtype: torch.dtype, seconds: float
) -> list[dict]:
    """Search every (M, shape) for its share of ``seconds``; one record each."""
    began, problems = time.perf_counter(), list(itertools.product(rows, shapes))
    records = []
    for number, (m, (n, k)) in enumerate(problems):
        left = seconds - (time.perf_counter() - began)
        record = _search(random_inputs(m, n, k, dtype), left / (len(problems) - number))
        print(record, flush=True)
        records.append(record)
    return records


def _search(inputs: tuple[Tensor, Tensor], seconds: float) -> dict[str, object]:
    """Compile for 0.6 of ``seconds``, run everything once, time everything shortly and the best at length."""
    (m, k), n, dtype = inputs[0].shape, inputs[1].shape[0], inputs[0].dtype
    chosen = _chosen_tile(m, n, k, dtype)
    tiles = _compiled([chosen, *plausible_tiles(m, dtype)], inputs, 0.6 * seconds)
    classes: list[Tensor] = []
    for output in (launch(*inputs, tile=tile) for tile in tiles):
        if not any(same_bits(output, other) for other in classes):
            classes.append(output)
    shortly = _times(tiles, inputs, rounds=3)
    finalists = sorted(tiles, key=shortly.__getitem__)[:6]
    times = _times(dict.fromkeys([*finalists, chosen]), inputs, rounds=20)
    library = times.pop(None)
    price = {tile: f"{_brief(tile)} {time_us / library:.3f}" for tile, time_us in times.items()}
    record = {"n": n, "k": k, "m": m, "dtype": str(dtype), "torch.mm_us": round(library, 2)}
    record |= {"tried": len(tiles), "bit_classes": len(classes), "chosen": price[chosen]}
    best = sorted(times, key=times.__getitem__)[:3]
    return record | {f"best{place}": price[tile] for place, tile in enumerate(best, 1)}


def _chosen_tile(m: int, n: int, k: int, dtype: torch.dtype) -> Tile:
    device = torch.cuda.get_device_properties()
    capability = 10 * device.major + device.minor
    name = str(dtype).removeprefix("torch.")
    return tile_for(m, n, k, name, sm_count=device.multi_processor_count, capability=capability)


def _compiled(tiles: Sequence[Tile], pair: tuple[Tensor, Tensor], seconds: float) -> list[Tile]:
    """Those of ``tiles``, the first at any price, that compile within ``seconds`` and can be launched."""
    began = time.perf_counter()

    def usable(tile: Tile) -> bool:
        if tile != tiles[0] and time.perf_counter() - began > seconds:
            return False
        try:
            launch(*pair, tile=tile, warm_up=True)
        except Exception as error:  # whatever Triton or ptxas cannot do is not a candidate
            print(f"  {_brief(tile)} does not compile: {str(error).splitlines()[0][:80]}", flush=True)
            return False
        return True

    different = {dataclasses.replace(tile, rate=0): tile for tile in reversed(tiles)}
    tiles = [*reversed(different.values())]
    with ThreadPoolExecutor(16) as pool:
        compiled = [tile for tile, fits in zip(tiles, pool.map(usable, tiles), strict=True) if fits]
    return [tile for tile in compiled if _launches(tile, pair)]


def _launches(tile: Tile, pair: tuple[Tensor, Tensor]) -> bool:
    try:
        launch(*pair, tile=tile)
    except triton.runtime.errors.OutOfResources:
        return False
    return True


def _times(tiles: Iterable[Tile], inputs: tuple[Tensor, Tensor], rounds: int) -> dict[Tile | None, float]:
    """Microseconds of each tile, and of ``torch.mm`` as None."""
    candidates: dict[Any, Any] = {tile: functools.partial(launch, *inputs, tile=tile) for tile in tiles}
    candidates[None] = functools.partial(linear, *inputs)
    return timing.interleaved_medians(candidates, rounds)


def _brief(tile: Tile) -> str:
    sizes = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    return f"{sizes} warps {tile.num_warps} stages {tile.num_stages}{' swapped' if tile.swap else ''}"
