"""Attention on a GPU: every legal schedule, every cut of the queries and every padding of the keys, bit for bit."""

import itertools
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate

from bi_inductor.templates import triton_attention, triton_attention_specialised
from bi_inductor.templates.triton_attention import Schedule
from bi_inductor.testing import same_bits

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def no_silent_eager():
    with torch._dynamo.config.patch(recompile_limit=100, fail_on_recompile_limit_hit=True):
        yield


def causal(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def full(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def masked(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def operands(batch, heads, key_heads, queries, keys, head_dim, dtype=torch.bfloat16):
    torch.manual_seed(0)
    shapes = ((heads, queries, head_dim), (key_heads, keys, head_dim), (key_heads, keys, min(head_dim, 512)))
    return [torch.randn(batch, *shape, device="cuda").to(dtype) for shape in shapes]


def exact(fn, *inputs):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return fn(*(x.double() if x.is_floating_point() else x for x in inputs))


def compiled(fn, **options):
    torch._dynamo.reset()
    return torch.compile(fn, backend="batchinv", **options)


def forced(fn, schedule, *inputs):
    """``fn`` compiled with one schedule of warps of one kind, whatever the table says."""
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        mock.patch.object(triton_attention, "is_suited", lambda *_: False),
        mock.patch.object(triton_attention, "schedule_for", lambda *_: schedule),
    ):
        return compiled(fn, dynamic=False)(*inputs)


SCHEDULES = [
    Schedule(16, 1, 2, False),
    Schedule(16, 4, 3, True),
    Schedule(32, 2, 2, False),
    Schedule(64, 4, 3, False),
    Schedule(64, 8, 2, True),
    Schedule(128, 8, 2, False),
]


@pytest.mark.parametrize("fn", [causal, full])
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.bfloat16, 128), (torch.float16, 64), (torch.bfloat16, 80)], ids=str
)
def test_every_schedule_has_the_same_bits(fn, dtype, head_dim):
    inputs = operands(2, 6, 2, 1100, 1100, head_dim, dtype)
    results = [forced(fn, schedule, *inputs) for schedule in SCHEDULES]
    assert_accurate(results[0], exact(fn, *inputs))
    for schedule, result in zip(SCHEDULES, results, strict=True):
        assert same_bits(result, results[0]), schedule


def specialised(fn, *inputs, programs=132, repeats=1):
    """Results of ``fn`` compiled for warps of two kinds, which is checked, with so many programs, heads in sections."""
    called = []

    def write(*arguments):
        called.append(arguments)
        return triton_attention_specialised.specialised(*arguments)

    with (
        torch._inductor.config.patch(force_disable_caches=True),
        mock.patch.object(triton_attention_specialised, "_SECTION_BYTES", 1 << 20),
        mock.patch.object(triton_attention_specialised, "_sm_count", lambda _: programs),
        mock.patch.object(triton_attention, "specialised", write),
    ):
        run = compiled(fn, dynamic=False)
        results = [run(*inputs) for _ in range(repeats)]
    assert len(called) == 1
    return results


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.bfloat16, (2, 6, 2, 1100, 1100, 128)),
        (torch.float16, (1, 8, 8, 2000, 2000, 64)),
        (torch.bfloat16, (8, 4, 1, 300, 1000, 80)),
        (torch.bfloat16, (1, 2, 1, 700, 333, 128)),
        (torch.float16, (5, 7, 7, 256, 63, 48)),
        (torch.bfloat16, (1, 2, 2, 9300, 9300, 128)),
    ],
    ids=str,
)
@pytest.mark.parametrize("fn", [causal, full])
def test_warps_of_two_kinds_give_the_bits_of_one(fn, dtype, sizes):
    inputs = operands(*sizes, dtype)
    expected = forced(fn, SCHEDULES[3], *inputs)
    for programs in (1, 17, 132):
        for result in specialised(fn, *inputs, programs=programs, repeats=20):  # a race shows now and then
            assert same_bits(result, expected), programs


def test_rows_of_warps_of_two_kinds_depend_on_themselves_alone():
    inputs = operands(4, 4, 2, 500, 500, 128)
    (expected,) = specialised(causal, *inputs)
    (alone,) = specialised(causal, *(x[2:3] for x in inputs))
    assert same_bits(alone, expected[2:3])
    poisoned = [x.clone() for x in inputs]
    for x, value in zip(poisoned, (math.nan, math.inf, math.nan), strict=True):
        x[:2] = value
    (beside,) = specialised(causal, *poisoned)
    assert same_bits(beside[2:], expected[2:])


@pytest.mark.parametrize("fn", [causal, full])
def test_one_graph_has_warps_of_both_kinds(fn):
    inputs = operands(2, 4, 2, 1500, 1500, 128)
    run = compiled(fn, dynamic=True)
    for queries in (700, 40, 1500, 256, 255, 1, 257):
        cut = [inputs[0][:, :, :queries], *inputs[1:]]
        assert same_bits(run(*cut), forced(fn, SCHEDULES[3], *cut)), queries


def test_unaligned_operands_keep_warps_of_one_kind():
    q, k, v = operands(1, 2, 2, 300, 300, 129)
    inputs = [x[..., 1:] for x in (q, k, v)]  # rows of 258 bytes
    expected = forced(causal, SCHEDULES[3], *inputs)
    with mock.patch.object(triton_attention, "specialised", None):
        assert same_bits(compiled(causal, dynamic=False)(*inputs), expected)


