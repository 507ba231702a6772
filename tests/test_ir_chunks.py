"""fp8 products in the compiler's IR: chunks of 128, each a chain from 0, added from left to right."""

import re

import pytest
import torch

from bi_inductor import certify, doctor, inspect
from bi_inductor.certificate import Level
from bi_inductor.ir import prove
from bi_inductor.ir.lowering import Lowering
from bi_inductor.templates import quantized_tiles
from bi_inductor.ttgir.steps import Step, steps_of
from bi_inductor.virtual import virtual_gpu

ONE = torch.ones(())


def fp8(*shape):
    return torch.randn(shape).to(torch.float8_e4m3fn)


def product(x, weight, scale_a, scale_b):
    return torch._scaled_mm(x, weight.t(), scale_a, scale_b, out_dtype=torch.float32)


def fast(x, weight, scale_a, scale_b):
    return torch._scaled_mm(x, weight.t(), scale_a, scale_b, out_dtype=torch.float32, use_fast_accum=True)


#: Function, inputs, what its IR shows.
CASES = {
    "two chunks and a tail": (product, (fp8(20, 288), fp8(32, 288), ONE, ONE), ("chunks", (288, 128, False))),
    "one chunk": (product, (fp8(20, 48), fp8(32, 48), ONE, ONE), ("chunks", (48, 128, False))),
    "many rows": (product, (fp8(150, 144), fp8(80, 144), ONE, ONE), ("chunks", (144, 128, False))),
    "scales of blocks": (
        product, (fp8(20, 256), fp8(128, 256), torch.ones(2, 20).t(), torch.ones(2, 1)), ("chunks", (256, 128, True)),
    ),
    "fast accumulation": (fast, (fp8(20, 288), fp8(32, 288), ONE, ONE), ("chain", 288)),
}  # fmt: skip


def graph_of(name):
    torch._dynamo.reset()
    fn, inputs, expected = CASES[name]
    (graph,) = inspect(fn, *inputs).graphs
    return graph, expected


@pytest.mark.parametrize(
    "tile", quantized_tiles.candidates("fp8 in chunks", 90), ids=lambda tile: str(tile.key)
)
def test_every_selectable_tile_is_the_form(tile):
    with doctor.chosen_in_turn("triton_quantized", "tile_for", [tile]):
        graph, expected = graph_of("two chunks and a tail")
    proof = prove(graph.source, graph.certificate, "sm_90")
    assert proof.proven == {expected} and not proof.wrong and not proof.unknown


@pytest.mark.parametrize("name", CASES)
def test_chunks_are_the_form(name):
    graph, expected = graph_of(name)
    proof = prove(graph.source, graph.certificate, "sm_90")
    assert proof.proven == {expected} and not proof.wrong and not proof.unknown


def test_steps_are_those_of_the_family_in_the_form():
    graph, _ = graph_of("two chunks and a tail")
    (form,) = [entry.form for entry in graph.certificate.entries if entry.form]
    assert form.startswith("Chunks(fp8_wgmma_k32/")
    ((name, text),) = [(name, text) for name, text in graph.kernels.items() if "_tem_" in name]
    with virtual_gpu("sm_90") as device:
        steps = steps_of(Lowering(text, name, device).lowered(0).ttgir)
    assert {*steps.found} == {Step("wgmma", 32)} and not steps.wrong


CORRUPTIONS = {
    "shorter chunks": (
        "two chunks and a tail",
        r"BLOCK_K : tl\.constexpr = 128",
        "BLOCK_K : tl.constexpr = 64",
    ),
    "chunks added the other way": ("two chunks and a tail", r"acc \+= chunk$", "acc = chunk - acc"),
    "one chain": ("two chunks and a tail", r"acc \+= chunk$", "acc = tl.dot(b, a, acc, out_dtype=ACC_TYPE)"),
    "scaled after the sum": ("scales of blocks", r"acc \+= chunk \* .*$", "acc += chunk"),
    "scaled once": ("scales of blocks", r"(acc \+= chunk \* \w+_scale\[[^\]]*\]) \* .*$", r"\1"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_another_order_is_not_the_form(name):
    case, old, new = CORRUPTIONS[name]
    graph, expected = graph_of(case)
    changed, count = re.subn(old, new, graph.source, flags=re.MULTILINE)
    assert count
    assert expected not in prove(changed, graph.certificate, "sm_90").proven


def test_certify_says_so():
    fn, inputs, _ = CASES["two chunks and a tail"]
    made = certify(fn, *inputs, ir=True, batch_dim=None)
    assert [entry.level for entry in made.certificates[0].entries if entry.form] == [Level.IR.value]
