"""Attention with dropout: drawn once, by seed and position in [batch, heads, queries, keys], whatever the batch.

What eager computes is asked of the rewritten op, run eagerly; bits of compiled functions, which take long to compile on
a CPU, of two functions there and of all on a GPU.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from devices import DEVICES, compiled, over_batches, random_rows
from torch import nn
from torch.utils.checkpoint import checkpoint

import bi_inductor
from bi_inductor.passes.attention import scaled_dot_product_attention
from bi_inductor.testing import bits, same_bits

P, HEADS, QUERIES, KEYS, WIDTH = 0.25, 4, 9, 11, 8
BATCHES = (1, 2, 3, 7, 8, 9, 31, 64, 255, 257)
VISIBLE = torch.rand(QUERIES, KEYS, generator=torch.Generator().manual_seed(0)) > 0.3
BIAS = torch.linspace(-2, 2, KEYS)
CASES = {
    "plain": lambda q: {},
    "causal": lambda q: {"is_causal": True, "scale": 0.3},
    "bool mask": lambda q: {"attn_mask": VISIBLE.to(q.device)},
    "float mask": lambda q: {"attn_mask": BIAS[None].to(q)},
}


def operands(batch, dtype=torch.float32, device="cpu"):
    """Two key heads for four heads of queries."""
    shapes = ((HEADS, QUERIES), (2, KEYS), (2, KEYS))
    return [random_rows(batch, *s, WIDTH, dtype=dtype, device=device, seed=i) for i, s in enumerate(shapes)]


def attention(dropout_p=P, case="plain", op=F.scaled_dot_product_attention):
    def attend(q, k, v):
        return op(q, k, v, dropout_p=dropout_p, enable_gqa=True, **CASES[case](q))

    return attend


def step(fn, inputs, rows=None):
    """The output and the inputs' gradients of ``fn`` on the first ``rows`` rows, from one seed."""
    leaves = [x[:rows].clone().requires_grad_() for x in inputs]
    torch.manual_seed(5)
    output = fn(*leaves)
    weights = torch.linspace(-1, 2, output[0].numel(), device=output.device).view(output.shape[1:])
    (output.to(torch.promote_types(output.dtype, torch.float32)) * weights).sum().backward()
    return [output.detach(), *(x.grad for x in leaves)]


def identity(q):
    """Values whose rows are those of an identity: with them the output is what multiplies values, for each head."""
    return torch.eye(KEYS, dtype=q.dtype, device=q.device).expand(q.shape[0], 1, KEYS, KEYS)


@pytest.mark.parametrize("name", CASES)
def test_it_is_eagers_formula_with_one_draw_for_values_and_gradients(name):
    """In fp64, with what was dropped read off the weights."""
    ours = attention(case=name, op=scaled_dot_product_attention)
    inputs = [x.clamp(-2, 2) for x in operands(20)]
    torch.manual_seed(5)
    kept = ours(*inputs[:2], identity(inputs[0])) != 0

    def exact(q, k, v):
        weights = attention(0.0, name)(q, k, identity(q)) * kept / (1 - P)
        return weights @ v.repeat_interleave(2, 1)

    for a, b in zip(step(ours, inputs), step(exact, [x.double() for x in inputs]), strict=True):
        assert_accurate(a, b, slack=10)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("device", DEVICES)
def test_the_share_that_is_dropped(device, p):
    """On a GPU as compiled."""
    fn = attention(p) if device == "cuda" else attention(p, op=scaled_dot_product_attention)
    fn = compiled(fn) if device == "cuda" else fn
    q, k, _ = (torch.randn(x.shape, device=device) for x in operands(200))
    kept = fn(q, k, identity(q)) != 0
    total = kept.numel()
    assert abs((~kept).sum() - p * total) < 5 * math.sqrt(p * (1 - p) * total)
    for dim in range(4):  # along no dimension are neighbours dropped together
        pairs = kept.narrow(dim, 1, kept.shape[dim] - 1) & kept.narrow(dim, 0, kept.shape[dim] - 1)
        assert abs(pairs.double().mean() - (1 - p) ** 2) < 0.02


def test_all_is_dropped_at_one_and_nothing_else_is_a_probability():
    output, *gradients = step(attention(1.0, op=scaled_dot_product_attention), operands(3))
    assert not bits(output.abs()).any() and not any(gradient.any() for gradient in gradients)
    for p in (1.5, -0.1):
        with pytest.raises(RuntimeError, match="dropout probability has to be between 0 and 1"):
            attention(p, op=scaled_dot_product_attention)(*operands(3))


