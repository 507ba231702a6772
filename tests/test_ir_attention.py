"""Attention in the compiler's IR: every schedule adds the same keys in the same steps, whatever mask is given."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from bi_inductor import BatchInvarianceError, certify, inspect
from bi_inductor.ir.layouts import Step, steps_of
from bi_inductor.ir.lowering import Lowering
from bi_inductor.runtime import attention
from bi_inductor.templates import triton_attention
from bi_inductor.templates.triton_attention import Schedule
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


def steps(schedule, mask, *, target="sm_90", dtype=torch.bfloat16):
    """What the steps of the dots of the attention kernel add, in one schedule."""
    torch._dynamo.reset()
    inputs = (QUERY.to(dtype), KEYS.to(dtype), KEYS.to(dtype), mask)
    with mock.patch.object(triton_attention, "schedule_for", lambda *_: schedule):
        (graph,) = inspect(masked, *inputs, target=target).graphs
    name, text = next(iter(graph.kernels.items()))
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
    small, large = (steps(schedule, MASKS["bool"]) for schedule in (SCHEDULES[0], SCHEDULES[2]))
    assert not large.wrong and [*large.found] == [Step("wgmma", 16)] * 2
    assert len(small.wrong) == 1 and "mma.sync whose threads hold 4 neighbouring k of bf16" in small.wrong[0]
    assert not steps(SCHEDULES[0], MASKS["bfloat16"]).wrong
    with pytest.raises(BatchInvarianceError, match="hold 4 neighbouring k"):
        certify(masked, QUERY[:, :, :1], KEYS, KEYS, MASKS["bool"][:, :, :1], ir=True, batch_dim=None)
