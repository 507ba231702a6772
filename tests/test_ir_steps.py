"""Chains of few steps in the compiler's IR: they start from 0, and not from what is added to them next.

Triton rewrites ``dot(a, b, 0) + c`` as ``dot(a, b, c)``. Where K is one step of a tile its loop is gone, and that is
what a product and its bias look like, unless a choice stands between them. Each control takes the choice away.
"""

import importlib.util
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from bi_inductor import BatchInvarianceError, certify, inspect, ir
from bi_inductor.inspection import kernel_definitions
from bi_inductor.ir import prove
from bi_inductor.ir.lowering import Lowering
from bi_inductor.runtime import attention
from bi_inductor.templates import triton_attention
from bi_inductor.templates.triton_attention import Schedule
from bi_inductor.ttgir import wrong_sums
from bi_inductor.virtual import virtual_gpu

R = torch.randn
ROWS, COLUMNS = 17, 24
END = re.compile(r"acc = tl\.where\(acc == 0\.0, 0\.0, acc\)")


def graph_of(fn, inputs, *, target="sm_90", dynamic=False):
    """The one graph of ``fn``; dynamic: the rows of each input with ROWS are a symbol, so its kernel has every tile."""
    torch._dynamo.reset()
    for x in inputs if dynamic else ():
        if x.ndim == 2 and x.shape[0] == ROWS:
            torch._dynamo.mark_dynamic(x, 0)
    (graph,) = inspect(fn, *inputs, target=target, dynamic=None if dynamic else False).graphs
    return graph


def proof_of(graph, target="sm_90"):
    return prove(graph.source, graph.certificate, target)


def proof_without_choice(graph, target="sm_90"):
    """The same with the + 0.0 at the end of every product spelled as an addition."""
    source, count = END.subn("acc = acc + 0.0", graph.source)
    assert count
    return prove(source, graph.certificate, target)


def assert_starts_from_what_is_added(proof):
    """As terms and as TTGIR have it. Where a product is added, the chain goes on from the other's."""
    assert any(re.match(r"a chain of \d+ products, ", what) for what in proof.wrong)
    assert any(what.startswith("a dot whose accumulator starts as") for what in proof.wrong)


# Every tile of the table.


def operands(k, dtype):
    """x [ROWS, k], w and v [k, COLUMNS], bias [COLUMNS], y [ROWS, COLUMNS]."""
    shapes = ((ROWS, k), (k, COLUMNS), (k, COLUMNS), (COLUMNS,), (ROWS, COLUMNS))
    return [R(shape).to(dtype) for shape in shapes]


def number_of(pattern, shown):
    return int(re.search(pattern, shown)[1])


@pytest.mark.parametrize(
    ("dtype", "k"),
    [
        (torch.float32, 1),
        (torch.float32, 32),  # one step of some tiles, two of others: the two classes of bits on an H100
        (torch.bfloat16, 20),
        (torch.bfloat16, 64),  # with TMA and extra columns
    ],
    ids=str,
)
def test_every_tile_starts_from_zero(dtype, k):
    x, w, _, bias, _ = operands(k, dtype)
    graph = graph_of(lambda x, w, bias: torch.addmm(bias, x, w), [x, w, bias], dynamic=True)
    proof = proof_of(graph)
    assert proof.proven == {("chain", k)} and not proof.wrong and not proof.unknown
    (tiles,) = proof.configurations.values()
    folded = {n for n, t in enumerate(tiles) if number_of(r"BLOCK_K: (\d+)", t) >= k and "SWAP: False" in t}
    wrong = proof_without_choice(graph).wrong
    found = {number_of(r"\(configuration (\d+)\)", what) for what in wrong if "does not start at 0" in what}
    assert found == folded and folded


# Whatever is added.


def flex(query, key, bias):
    return flex_attention(query, key, key, score_mod=lambda s, b, h, i, j: s + bias[h, i, j], scale=1.0)


def masked_product(query, key, mask):
    """fp64 has no attention kernel."""
    return F.scaled_dot_product_attention(query, key, key, attn_mask=mask, scale=1.0)


