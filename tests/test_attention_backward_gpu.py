"""Gradients of attention on a GPU: the fused kernels have the composite's bits, whatever the schedule and the batch."""

import contextlib
import itertools
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from attention_gradients import cancelling_keys, cancelling_queries, composite_of, fused, operands

from bi_inductor.templates import triton_attention_backward as templates
from bi_inductor.templates.triton_attention_backward import Schedule
from bi_inductor.testing import bits, same_bits

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def no_silent_eager():
    with torch._dynamo.config.patch(recompile_limit=100, fail_on_recompile_limit_hit=True):
        yield


@contextlib.contextmanager
def products_of_fp32(precision):
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, precision
    try:
        yield
    finally:
        settings.fp32_precision = before


def compiled(fn, **options):
    torch._dynamo.reset()
    return torch.compile(fn, backend="batchinv", **options)


def forced(of_query, of_key):
    """Two schedules, whatever the tables say."""
    stack = contextlib.ExitStack()
    stack.enter_context(torch._inductor.config.patch(force_disable_caches=True))
    stack.enter_context(
        mock.patch.multiple(
            templates, query_schedule_for=lambda *_: of_query, key_schedule_for=lambda *_: of_key
        )
    )
    return stack


def assert_same_bits(found, expected, what=""):
    names = ("dq", "dk", "dv")
    changed = {
        name: int((bits(x) != bits(y)).sum()) for name, x, y in zip(names, found, expected, strict=True)
    }
    assert not any(changed.values()), (changed, what)
    assert all(map(same_bits, found, expected))


def cuda(inputs):
    return [x if x is None else x.cuda() for x in inputs]


# ---------------------------------------------------------------- the composite is the oracle

