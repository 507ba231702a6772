"""Orders rebuilt from Triton's IR are the forms', in every configuration and tile; no changed order passes for them."""

import re

import pytest
import torch
import torch.nn.functional as F
from inspected import WIDTH, Block

from bi_inductor import BatchInvarianceError, OptionError, certify, inspect, ir
from bi_inductor.certificate import Level
from bi_inductor.inspection import kernel_definitions
from bi_inductor.ir import prove
from bi_inductor.ir.orders import _counts_up
from bi_inductor.ir.text import UnreadableError, parse

R = torch.randn
WEIGHT = R(64, 32)
#: Function, inputs, options of inspect, what its IR shows.
CASES = {
    "a norm in bf16": (lambda x: F.rms_norm(x, (64,)), (R(3, 64).bfloat16(),), {}, {("sum", 64)}),
    "mean and variance": (lambda x: F.layer_norm(x, (300,)), (R(3, 300),), {}, {("sum", 300)}),
    "a loop": (lambda x: x.sum(0), (R(300, 20),), {"dynamic": True}, {("sum", 300)}),
    "columns in chunks": (lambda x: x.sum(0), (R(500, 20),), {}, {("sum", 500)}),
    "a product of elements": (lambda x: (1 + x).prod(-1), (R(3, 300),), {}, {("prod", 300)}),
    "two dimensions": (lambda x: x.sum((0, 2)), (R(10, 5, 12),), {}, {("sum", 120)}),
    "a sum of sums": (lambda x: x.sum(-1).sum(-1), (R(3, 16, 32),), {}, {("sum", 32), ("sum", 16)}),
    "softmax": (lambda x: x.softmax(-1), (R(3, 1000),), {}, {("sum", 1000)}),
    "two sums added": (lambda x, y: x.sum(-1) + y.sum(-1), (R(3, 64), R(3, 80)), {}, {("sum", 64), ("sum", 80)}),
    "a product": (lambda a, b: a @ b, (R(33, 70), R(70, 20)), {}, {("chain", 70)}),
    "a dynamic product": (lambda a, b: F.relu(a @ b), (R(33, 70), R(70, 20)), {"dynamic": True}, {("chain", 70)}),
    "a model": (
        lambda x: torch.softmax(F.rms_norm(x, (64,)) @ WEIGHT, -1), (R(5, 64),), {},
        {("chain", 64), ("sum", 32), ("sum", 64)},
    ),
    "attention in ordinary ops": (
        lambda q, k, v: torch.softmax(q @ k.transpose(1, 2), -1) @ v,
        (R(2, 9, 16), R(2, 20, 16), R(2, 20, 16)), {}, {("chain", 16), ("chain", 20), ("sum", 20)},
    ),
}  # fmt: skip


def graph_of(name, target="sm_90"):
    torch._dynamo.reset()
    fn, args, options, expected = CASES[name]
    (graph,) = inspect(fn, *args, target=target, **options).graphs
    return graph, expected


@pytest.mark.parametrize("name", CASES)
def test_orders_are_the_forms(name):
    graph, expected = graph_of(name)
    proof = prove(graph.source, graph.certificate, "sm_90")
    assert proof.proven == expected and not proof.wrong and not proof.unknown
    assert set(proof.configurations) == set(graph.kernels)


def test_every_tile_of_rows_was_followed():
    graph, _ = graph_of("a norm in bf16")
    (configurations,) = prove(graph.source, graph.certificate, "sm_90").configurations.values()
    assert {re.search(r"XBLOCK: (\d+)", shown)[1] for shown in configurations} == {"1", "2", "4", "8", "16"}


@pytest.mark.lengthy
def test_every_tile_of_a_product_is_the_chain():
    """A dynamic graph holds all tiles that a launch may choose: swapped, by TMA, with extra columns."""
    a, b = R(37, 256).bfloat16(), R(256, 64).bfloat16()
    torch._dynamo.mark_dynamic(a, 0)
    (graph,) = inspect(torch.matmul, a, b, dynamic=None).graphs
    proof = prove(graph.source, graph.certificate, "sm_90")
    assert proof.proven == {("chain", 256)} and not proof.wrong and not proof.unknown
    (configurations,) = proof.configurations.values()
    assert len(configurations) >= 8
    for kind in ("SWAP: True", "SWAP: False", "TMA: True", "EXTRA_N: 16"):
        assert any(kind in shown for shown in configurations)


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_other_targets(target):
    graph, expected = graph_of("a model", target)
    proof = prove(graph.source, graph.certificate, target)
    assert proof.proven == expected and not proof.wrong