#: What is computed with ``operands(16, float32)``: the last op adds to the sums of a product.
EPILOGUES = {
    "bias": lambda x, w, v, bias, y: torch.addmm(bias, x, w),
    "beta": lambda x, w, v, bias, y: torch.addmm(bias, x, w, beta=0.5),
    "residual": lambda x, w, v, bias, y: y + x @ w,
    "two products": lambda x, w, v, bias, y: x @ w + x @ v,
    "times one": lambda x, w, v, bias, y: (x @ w) * 1.0 + bias,
    "zero and bias": lambda x, w, v, bias, y: x @ w + 0.0 + bias,
    "batch": lambda x, w, v, bias, y: torch.baddbmm(y.expand(2, -1, -1), x.expand(2, -1, -1), w.expand(2, -1, -1)),
}  # fmt: skip
#: The same where nothing is rewritten, with or without the choice.
SAFE_EPILOGUES = {
    "alpha": lambda x, w, v, bias, y: torch.addmm(y, x, w, alpha=2.0),
    "activation": lambda x, w, v, bias, y: F.relu(x @ w) + y,
    "difference": lambda x, w, v, bias, y: x @ w - bias,
    "rounded": lambda x, w, v, bias, y: (x.bfloat16() @ w.bfloat16()) + y.bfloat16(),
}


@pytest.mark.parametrize("name", [*EPILOGUES, *SAFE_EPILOGUES])
def test_whatever_is_added_comes_after_the_chain(name):
    graph = graph_of({**EPILOGUES, **SAFE_EPILOGUES}[name], operands(16, torch.float32))
    proof, without = proof_of(graph), proof_without_choice(graph)
    assert proof.proven == {("chain", 16)} and not proof.wrong and not proof.unknown
    if name in EPILOGUES:
        assert_starts_from_what_is_added(without)
    else:
        assert not without.wrong


