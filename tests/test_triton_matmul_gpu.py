"""The Triton matmul on a GPU: a row's bits over batches, tiles, layouts and compile histories."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_lowering import forced_tile

from bi_inductor.templates.tile_table import candidates
from bi_inductor.testing import BATCH_LADDER, count_changed_rows, same_bits, with_cancellation

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
#: Largest error against fp64 relative to sum |a||b|: a few roundings of the output, and of the fp32 chain.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-5, torch.float64: 1e-13}


@pytest.fixture(autouse=True)
def no_silent_eager():
    """Every batch size may compile its own graph; Dynamo's limit would run the rest of them in eager mode."""
    with torch._dynamo.config.patch(recompile_limit=100, fail_on_recompile_limit_hit=True):
        yield


def compiled(fn, **options):
    torch._dynamo.reset()
    return torch.compile(fn, backend="batchinv", **options)


def randn(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, device="cuda", dtype=dtype)


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [m, K] and weight [n, K] of ``linear``, K >= k; 16-bit results show the last bits of their fp32 sums."""
    x, weight = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype)
    return with_cancellation(x, weight) if dtype.itemsize == 2 else (x, weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def assert_accurate(output: Tensor, a: Tensor, b: Tensor) -> None:
    exact, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((output.double() - exact).abs() <= TOLERANCE[a.dtype] * scale + 1e-30).all()


def test_the_whole_ladder():
    x, weight = operands(2048, 512, 1024, torch.bfloat16)
    product = compiled(linear, dynamic=False)
    whole = product(x, weight)
    for rows in BATCH_LADDER:
        assert count_changed_rows(product(x[:rows], weight), whole[:rows]) == 0, rows
    alone = torch.cat([product(row, weight) for row in x.split(1)])
    assert same_bits(alone, whole)


@pytest.mark.parametrize(
    ("dtype", "n", "k"),
    [
        (torch.bfloat16, 130, 1000),
        (torch.bfloat16, 1, 257),
        (torch.float16, 512, 1024),
        (torch.float16, 96, 17),
        (torch.float32, 512, 1024),
        (torch.float32, 130, 1000),
        (torch.float64, 130, 1000),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_do_not_depend_on_the_batch(dtype, n, k, dynamic):
    x, weight = operands(2048, n, k, dtype)
    product = compiled(linear, dynamic=dynamic)
    plain = x[:, :k].contiguous(), weight[:, :k].contiguous()
    assert_accurate(product(*plain), plain[0], plain[1].t())
    whole = product(x, weight)
    for rows in (1, 7, 64, 257) if not dynamic else BATCH_LADDER:
        assert count_changed_rows(product(x[:rows], weight), whole[:rows]) == 0, rows
    for row in (0, 1, 255, 256, 2047):
        assert same_bits(product(x[row : row + 1], weight), whole[row : row + 1]), row


@pytest.mark.parametrize(
    ("dtype", "k"), [*((dtype, 1000) for dtype in DTYPES), (torch.bfloat16, 1024), (torch.float32, 17)]
)
def test_every_tile_gives_the_same_bits(dtype, k):
    major, minor = torch.cuda.get_device_capability()
    x, weight = operands(200, 300, k, dtype)
    reference = compiled(linear, dynamic=False)(x, weight)
    with torch._inductor.config.patch(force_disable_caches=True):
        name = str(dtype).removeprefix("torch.")
        for tile in candidates(name, 10 * major + minor, tma=True, wide=True):
            with forced_tile(tile):
                assert same_bits(compiled(linear, dynamic=False)(x, weight), reference), tile


#: Around the borders between tiles, and sizes at which persistent TMA tiles run.
BORDERS = (1, 16, 17, 32, 33, 64, 65, 127, 128, 129, 255, 256, 257, 2048, 4096)


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_a_dynamic_graph_has_the_bits_of_static_ones_at_every_border(mode):
    x, weight = operands(4096, 4096, 1024, torch.bfloat16)
    whole = compiled(linear, dynamic=False)(x, weight)
    product = compiled(linear, dynamic=True, mode=mode)
    for m in BORDERS:
        assert same_bits(product(x[:m], weight), whole[:m]), m


def test_a_size_seen_first_in_a_capture():
    """A launch inside a CUDA graph's capture may be the first that wants its tile."""
    x, weight = randn(4096, 1024, dtype=torch.bfloat16), randn(4096, 1024, dtype=torch.bfloat16)
    product = compiled(linear, dynamic=True)
    whole = product(x[:300], weight)
    for m in (20, 3000):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = product(x[:m], weight)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(captured[:20], whole[:20]), m