#: Case, what is replaced, by what: each is another order, and none is taken for the form.
CORRUPTIONS = {
    "tl.sum": ("softmax", r"ordered\.tree_sum\((\w+)\)", r"tl.sum(\1, 1)"),
    "halves": (
        "mean and variance", r"ordered\.tree_sum\((\w+)\)",
        r"ordered.tree_sum(tl.reshape(tl.permute(tl.reshape(\1, [XBLOCK, 2, 256]), (0, 2, 1)), [XBLOCK, 512]))",
    ),
    "elements in another order": ("softmax", r"(tl\.load\(in_ptr0 \+ )\(r0_1 ", r"\1(999 - r0_1 "),
    "one element twice": ("softmax", r"(tl\.load\(in_ptr0 \+ )\(r0_1 ", r"\1((r0_1 // 2) "),
    "stack order": (
        "a loop", r"ordered\.push_sum\((\w+), (.+), r0_offset // R0_BLOCK\)",
        r"ordered.push_sum(\1, \2, 1 + r0_offset // R0_BLOCK)",
    ),
    "an element left out": ("softmax", r"r0_mask = r0_index < r0_numel", "r0_mask = r0_index < r0_numel - 1"),
    "chunks in another order": ("columns in chunks", r"(in_ptr0 \+ \(.*?)(\d+)\*r0_1", r"\1(-\2)*r0_1 + 31*\2"),
    "k counted down": ("a product", r"a_block \+= BLOCK_K \* stride_ak", "a_block -= BLOCK_K * stride_ak"),
    "k permuted": ("a product", r"k = tl\.arange\(0, BLOCK_K\)", "k = (tl.arange(0, BLOCK_K) ^ 1)"),
    "an accumulator that starts elsewhere": (
        "a product", r"acc = tl\.zeros\((.*?), ACC_TYPE\)", r"acc = tl.full(\1, 1.0, ACC_TYPE)",
    ),
    "a rounded accumulator": (
        "a product", r"acc = tl\.dot\(a, b, acc,", r"acc = tl.dot(a, b, acc.to(tl.bfloat16).to(ACC_TYPE),",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_another_order_is_not_the_forms(name):
    case, old, new = CORRUPTIONS[name]
    graph, expected = graph_of(case)
    changed, count = re.subn(old, new, graph.source)
    assert count
    proof = prove(changed, graph.certificate, "sm_90")
    assert expected - proof.proven


def test_what_is_not_followed_is_named():
    torch._dynamo.reset()
    (graph,) = inspect(lambda x, i: x[i].sum(-1), R(8, 64), torch.tensor([1, 2])).graphs
    proof = prove(graph.source, graph.certificate, "sm_90")
    assert list(proof.unknown.values()) == ["an address that was loaded"] and not proof.proven
    torch._dynamo.reset()
    made = certify(
        lambda x, w, ends: torch._grouped_mm(x, w, offs=ends),
        *(R(20, 64).bfloat16(), R(2, 64, 32).bfloat16(), torch.tensor([8, 20]).int()), ir=True, batch_dim=None,
    )  # fmt: skip
    (product,) = [entry for entry in made.certificates[0].entries if entry.form.startswith("Chain")]
    assert product.level == Level.SOURCE.value
    with pytest.raises(UnreadableError, match="no public function"):
        parse("module { }")


def test_addresses_that_count_up():
    assert _counts_up([7]) and _counts_up([5, 8, 11]) and _counts_up([0, 1, 2, 10, 11, 12])
    assert not _counts_up([2, 1, 0]) and not _counts_up([0, 1, 2, 10, 12, 11]) and not _counts_up([0, 0, 1])


def test_certify_says_which_ops_were_rebuilt():
    made = certify(Block(), R(3, WIDTH), ir=True, batch_dim=None)
    (certificate,) = made.certificates
    ordered = [entry for entry in certificate.entries if entry.form.startswith(("Tree", "Chain"))]
    assert ordered and {entry.level for entry in ordered} == {Level.IR.value}
    assert all(kernel.level in (Level.IR.value, Level.SOURCE.value) for kernel in certificate.kernels)
    assert made.digest == certify(Block(), R(3, WIDTH), batch_dim=None).digest
    with pytest.raises(OptionError, match="give a GPU"):
        certify(Block(), R(3, WIDTH), ir=True, target="cpu")


def test_certify_refuses_another_order(monkeypatch):
    """Where the compiler had made another order of what the verifier has read."""

    def corrupted(source):
        definitions = kernel_definitions(source)
        return {
            name: re.sub(r"ordered\.tree_sum\((\w+)\)", r"tl.sum(\1, 1)", text)
            for name, text in definitions.items()
        }

    monkeypatch.setattr(ir, "kernel_definitions", corrupted)
    with pytest.raises(BatchInvarianceError, match="in the compiler's order"):
        certify(lambda x: x.sum(-1), R(3, 100), ir=True)
