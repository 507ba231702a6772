"""One compiled graph, several tiles: which one runs follows the batch, and no bit does."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._inductor.runtime.triton_heuristics import CachingAutotuner, StaticTritonCompileResult
from triton.compiler import CompiledKernel
from triton_lowering import kernel_sources, lower

from bi_inductor import inspect
from bi_inductor.interpreter import run_module
from bi_inductor.offline import compile_offline, load_kernel
from bi_inductor.runtime.tiles import TileChoosing
from bi_inductor.templates.tile_table import Tile, candidates, tile_for
from bi_inductor.testing import same_bits
from bi_inductor.virtual import virtual_gpu

#: Around the borders between tiles of 16, 32, 64, 128 and 256 rows.
BORDERS = (1, 16, 17, 32, 33, 64, 65, 127, 128, 129, 255, 256, 257)
WEIGHT = torch.randn(4096, 1024).bfloat16()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t())


def rows(m: int, k: int = 1024) -> Tensor:
    return torch.randn(m, k).bfloat16()


def only_kernel_object(module: str) -> TileChoosing:
    """What the single kernel of ``module`` is before anything is compiled."""
    (source,) = kernel_sources(module)
    with virtual_gpu():
        return load_kernel(source, re.search(r"(?m)^def (\w+)\(", source)[1])


def dynamic_module(x: Tensor, weight: Tensor = WEIGHT, target: str = "sm_90") -> str:
    return lower(linear, x, weight, dynamic={0: [0]}, target=target)


@pytest.fixture(scope="module")
def kernel() -> TileChoosing:
    """The kernel of a graph with a dynamic batch, not compiled."""
    return only_kernel_object(dynamic_module(rows(300)))


def tile_of(kernel: TileChoosing, m: int) -> dict[str, int]:
    """Constants of the tile that runs for m rows."""
    return kernel.choice.configs[kernel.choice(m, 4096, 1)[0]].kwargs


def test_the_tile_follows_the_rows_as_it_does_in_static_graphs(kernel):
    assert len({tuple(tile_of(kernel, m).items()) for m in BORDERS}) >= 5
    for m in (*BORDERS, 2048, 8192):
        tile = tile_for(m, 4096, 1024, "bfloat16", sm_count=132, capability=90, tma=True, wide=True)
        chosen = tile_of(kernel, m)
        assert (chosen["BLOCK_M"], chosen["BLOCK_N"], chosen["EXTRA_N"], chosen["TMA"]) == (
            *(tile.block_m, tile.block_n, tile.extra_n),
            tile.tma,
        ), m


def test_each_launch_runs_the_tile_of_its_sizes(kernel):
    kernel, launched = copy.copy(kernel), []
    kernel._forget()

    class Launched:
        def __init__(self, number: int) -> None:
            self.number = number

        def run(self, *args: object, stream: object) -> None:
            launched.append(self.number)

    first = mock.patch.object(CachingAutotuner, "run", lambda self, *args, stream: launched.append(0))
    others = mock.patch.object(TileChoosing, "_kernel", lambda self, number: Launched(number))
    alone = mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False)
    sizes = [*BORDERS, 300, *reversed(BORDERS)]
    with first, others, alone, mock.patch.object(kernel, "choice", wraps=kernel.choice) as choice:
        for m in sizes:
            kernel.run("a", "b", "out", m, m, 4096, 1, stream=0)
    assert launched == [kernel.choice(m, 4096, 1)[0] for m in sizes]
    assert len(set(launched)) >= 5 and 0 in launched
    assert choice.call_count == len(set(sizes))  # known sizes are looked up


def test_a_capture_takes_a_tile_that_is_there_and_remembers_nothing(kernel):
    kernel, launched = copy.copy(kernel), []
    with (
        mock.patch.object(CachingAutotuner, "run", lambda self, *args, stream: launched.append(args[-3:])),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
    ):
        kernel.run("a", "b", "out", 2, 2, 4096, 1, stream=0)
    assert launched == [(2, 4096, 1)] and not kernel._by_sizes and not kernel._by_tile


def test_a_launch_compiles_its_tile_and_has_its_grid():
    """With the launchers that a GPU would be launched by, up to the call of the driver."""
    kernel, launched = copy.copy(only_kernel_object(dynamic_module(rows(300)))), []

    class Driver:
        """In the place of a compiled kernel's ``run``."""

        def __get__(self, kernel: CompiledKernel, owner: type) -> Callable[..., None]:
            return lambda *args: launched.append((args[0], kernel.metadata.num_warps, kernel.asm["ptx"]))

    with (
        virtual_gpu() as device,
        mock.patch.object(CompiledKernel, "_init_handles", lambda self: None),
        mock.patch.object(CompiledKernel, "run", Driver()),
        mock.patch.object(StaticTritonCompileResult, "can_statically_launch", staticmethod(lambda *_: None)),
    ):
        kernel.device_props = kernel.device_props._replace(cc=device.arch, major=device.major)
        for m in (2, 300, 4096, 300):
            kernel.run("a", "b", "out", m, m, 4096, 1, stream=0)
    assert [grid for grid, _, _ in launched] == [
        64,
        5 * 22,
        132,
        5 * 22,
    ]  # 64 columns; 64x192; one for each SM
    assert [warps for _, warps, _ in launched] == [4, 4, 8, 4]
    assert ["cp.async.bulk.tensor" in ptx for _, _, ptx in launched] == [False, False, True, False]
    assert len(kernel._by_tile) == 2  # the first tile is the kernel's own


