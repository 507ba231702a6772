"""The Triton matmul without a GPU: emitted source, offline cubins, and bits in the interpreter."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton_lowering import kernel_sources, lower

from bi_inductor import inspect, oracle
from bi_inductor.interpreter import run_in_interpreter, run_module
from bi_inductor.offline import CompiledKernel, compile_offline
from bi_inductor.templates import triton_matmul
from bi_inductor.templates.tile_table import Tile, candidates, tile_for
from bi_inductor.testing import same_bits

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TRITON = tuple(int(number) for number in importlib.metadata.version("triton").split(".")[:2])
H100 = {"sm_count": 132, "capability": 90}


def mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t())


def scaled_addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(bias, a, b, alpha=0.7, beta=1.3)


def randn(*size: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(size).to(dtype)


def only_kernel(module: str) -> str:
    """The source of the single kernel of ``module``, which calls no library."""
    assert "extern_kernels." not in module
    (source,) = kernel_sources(module)
    return source


# The tile table


@pytest.mark.parametrize(
    ("m", "n", "k", "expected"),
    [
        (1, 4096, 4096, (16, 64)),
        (16, 28672, 4096, (16, 64)),
        (32, 4096, 14336, (32, 64)),
        (64, 4096, 14336, (64, 32)),
        (256, 4096, 4096, (64, 128)),
        (512, 4096, 4096, (128, 128)),
        (512, 6144, 4096, (128, 192)),
        (512, 5120, 8192, (64, 320)),
        (4096, 28672, 4096, (128, 256)),
        (4096, 1, 4096, (64, 32)),
    ],
)
def test_tiles_are_the_measured_winners(m, n, k, expected):
    tile = tile_for(m, n, k, "bfloat16", tma=True, wide=True, **H100)
    assert (tile.block_m, tile.columns) == expected
    assert tile.tma == (m == 4096 and n > 1)


def test_tma_and_extra_columns_are_chosen_where_they_can_be():
    assert not tile_for(4096, 28672, 4096, "bfloat16", **H100).tma
    assert not any(tile.tma for tile in candidates("bfloat16", 80, tma=True, wide=True))
    assert not any(
        tile.extra_n and (tile.swap or tile.tma) for tile in candidates("bfloat16", 90, tma=True, wide=True)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_tile_fits_and_is_pipelined(dtype, capability):
    limit = {80: 166912, 90: 232448, 100: 232448}.get(capability, 101376)
    itemsize = getattr(torch, dtype).itemsize
    for tile in candidates(dtype, capability, tma=True, wide=True) + candidates(dtype, capability, tf32=True):
        assert tile.shared_bytes(itemsize) <= limit
        assert tile.num_stages >= 2
        assert tile.block_k >= 16


def test_degenerate_sizes_have_a_tile():
    for m, n, k in [(0, 0, 0), (1, 1, 1), (2**31, 1, 1), (1, 2**31, 2**20)]:
        assert tile_for(m, n, k, "float16", **H100).block_k >= 16


# The emitted source


def _numerics(source: str) -> list[str]:
    """The statements that compute values, with the operands of the dot in one order."""
    source = source.split("acc = extra_acc")[0]  # a second store says the same of the extra columns
    statements = re.findall(r"(?m)^ +((?:acc|tmp\d+) = .*|ACC_TYPE.*|INPUT_PRECISION.*)$", source)
    same = {
        "tl.dot(b, a,": "tl.dot(a, b,",
        "tl.trans(acc)": "acc",
        "(BLOCK_N, BLOCK_M)": "(BLOCK_M, BLOCK_N)",
    }
    for swapped, straight in same.items():
        statements = [statement.replace(swapped, straight) for statement in statements]
    return [statement for statement in statements if statement != "acc = acc"]


def test_one_kernel_with_epilogue_that_reads_the_rounded_value():
    module = lower(
        lambda x, w, b: torch.nn.functional.silu(torch.addmm(b, x, w.t())),
        *(randn(8, 1024), randn(4096, 1024), randn(4096)),
    )
    source = only_kernel(module)
    assert "'enable_fp_fusion': False" in source
    assert source.count("tl.dot(") == 1 and source.count("tl.store(") == 1
    rounded = source.index(".to(tl.bfloat16)")
    assert source.index("tl.dot(") < rounded < source.index("libdevice.exp")


def test_producers_are_not_pulled_into_the_loop():
    module = lower(lambda x, w: torch.mm(x.relu(), w + 1), randn(64, 64), randn(64, 64))
    assert len(kernel_sources(module)) == 3


def test_batch_sizes_change_the_schedule_and_nothing_else():
    weight = randn(4096, 1024)
    sources = {m: only_kernel(lower(linear, randn(m, 1024), weight)) for m in (1, 2, 3, 17, 64, 257, 4096)}
    assert len(_numerics(sources[1])) >= 5
    assert all(_numerics(source) == _numerics(sources[1]) for source in sources.values())
    tiles = {tuple(re.findall(r"BLOCK_. : tl.constexpr = \d+", source)) for source in sources.values()}
    assert len(tiles) >= 4


@pytest.mark.parametrize("rows", ["static", "dynamic"])
def test_a_second_store_reads_by_indices_of_its_own(rows):
    """A tile with extra columns stores twice; behind both is an epilogue whose operand is laid out otherwise."""
    x, weight, side = randn(4, 160, 512), randn(640, 512), randn(4, 161, 640)[:, :160]

    def fn(x, weight, side):
        return (x.flatten(0, 1) @ weight.t()).unflatten(0, side.shape[:2]) * side

    tile = next(
        tile
        for tile in candidates("bfloat16", 90, tf32=False, aligned=True, tma=False, wide=True)
        if tile.extra_n
    )
    with mock.patch.object(triton_matmul, "tile_for", lambda *args, **kwargs: tile):
        graph = inspect(fn, x, weight, side, target="sm_90", dynamic=rows == "dynamic")
    assert compile_offline(graph, "sm_90", every_config=True)
    (source,) = [source for source in graph.kernels.values() if "extra_acc" in source]
    first, second = source.split("acc = extra_acc")
    found = [set(re.findall(r"(?m)^ +(x\d+) = ", text)) for text in (first, second)]
    assert found[0] == found[1] != set()


def test_dynamic_batch_passes_its_size_at_run_time():
    module = lower(linear, randn(300, 1024), randn(4096, 1024), dynamic={0: [0]})
    assert "M = ks0" in only_kernel(module)
    assert re.search(
        r"\.run\(.*, s\d+, (s\d+), 4096, 1, stream=", module
    )  # sizes, for the tile to be chosen by


def test_large_tensors_are_addressed_with_64_bits():
    big = torch.empty(1, dtype=BF16).expand(70000, 40000)
    module = lower(
        mm, torch.empty_strided(big.size(), (40000, 1), dtype=BF16, device="meta"), randn(40000, 8)
    )
    assert "INDEX_DTYPE : tl.constexpr = tl.int64" in only_kernel(module)


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_follows_the_users_setting(tf32, monkeypatch):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        source = only_kernel(lower(mm, randn(64, 64, dtype=FP32), randn(64, 64, dtype=FP32)))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert f"INPUT_PRECISION : tl.constexpr = '{'tf32' if tf32 else 'ieee'}'" in source


def test_unknown_dtype_is_an_error():
    with pytest.raises(Exception, match="int32"):
        lower(mm, torch.ones(4, 4, dtype=torch.int32), torch.ones(4, 4, dtype=torch.int32))


# Cubins

FAMILY = {
    (80, BF16): {"mma.sync"},
    (90, BF16): {"wgmma"},
    (100, BF16): {"tcgen05"},
    (80, FP64): {"mma.sync"},
    (90, FP64): {"mma.sync"},
    (100, FP64): {"fma.f64"} if TRITON < (3, 8) else {"mma.sync"},
    (90, FP32): {"fma.f32"},
    (100, FP32): {"fma.f32"},
}


def compiled(module: str, capability: int = 90) -> CompiledKernel:
    """The single kernel of ``module`` as a cubin."""
    (kernel,) = compile_offline(module, f"sm_{capability}")
    return kernel


def mma_families(kernel: CompiledKernel) -> set[str]:
    """Which kinds of multiply-add a kernel has."""
    patterns = {
        "wgmma": r"\bwgmma\.mma_async",
        "tcgen05": r"\btcgen05\.mma",
        "mma.sync": r"\bmma\.sync",
        "fma.f32": r"\bfma\.rn\.f32",
        "fma.f64": r"\bfma\.rn\.f64",
    }
    return {name for name, pattern in patterns.items() if re.search(pattern, kernel.ptx)}


def is_pipelined(kernel: CompiledKernel) -> bool:
    """True if operands are copied to shared memory asynchronously, and by nothing else."""
    return "cp.async.c" in kernel.ptx and "ld.global" not in kernel.ptx


@pytest.mark.parametrize(("capability", "dtype"), FAMILY)
def test_all_tiles_use_one_family_and_do_not_spill(capability, dtype):
    tiles = candidates(str(dtype).removeprefix("torch."), capability)
    smallest = min(tiles, key=lambda tile: tile.block_m * tile.block_n)
    largest = max(tiles, key=lambda tile: tile.block_m * tile.block_n)
    tiles = tiles if (capability, dtype) == (90, BF16) else (smallest, largest)
    inputs = randn(256, 1024, dtype=dtype), randn(512, 1024, dtype=dtype)
    for tile in tiles:
        kernel = compiled(lower(linear, *inputs, target=f"sm_{capability}", tile=tile), capability)
        assert mma_families(kernel) == FAMILY[capability, dtype], tile
        assert kernel.stack_bytes <= 16, tile
        assert kernel.shared_bytes <= {80: 166912}.get(capability, 232448)
        assert is_pipelined(kernel), tile


def test_epilogue_is_not_contracted_but_the_chain_is():
    inputs = randn(512, dtype=FP32), randn(64, 256, dtype=FP32), randn(256, 512, dtype=FP32)
    module = lower(scaled_addmm, *inputs, tile=Tile(32, 64, 32, num_warps=4, num_stages=4))
    free = module.replace("'enable_fp_fusion': False", "'enable_fp_fusion': True")
    outputs = 32 * 64 // 128  # per thread, of 4 columns: each has 32 steps of the chain and alpha * acc
    ptx = compiled(module).ptx
    assert ptx.count("fma.rn.f32") == 32 * outputs < compiled(free).ptx.count("fma.rn.f32")
    assert ptx.count("mul.rn.f32") + ptx.count("mul.f32") == outputs + 4  # beta * bias, once for a column


def test_uneven_k_is_still_pipelined():
    module = lower(linear, randn(512, 1000), randn(4096, 1000))
    assert "inside" in only_kernel(module)
    kernel = compiled(module)
    assert is_pipelined(kernel) and not kernel.spills


# Bits, in the interpreter


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of matrix products, its inputs, and how to lower it."""

    fn: object
    inputs: tuple[Tensor, ...]
    tile: Tile | None = None
    dynamic: dict | None = None

    def module(self) -> str:
        return lower(self.fn, *self.inputs, tile=self.tile, dynamic=self.dynamic)


