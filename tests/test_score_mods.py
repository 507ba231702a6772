"""score_mod in attention's kernels: programs, their derivatives, and the bits of what else says the same."""

import re

import pytest
import torch
from devices import compiled
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bi_inductor import inspect, verifier
from bi_inductor.attention_backward_op import attention_backward
from bi_inductor.attention_op import OVERLOAD, attention
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.measurement_attention import run_of
from bi_inductor.score_programs import programs_of, run, run_on_grid
from bi_inductor.testing import same_bits

SLOPES = torch.exp2(-torch.arange(1, 5, dtype=torch.float32))


def soft_cap(score, b, h, i, j):
    return 3.0 * torch.tanh(score / 3.0)


def by_reciprocal(score, b, h, i, j):
    """What the program of a ``soft_cap`` is: no number divides."""
    return 3.0 * torch.tanh(score * (1 / 3.0))


def alibi(score, b, h, i, j, slopes):
    return score + slopes[h] * (j - i)


def relative(score, b, h, i, j, table):
    """A bias by distance, from a table."""
    return score + table[(i - j).abs()]


def wrapped(score, b, h, i, j, table):
    """Negative indices count from the end of the table."""
    return score + table[j - i]


def gated(score, b, h, i, j):
    return torch.where(i >= j, score * torch.sigmoid(score), -torch.inf)


def by_batch(score, b, h, i, j):
    return score * (1 + b) - h


#: name -> (score_mod, what it reads)
MODS = {
    "soft_cap": (soft_cap, ()),
    "alibi": (alibi, (SLOPES,)),
    "relative": (relative, (torch.linspace(0, -3, 1000),)),
    "wrapped": (wrapped, (torch.linspace(0, -3, 1000),)),
    "gated": (gated, ()),
    "by_batch": (by_batch, ()),
}


def programs(name, dtype=torch.bfloat16):
    score_mod, captured = MODS[name]
    with FakeTensorMode() as mode:
        query = torch.empty(2, 4, 8, 16, dtype=dtype)
        fakes = [mode.from_tensor(x) for x in captured]
    return programs_of(torch.fx.symbolic_trace(score_mod), query, fakes)


def operands(queries, keys, head_dim=16, device="cpu", dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, queries), (2, keys), (2, keys))
    return [torch.randn(2, *shape, head_dim, generator=generator).to(device, dtype) for shape in shapes]


def places(shape):
    return torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")


@pytest.mark.parametrize("name", MODS)
def test_a_program_is_the_function_and_its_derivative(name):
    score_mod, captured = MODS[name]
    forward, derivative = programs(name)
    scores, gradient = torch.randn(2, 2, 4, 7, 9, dtype=torch.float32)
    leaf = scores.clone().requires_grad_()
    if name == "soft_cap":
        score_mod = by_reciprocal
    expected = score_mod(leaf, *places(scores.shape), *captured)
    (of_score,) = torch.autograd.grad(expected, leaf, gradient)
    assert same_bits(run_on_grid(forward, scores, (), captured), expected.detach())
    torch.testing.assert_close(run_on_grid(derivative, scores, (gradient,), captured), of_score)


def test_a_program_calls_elementwise_ops_alone():
    with pytest.raises(ValueError, match="elementwise"):
        run('[["aten.sum.default",[{"v":0}],{}],1]', [torch.ones(3)])


@pytest.mark.parametrize(
    "score_mod, captured",
    [
        (lambda s, b, h, i, j, x: s + x.sum(), [torch.ones(3)]),
        (lambda s, b, h, i, j, x: s + x[h], [torch.ones(4, dtype=torch.int8)]),
        (lambda s, b, h, i, j, x: s + x, [torch.ones((), dtype=torch.float64)]),
    ],
    ids=["a sum", "few bits", "a number that widens"],
)
def test_what_has_no_program(score_mod, captured):
    with FakeTensorMode() as mode:
        query = torch.empty(2, 4, 8, 16, dtype=torch.bfloat16)
        fakes = [mode.from_tensor(x) for x in captured]
    assert programs_of(torch.fx.symbolic_trace(score_mod), query, fakes) is None