def on(device, **arguments):
    marks = pytest.mark.gpu if device == "cuda" else ()
    return pytest.param(
        device, arguments, marks=marks, id=f"{device} {' '.join(map(str, arguments.values()))}"
    )


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("device", "how"),
    [
        on("cpu", case="bool mask", dtype=torch.float32),
        *(on("cuda", case=c, dtype=d) for c in CASES for d in (torch.bfloat16, torch.float32, torch.float64)),
    ],
)
def test_outputs_and_input_gradients_do_not_follow_the_batch(device, how):
    inputs = operands(max(BATCHES), how["dtype"], device)
    fn = over_batches(attention(case=how["case"]), fullgraph=True)
    whole = step(fn, inputs)
    for rows in BATCHES[1:-1]:
        assert all(map(same_bits, step(fn, inputs, rows), (x[:rows] for x in whole))), rows
    torch.manual_seed(5)
    with torch.no_grad():  # a static graph, and one for inference
        alone = compiled(attention(case=how["case"]), dynamic=False)(*(x[:1] for x in inputs))
    assert same_bits(alone, whole[0][:1])
    assert any(entry.form.startswith("Drawn(") for entry in bi_inductor.certificates()[-1].entries)


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_what_a_user_would_write(device):
    def written_out(q, k, v):
        scores = (q @ k.repeat_interleave(2, 1).transpose(-2, -1)) * (1 / math.sqrt(WIDTH))
        return F.dropout(scores.softmax(-1), P) @ v.repeat_interleave(2, 1)

    inputs, outputs = operands(3, torch.float64, device), []
    for fn in (attention(), written_out):
        torch.manual_seed(5)
        outputs.append(compiled(fn)(*inputs))
    assert same_bits(*outputs)


@pytest.mark.gpu
def test_checkpoints_and_inference_draw_the_same():
    inputs = operands(7, device="cuda")
    expected = step(compiled(attention()), inputs)
    again = compiled(lambda *x: checkpoint(attention(), *x, use_reentrant=False))
    assert all(map(same_bits, step(again, inputs), expected))
    torch.manual_seed(5)
    with torch.no_grad():
        assert same_bits(compiled(attention())(*inputs), expected[0])


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_multihead_attention_in_training(device):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, HEADS, dropout=P, batch_first=True).to(device).train()
    x = random_rows(64, QUERIES, 16, device=device)
    call = over_batches(lambda x: module(x, x, x)[0])
    whole = step(call, [x])
    for rows in (2, 7, 31):
        assert all(map(same_bits, step(call, [x], rows), (x[:rows] for x in whole))), rows
    assert not same_bits(whole[0], call(x.clone().requires_grad_()).detach())  # another draw


def generated(fn, *inputs):
    """A training step's code for a GPU, as the verifier has passed it."""
    made = bi_inductor.inspect(fn, *(x.requires_grad_() for x in inputs), target="sm_90", backward=True)
    assert [graph.is_backward for graph in made.graphs] == [False, True]
    return made


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in CASES), ("causal", torch.bfloat16)], ids=str
)
def test_one_code_for_every_batch(name, dtype):
    made = [generated(attention(case=name), *operands(batch, dtype)) for batch in (1, 7)]
    assert len({one.fingerprint for one in made}) == 1
    assert any(entry.form.startswith("Drawn(") for entry in made[0].verdicts)


def test_without_dropout_it_is_the_kernel_of_attention():
    made = [bi_inductor.inspect(attention(p), *operands(3), target="sm_90") for p in (0.0, P)]
    assert [any(e.form.startswith("Attention(") for e in one.verdicts) for one in made] == [True, False]


@pytest.mark.lengthy
def test_a_bert_layer_in_training():
    """Dropout inside and outside attention, and the gradient of its input."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    layer = BertLayer(BertConfig(**sizes, attn_implementation="sdpa")).train().requires_grad_(False)
    made = [generated(layer, torch.randn(batch, 9, 32)) for batch in (1, 7)]
    assert len({one.fingerprint for one in made}) == 1
    assert sum(entry.form.startswith("Drawn(") for entry in made[0].verdicts) == 3