def interpreted(*cases: Case) -> list[Tensor]:
    return [run_module(case.module(), list(case.inputs))[0] for case in cases]


def chain(a: Tensor, b: Tensor) -> Tensor:
    """The oracle's chain, batched; integers make fp64 exact."""
    if a.ndim == 3:
        return torch.stack([chain(x, y) for x, y in zip(a, b, strict=True)])
    return a @ b if a.dtype == FP64 else oracle.chain_matmul(a, b)


def sliced(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return randn(2 * m, 3 * k + 1, dtype=dtype)[1::2, 2 : 2 + 2 * k : 2]


def test_bits_are_those_of_the_chain():
    shapes = [(1, 1, 1), (1, 64, 17), (3, 70, 40), (33, 50, 130), (70, 3, 16), (40, 1, 33)]
    pairs = [
        (randn(m, k, dtype=dtype), randn(k, n, dtype=dtype)) for m, n, k in shapes for dtype in (BF16, FP32)
    ]
    pairs += [
        (randn(20, 30, dtype=FP16).t(), randn(30, 20, dtype=FP16).t()),
        (sliced(20, 30, BF16), sliced(30, 40, BF16)),
        (randn(1, 30).expand(20, 30), randn(30, 1).expand(30, 40)),
        (torch.randint(-9, 9, (33, 40)).double(), torch.randint(-9, 9, (40, 35)).double()),
    ]
    pairs += [(randn(b, 5, 19), randn(b, 19, 37)) for b in (1, 3)]
    outputs = interpreted(*(Case(torch.matmul, pair) for pair in pairs))
    for (a, b), output in zip(pairs, outputs, strict=True):
        assert same_bits(output, (chain(a, b) + 0.0).to(a.dtype)), (a.shape, b.shape, a.dtype)


def test_bits_do_not_depend_on_tile_rows_or_dynamic_shapes():
    a, b = randn(70, 100, dtype=FP32), randn(100, 50, dtype=FP32)
    tiles = [
        Tile(16, 64, 32, 4, 3, swap=True),
        Tile(64, 16, 64, 4, 3),
        Tile(32, 32, 16, 4, 3),
        Tile(128, 64, 128, 8, 3),
        Tile(64, 64, 128, 8, 3, swap=True),
    ]
    reference, *others = interpreted(
        Case(mm, (a, b)),
        *(Case(mm, (a, b), tile=tile) for tile in tiles),
        Case(mm, (a, b), dynamic={0: [0, 1], 1: [0]}),
        *(Case(mm, (a[row : row + 1], b)) for row in (0, 1, 69)),
        Case(mm, (a[3:20], b)),
    )
    rows = [slice(None)] * (len(tiles) + 1) + [slice(0, 1), slice(1, 2), slice(69, 70), slice(3, 20)]
    for output, row in zip(others, rows, strict=True):
        assert same_bits(output, reference[row])


def test_bias_is_added_before_the_one_rounding():
    a, b = randn(9, 300), randn(300, 20)
    biases = [randn(20), randn(9, 20), randn(9, 1), randn(1, 1)]
    cases = [Case(scaled_addmm, (bias, a, b)) for bias in biases]
    cases.append(Case(lambda c, x, y: torch.addmm(c, x, y, beta=0), (torch.full((20,), torch.nan), a, b)))
    cases.append(Case(lambda c, x, y: torch.baddbmm(c, x, y, beta=2), (biases[1][None], a[None], b[None])))
    outputs = interpreted(*cases)
    alpha, beta = torch.tensor(0.7), torch.tensor(1.3)
    for bias, output in zip(biases, outputs, strict=False):
        assert same_bits(output, (alpha * chain(a, b) + beta * bias.float()).to(BF16))
    assert same_bits(outputs[-2], chain(a, b).to(BF16))
    assert same_bits(outputs[-1][0], (chain(a, b) + 2 * biases[1].float()).to(BF16))


def test_fused_epilogue_has_the_bits_of_the_unfused_one():
    def block(x: Tensor, w: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (torch.mm(x, w).float() * y + z) * 3

    x, w, y, z = randn(9, 300), randn(300, 20), randn(9, 20, dtype=FP32), randn(20, dtype=FP32)
    assert "* tmp" in only_kernel(Case(block, (x, w, y, z)).module())
    product, fused, row = interpreted(
        Case(mm, (x, w)), Case(block, (x, w, y, z)), Case(block, (x[:1], w, y[:1], z))
    )
    assert same_bits(fused, (product.float() * y + z) * 3)
    assert same_bits(row, fused[:1])  # of one row every operand is read by the column alone


def test_neighbours_and_padding_do_not_leak():
    a, b = randn(40, 50, dtype=FP32), randn(50, 30, dtype=FP32)
    poisoned = a.clone()
    poisoned[1::2] = torch.tensor([torch.inf, torch.nan]).repeat(25)
    clean, dirty = interpreted(Case(mm, (a, b)), Case(mm, (poisoned, b)))
    assert same_bits(clean[::2], dirty[::2])
    assert dirty[1::2].isnan().all()


def test_empty_products():
    bias = randn(3)
    for fn, inputs in [
        (mm, (randn(2, 0), randn(0, 3))),
        (mm, (randn(0, 4), randn(4, 3))),
        (scaled_addmm, (bias, randn(2, 0), randn(0, 3))),
    ]:
        assert "tl.dot" not in lower(fn, *inputs)


def test_underflowed_chain_is_positive_zero_whatever_the_padding():
    a, b = torch.full((1, 16), -1e-30), torch.full((16, 1), 1e-30)
    tiles = [Tile(16, 16, 16, 4, 2), Tile(16, 16, 32, 4, 2)]
    outputs = interpreted(*(Case(mm, (a, b), tile=tile) for tile in tiles))
    assert all(same_bits(output, torch.zeros(1, 1)) for output in outputs)


def test_table_is_used(monkeypatch):
    seen = []

    def recording(*args, **kwargs):
        seen.append((args, kwargs))
        return tile_for(*args, **kwargs)

    monkeypatch.setattr(triton_matmul, "tile_for", recording)
    lower(linear, randn(8, 1024), randn(4096, 1024))
    ((args, kwargs),) = seen
    assert args == (8, 4096, 1024, "bfloat16")
    assert kwargs["sm_count"] == 132 and kwargs["capability"] == 90 and kwargs["aligned"]


@pytest.mark.parametrize("rows", [1, 3])
def test_an_element_that_is_looked_up_by_a_product_is_the_products_own(rows):
    """Of a tile's 512 elements at most three exist, and the others, for which nothing is loaded, are not written."""
    a, b = torch.arange(1.0, 6.0).expand(rows, 5).contiguous(), torch.full((5, 1), 0.125)

    def looked_up(a: Tensor, b: Tensor, table: Tensor) -> Tensor:
        return table[(a @ b).clamp(0, 8).long()]

    table = torch.arange(9.0) + 0.5
    found = run_in_interpreter(looked_up, a, b, table)
    assert same_bits(found, torch.full((rows, 1), 1.5))
