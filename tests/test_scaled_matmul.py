"""Products of fp8 matrices: the sums of the oracle, one MMA family for each GPU, refusals by name."""

import re
from unittest import mock

import pytest
import torch
from devices import compiled
from torch.nn.functional import ScalingType

from bi_inductor import BatchInvarianceError, inspect, oracle, verifier
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.offline import compile_offline
from bi_inductor.templates import quantized_tiles, triton_quantized
from bi_inductor.templates.mma_family import FP8_FAMILY, fp8_family_of
from bi_inductor.testing import BATCH_LADDER, same_bits

E4M3, E5M2, BF16, FP32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32


def operands(m, n, k, left=E4M3, right=E4M3, seed=0):
    """[m, k] row-major and [k, n] column-major, as eager wants them on a GPU."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(m, k, generator=generator) * 3, torch.randn(n, k, generator=generator) * 3
    return a.to(left), b.to(right).t()


def scaled(out_dtype=BF16, fast=False):
    def product(a, b, scale_a, scale_b, bias=None):
        return torch._scaled_mm(a, b, scale_a, scale_b, bias=bias, out_dtype=out_dtype, use_fast_accum=fast)

    return product


def scales(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


# Bits: the interpreter's against the oracle's


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", [(1, 16, 32), (5, 32, 304), (70, 144, 256)], ids=str)
def test_the_sums_are_the_oracle_s(shape, fast):
    m, n, k = shape
    a, b = operands(m, n, k)
    total = (oracle.chain_matmul if fast else oracle.chunked_matmul)(a, b) + 0.0
    bias = scales(n, seed=3).to(BF16)
    for scale_a, scale_b in [(scales(1), scales(1)), (scales(m, 1), scales(1, n))]:
        result = run_in_interpreter(scaled(BF16, fast), a, b, scale_a, scale_b, bias)
        assert same_bits(result, (total * scale_a * scale_b + bias).to(BF16))


def spread(x, dim, length):
    return x if x.shape[dim] == length else x.repeat_interleave(128, dim).narrow(dim, 0, length)


@pytest.mark.parametrize("kind", ["1x128, 128x128", "1x128, 1x128", "128x128, 1x128"])
def test_block_scales(kind):
    m, n, k = 40, 144, 272
    a, b = operands(m, n, k)
    scale_a = scales(1 if kind.startswith("128") else m, 3)
    scale_b = scales(3, 2 if kind.endswith("128x128") else n)
    expected = oracle.chunked_matmul(a, b, spread(scale_a, 0, m), spread(scale_b, 1, n)) + 0.0
    assert same_bits(run_in_interpreter(scaled(FP32), a, b, scale_a, scale_b), expected)


def test_scales_of_blocks_and_of_rows_agree_where_both_fit():
    """Up to K = 128 and N = 128 the scales [M, 1] and [1, 1] are blocks, but for one row they are a tensor's."""
    a, b = operands(40, 64, 112)
    scale_a, scale_b = scales(40, 1), scales(1, 1, seed=2)
    together = run_in_interpreter(scaled(FP32), a, b, scale_a, scale_b)
    assert same_bits(together, (oracle.chunked_matmul(a, b) + 0.0) * scale_a * scale_b)
    alone = run_in_interpreter(scaled(FP32), a[:1], b, scale_a[:1], scale_b)
    assert same_bits(alone, together[:1])


@pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="Dynamo of torch 2.11 does not trace the second version"
)
@pytest.mark.parametrize("kind", ["TensorWise", "RowWise", "BlockWise1x128, BlockWise128x128"])
def test_the_second_version_of_the_op(kind):
    m, n, k = 128, 256, 256
    a, b = operands(m, n, k)
    shapes = {"TensorWise": ((1,), (1,)), "RowWise": ((m, 1), (1, n))}.get(kind, ((2, m), (2, 4)))
    scale_a, scale_b = scales(*shapes[0]), scales(*shapes[1], seed=2)
    left, *right = (getattr(ScalingType, name) for name in kind.split(", "))
    right = right[0] if right else left
    if len(kind) > 10:
        scale_a, scale_b = scale_a.t(), scale_b.t()
        wide = spread(spread(scale_b[:2], 0, 2), 1, n)
        expected = oracle.chunked_matmul(a, b, scale_a, wide) + 0.0
    else:
        expected = (oracle.chunked_matmul(a, b) + 0.0) * scale_a * scale_b

    def product(a, b, scale_a, scale_b):
        return torch.nn.functional.scaled_mm(a, b, scale_a, left, scale_b, right, output_dtype=FP32)

    assert same_bits(run_in_interpreter(product, a, b, scale_a, scale_b), expected)