def scores(dtype, *mask):
    return [R(1, 2, 9, 16).to(dtype), R(1, 2, 12, 16).to(dtype), R(mask).to(dtype)]


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("fn", "inputs"),
    [
        (flex, scores(torch.float64, 2, 9, 12)),
        (masked_product, scores(torch.float64, 1, 1, 9, 12)),
    ],
    ids=["flex_attention", "two products around a softmax"],
)
def test_scores_start_from_zero(fn, inputs):
    graph = graph_of(fn, inputs)
    proof = proof_of(graph)
    assert (
        proof.proven == {("chain", 16), ("chain", 12), ("sum", 12)} and not proof.wrong and not proof.unknown
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_so_do_scores_that_a_score_mod_adds_to(dtype):
    proof = proof_of(graph_of(flex, scores(dtype, 2, 9, 12)))
    assert {kind for kind, _ in proof.proven} == {"attention"} and not proof.wrong and not proof.unknown


def test_certify_refuses_a_chain_that_starts_from_its_bias(monkeypatch):
    """Where the verifier had let the addition pass."""

    def corrupted(source):
        return {name: END.sub("acc = acc + 0.0", text) for name, text in kernel_definitions(source).items()}

    monkeypatch.setattr(ir, "kernel_definitions", corrupted)
    x, w, _, bias, _ = operands(16, torch.float32)
    with pytest.raises(BatchInvarianceError, match="does not start at 0"):
        certify(lambda x, w, bias: torch.addmm(bias, x, w), x, w, bias, ir=True, batch_dim=None)


# Attention under a mask that is added to scores with a scale of 1.


def masked(query, key, mask):
    return F.scaled_dot_product_attention(query, key, key, attn_mask=mask, scale=1.0, enable_gqa=True)


def attention_graph(schedule, dtype, queries, keys):
    inputs = [R(1, 2, queries, 16).to(dtype), R(1, 1, keys, 16).to(dtype), R(1, 1, queries, keys).to(dtype)]
    with mock.patch.object(triton_attention, "schedule_for", lambda *_: schedule):
        return graph_of(masked, inputs)


@pytest.fixture
def without_choice(monkeypatch, tmp_path):
    """Attention whose scores are added to as they are."""
    source, choice = Path(attention.__file__).read_text(), "if SCALE == 1.0:"
    assert source.count(choice) == 1
    path = tmp_path / "attention_without_choice.py"
    path.write_text(source.replace(choice, "if SCALE == 0.0:"))
    spec = importlib.util.spec_from_file_location("attention_without_choice", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(attention, "_tile", module._tile)


DECODING, PREFILL = Schedule(16, 1, 3, True), Schedule(64, 8, 2, False)
MASKED = [
    (DECODING, torch.bfloat16, 1, 530),
    (PREFILL, torch.bfloat16, 40, 70),
    (PREFILL, torch.float32, 33, 40),
]


@pytest.mark.lengthy
@pytest.mark.parametrize("case", MASKED, ids=["decoding", "prefill", "prefill of fp32"])
def test_masked_scores_start_from_zero(case):
    proof = proof_of(attention_graph(*case))
    ((kind, _),) = proof.proven
    assert kind == "attention" and not proof.wrong and not proof.unknown


@pytest.mark.parametrize("case", MASKED[:2], ids=["decoding", "prefill"])
def test_masked_scores_without_the_choice(case, without_choice):
    proof = proof_of(attention_graph(*case))
    assert not proof.proven and any("a dot whose accumulator starts as" in what for what in proof.wrong)


# fp8, int8 and grouped products.

ONE = torch.ones(())


def fp8(*shape):
    return R(shape).to(torch.float8_e4m3fn)


def scaled(fast):
    def product(x, w, y):
        return torch._scaled_mm(x, w.t(), ONE, ONE, out_dtype=torch.float32, use_fast_accum=fast) + y

    return product


def test_a_chunk_starts_from_zero():
    """One and two chunks: Triton adds to no dot that is to be promoted."""
    for k, form in ((128, 128), (208, 128)):
        graph = graph_of(scaled(False), [fp8(20, k), fp8(32, k), R(20, 32)])
        proof = proof_of(graph)
        assert proof.proven == {("chunks", (k, form, False))} and not proof.wrong and not proof.unknown
    changed, count = re.subn("max_num_imprecise_acc=BLOCK_K", "max_num_imprecise_acc=0", graph.source)
    assert count and prove(changed, graph.certificate, "sm_90").wrong


def test_a_chain_of_fp8_starts_from_zero():
    proof = proof_of(graph_of(scaled(True), [fp8(20, 64), fp8(32, 64), R(20, 32)]))
    assert proof.proven == {("chain", 64)} and not proof.wrong and not proof.unknown


def ttgir(graph, target):
    """Of every kernel with a dot, in each configuration."""
    with virtual_gpu(target) as device:
        lowerings = [
            Lowering(text, name, device) for name, text in graph.kernels.items() if "tl.dot(" in text
        ]
        return [kernel.lowered(n).ttgir for kernel in lowerings for n in range(len(kernel.configs))]


def grouped(x, w, ends, y):
    return torch._grouped_mm(x, w, offs=ends).float() + y


def of_integers(x, w, y):
    """Exact wherever it starts."""
    return torch._int_mm(x, w) + y


ENDS = torch.tensor([8, 20], dtype=torch.int32)
BYTES = torch.ones(20, 32, dtype=torch.int8), torch.ones(32, 32, dtype=torch.int8)


@pytest.mark.parametrize(
    ("fn", "inputs"),
    [
        (grouped, (R(20, 16).bfloat16(), R(2, 16, 32).bfloat16(), ENDS, R(20, 32))),
        (grouped, (R(16, 24).bfloat16(), R(24, 32).bfloat16(), ENDS, R(2, 16, 32))),
        (of_integers, (*BYTES, torch.ones(32, dtype=torch.int32))),
    ],
    ids=["rows", "depth", "int8"],
)
def test_products_that_terms_do_not_follow(fn, inputs):
    found = ttgir(graph_of(fn, inputs), "sm_90")
    assert found and not any(map(wrong_sums, found))
