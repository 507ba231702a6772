"""The doctor finds schedules of attention that disagree, and its operands show what a 16-bit result hides."""

import dataclasses

import pytest
import torch

from bi_inductor import attention_op, contract, doctor, doctor_attention, inspect, verifier
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.templates import triton_attention
from bi_inductor.templates.triton_attention import Schedule, schedule_for

KIND = doctor_attention.KINDS[0]


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(doctor_attention, "BATCH", 1)
    monkeypatch.setattr(doctor_attention, "HEADS", 2)


def in_interpreter(*graph):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bi_inductor.verifier.check", verifier.examine)
        return run_in_interpreter(*graph)


SCHEDULES = [Schedule(16, 4, 3, True), Schedule(64, 4, 3, False)]


@pytest.mark.parametrize("kind", doctor_attention.KINDS, ids=lambda kind: kind.name)
def test_agreement_is_one_class(kind, few_rows):
    kind = dataclasses.replace(kind, depths=(kind.form.tile + 6,))
    (result,) = doctor_attention.examine(kind, SCHEDULES, device="cpu", execute=in_interpreter)
    assert result.classes == (1,) and result.agrees
    assert result.tiles == 2 * (4 + kind.float_masks) == len(set(result.runs))


@pytest.mark.lengthy
def test_a_schedule_that_computes_something_else_is_a_second_class(few_rows, monkeypatch):
    """Teeth: tiles of 16 keys in one of the schedules add a row in another order."""
    stock = triton_attention._constants

    def constants(form, schedule, *rest):
        if schedule.split:
            form = dataclasses.replace(form, tile=16)
        return stock(form, schedule, *rest)

    monkeypatch.setattr(triton_attention, "_constants", constants)
    monkeypatch.setattr(doctor_attention, "HEADS", 6)
    all_cases = (
        doctor_attention._masked
    )  # but that with as many queries as keys, and that with a map of 64 keys a tile

    def cases(*operands):
        return [case for case in all_cases(*operands)[:-1] if case.tiles is None]

    monkeypatch.setattr(doctor_attention, "_masked", cases)
    kind = dataclasses.replace(KIND, depths=(400,))
    (result,) = doctor_attention.examine(kind, SCHEDULES, device="cpu", execute=in_interpreter)
    assert result.classes == (2,) and not result.agrees


@pytest.mark.parametrize("kind", doctor_attention.KINDS, ids=lambda kind: kind.name)
def test_every_schedule_is_examined(kind):
    form = contract.attention_form(kind.width, kind.width, kind.dtype, tf32=kind.tf32)
    for rows in (1, 4, 16, 20, 32, 64, 4096, None):
        for pairs in (1, 8, 100, 1000, 100_000):
            for keys in (1, 512, 600, 5000, 131072):
                for major in (8, 9):
                    chosen = schedule_for(
                        rows, pairs, keys, form, kind.width, kind.dtype.itemsize, 132, major
                    )
                    assert chosen in kind.schedules


def in_steps(p, value, order):
    """[pairs, D] in bf16: steps of 16 keys in ``order``, each added exactly and then to an fp32 sum."""
    total = torch.zeros(p.shape[0], value.shape[-1])
    for step in torch.tensor(order).split(16):
        total = (total.double() + (p[:, step, None] * value[:, step]).sum(1)).float()
    return total.bfloat16()


def test_operands_show_which_keys_a_step_adds():
    """With 4 keys in a thread of ``mma.sync``, hardly one of 8192 ordinary sums ends otherwise; of these, 4 in 10."""
    query, key, value = (x.double().flatten(0, 1) for x in doctor_attention.operands(KIND, 96, "cpu"))
    t = query @ key.transpose(1, 2) * (KIND.scale * attention_op.LOG2_E)
    p = doctor_attention.rounded_probabilities(t, KIND.form, torch.bfloat16)[:, 0]
    ascending = list(range(96))
    shared_out = [32 * block + k for block in range(3) for half in (0, 2) for k in _holding_four(half)]
    assert sorted(shared_out) == ascending

    def share(value):
        return (in_steps(p, value, ascending) != in_steps(p, value, shared_out)).double().mean()

    ordinary = value.clone()
    ordinary[:, -2:] = torch.randn(ordinary[:, -2:].shape).bfloat16().double()
    assert share(ordinary) < 0.001 < 0.2 < share(value)


def _holding_four(half):
    """The keys of the first (0) or second (2) of two steps."""
    return [4 * thread + half + i for thread in range(8) for i in range(2)]


@pytest.mark.lengthy
def test_families_are_read_from_ptx():
    """Every schedule compiles, with every mask, and its instructions are found."""
    cases = doctor_attention._masked(KIND, *doctor_attention.operands(KIND, 89, "cpu"))
    inputs = [[doctor_attention._copied(case) for _ in KIND.schedules for case in cases]]
    in_turn = [schedule for schedule in KIND.schedules for _ in cases]
    with doctor.prepared("triton_attention", "schedule_for", in_turn, tf32=False):
        source = inspect(doctor_attention._graph, inputs, target="sm_90").source
    found = doctor.instructions(source, len(in_turn), "sm_90", pattern=doctor_attention._KERNEL)
    expected = ["wgmma k16" if schedule.block_m == 64 else "mma.sync k16" for schedule in KIND.schedules]
    assert found == [family for family in expected for _ in cases]


@pytest.mark.gpu
def test_the_doctor_examines_attention_on_this_gpu():
    (result,) = doctor_attention.examine(KIND)
    assert result.agrees and result.tiles == 5 * len(KIND.schedules) and "unknown" not in result.family