@pytest.mark.parametrize("fast", [False, True])
def test_tiles_rows_and_dynamic_shapes_have_no_say(fast):
    a, b = operands(70, 48, 304, left=E5M2)
    one = torch.ones(1)
    reference = run_in_interpreter(scaled(FP32, fast), a, b, one, one)
    for rows in (slice(0, 1), slice(69, 70), slice(3, 20)):
        assert same_bits(run_in_interpreter(scaled(FP32, fast), a[rows], b, one, one), reference[rows])
    assert same_bits(run_in_interpreter(scaled(FP32, fast), a, b, one, one, dynamic=True), reference)
    for tile in quantized_tiles.candidates("fp8" if fast else "fp8 in chunks", 90)[1::2]:
        with mock.patch.object(triton_quantized, "tile_for", lambda *args, t=tile, **kwargs: t):
            assert same_bits(run_in_interpreter(scaled(FP32, fast), a, b, one, one), reference), tile


def test_quantising_in_the_graph_and_a_fused_epilogue():
    """Scales by row are exact maxima of rows, so they do not see the batch either."""

    def layer(x, weight, scale):
        largest = x.abs().amax(-1, keepdim=True).float() / 448
        product = torch._scaled_mm((x / largest).to(E4M3), weight.t(), largest, scale, out_dtype=BF16)
        return torch.nn.functional.silu(product) * 1.5

    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).to(BF16)
    weight, scale = operands(1, 32, 256)[1].t(), scales(1, 32)
    assert len(inspect(layer, x, weight, scale).kernels) == 2
    whole = run_in_interpreter(layer, x, weight, scale)
    for row in (0, 7):
        assert same_bits(run_in_interpreter(layer, x[row : row + 1], weight, scale), whole[row : row + 1])


def test_an_fp8_result_is_rounded_once():
    a, b = operands(5, 32, 304)
    result = run_in_interpreter(scaled(None), a, b, torch.ones(1), torch.ones(1))
    expected = (oracle.chunked_matmul(a, b) + 0.0).to(E4M3)
    assert result.dtype == E4M3 and torch.equal(result.view(torch.uint8), expected.view(torch.uint8))


# One family of instructions


@pytest.mark.parametrize("capability", FP8_FAMILY)
@pytest.mark.parametrize("kind", ["fp8", "fp8 in chunks"])
def test_no_shape_gets_a_tile_of_another_family(kind, capability):
    for tile in quantized_tiles.candidates(kind, capability):
        assert fp8_family_of(tile, capability) == FP8_FAMILY[capability], tile
        assert tile.block_k == 128
    for m in (*BATCH_LADDER, 0, 8192):
        for n in (1, 16, 512, 28672):
            tile = quantized_tiles.tile_for(m, n, 4096, kind, sm_count=132, capability=capability)
            assert fp8_family_of(tile, capability) == FP8_FAMILY[capability], (m, n, tile)


INSTRUCTIONS = {
    "mma_k16": r"mma\.sync\S*\.m16n8k16\.\S*f16",
    "mma_k32": r"mma\.sync\S*\.m16n8k32\.\S*e4m3",
    "wgmma_k32": r"wgmma\.mma_async\S*k32\.f32\.e4m3",
    "tcgen05_k32": r"tcgen05\.mma\S*f8f6f4",
}


def families(ptx):
    return {name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, ptx)}