def test_the_first_tile_is_the_one_of_the_hint():
    for m in (2, 64, 4096):
        kernel = only_kernel_object(dynamic_module(rows(m)))
        assert kernel.choice(m, 4096, 1) == [0]
        assert [config.kwargs for config in kernel.configs] == [kernel.choice.configs[0].kwargs]


def test_a_kernel_crosses_processes(kernel):
    kernel = copy.copy(kernel)
    kernel._by_sizes = {(1, 4096, 1): print}
    old = kernel.prepare_for_pickle()
    try:
        there = pickle.loads(pickle.dumps(kernel))
    finally:
        kernel.restore_after_unpickle(old)
    assert there._by_sizes == {} and there.choice(257, 4096, 1) == kernel.choice(257, 4096, 1)


def test_static_graphs_hold_one_tile_unless_tiles_are_measured():
    static = lower(linear, rows(64), WEIGHT)
    assert "import tiles" not in static and "BLOCK_M : tl.constexpr = 64" in static
    measured = only_kernel_object(lower(linear, rows(64), WEIGHT, max_autotune=True))
    numbers = measured.choice(64, 4096, 1, count=4)
    assert len(set(numbers)) == 4 and numbers[0] == 0


def test_max_autotune_runs_the_fastest_of_the_best_estimates():
    kernel = only_kernel_object(lower(linear, rows(64), WEIGHT, max_autotune=True))
    numbers = kernel.choice(64, 4096, 1, count=4)
    compiled = {}
    for number in numbers:
        bench = mock.Mock(side_effect=lambda launcher, *_: 1 if launcher == numbers[2] else 9)
        compiled[number] = mock.Mock(launchers=[number], bench=bench)
    with (
        mock.patch.object(TileChoosing, "_kernel", lambda self, number: compiled[number]),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
    ):
        kernel.run(rows(2), rows(2), rows(2), 64, 4096, 1, stream=0)
        kernel.run(rows(2), rows(2), rows(2), 60, 4096, 1, stream=0)  # about as many: not measured again
    assert [one.bench.call_count for one in compiled.values()] == [1, 1, 1, 1]
    assert compiled[numbers[2]].run.call_count == 2


def test_the_certificate_of_a_dynamic_graph_is_that_of_a_static_one():
    static, dynamic = (inspect(linear, rows(300), WEIGHT, dynamic=d).verdicts for d in (False, True))
    assert [entry.verdict for entry in static] == [entry.verdict for entry in dynamic]


# Bits, in the interpreter


def test_a_dynamic_graph_has_the_bits_of_static_ones_at_every_border():
    x, weight = rows(257, 40), torch.randn(136, 40).bfloat16()
    whole = run_module(lower(linear, x, weight), [x, weight])[0]
    module = dynamic_module(x[:3], weight)
    chosen = {tuple(tile_of_rows(module, m)) for m in BORDERS}
    assert len(chosen) >= 3
    for m in BORDERS:
        assert same_bits(run_module(module, [x[:m], weight])[0], whole[:m]), m


def tile_of_rows(module: str, m: int) -> tuple[int, ...]:
    kernel = only_kernel_object(module)
    return tuple(kernel.choice.configs[kernel.choice(m, 136, 1)[0]].kwargs.values())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("k_is_dense", [False, True])
def test_tma_and_extra_columns_have_the_bits_of_other_tiles(k_is_dense, fused):
    def product(x: Tensor, weight: Tensor) -> Tensor:
        out = torch.mm(x, weight)
        return out.relu() * 1.5 if fused else out

    x, weight = torch.randn(72, 40).bfloat16(), torch.randn(40, 104).bfloat16()
    inputs = (x, weight.t().contiguous().t()) if k_is_dense else (x.t().contiguous().t(), weight)
    reference = run_module(lower(product, *inputs), [*inputs])[0]
    for tile in (
        Tile(64, 32, 16, 4, 3, tma=True),
        Tile(16, 128, 32, 4, 3, tma=True, group_m=2),
        Tile(16, 32, 16, 4, 3, extra_n=16),
        Tile(64, 64, 64, 4, 3, extra_n=32),
    ):
        module = lower(product, *inputs, tile=tile)
        assert ("tl.make_tensor_descriptor(" in module) == tile.tma
        assert same_bits(run_module(module, [*inputs])[0], reference), tile


# Cubins


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("target", "family"), [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05")]
)
def test_every_tile_compiles_without_spilling(target, family):
    capability = int(target[3:])
    module = dynamic_module(rows(300), target=target)
    tiles = compile_offline(module, target, every_config=True)
    assert len(tiles) == len(candidates("bfloat16", capability, tma=True, wide=True))
    for tile in tiles:
        assert f"{family}." in tile.ptx, tile
        assert tile.stack_bytes <= 16 and tile.shared_bytes <= (166912 if target == "sm_80" else 232448), tile
        assert ("cp.async.bulk.tensor" in tile.ptx) == ("TMA: True" in tile.config), tile
