"""nn.MultiheadAttention and nn.TransformerEncoderLayer: eager's values, one graph for every batch and mode."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from torch import nn
from torch.utils import _pytree as pytree
from tracing import computing_targets, traced

from bi_inductor.passes.canonicalize import canonicalize

LENGTH, KEYS, BATCH, WIDTH, HEADS = 5, 7, 3, 8, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rewritten(module):
    """The module through the rewrites, run eagerly."""
    return torch.compile(module, backend=lambda graph, _: canonicalize(graph), fullgraph=True)


def doubled(tree):
    def double(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return pytree.tree_map(double, tree)


def check(module, *inputs, **arguments):
    """Values and parameters' gradients, where there are any, against eager in fp64."""
    reference = copy.deepcopy(module).double()
    ours = pytree.tree_leaves(rewritten(module)(*inputs, **arguments))
    exact = pytree.tree_leaves(reference(*doubled(inputs), **doubled(arguments)))
    for a, b in zip(ours, exact, strict=True):
        if b is not None:
            assert_accurate(a, b)
    if exact[0].requires_grad:
        ours[0].square().sum().backward()
        exact[0].square().sum().backward()
        for a, b in zip(module.parameters(), reference.parameters(), strict=True):
            assert_accurate(a.grad, b.grad, slack=10)


def query_key_value(batch=BATCH, key_dim=WIDTH, value_dim=WIDTH):
    shapes = ((batch, LENGTH, WIDTH), (batch, KEYS, key_dim), (batch, KEYS, value_dim))
    return [torch.randn(shape) for shape in shapes]


OPTIONS = {
    "plain": {},
    "without bias": {"bias": False},
    "key bias": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 6, "vdim": 10},
}


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
@pytest.mark.parametrize("name", OPTIONS)
def test_cross_attention(name, need_weights):
    options = OPTIONS[name]
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
    inputs = query_key_value(BATCH, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
    check(module, *inputs, need_weights=need_weights)


@pytest.mark.parametrize("average", [False, True], ids=["per head", "averaged"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("masks", ["attention", "per head", "padding", "both", "float"])
def test_masks(masks, name, average):
    options = OPTIONS[name]
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
    inputs = query_key_value(BATCH, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
    hidden = torch.rand(LENGTH, KEYS) > 0.6
    hidden[:, 0] = False
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1, 4:] = True
    arguments = {
        "attention": {"attn_mask": hidden},
        "per head": {"attn_mask": hidden.expand(BATCH * HEADS, -1, -1)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "float": {"attn_mask": torch.randn(LENGTH, KEYS)},
    }[masks]
    check(module, *inputs, average_attn_weights=average, **arguments)


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
def test_self_attention_without_a_batch_dim(need_weights):
    x = torch.randn(LENGTH, WIDTH)
    check(nn.MultiheadAttention(WIDTH, HEADS), x, x, x, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
@pytest.mark.parametrize("name", ["plain", "both"])
def test_causal_hint(name, need_weights):
    """The hint replaces the mask if no weights are wanted, which also hides appended keys: eager's meaning."""
    x = torch.randn(BATCH, LENGTH, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **OPTIONS[name])
    check(module, x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
def test_a_query_without_any_key(need_weights):
    """0 through the functional op, NaN through the explicit softmax that gives the weights."""
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    hidden = torch.zeros(LENGTH, KEYS, dtype=torch.bool)
    hidden[2] = True
    with torch.no_grad():
        check(module, *query_key_value(), attn_mask=hidden, need_weights=need_weights)


def test_returning_the_weights_changes_no_bit_of_the_output():
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    inputs = query_key_value()
    with_weights, _ = rewritten(module)(*inputs, need_weights=True)
    without, _ = rewritten(module)(*inputs, need_weights=False)
    assert torch.equal(with_weights, without)


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True, **options)


ENCODER_OPTIONS = {"relu": {}, "gelu": {"activation": "gelu"}, "norm first": {"norm_first": True}}


@pytest.mark.parametrize("masked", [None, "attention", "padding", "both"])
@pytest.mark.parametrize("name", ENCODER_OPTIONS)
def test_encoder_layer_in_eval_mode(name, masked):
    """Eager runs one fused op here; its values are ours, and so are those of the training path."""
    layer = encoder_layer(**ENCODER_OPTIONS[name]).eval()
    x = torch.randn(BATCH, LENGTH, WIDTH)
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, 3:] = True
    masks = {
        "src_mask": hidden if masked in ("attention", "both") else None,
        "src_key_padding_mask": padding if masked in ("padding", "both") else None,
    }
    with torch.no_grad():
        check(layer, x, **masks)
        fused = rewritten(layer)(x, **masks)
    training = rewritten(layer.train())(x, **masks)
    torch.testing.assert_close(fused, training)


@pytest.mark.lengthy
@pytest.mark.parametrize("name", ENCODER_OPTIONS)
def test_inference_and_training_compute_the_same_ops_at_every_batch(name):
    layer = encoder_layer(**ENCODER_OPTIONS[name])
    graphs = set()
    for batch in (1, 2, 7):
        x = torch.randn(batch, LENGTH, WIDTH)
        graphs.add(tuple(computing_targets(traced(layer.train(), x, backward=False)[0])))
        with torch.no_grad():
            graphs.add(tuple(computing_targets(traced(layer.eval(), x)[0])))
    assert len(graphs) == 1
    assert not any("transformer_encoder" in op or "scaled_dot" in op for op in graphs.pop())


def test_dropout_in_training_only():
    """As in eager, the weights that are returned are those after dropout."""
    module = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.25, batch_first=True)
    inputs = query_key_value(batch=50)
    output, weights = rewritten(module)(*inputs, average_attn_weights=False)
    assert abs((weights == 0).double().mean() - 0.25) < 0.05
    weight, bias = (x.chunk(3)[2] for x in (module.in_proj_weight, module.in_proj_bias))
    v = F.linear(inputs[2], weight, bias)
    heads = weights @ v.unflatten(2, (HEADS, -1)).transpose(1, 2)
    torch.testing.assert_close(output, module.out_proj(heads.transpose(1, 2).flatten(2)))
    torch._dynamo.reset()
    check(module.eval(), *inputs)