@pytest.mark.lengthy
def test_the_op_with_a_program():
    """As PyTorch checks ops; its gradient is that of the plain ops, and so is the gradient of that."""
    forward, derivative = programs("alibi")
    leaves = [x.double().requires_grad_() for x in operands(3, 5, 4, dtype=torch.float64)]
    options = (None, False, 0.3, None, forward, derivative, [SLOPES.double()])
    torch.library.opcheck(OVERLOAD, (*leaves, *options))
    torch.autograd.gradcheck(lambda *x: attention(*x, *options), leaves, eps=1e-6, atol=1e-7)
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda *x: attention(*x, *options))(*(x[None] for x in leaves))


@pytest.mark.parametrize("name", ["alibi", "relative"])
def test_gradients_of_what_a_program_reads(name):
    score_mod, (captured,) = MODS[name]
    forward, derivative = programs(name, torch.float32)
    leaves = [x.double().requires_grad_() for x in (*operands(5, 9, dtype=torch.float64), captured)]

    def fn(query, key, value, captured):
        return attention(query, key, value, None, False, 0.25, None, forward, derivative, [captured])[0]

    query, key, value, read = leaves
    products = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.25
    exact = score_mod(products, *places(products.shape), read).softmax(-1) @ value.repeat_interleave(2, 1)
    grad = torch.randn(exact.shape, dtype=torch.float64)
    expected = torch.autograd.grad(exact, leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(fn(*leaves), leaves, grad), expected)


@pytest.mark.lengthy
def test_what_needs_a_gradient_changes_no_bit_of_the_result():
    """The forward is the same kernel, and so are the gradients of queries, keys and values."""
    forward, derivative = programs("alibi")

    def fn(query, key, value, slopes):
        return attention(query, key, value, None, False, 0.25, None, forward, derivative, [slopes])[0]

    made = []
    for needs_gradient in (False, True):
        inputs = [x.requires_grad_() for x in operands(40, 70)]
        graphs = inspect(fn, *inputs, SLOPES.clone().requires_grad_(needs_gradient), backward=True).graphs
        made.append(graphs)
        assert all("attention" in graph.source and "computed_score" in graph.source for graph in graphs)
    assert made[0][0].certificate.fingerprint == made[1][0].certificate.fingerprint
    assert ["tl.dot(" in graphs[1].source for graphs in made] == [False, True]


def biased(query, key, value, mask, captured):
    """Additive, as a mask of floats."""
    return attention(query, key, value, mask, False, 0.25)


def scored(name):
    forward, derivative = programs(name)

    def fn(query, key, value, captured):
        return attention(query, key, value, None, False, 0.25, None, forward, derivative, captured)

    return fn


@pytest.mark.parametrize("name", ["alibi", "relative", "wrapped"])
@pytest.mark.parametrize("queries, keys", [(3, 600), (40, 150)], ids=["split", "in sequence"])
def test_what_is_added_has_the_bits_of_a_mask(name, queries, keys):
    inputs, captured = operands(queries, keys), list(MODS[name][1])
    shape = (2, 4, queries, keys)
    mask = MODS[name][0](torch.zeros(shape), *places(shape), *captured)
    expected = run_in_interpreter(biased, *inputs, mask, captured)
    assert all(map(same_bits, run_in_interpreter(scored(name), *inputs, captured), expected))


@pytest.mark.parametrize("name", ["alibi", "relative"])
def test_gradients_of_what_is_added_have_the_bits_of_a_masks(name):
    inputs, captured = operands(40, 90), list(MODS[name][1])
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(2, 4, 40, 16, generator=generator).bfloat16()
    logsumexp, delta = (
        torch.randn(2, 2, 4, 40, generator=generator) + torch.tensor([6.0, 0.0])[:, None, None, None]
    )
    shape = (2, 4, 40, 90)
    mask = MODS[name][0](torch.zeros(shape), *places(shape), *captured)
    forward, derivative = programs(name)

    def with_mask(grad, query, key, value, mask, logsumexp, delta):
        return attention_backward(grad, query, key, value, mask, logsumexp, delta, False, 0.25)

    def with_program(grad, query, key, value, logsumexp, delta, captured):
        return attention_backward(
            grad,
            query,
            key,
            value,
            None,
            logsumexp,
            delta,
            False,
            0.25,
            None,
            None,
            forward,
            derivative,
            captured,
        )

    expected = run_in_interpreter(with_mask, grad, *inputs, mask, logsumexp, delta)
    found = run_in_interpreter(with_program, grad, *inputs, logsumexp, delta, captured)
    assert all(map(same_bits, found, expected))