@pytest.mark.parametrize("capability", [89, 90, 100])
@pytest.mark.parametrize("fast", [False, True])
def test_every_tile_compiles_to_its_family(capability, fast):
    target, one = f"sm_{capability}", torch.ones(1)
    tiles = quantized_tiles.candidates("fp8" if fast else "fp8 in chunks", capability)
    a, b = operands(256, 512, 1024)
    for tile in tiles if capability == 90 else tiles[::3]:
        with mock.patch.object(triton_quantized, "tile_for", lambda *args, t=tile, **kwargs: t):
            (kernel,) = compile_offline(inspect(scaled(fast=fast), a, b, one, one, target=target), target)
        assert families(kernel.ptx) == {FP8_FAMILY[capability]}, tile
        assert kernel.stack_bytes <= 16, (tile, str(kernel))
        # One addition per output and chunk if there are chunks: no other promotion.
        outputs = tile.block_m * tile.block_n // (32 * tile.num_warps)
        additions = len(re.findall(r"add\.(?:rn\.)?f32(?:x2)?\b", kernel.ptx))
        if capability == 90:
            assert additions == (0 if fast else outputs), tile


def test_a_small_tile_would_be_of_another_family():
    """The guard's teeth: what the table must not return compiles to other instructions, and is found."""
    from bi_inductor.templates.tile_table import Tile

    small = Tile(16, 32, 128, 4, 4)
    assert fp8_family_of(small, 90) == "mma_k16"
    a, b = operands(16, 32, 256)
    with mock.patch.object(triton_quantized, "tile_for", lambda *args, **kwargs: small):
        with pytest.raises(BatchInvarianceError, match="mma_k16"):
            inspect(scaled(), a, b, torch.ones(1), torch.ones(1))
        with mock.patch("bi_inductor.verifier.check", verifier.examine):
            graph = inspect(scaled(), a, b, torch.ones(1), torch.ones(1))
        with pytest.raises(BatchInvarianceError, match="threads hold 4 neighbouring k of f16"):
            compile_offline(graph)
        with mock.patch("bi_inductor.runtime.checked.wrong_sums", lambda *irs: []):
            (kernel,) = compile_offline(graph)
    assert families(kernel.ptx) == {"mma_k16"}


# The CPU, and what is refused


@pytest.mark.lengthy
def test_the_cpu_product_is_one_chain():
    a, b = operands(70, 48, 304)
    product = compiled(scaled(FP32), dynamic=True)
    whole = product(a, b, scales(1), scales(1, seed=2))
    exact = a.double() @ b.double() * scales(1) * scales(1, seed=2)
    torch.testing.assert_close(whole.double(), exact, rtol=1e-4, atol=1e-3)
    for rows in (1, 2, 7, 33):
        assert same_bits(product(a[:rows], b, scales(1), scales(1, seed=2)), whole[:rows])
    by_rows = compiled(scaled(FP32))(a, b, scales(70, 1), scales(1, 48))
    chain = compiled(torch.mm)(a.float(), b.float())
    assert same_bits(by_rows, chain * scales(70, 1) * scales(1, 48))


def test_refusals_name_a_remedy():
    a, b = operands(16, 32, 256)
    one = torch.ones(1)
    for target in ("sm_80", "sm_86"):
        with pytest.raises(BatchInvarianceError, match=r"compute capability 8\.9"):
            inspect(scaled(), a, b, one, one, target=target)

    def with_scale_of_the_result(a, b, one):
        return torch._scaled_mm(a, b, one, one, scale_result=one, out_dtype=BF16)

    with pytest.raises(BatchInvarianceError, match="scale_result"):
        inspect(with_scale_of_the_result, a, b, one)
    with pytest.raises(BatchInvarianceError, match="block scales"):
        compiled(scaled())(a, b, scales(16, 2), scales(2, 1))


def test_mistakes_get_eager_s_error():
    a, b = operands(16, 32, 256)
    one = torch.ones(1)
    with pytest.raises(Exception, match="fp8"):
        inspect(scaled(), a.float(), b, one, one)
    with pytest.raises(Exception, match="divisible by 16"):
        inspect(scaled(), *operands(16, 31, 256), one, one)
    with pytest.raises(Exception, match=r"[Ii]nvalid scaling"):
        inspect(scaled(), a, b, scales(15, 1), scales(1, 32))


def test_the_certificate_names_family_and_chunks():
    a, b = operands(16, 32, 256)
    forms = {
        False: "Chunks(fp8_wgmma_k32/float32, 128, 256)",
        True: "Chain(fp8_wgmma_k32/float32, 256)",
    }
    for fast, form in forms.items():
        (made,) = inspect(scaled(fast=fast), a, b, torch.ones(1), torch.ones(1)).certificates
        (entry,) = (entry for entry in made.entries if entry.form)
        assert entry.form == form and entry.level == "verified in source"
