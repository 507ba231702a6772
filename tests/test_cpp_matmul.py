"""The C++ matrix product: each element is one chain of fused multiply-adds over ascending k, whatever changes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from fma_reference import chain, epilogue, fma32, library_fma32
from gemm_library import Gemm
from torch import Tensor

from bi_inductor.backend import batchinv
from bi_inductor.templates.cpp_matmul import header_text
from bi_inductor.testing import bits, same_bits

# 1 to 3 rows have kernels of their own; 6 is a register tile, 12 the last unpacked size, 96 a strip.
ROW_LADDER = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 31, 64, 96, 97, 255, 256, 257)
LAYOUTS = ("contiguous", "transposed", "every_other", "offset")


@pytest.fixture(autouse=True)
def no_silent_fallback():
    """Dynamo answers too many recompilations with eager execution; sizes of 0 and 1 and strides make many."""
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


def compiled(fn):
    """``fn`` compiled with symbolic sizes (0 and 1 are specialised)."""
    return torch.compile(fn, backend=batchinv, dynamic=True)


def arranged(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` [..., R, C] under other strides."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "every_other":
        return torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2]
    if layout == "offset":
        return torch.nn.functional.pad(x, (3, 2, 1, 1), value=torch.inf)[..., 1:-1, 3:-2]
    return x.contiguous()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values over many binades with both signs, so that any other order of additions shows in the bits."""
    generator = torch.Generator().manual_seed(seed + 1009 * len(shape) + sum(shape))
    mantissa = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (mantissa * torch.exp2(torch.randn(*shape, generator=generator, dtype=torch.float64) * 2)).to(
        dtype
    )


def assert_same(actual: Tensor, expected: Tensor, what: object) -> None:
    assert same_bits(actual, expected), f"{what}: {(bits(actual) != bits(expected)).sum()} elements differ"


def test_the_reference_is_a_fused_multiply_add() -> None:
    a, b = random(2000), random(2000, seed=1)
    nearly_cancelling = -(a.double() * b.double()).float() * (1 + torch.randint(-2, 3, (2000,)) * 2.0**-23)
    for c in (nearly_cancelling, random(2000, seed=2)):
        expected = torch.tensor(
            [library_fma32(*triple) for triple in zip(*(x.tolist() for x in (a, b, c)), strict=True)]
        )
        assert_same(fma32(a, b, c), expected, "fma32")


def test_every_size_and_layout_is_the_chain() -> None:
    gemm = Gemm()
    sizes = [(m, n, k) for m in (1, 2, 3, 4, 5, 7, 13, 97) for n in (1, 5, 8, 17, 66) for k in (0, 1, 2, 33)]
    sizes += [(7, 9, 385), (2, 70, 1100), (1, 130, 400), (98, 33, 800), (400, 300, 3), (20, 600, 40)]
    for m, n, k in sizes:
        a, b = random(1, m, k), random(1, k, n, seed=1)
        expected = chain(a, b)
        for left in LAYOUTS:
            for right in LAYOUTS:
                assert_same(gemm(arranged(a, left), arranged(b, right)), expected, (m, n, k, left, right))


