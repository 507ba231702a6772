"""fp8, int8 and grouped products on a GPU: a row's bits over batches, tiles, layouts and compile histories."""

from unittest import mock

import pytest
import torch
from devices import compiled

from bi_inductor.templates import quantized_tiles, tile_table, triton_grouped, triton_quantized
from bi_inductor.testing import BATCH_LADDER, count_changed_rows, same_bits

pytestmark = pytest.mark.gpu

E4M3, E5M2, BF16, FP32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def no_silent_eager():
    with torch._dynamo.config.patch(recompile_limit=100, fail_on_recompile_limit_hit=True):
        yield


def capability():
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def fp8(*shape, dtype=E4M3):
    return (torch.randn(shape, device="cuda") * 3).to(dtype)


def scaled(out_dtype=BF16, fast=False):
    def product(x, weight, scale_x, scale_weight, bias=None):
        return torch._scaled_mm(
            x, weight.t(), scale_x, scale_weight, bias=bias, out_dtype=out_dtype, use_fast_accum=fast
        )

    return product


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_fp8_rows_do_not_depend_on_the_batch(fast, by_row):
    x, weight, bias = fp8(2048, 1040), fp8(272, 1040, dtype=E5M2), torch.randn(272, device="cuda", dtype=BF16)
    scale_x = torch.rand(2048 if by_row else 1, 1, device="cuda") + 0.5
    scale_weight = torch.rand(1, 272 if by_row else 1, device="cuda") + 0.5

    def rows_of(product, rows):
        return product(x[rows], weight, scale_x[rows] if by_row else scale_x, scale_weight, bias)

    whole = rows_of(compiled(scaled(BF16, fast), dynamic=False), slice(None))
    exact = x.double() @ weight.double().t() * scale_x * scale_weight + bias.double()
    scale = x.double().abs() @ weight.double().abs().t() * scale_x * scale_weight + 1
    assert ((whole.double() - exact).abs() <= (5e-2 if fast else 1e-2) * scale).all()
    product = compiled(scaled(BF16, fast), dynamic=True)
    for rows in BATCH_LADDER:
        assert count_changed_rows(rows_of(product, slice(rows)), whole[:rows]) == 0, rows
    for row in (0, 1, 255, 2047):
        assert same_bits(rows_of(product, slice(row, row + 1)), whole[row : row + 1]), row


@pytest.mark.parametrize("kind", ["fp8", "fp8 in chunks", "int8"])
def test_every_tile_gives_the_same_bits(kind):
    if kind == "int8":
        inputs = [
            torch.randint(-128, 128, (size, 1000), device="cuda", dtype=torch.int8) for size in (200, 304)
        ]
        fn = lambda x, weight: torch._int_mm(x, weight.t())  # noqa: E731
        expected = (inputs[0].cpu().long() @ inputs[1].cpu().long().t()).int().cuda()
    else:
        one = torch.ones((), device="cuda")
        inputs, fn = [fp8(200, 1040), fp8(304, 1040), one, one], scaled(FP32, kind == "fp8")
        expected = compiled(fn, dynamic=False)(*inputs)
    with torch._inductor.config.patch(force_disable_caches=True):
        for tile in quantized_tiles.candidates(kind, capability()):
            torch._dynamo.reset()
            with mock.patch.object(triton_quantized, "tile_for", lambda *args, t=tile, **kwargs: t):
                assert same_bits(compiled(fn, dynamic=False)(*inputs), expected), tile


@pytest.mark.parametrize("kind", ["1x128, 128x128", "1x128, 1x128"])
def test_block_scales(kind):
    x, weight = fp8(260, 1024), fp8(272, 1024)
    scale_x = torch.rand(260, 8, device="cuda") + 0.5
    scale_weight = torch.rand(8, 3 if kind.endswith("128x128") else 272, device="cuda") + 0.5
    product = compiled(scaled(FP32), dynamic=True)
    whole = product(x, weight, scale_x, scale_weight)
    wide = scale_weight if scale_weight.shape[1] == 272 else scale_weight.repeat_interleave(128, 1)[:, :272]
    left = x.double() * scale_x.double().repeat_interleave(128, 1)
    exact = left @ (weight.double().t() * wide.double().repeat_interleave(128, 0))
    assert ((whole.double() - exact).abs() <= 1e-2 * exact.abs().max()).all()
    for rows in (1, 2, 31, 129, 257):
        assert same_bits(product(x[:rows], weight, scale_x[:rows], scale_weight), whole[:rows]), rows