def test_latent_heads_in_every_schedule():
    inputs = operands(1, 16, 1, 700, 700, 576)
    schedules = (Schedule(16, 8, 2, True), Schedule(16, 4, 2, False), Schedule(64, 8, 2, False))
    results = [forced(causal, schedule, *inputs) for schedule in schedules]
    assert_accurate(results[0], exact(causal, *inputs))
    assert all(same_bits(result, results[0]) for result in results)


def test_fp32_schedules_have_the_same_bits():
    inputs = operands(1, 4, 2, 600, 600, 64, torch.float32)
    schedules = (Schedule(16, 4, 2, True), Schedule(32, 8, 2, False), Schedule(32, 4, 2, False))
    results = [forced(causal, schedule, *inputs) for schedule in schedules]
    assert_accurate(results[0], exact(causal, *inputs))
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256, 576])
def test_decoding_gives_the_bits_of_prefill(head_dim):
    """At tile, chunk and far-chunk borders, one graph for all lengths."""
    length = 8192 + 2048 + 100
    query, key, value = operands(1, 4, 2, length, length, head_dim)
    prefill = compiled(causal, dynamic=True)(query, key, value)
    decode = torch.compile(full, backend="batchinv", dynamic=True)
    borders = (1, 64, 512, 1024, 8192, 8192 + 2048, length)
    for t in sorted({b + d for b, d in itertools.product(borders, (-1, 0, 1)) if 2 <= b + d <= length}):
        row = decode(query[:, :, t - 1 : t], key[:, :, :t], value[:, :, :t])
        assert same_bits(row, prefill[:, :, t - 1 : t]), t


def test_token_by_token():
    query, key, value = operands(3, 8, 2, 300, 300, 64)
    prefill = compiled(causal, dynamic=True)(query, key, value)
    decode = torch.compile(full, backend="batchinv", dynamic=True)
    for t in range(2, 301):
        assert same_bits(
            decode(query[:, :, t - 1 : t], key[:, :, :t], value[:, :, :t]), prefill[:, :, t - 1 : t]
        )


def test_queries_cut_at_every_position():
    query, key, value = operands(2, 8, 2, 150, 700, 128)
    fn = compiled(full, dynamic=True)
    whole = fn(query, key, value)
    for cut in range(1, 150):
        assert same_bits(
            torch.cat([fn(query[:, :, :cut], key, value), fn(query[:, :, cut:], key, value)], 2), whole
        )


@pytest.mark.parametrize("queries", [1, 70])
def test_rows_depend_on_themselves_alone(queries):
    """Batch size, slot, neighbours that are infinite or NaN."""
    query, key, value = operands(33, 8, 2, queries, 900, 128)
    fn = compiled(full, dynamic=True)
    whole = fn(query, key, value)
    assert_accurate(whole, exact(full, query, key, value))
    for batch in (slice(0, 1), slice(32, 33), slice(3, 5), slice(1, 20)):
        assert same_bits(fn(query[batch], key[batch], value[batch]), whole[batch])
    order = torch.randperm(33, device="cuda")
    assert same_bits(fn(query[order], key[order], value[order]), whole[order])
    for bad in (math.inf, math.nan, 3e38):
        spoiled = [x.clone() for x in (query, key, value)]
        for x in spoiled:
            x[1::2] = bad
        assert same_bits(fn(*spoiled)[::2], whole[::2])


@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_padded_keys_change_no_bit(kind, queries):
    query, key, value = operands(2, 4, 2, queries, 500, 64)

    def mask(padding):
        visible = torch.arange(500 + padding, device="cuda") < 500
        visible = visible.expand(2, 1, queries, -1).clone()
        visible[1, 0, 0, :] = False
        return (
            visible
            if kind == "bool"
            else torch.zeros(visible.shape, device="cuda").masked_fill(~visible, -math.inf)
        )

    fn = compiled(masked, dynamic=True)
    expected = fn(query, key, value, mask(0))
    assert not expected[1, :, 0].any() and not expected.isnan().any()
    for padding in (1, 12, 13, 100, 524, 4096, 9000):
        tail = torch.randn(2, 2, padding, 64, device="cuda").bfloat16() * 100
        padded = [torch.cat([x, tail], 2) for x in (key, value)]
        assert same_bits(fn(query, *padded, mask(padding)), expected), padding


def test_training_gives_the_bits_of_inference_and_gradients_ignore_the_batch():
    inputs = operands(3, 8, 2, 200, 200, 64)
    fn = compiled(causal, dynamic=False)
    inference = fn(*inputs)

    def gradients(batch):
        leaves = [x[batch].clone().requires_grad_() for x in inputs]
        result = fn(*leaves)
        result.float().square().sum().backward()
        return [result.detach(), *(x.grad for x in leaves)]

    together = gradients(slice(0, 3))
    assert same_bits(together[0], inference)
    doubles = [x.double().requires_grad_() for x in inputs]
    exact(causal, *doubles).square().sum().backward()
    for ours, reference in zip(together[1:], doubles, strict=True):
        assert_accurate(ours, reference.grad, slack=4)
    for alone, all_three in zip(gradients(slice(1, 2)), together, strict=True):
        assert same_bits(alone, all_three[1:2])