@pytest.mark.parametrize("name", MODS)
def test_kernels_agree_with_plain_ops(name):
    """Forward and gradients, with fp32 inputs: the composite is the same mathematics in other orders."""
    inputs, captured = operands(20, 70, dtype=torch.float32), list(MODS[name][1])
    forward, derivative = programs(name, torch.float32)
    output, logsumexp = attention(*inputs, None, False, 0.25, None, forward, derivative, captured)
    found = run_in_interpreter(scored(name), *inputs, captured)
    torch.testing.assert_close(found, (output, logsumexp), atol=1e-5, rtol=1e-5)
    leaves = [x.double().requires_grad_() for x in inputs]
    wide = [x.double() if x.is_floating_point() else x for x in captured]
    query, key, value = leaves
    products = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.25
    exact = MODS[name][0](products, *places(products.shape), *wide).softmax(-1) @ value.repeat_interleave(
        2, 1
    )
    torch.testing.assert_close(output.double(), exact, atol=1e-5, rtol=1e-5)
    grad = torch.randn(output.shape)
    expected = torch.autograd.grad(exact, leaves, grad.double())
    delta = (grad * output).sum(-1)

    def backward(grad, query, key, value, logsumexp, delta, captured):
        options = (False, 0.25, None, None, forward, derivative, captured)
        return attention_backward(grad, query, key, value, None, logsumexp, delta, *options)

    gradients = run_in_interpreter(backward, grad, *inputs, logsumexp, delta, captured)
    torch.testing.assert_close([x.double() for x in gradients], list(expected), atol=1e-4, rtol=1e-4)


def test_a_function_may_return_a_constant():
    """It forgets the score, and so does its derivative."""
    grad, *inputs = [torch.randn(2, h, 40, 16).bfloat16() for h in (4, 4, 2, 2)]
    with FakeTensorMode():
        gm = torch.fx.symbolic_trace(lambda score, b, h, i, j: torch.zeros_like(score))
        forward, derivative = programs_of(gm, torch.empty(2, 4, 8, 16, dtype=torch.bfloat16), [])

    def mean_of_values(query, key, value):
        return attention(query, key, value, None, False, 0.25, None, forward, derivative, [])

    def without_scores(query, key, value):
        return attention(query * 0, key, value, None, False, 0.25)

    found = run_in_interpreter(mean_of_values, *inputs)
    assert all(map(same_bits, found, run_in_interpreter(without_scores, *inputs)))

    def backward(grad, query, key, value, logsumexp, delta):
        options = (False, 0.25, None, None, forward, derivative, [])
        return attention_backward(grad, query, key, value, None, logsumexp, delta, *options)

    delta = (grad.float() * found[0].float()).sum(-1)
    for gradient in run_in_interpreter(backward, grad, *inputs, found[1], delta)[:2]:
        assert not gradient.count_nonzero()


def flex(score_mod, **options):
    def fn(query, key, value):
        return flex_attention(query, key, value, score_mod=score_mod, enable_gqa=True, **options)

    return fn


def graph_of(score_mod, *inputs):
    (graph,) = inspect(flex(score_mod), *inputs).graphs
    return graph


def test_scores_are_in_no_memory():
    graph = graph_of(soft_cap, *operands(70, 300))
    assert (
        "def computed_score(" in graph.source
        and "bmm" not in graph.source
        and graph.source.count("tl.dot(") == 0
    )


def test_what_a_program_reads_may_be_computed_in_the_graph():
    slopes = SLOPES / 2

    def fn(query, key, value, twice):
        slopes = twice.cos() * 0 + twice / 2

        def modified(score, b, h, i, j):
            return alibi(score, b, h, i, j, slopes)

        return flex_attention(query, key, value, score_mod=modified, enable_gqa=True)

    forward, derivative = programs("alibi")

    def expected(query, key, value, slopes):
        return attention(query, key, value, None, False, 0.25, None, forward, derivative, [slopes])[0]

    inputs = operands(40, 70)
    found = run_in_interpreter(fn, *inputs, slopes * 2)
    assert same_bits(found, run_in_interpreter(expected, *inputs, slopes))