#: dtype, head dim, head dim of the values, query heads, key heads, precision of fp32 products
HEADS = {
    "bf16 64": (BF16, 64, 64, 8, 2, "ieee"),
    "bf16 128": (BF16, 128, 128, 8, 2, "ieee"),
    "bf16 128 ungrouped": (BF16, 128, 128, 4, 4, "ieee"),
    "bf16 16": (BF16, 16, 16, 4, 1, "ieee"),
    "bf16 80": (BF16, 80, 80, 4, 4, "ieee"),
    "bf16 192 and 128": (BF16, 192, 128, 4, 2, "ieee"),
    "bf16 256": (BF16, 256, 256, 4, 2, "ieee"),
    "fp16 64": (FP16, 64, 64, 8, 2, "ieee"),
    "fp32 64": (FP32, 64, 64, 4, 2, "ieee"),
    "fp32 128": (FP32, 128, 128, 2, 1, "ieee"),
    "tf32 64": (FP32, 64, 64, 4, 2, "tf32"),
    "tf32 256": (FP32, 256, 256, 2, 2, "tf32"),
}
KINDS = ("causal", "full", "bool", "float32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HEADS)
def test_the_composites_bits(name, kind):
    """Lengths are no multiples of a tile, so heads of a group share tiles."""
    dtype, head_dim, value_dim, heads, key_heads, precision = HEADS[name]
    mask = kind if kind in ("bool", "float32") else None
    inputs = cuda(operands(2, heads, key_heads, 500, 613, head_dim, value_dim, dtype, mask))
    options = (kind == "causal", head_dim**-0.5)
    with products_of_fp32(precision):
        expected = compiled(composite_of(*options), dynamic=False)(*inputs)
        found = compiled(fused(*options), dynamic=False)(*inputs)
    assert_same_bits(found, expected)
    assert all(x.count_nonzero() > x.numel() // 2 for x in expected[:1])


SIZES = [(1, 1), (1, 700), (33, 33), (512, 512), (64, 1000), (1000, 64), (129, 5)]


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_the_composites_bits_at_other_lengths(is_causal):
    """One dynamic graph for all lengths against static composites."""
    fn = compiled(fused(is_causal, 0.125), dynamic=True)
    for queries, keys in SIZES:
        inputs = cuda(operands(2, 6, 2, queries, keys, 64, 64, BF16))
        expected = torch.compile(composite_of(is_causal, 0.125), backend="batchinv", dynamic=False)(*inputs)
        assert_same_bits(fn(*inputs), expected, (queries, keys))


@pytest.mark.parametrize("make", [cancelling_keys, cancelling_queries], ids=["dq", "dk and dv"])
@pytest.mark.parametrize(("dtype", "width"), [(BF16, 64), (BF16, 128), (FP16, 64)], ids=str)
def test_the_composites_bits_in_sums_that_end_near_zero(make, dtype, width):
    """16-bit results of ordinary data hide which order was added in; these show it."""
    inputs = cuda(make(4, 8, 333, width, dtype))
    expected = compiled(composite_of(False, 1.0), dynamic=False)(*inputs)
    assert_same_bits(compiled(fused(False, 1.0), dynamic=False)(*inputs), expected)
    everything = torch.ones(4, 8, inputs[0].shape[2], inputs[2].shape[2], dtype=torch.bool, device="cuda")
    inputs[4] = everything
    assert_same_bits(compiled(fused(False, 1.0), dynamic=False)(*inputs), expected, "mask of bools")
    inputs[4] = torch.zeros_like(everything, dtype=FP32)
    assert_same_bits(compiled(fused(False, 1.0), dynamic=False)(*inputs), expected, "mask of floats")


# ---------------------------------------------------------------- schedules

FORCED = [
    Schedule(16, 16, 1, 2, 1),
    Schedule(16, 64, 4, 1, 1),
    Schedule(32, 32, 2, 2, 2),
    Schedule(64, 16, 4, 3, 1),
    Schedule(64, 64, 4, 2, 2),
    Schedule(64, 128, 8, 2, 1),
    Schedule(128, 32, 8, 3, 2),
    Schedule(128, 64, 8, 2, 1),
]


@pytest.mark.parametrize("kind", ["causal", "bool"])
@pytest.mark.parametrize("width", [64, 128])
def test_every_forced_schedule_has_the_same_bits(width, kind):
    mask = None if kind == "causal" else kind
    inputs = cuda(operands(1, 6, 2, 700, 700, width, width, BF16, mask))
    results = []
    for schedule in FORCED:
        with forced(schedule, schedule):
            results.append(compiled(fused(kind == "causal", 0.125), dynamic=False)(*inputs))
    for schedule, result in zip(FORCED, results, strict=True):
        assert_same_bits(result, results[0], schedule)


@pytest.mark.parametrize(("dtype", "width"), [*itertools.product((BF16, FP32), (64, 128, 256))], ids=str)
def test_every_schedule_that_may_be_chosen_has_the_same_bits(dtype, width):
    inputs = cuda(operands(1, 4, 2, 300, 300, width, width, dtype))
    results = {}
    of_queries, of_keys = templates.schedules(width, dtype.itemsize)
    for of_query, of_key in itertools.zip_longest(of_queries, of_keys):
        of_query, of_key = of_query or of_queries[0], of_key or of_keys[0]
        with forced(of_query, of_key):
            results[of_query, of_key] = compiled(fused(True, 0.1), dynamic=False)(*inputs)
    first = next(iter(results.values()))
    for schedules, result in results.items():
        assert_same_bits(result, first, schedules)


# ---------------------------------------------------------------- through scaled_dot_product_attention


def causal(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def gradients(fn, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    fn(*leaves).float().square().sum().backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize("length", [1, 130])
def test_gradients_ignore_the_batch_and_the_run(length):
    torch.manual_seed(0)
    inputs = [torch.randn(7, h, length, 64, device="cuda").to(BF16) for h in (8, 2, 2)]
    fn = compiled(causal, dynamic=True)
    whole = gradients(fn, inputs)
    assert_same_bits(gradients(fn, inputs), whole, "again")
    doubles = [x.double().requires_grad_() for x in inputs]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        causal(*doubles).square().sum().backward()
    for ours, reference in zip(whole, doubles, strict=True):
        if length > 1 or reference is doubles[2]:
            assert_accurate(ours, reference.grad, slack=4)
        else:  # one key: these are differences of equal sums over a head dim, as exact as fp32
            assert_accurate(ours.float(), reference.grad, slack=8, terms=doubles[2].square().sum(-1))
    for batch in (1, 2, 3, 7):
        part = gradients(fn, [x[:batch] for x in inputs])
        assert_same_bits(part, [x[:batch] for x in whole], batch)
    order = torch.randperm(7, device="cuda")
    assert_same_bits(gradients(fn, [x[order] for x in inputs]), [x[order] for x in whole], "permuted")


def test_neighbours_are_not_seen():
    torch.manual_seed(0)
    inputs = [torch.randn(5, h, 300, 128, device="cuda").to(BF16) for h in (8, 2, 2)]
    fn = compiled(causal, dynamic=True)
    whole = gradients(fn, inputs)
    for bad in (math.inf, math.nan, 3e38):
        spoiled = [x.clone() for x in inputs]
        for x in spoiled:
            x[1::2] = bad
        assert_same_bits([x[::2] for x in gradients(fn, spoiled)], [x[::2] for x in whole], bad)


def test_transposed_views_have_the_same_bits():
    torch.manual_seed(0)
    inputs = [torch.randn(2, h, 200, 64, device="cuda").to(BF16) for h in (8, 2, 2)]
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    fn = compiled(causal, dynamic=False)
    assert_same_bits(gradients(fn, views), gradients(fn, inputs))
