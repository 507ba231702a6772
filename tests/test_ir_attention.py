"""Attention in the compiler's IR: every schedule adds the same keys in the same steps, whatever mask is given."""

import dataclasses
import math
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from bi_inductor import BatchInvarianceError, certify, contract, inspect
from bi_inductor.certificate import Level
from bi_inductor.ir import prove
from bi_inductor.ir.lowering import Lowering
from bi_inductor.runtime import attention
from bi_inductor.templates import triton_attention
from bi_inductor.templates.triton_attention import Schedule
from bi_inductor.ttgir.steps import Step, steps_of
from bi_inductor.virtual import virtual_gpu

QUERY, KEYS = torch.randn(1, 4, 70, 64).bfloat16(), torch.randn(1, 2, 600, 64).bfloat16()
MASKS = {
    "none": None,
    "bool": torch.ones(1, 1, 70, 600, dtype=torch.bool),
    "bfloat16": torch.zeros(1, 1, 70, 600).bfloat16(),
}
SCHEDULES = [
    Schedule(16, 1, 3, True),
    Schedule(32, 4, 3, False),
    Schedule(64, 4, 3, False),
    Schedule(128, 8, 2, False),
]


def masked(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def steps(schedule, mask, *, target="sm_90", dtype=torch.bfloat16, inputs=(QUERY, KEYS, KEYS)):
    """What the steps of the dots of the attention kernel add, in one schedule."""
    torch._dynamo.reset()
    inputs = (*(x.to(dtype) for x in inputs), mask)
    with mock.patch.object(triton_attention, "schedule_for", lambda *_: schedule):
        (graph,) = inspect(masked, *inputs, target=target).graphs
    (name, text), *_ = [item for item in graph.kernels.items() if re.search(r"(all|one)_chunks?\(", item[1])]
    with virtual_gpu(target) as device:
        return steps_of(Lowering(text, name, device).lowered(0).ttgir)


@pytest.mark.parametrize(
    ("target", "mask"), [("sm_80", "bool"), ("sm_90", "bool"), ("sm_90", "bfloat16"), ("sm_90", "none")]
)
def test_a_step_adds_neighbouring_keys_in_every_schedule(mask, target):
    found = [steps(schedule, MASKS[mask], target=target) for schedule in SCHEDULES]
    assert not any(each.wrong for each in found)
    assert {step.depth for each in found for step in each.found} == {16}
    families = {step.family for each in found for step in each.found}
    assert families == ({"mma.sync", "wgmma"} if target == "sm_90" else {"mma.sync"})


@pytest.mark.parametrize("width", [64, 256, 320])
def test_so_does_every_selectable_schedule(width):
    """Behind a mask of bools: what narrow heads and wide ones may run with."""
    form = contract.attention_form(width, width, torch.bfloat16)
    inputs = [torch.randn(1, 1, length, width).bfloat16() for length in (40, 600, 600)]
    for schedule in triton_attention.schedules(form, triton_attention.padded(width), itemsize=2):
        found = steps(schedule, torch.ones(1, 1, 40, 600, dtype=torch.bool), inputs=inputs)
        assert not found.wrong and {step.depth for step in found.found} == {16}, schedule


@pytest.mark.parametrize("schedule", [Schedule(16, 4, 2, True), Schedule(32, 8, 2, False)])
@pytest.mark.parametrize(("precision", "step"), [("ieee", Step("fma", 1)), ("tf32", Step("mma.sync", 8))])
def test_fp32_and_tf32(precision, step, schedule):
    """A step of tf32 has 8 products; fp32 has no matrix instruction."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, precision
    try:
        found = steps(schedule, MASKS["bool"], dtype=torch.float32)
    finally:
        settings.fp32_precision = before
    assert {*found.found} == {step} and not found.wrong


@triton.jit
def _mask_as_it_is(pointers, exists, other, WIDTH: tl.constexpr):
    return tl.load(pointers, mask=exists, other=other)


def test_a_mask_of_bytes_would_change_what_a_step_adds(monkeypatch):
    """The guard in ``load_mask`` taken away: ``mma.sync`` has other steps then, and ``wgmma`` has not."""
    monkeypatch.setattr(attention, "load_mask", _mask_as_it_is)
    few = [x[:, :, :16] for x in (QUERY, MASKS["bool"])]  # and so no map
    small, large = (
        steps(SCHEDULES[0], few[1], inputs=(few[0], KEYS, KEYS)),
        steps(SCHEDULES[2], MASKS["bool"]),
    )
    assert not large.wrong and [*large.found] == [Step("wgmma", 16)] * 2  # one loop for whole tiles and edges
    assert len(small.wrong) == 1 and "mma.sync whose threads hold 4 neighbouring k of bf16" in small.wrong[0]
    assert not steps(SCHEDULES[0], MASKS["bfloat16"]).wrong
    with pytest.raises(BatchInvarianceError, match="hold 4 neighbouring k"):
        certify(masked, *CASES["a mask of bools"][1], ir=True, batch_dim=None)


def padded(query, key, value, exists):
    """The kernel computes the mask, from bytes. (Of a mask of bools the map says where, and Triton asks no further.)"""
    places = torch.arange(600, device=query.device)
    mask = exists[:, None, None, :] & (places[:70, None] + 530 >= places)
    mask = torch.where(mask, 0.0, -math.inf).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


@triton.jit
def _as_it_is(values):
    return values


def test_so_would_a_mask_that_is_computed_from_bytes(monkeypatch):
    """The guard in ``mask_of`` taken away."""

    def steps_of_padded():
        torch._dynamo.reset()
        with mock.patch.object(triton_attention, "schedule_for", lambda *_: SCHEDULES[0]):
            (graph,) = inspect(padded, QUERY, KEYS, KEYS, torch.ones(1, 600, dtype=torch.bool)).graphs
        assert "COMPUTED, computed_mask" in graph.source
        (kernel,) = [item for item in graph.kernels.items() if "attention.one_chunk(" in item[1]]
        with virtual_gpu("sm_90") as device:
            return steps_of(Lowering(kernel[1], kernel[0], device).lowered(0).ttgir)

    assert not steps_of_padded().wrong
    monkeypatch.setattr(attention, "through_reduction", _as_it_is)
    assert steps_of_padded().wrong


# The order of additions, from scores to the output.

FORM = ("attention", (64, 512, 8192, 1024))
SHORT = ("attention", (16, 32, 64, 64))


@pytest.fixture
def short_chunks(monkeypatch):
    """The form with tiles and chunks so short that 150 keys have all kinds of borders, and are followed in a second."""
    stock = contract.attention_form

    def form(*arguments, **options):
        tile, near_chunk, near_keys, far_chunk = SHORT[1]
        return dataclasses.replace(
            stock(*arguments, **options),
            tile=tile,
            near_chunk=near_chunk,
            near_keys=near_keys,
            far_chunk=far_chunk,
        )

    monkeypatch.setattr(contract, "attention_form", form)


def operands(heads, queries, keys):
    return [torch.randn(1, *shape, 16).bfloat16() for shape in ((heads, queries), (1, keys), (1, keys))]


def causal(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def full(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def proof_of(fn, inputs, schedule, target="sm_90"):
    torch._dynamo.reset()
    with mock.patch.object(triton_attention, "schedule_for", lambda *_: schedule):
        (graph,) = inspect(fn, *inputs, target=target).graphs
    return prove(graph.source, graph.certificate, target)


CASES = {
    "all keys": (full, operands(2, 3, 150)),
    "a part of a tile": (causal, operands(1, 40, 40)),
    "a mask of bools": (masked, [*operands(2, 2, 70), torch.ones(1, 1, 2, 70, dtype=torch.bool)]),
    "a mask of floats": (masked, [*operands(1, 2, 70), torch.zeros(1, 1, 2, 70).bfloat16()]),
}


@pytest.mark.parametrize("schedule", [SCHEDULES[0], Schedule(64, 8, 2, False), Schedule(128, 8, 2, True)])
@pytest.mark.parametrize("name", CASES)
def test_every_schedule_is_the_form(name, schedule, short_chunks):
    proof = proof_of(*CASES[name], schedule)
    assert proof.proven == {SHORT} and not proof.wrong and not proof.unknown


@pytest.mark.parametrize(("target", "split"), [("sm_90", False), ("sm_80", True)])
def test_two_chunks_of_the_form_as_it_is(target, split):
    proof = proof_of(full, operands(1, 1, 530), Schedule(16, 4, 2, split), target)
    assert proof.proven == {FORM} and not proof.wrong and not proof.unknown


def layer(x, wq, wk, wv, wo):
    q, k, v = ((x @ w).view(1, x.shape[1], -1, 16).transpose(1, 2) for w in (wq, wk, wv))
    return x + causal(q, k, v).transpose(1, 2).reshape(x.shape) @ wo


def test_attention_between_products():
    """The terms of the last product are elements of attention, those of attention are products."""
    inputs = [
        torch.randn(shape).bfloat16() for shape in ((1, 20, 32), (32, 32), (32, 16), (32, 16), (32, 32))
    ]
    made = certify(layer, *inputs, ir=True, batch_dim=None)
    forms = {entry.form.split("(")[0]: entry.level for entry in made.certificates[0].entries if entry.form}
    assert forms == {"Attention": Level.IR.value, "Chain": Level.IR.value}


#: What corruptions call, whatever they replace.
_join, _chunk_start, _load_rows = attention.join, attention.chunk_start, attention.load_rows
_tree_of_groups = attention._tree_of_groups


@triton.jit
def _halves(p):
    halves = tl.reshape(p, [p.shape[0], 2, p.shape[1] // 8, 4])
    return _tree_of_groups(tl.sum(halves, 1))


@triton.jit
def _rounded_before(p):
    p = p.to(tl.bfloat16).to(tl.float32)
    return _tree_of_groups(tl.sum(tl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2]), 3))


@triton.jit
def _compilers_order(p):
    return tl.sum(tl.reshape(p, [p.shape[0], p.shape[1] // 4, 4]), 1)


@triton.jit
def _lanes_crossed(sums):
    return tl.sum(tl.sum(tl.reshape(sums, [sums.shape[0], 2, 2]), 1), 1)


@triton.jit
def _joined_unfused(m, sums, acc, next_m, next_sums, next_acc):
    highest = tl.maximum(m, next_m)
    old, new = tl.exp2(m - highest), tl.exp2(next_m - highest)
    return highest, sums * old + next_sums * new, acc * old[:, None] + next_acc * new[:, None]


@triton.jit
def _joined_other_way(m, sums, acc, next_m, next_sums, next_acc):
    return _join(next_m, next_sums, next_acc, m, sums, acc)


@triton.jit
def _later_start(chunk, NEAR_CHUNK: tl.constexpr, NEAR_CHUNKS: tl.constexpr, FAR_CHUNK: tl.constexpr):
    return tl.where(chunk == 1, 16, _chunk_start(chunk, NEAR_CHUNK, NEAR_CHUNKS, FAR_CHUNK)).to(tl.int32)


@triton.jit
def _keys_exchanged(base, rows, columns, stride_row, stride_column, row_mask, LENGTH: tl.constexpr):
    if row_mask is None:  # a tile whose keys are all visible
        rows = rows ^ 1
    return _load_rows(base, rows, columns, stride_row, stride_column, row_mask, LENGTH)


CORRUPTIONS = {
    "halves": ("lane_sums", _halves),
    "probabilities rounded before their sum": ("lane_sums", _rounded_before),
    "the order of the compiler": ("lane_sums", _compilers_order),
    "lanes crossed": ("total", _lanes_crossed),
    "chunks joined without fma": ("join", _joined_unfused),
    "chunks joined the other way round": ("join", _joined_other_way),
    "another border of chunks": ("chunk_start", _later_start),
    "keys exchanged": ("load_rows", _keys_exchanged),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_another_order_is_not_the_form(name, short_chunks, monkeypatch):
    monkeypatch.setattr(attention, *CORRUPTIONS[name])
    proof = proof_of(full, operands(1, 2, 96), SCHEDULES[0])
    assert not proof.proven and proof.wrong


@pytest.mark.lengthy
def test_warps_of_two_kinds_are_verified_in_source_and_not_followed():
    operands = (torch.empty(1, 64, 300, 64, dtype=torch.bfloat16) for _ in range(3))
    (made,) = certify(F.scaled_dot_product_attention, *operands, ir=True, batch_dim=None).certificates
    (attention_entry,) = [entry for entry in made.entries if entry.form]
    assert attention_entry.level == Level.SOURCE.value