def test_the_fingerprint_knows_the_function_and_not_the_batch():
    def other_cap(score, b, h, i, j):
        return 4.0 * torch.tanh(score / 4.0)

    inputs = operands(70, 300)
    alone = [x[:1] for x in inputs]
    prints = [graph_of(f, *x).certificate.fingerprint for f, x in ((soft_cap, inputs), (soft_cap, alone))]
    assert prints[0] == prints[1] != graph_of(other_cap, *inputs).certificate.fingerprint


@pytest.fixture(scope="module")
def emitted():
    slopes = SLOPES.clone()
    (graph,) = inspect(flex(lambda s, b, h, i, j: alibi(s, b, h, i, j, slopes)), *operands(70, 300)).graphs
    return graph.source, graph.certificate


CORRUPTIONS = {
    "a sum": (r"return (tmp\d+)", r"\1 = tl.sum(\1, 1)\n    return \1"),
    "other operands": (r"computed_score\(score, idx_b, idx_h", "computed_score(score, idx_h, idx_b"),
    "another score": (r"(    tmp0 = \(score\)\n)", r"    score = idx_m\n\1"),
    "no function": (r"True, computed_score", "False, 0"),
    "a function of its own": (r"True, computed_score", "True, attention.join"),
    "another argument": (r"captured_by_score = \(\w+,\)", "captured_by_score = (LSE,)"),
    "rows that do not exist": (r"tl.minimum\(idx_m, 70 - 1\)", "idx_m"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_found(emitted, name):
    source, certificate = emitted
    assert verifier.verify(source, certificate) == ()
    corrupted = re.sub(*CORRUPTIONS[name], source)
    assert corrupted != source, "the corruption changes nothing"
    assert verifier.verify(corrupted, certificate)


def test_no_doctor_measured_it(emitted):
    """Its schedule is that of plain attention, which a doctor runs; what it computes is not."""
    (kernel,) = (text for text in emitted[0].split("'''") if "attention.all_chunks(" in text)
    form = next(entry.form for entry in emitted[1].entries if entry.form)
    assert run_of([kernel], form) is None
    plain = kernel.replace("SCORED : tl.constexpr = True", "SCORED : tl.constexpr = False")
    assert run_of([plain], form) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["soft_cap", "alibi", "gated"])
@pytest.mark.parametrize("is_masked", [False, True])
def test_rows_and_gradients_do_not_see_the_batch(name, is_masked):
    """Nor does a query see which others are computed with it: decoding, chunks and prefill."""
    score_mod, captured = MODS[name]
    captured = [x.cuda() for x in captured]
    inputs = [x.repeat(4, 1, 1, 1) for x in operands(300, 300, 64, "cuda")]

    def modified(score, b, h, i, j):
        return score_mod(score, b * 0, h, i, j, *captured)

    def visible(b, h, i, j):
        return i - j < 70

    def run_rows(rows, first=0):
        leaves = [x[rows].detach().clone().requires_grad_() for x in inputs]
        query, *others = leaves
        queries = 300 - first

        def shifted(score, b, h, i, j):
            return modified(score, b, h, i + first, j)

        def shifted_visible(b, h, i, j):
            return visible(b, h, i + first, j)

        blocks = (
            create_block_mask(shifted_visible, None, None, queries, 300, device="cuda") if is_masked else None
        )
        torch._dynamo.reset()
        out = compiled(flex(shifted, block_mask=blocks), dynamic=False)(query[:, :, first:], *others)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    whole = run_rows(slice(0, 8))
    for rows in (slice(0, 1), slice(3, 5)):
        assert all(map(same_bits, run_rows(rows), (x[rows] for x in whole)))
    for first in (299, 200):
        assert same_bits(run_rows(slice(0, 8), first)[0], whole[0][:, :, first:])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["soft_cap", "alibi"])
def test_gradients_are_stocks(name):
    """To the accuracy of bf16, beside stock Inductor's kernels."""
    score_mod, captured = MODS[name]
    captured = [x.cuda() for x in captured]
    inputs = operands(256, 256, 64, "cuda")

    def modified(score, b, h, i, j):
        return score_mod(score, b, h, i, j, *captured)

    results: list[list[Tensor]] = []
    for backend in ("batchinv", "inductor"):
        torch._dynamo.reset()
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = torch.compile(flex(modified), backend=backend, dynamic=False)(*leaves)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=3e-2, rtol=3e-2)