def test_a_chain_goes_on_from_a_start() -> None:
    """Cut anywhere along k, the second part started from the first one's sums: the chain of the whole."""
    gemm, continued = Gemm(), Gemm(has_bias=True, bias_is_start=True)
    for m, n, k in ((1, 9, 33), (1, 130, 400), (3, 17, 70), (13, 5, 40), (98, 33, 800), (30, 3, 31)):
        a, b = random(1, m, k), random(1, k, n, seed=1)
        for cut in (0, 1, k // 2, k):
            first = gemm(a[..., :cut], b[:, :cut])
            for layout in LAYOUTS:
                rest = continued(a[..., cut:], b[:, cut:], arranged(first, layout))
                assert_same(rest, gemm(a, b), (m, n, k, cut, layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_accumulate_widely_and_round_once(dtype: torch.dtype) -> None:
    gemm = Gemm(dtype, has_bias=True)
    for m, n, k in ((1, 9, 33), (2, 17, 70), (3, 40, 9), (4, 33, 129), (13, 5, 40), (30, 3, 31)):
        a, b, bias = (random(1, *s, dtype=dtype, seed=i) for i, s in enumerate(((m, k), (k, n), (1, n))))
        expected = epilogue(chain(a, b), bias, 1, 1, dtype)
        for left in LAYOUTS:
            for right in LAYOUTS:
                assert_same(
                    gemm(arranged(a, left), arranged(b, right), bias), expected, (m, n, k, left, right)
                )


def test_low_precision_operands_with_a_wide_output() -> None:
    def wide(a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out_dtype=torch.float32)

    a, b = random(7, 65, dtype=torch.bfloat16), random(65, 19, dtype=torch.bfloat16, seed=1)
    assert_same(compiled(wide)(a, b), chain(a, b), "float32 out of bfloat16")


def test_a_bias_of_any_shape_and_scales_round_separately() -> None:
    def addmm(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(c, a, b, alpha=0.3, beta=1.7)

    a, b = random(9, 50), random(50, 37, seed=1)
    total = chain(a, b)
    whole = random(9, 37, seed=2)
    biases = (whole, whole[0], whole[:1], whole[:, :1], whole[0, 0], arranged(whole, "transposed"))
    for function, alpha, beta in ((compiled(torch.addmm), 1, 1), (compiled(addmm), 0.3, 1.7)):
        for bias in biases:
            expected = epilogue(total, bias.expand(9, 37), alpha, beta, torch.float32)
            assert_same(function(bias, a, b), expected, (alpha, bias.shape))


def test_batched_products_and_their_biases() -> None:
    mm, bmm, baddbmm = compiled(torch.mm), compiled(torch.bmm), compiled(torch.baddbmm)
    for batch, m, n, k in ((1, 3, 9, 20), (2, 1, 17, 33), (5, 16, 16, 32), (3, 20, 1, 7)):
        a, b, c = random(batch, m, k), random(batch, k, n, seed=1), random(batch, m, n, seed=2)
        expected = chain(a, b)
        for left, right in (
            ("contiguous", "transposed"),
            ("offset", "every_other"),
            ("transposed", "contiguous"),
        ):
            assert_same(bmm(arranged(a, left), arranged(b, right)), expected, (batch, m, n, k, left))
        assert_same(baddbmm(c, a, b), epilogue(expected, c, 1, 1, torch.float32), (batch, "bias"))
        shared = random(k, n, seed=3).expand(batch, k, n)
        assert_same(bmm(a, shared), chain(a, shared), (batch, "one b for all"))
        one_by_one = torch.stack([mm(*pair) for pair in zip(a, b, strict=True)])
        assert_same(one_by_one, expected, (batch, "alone"))


@pytest.mark.parametrize("m, n, k", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0), (1, 1, 1), (1, 7, 0)])
def test_empty_and_single(m: int, n: int, k: int) -> None:
    a, b, bias = random(m, k), random(k, n, seed=1), random(n, seed=2)
    assert_same(torch.compile(torch.mm, backend=batchinv)(a, b), chain(a, b), "mm")
    expected = epilogue(chain(a, b), bias, 1, 1, torch.float32)
    assert_same(torch.compile(torch.addmm, backend=batchinv)(bias, a, b), expected, "addmm")
    expected = chain(a, b).expand(2, m, n)
    assert_same(
        torch.compile(torch.bmm, backend=batchinv)(a.expand(2, m, k), b.expand(2, k, n)), expected, "bmm"
    )
    assert torch.compile(torch.bmm, backend=batchinv)(a[None][:0], b[None][:0]).shape == (0, m, n)


def test_a_row_ignores_batch_slot_neighbours_and_threads() -> None:
    gemm = Gemm(has_bias=True)
    x, w, bias = random(1, 257, 150), random(1, 150, 70, seed=1), random(70, seed=2)
    expected = epilogue(chain(x, w), bias, 1, 1, torch.float32)
    order = torch.randperm(257, generator=torch.Generator().manual_seed(3))
    for weight in (w, arranged(w, "transposed")):
        for rows in ROW_LADDER:
            for layout in LAYOUTS:
                assert_same(
                    gemm(arranged(x[:, :rows], layout), weight, bias), expected[:, :rows], (rows, layout)
                )
            shuffled = gemm(x[:, order[:rows]], weight, bias)
            assert_same(shuffled, expected[:, order[:rows]], (rows, "shuffled"))
        for value in (torch.inf, -torch.inf, torch.nan, 3e38):
            loud = torch.full_like(x, value)
            loud[:, 100:103] = x[:, 100:103]
            assert_same(gemm(loud, weight, bias)[:, 100:103], expected[:, 100:103], ("neighbours", value))
        for threads in (1, 2, 3, 16):
            assert_same(gemm(x, weight, bias, threads=threads), expected, ("threads", threads))


def test_rows_of_a_compiled_linear_ignore_the_batch() -> None:
    linear = compiled(torch.nn.functional.linear)
    x, w, bias = random(257, 150), random(70, 150, seed=1), random(70, seed=2)
    expected = epilogue(chain(x, w.t()), bias, 1, 1, torch.float32)
    for rows in ROW_LADDER:
        assert_same(linear(x[:rows], w, bias), expected[:rows], rows)
    for threads in (1, 2, 3):
        assert_same(with_threads(threads, linear, x, w, bias), expected, ("threads", threads))


def with_threads(threads: int, function, *inputs: Tensor) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(*inputs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_nan_is_the_same_nan(dtype: torch.dtype) -> None:
    """Two NaNs with payloads meet, infinity meets zero: which one an FMA returns follows operand order."""
    gemm, no_bias = Gemm(dtype, has_bias=True), torch.zeros((), dtype=dtype)
    raw = torch.tensor([0x7FC0, 0xFFC1, 0x7FC7, 0x7F80, 0x0000, 0x3F80, 0xFF80, 0xFFFF], dtype=torch.int32)
    special = (raw << 16).view(torch.float32).to(dtype)
    for rows in (1, 2, 3, 7, 40):
        a, b = special.repeat(1, rows, 3), special.roll(1).repeat(1, 19, 3).mT
        assert_same(gemm(a, b, no_bias), epilogue(chain(a, b), None, 1, 1, dtype), rows)
        assert gemm(a, b, no_bias).isnan().all()
        assert_same(gemm(b.mT, a.mT, no_bias).mT, gemm(a, b, no_bias), (rows, "factors exchanged"))


def test_signed_zeros_and_subnormals_survive() -> None:
    """A product that underflows makes the accumulator -0.0; from then on the sign of a zero operand counts."""
    tiny = 2.0**-100
    rows = [[-tiny, -0.0, 0.0], [-tiny, 0.0, -0.0], [-tiny, -0.0, -0.0], [tiny / 2**40, tiny, 2.0**-149]]
    a = torch.tensor([rows])
    b = torch.tensor([[[tiny, 1e-8, tiny], [1.0, 1.0, -1.0], [1.0, -1.0, 1.0]]]).repeat(1, 1, 7)
    expected = chain(a, b)
    assert (expected.signbit() & (expected == 0)).any()
    gemm = Gemm()
    for m in (1, 2, 4):
        assert_same(gemm(a[:, :m], b), expected[:, :m], m)
        assert_same(gemm(a[:, :m], arranged(b, "transposed")), expected[:, :m], (m, "transposed"))
        assert_same(gemm(b.mT, a[:, :m].mT).mT, expected[:, :m], (m, "factors exchanged"))


# Each entry changes sizes of blocks only; small ones put every border inside a small product.
SCHEDULES = {
    "packed": {"kDepth": 7, "kStripRows": 12, "kItemRows": 12, "kItemCols": 16, "kDirectRows": 0},
    "direct": {"kDepth": 30, "kDirectRows": 1 << 40, "kDirectDepth": 3, "kDirectCols": 50},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_block_sizes_cannot_reach_a_bit(schedule: str) -> None:
    header = header_text()
    for name, value in SCHEDULES[schedule].items():
        header, changed = re.subn(rf"(constexpr int64_t {name} = )\d+", rf"\g<1>{value}", header)
        assert changed == 1, name
    gemm = Gemm(header=header)
    for m, n, k in ((1, 150, 40), (2, 70, 40), (3, 70, 40), (13, 33, 40), (98, 50, 40), (50, 4, 40)):
        a, b = random(1, m, k), random(1, k, n, seed=1)
        for layout in LAYOUTS:
            assert_same(gemm(a, arranged(b, layout)), chain(a, b), (schedule, m, n, k, layout))


def test_other_vectors_give_the_same_bits() -> None:
    """Without AVX2 and FMA instructions: 16-byte vectors, another register tile, std::fma, no row kernel."""
    header = header_text()
    assert header.count("defined(__AVX512F__)") > 2 and header.count("defined(__FMA__)") > 2
    header = header.replace("defined(__AVX512F__)", "0").replace("defined(__FMA__)", "0")
    gemm, bias = Gemm(torch.float16, has_bias=True, header=header), random(35, dtype=torch.float16, seed=2)
    for m in (1, 2, 3, 7, 40):
        a, b = random(1, m, 50, dtype=torch.float16), random(1, 50, 35, dtype=torch.float16, seed=1)
        expected = epilogue(chain(a, b), bias, 1, 1, torch.float16)
        for layout in LAYOUTS:
            assert_same(gemm(a, arranged(b, layout), bias), expected, (m, layout))


BREAKAGES = {
    "descending": {
        "a[r * lda + k]": "a[r * lda + depth - 1 - k]",
        "load<T>(b + k *": "load<T>(b + (depth - 1 - k) *",
    },
    "not_fused": {"fused_multiply_add<T>(left, right[v], sum[r][v])": "left * right[v] + sum[r][v]"},
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_order_is_caught(breakage: str) -> None:
    """The comparison has teeth: a product that is right but for its order or its roundings does not pass."""
    header = header_text()
    for old, new in BREAKAGES[breakage].items():
        assert header.count(old) == 1
        header = header.replace(old, new)
    gemm = Gemm(header=header)
    a, b = random(1, 13, 800), random(1, 800, 17, seed=1)
    assert not same_bits(gemm(a, b), chain(a, b))
    torch.testing.assert_close(gemm(a, b), a @ b, rtol=1e-4, atol=1e-2)


def test_static_and_dynamic_graphs_agree() -> None:
    x, w = random(8, 40), random(33, 40, seed=1)
    expected = chain(x, w.t())
    for dynamic in (None, False, True):
        for first in (1, 5):
            torch._dynamo.reset()
            linear = torch.compile(torch.nn.functional.linear, backend=batchinv, dynamic=dynamic)
            for rows in (first, 8, 1, 2):
                assert_same(linear(x[:rows], w), expected[:rows], (dynamic, first, rows))


@pytest.mark.lengthy
def test_views_repeats_and_gradients_in_one_graph() -> None:
    """x @ x.T reads one buffer twice; a product feeds products; views of intermediates are operands."""

    def network(x: Tensor, w: Tensor) -> Tensor:
        heads = (x @ w).view(-1, 2, 12).transpose(0, 1)
        scores = heads @ heads.mT
        mixed = (scores @ heads).transpose(0, 1).reshape(-1, 24)
        return mixed @ w.t() + x @ x.t() @ x

    x, w = random(6, 24).requires_grad_(), (random(24, 24, seed=1) / 8).requires_grad_()
    gradients = {}
    for name, function in {"ours": compiled(network), "eager": network}.items():
        gradients[name] = torch.autograd.grad(function(x, w).sum(), (x, w))
    for ours, eager in zip(gradients["ours"], gradients["eager"], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-2 * float(eager.abs().max()))

    def products(x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ x.t(), x[1:, 2:].t() @ x[1:, 2:]

    x = random(6, 24)
    square, shifted = compiled(products)(x)
    assert_same(square, chain(x, x.t()), "one buffer twice")
    assert_same(shifted, chain(x[1:, 2:].t(), x[1:, 2:]), "views of one buffer")


def test_the_gradients_of_a_linear_are_chains_too() -> None:
    x, w = random(9, 20).requires_grad_(), random(15, 20, seed=1).requires_grad_()
    cotangent = random(9, 15, seed=2)
    compiled(torch.nn.functional.linear)(x, w).backward(cotangent)
    assert_same(x.grad, chain(cotangent, w.detach()), "gradient of the input")
    assert_same(w.grad, chain(cotangent.t(), x.detach()), "gradient of the weight")


@pytest.mark.lengthy
def test_a_warm_cache_in_another_process_gives_the_same_bits(tmp_path) -> None:
    program = """
        import torch
        from torch._dynamo.utils import counters
        from bi_inductor.backend import batchinv
        torch.manual_seed(0)
        a, b, bias = torch.randn(13, 70), torch.randn(70, 33), torch.randn(33)
        out = torch.compile(torch.addmm, backend=batchinv, dynamic=True)(bias, a, b)
        hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
        print(hits > 0, out.view(torch.int32).tolist())
    """
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    outputs = []
    for expected_hit in ("False", "True"):
        command = [sys.executable, "-c", textwrap.dedent(program)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        hit, _, values = result.stdout.partition(" ")
        assert hit == expected_hit
        outputs.append(values)
    assert outputs[0] == outputs[1]


def test_one_kernel_serves_all_shapes_and_nothing_external_is_called() -> None:
    def products(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return x @ w, torch.bmm(v, v.mT)

    from torch._inductor.utils import run_and_get_code

    function = torch.compile(products, backend=batchinv, options={"fx_graph_cache": False})
    _, (code,) = run_and_get_code(function, random(4, 8), random(8, 9), random(2, 3, 5))
    assert not re.search(r"extern_kernels\.\w+\(", code)
    assert code.count("bi_gemm::run<Spec>(") == 2  # two operands, and one buffer that is both operands
    assert len(re.findall(r"cpp_pybinding", code)) == 2