def test_tf32_tiles_agree_and_differ_from_ieee():
    major, minor = torch.cuda.get_device_capability()
    x, weight = randn(200, 512, dtype=torch.float32), randn(300, 512, dtype=torch.float32)
    ieee = compiled(linear, dynamic=False)(x, weight)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            outputs = []
            for tile in candidates("float32", 10 * major + minor, tf32=True):
                with forced_tile(tile):
                    outputs.append(compiled(linear, dynamic=False)(x, weight))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert all(same_bits(output, outputs[0]) for output in outputs)
    assert not same_bits(outputs[0], ieee)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batched_rows_do_not_depend_on_the_batch(dtype):
    a, b = randn(33, 65, 100, dtype=dtype), randn(33, 100, 72, dtype=dtype)
    product = compiled(torch.bmm, dynamic=False)
    whole = product(a, b)
    assert_accurate(whole, a, b)
    for start, stop in [(0, 1), (0, 2), (5, 12), (32, 33)]:
        assert same_bits(product(a[start:stop], b[start:stop]), whole[start:stop])
    flat = compiled(torch.mm, dynamic=False)
    assert same_bits(flat(a[7], b[7]), whole[7])
    assert same_bits(product(a[:, :3], b), whole[:, :3])


def test_layouts_do_not_matter():
    a, b = randn(300, 512, dtype=torch.bfloat16), randn(512, 260, dtype=torch.bfloat16)
    product = compiled(torch.mm, dynamic=False)
    reference = product(a, b)
    padded = torch.zeros(700, 1100, device="cuda", dtype=a.dtype)
    padded[3:303, 5:517] = a
    spread = torch.zeros(300, 1024, device="cuda", dtype=a.dtype)
    spread[:, ::2] = a
    for left in (a, a.t().contiguous().t(), padded[3:303, 5:517], spread[:, ::2]):
        for right in (b, b.t().contiguous().t()):
            assert same_bits(product(left, right), reference), (left.stride(), right.stride())


@pytest.mark.parametrize("dtype", DTYPES)
def test_addmm(dtype):
    bias, a, b = randn(96, dtype=dtype), randn(257, 300, dtype=dtype), randn(300, 96, dtype=dtype)

    def scaled(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(bias, a, b, alpha=0.7, beta=1.3)

    product = compiled(scaled, dynamic=False)
    whole = product(bias, a, b)
    assert_accurate(whole - 1.3 * bias, 0.7 * a, b)
    for rows in (1, 2, 9, 64, 255, 256):
        assert same_bits(product(bias, a[:rows], b), whole[:rows]), rows


@pytest.mark.parametrize("fp32_inputs", [False, True])
def test_fused_epilogue_has_the_bits_of_the_unfused_one(fp32_inputs):
    dtype = torch.float32 if fp32_inputs else torch.bfloat16
    x, weight, bias = randn(257, 512, dtype=dtype), randn(384, 512, dtype=dtype), randn(384, dtype=dtype)

    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.silu(torch.nn.functional.linear(x, weight, bias)) * 1.1 + bias

    fused = compiled(block, dynamic=False)(x, weight, bias)
    with torch._inductor.config.patch(epilogue_fusion=False, force_disable_caches=True):
        assert same_bits(compiled(block, dynamic=False)(x, weight, bias), fused)


def test_neighbours_do_not_leak():
    x, weight = randn(64, 100, dtype=torch.bfloat16), randn(80, 100, dtype=torch.bfloat16)
    poisoned = x.clone()
    poisoned[::2] = torch.tensor([torch.inf, torch.nan], device="cuda").repeat(50)
    product = compiled(linear, dynamic=False)
    assert same_bits(product(poisoned, weight)[1::2], product(x, weight)[1::2])


def test_addresses_beyond_32_bits():
    if torch.cuda.get_device_properties().total_memory < 24 << 30:
        pytest.fail("this test needs 24 GiB of GPU memory; deselect it on a smaller GPU")
    x = torch.empty(2**20 + 3, 2**11 + 8, device="cuda", dtype=torch.bfloat16).normal_()
    weight = randn(16, x.shape[1], dtype=torch.bfloat16)
    product = compiled(linear, dynamic=False)
    tail = product(x, weight)[-300:]
    assert same_bits(product(x[-300:].clone(), weight), tail)