def routed(tokens, experts, seed=0):
    """The expert of each token, the order that sorts tokens by expert, and where each expert ends."""
    expert = torch.randint(experts, (tokens,), generator=torch.Generator().manual_seed(seed))
    ends = torch.bincount(expert, minlength=experts).cumsum(0).int().cuda()
    return expert.cuda(), expert.argsort(stable=True).cuda(), ends


def grouped(x, weight, ends):
    return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)


def test_grouped_rows_have_the_bits_of_an_ordinary_product():
    experts, width, depth = 16, 320, 1032
    x = torch.randn(2048, depth, device="cuda", dtype=BF16)
    weight = torch.randn(experts, width, depth, device="cuda", dtype=BF16)
    expert, _, _ = routed(2048, experts)
    mm = compiled(lambda x, w: x @ w.t(), dynamic=False)
    expected = torch.empty(2048, width, device="cuda", dtype=BF16)
    for number in range(experts):
        expected[expert == number] = mm(x, weight[number])[expert == number]
    product = compiled(grouped, dynamic=True)
    for rows in BATCH_LADDER:
        order = expert[:rows].argsort(stable=True)
        ends = torch.bincount(expert[:rows], minlength=experts).cumsum(0).int()
        assert count_changed_rows(product(x[order], weight, ends), expected[order]) == 0, rows
        torch._dynamo.reset() if rows == 255 else None
    backwards = torch.arange(2047, -1, -1, device="cuda")[:300]
    order = backwards[expert[backwards].argsort(stable=True)]
    ends = torch.bincount(expert[order], minlength=experts).cumsum(0).int()
    assert same_bits(product(x[order], weight, ends), expected[order])


def test_grouped_tiles_give_the_same_bits():
    x, weight = (
        torch.randn(500, 520, device="cuda", dtype=BF16),
        torch.randn(6, 304, 520, device="cuda", dtype=BF16),
    )
    ends = torch.tensor([0, 130, 130, 131, 400, 490], dtype=torch.int32, device="cuda")
    gradient = torch.randn(500, 304, device="cuda", dtype=BF16)

    def both(x, weight, ends, gradient):
        return grouped(x, weight, ends), torch._grouped_mm(gradient.t(), x, offs=ends)

    reference = compiled(both, dynamic=False)(x, weight, ends, gradient)
    with torch._inductor.config.patch(force_disable_caches=True):
        for tile in tile_table.candidates("bfloat16", capability()):
            torch._dynamo.reset()
            with mock.patch.object(triton_grouped, "tile_for", lambda *args, t=tile, **kwargs: t):
                result = compiled(both, dynamic=False)(x, weight, ends, gradient)
            assert same_bits(result[0], reference[0]) and same_bits(result[1], reference[1]), tile
    assert not reference[0][490:].any() and not reference[1][0].any() and not reference[1][2].any()


def test_gradients_of_experts():
    x = torch.randn(600, 256, device="cuda", dtype=BF16, requires_grad=True)
    weight = torch.randn(8, 128, 256, device="cuda", dtype=BF16, requires_grad=True)
    _, _, ends = routed(600, 8)
    cotangent = torch.randn(600, 128, device="cuda", dtype=BF16)
    ours = torch.autograd.grad(compiled(grouped)(x, weight, ends), (x, weight), cotangent)
    eager = torch.autograd.grad(grouped(x, weight, ends), (x, weight), cotangent)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))
    again = torch.autograd.grad(compiled(grouped, dynamic=True)(x, weight, ends), (x, weight), cotangent)
    assert all(same_bits(a, b) for a, b in zip(ours, again, strict=True))


def test_an_element_that_is_looked_up_by_a_product_is_the_products_own():
    def looked_up(a, b, table):
        return table[(a @ b).clamp(0, 8).long()]

    a, b = torch.arange(1.0, 6.0, device="cuda")[None, :], torch.full((5, 1), 0.125, device="cuda")
    table = torch.arange(9.0, device="cuda") + 0.5
    for _ in range(20):  # elements that do not exist would be written at the same time
        assert same_bits(compiled(looked_up)(a, b, table), table[1:2, None])
