"""A Llama on a GPU decodes the bits of its prefill: the whole model, and each piece of a layer over many more rows.

bf16 results hide what the fp32 numbers behind them do: two that differ by one unit in the last place round to
different bf16 numbers once in about 2**16 times. So the pieces run on 19,200 rows, where the model has 600.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.llama import modeling_llama

from bi_inductor.attention_op import attention
from bi_inductor.testing import same_bits

pytestmark = pytest.mark.gpu

TOKENS = 300
BATCH = 64
#: Rows of the batch that decode together: the tiles of M = 2.
TOGETHER = 2


@pytest.fixture(autouse=True)
def no_silent_eager():
    with torch._dynamo.config.patch(recompile_limit=100, fail_on_recompile_limit_hit=True):
        yield


def llama():
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=1000, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).cuda().bfloat16().eval()
    model.set_attn_implementation("sdpa")
    return model


def test_a_llama_decodes_the_bits_of_its_prefill():
    """300 tokens, logits bit for bit, through the library's own cache."""
    model = llama()
    tokens = torch.randint(0, 1000, (2, TOKENS), device="cuda")
    model.forward = torch.compile(model.forward, backend="batchinv", dynamic=True)
    with torch.no_grad():
        prefill = model(input_ids=tokens, use_cache=True).logits
        cache, changed = None, []
        for t in range(TOKENS):
            step = model(input_ids=tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            changed.append(not same_bits(step.logits[:, 0], prefill[:, t]))
    assert not any(changed), [t for t, is_changed in enumerate(changed) if is_changed]


def heads(projected):
    return projected.unflatten(-1, (-1, 64)).transpose(1, 2)


def attend(query, key, value, visible):
    """The output and the fp32 logsumexp, which no rounding hides."""
    key, value = (modeling_llama.repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    visible = visible.expand(-1, query.shape[1], -1, -1)
    return attention(query, key, value, visible, False, 0.125)


def rotated(x, cos, sin):
    return modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0]


class Layer:
    """The pieces of one layer, and what each is given in a prefill of [BATCH, TOKENS] tokens."""

    def __init__(self):
        model = llama().model
        layer = model.layers[0]
        attention = layer.self_attn
        self.positions = torch.arange(TOKENS, device="cuda").expand(BATCH, -1)
        tokens = torch.randint(0, 1000, (BATCH, TOKENS), device="cuda")
        self.visible = (
            torch.ones(TOKENS, TOKENS, dtype=torch.bool, device="cuda").tril().expand(BATCH, 1, -1, -1)
        )
        self.hidden = model.embed_tokens(tokens)
        self.normed = layer.input_layernorm(self.hidden)
        self.cos, self.sin = model.rotary_emb(self.hidden, self.positions)
        self.query, self.key = (
            rotated(heads(project(self.normed)), self.cos, self.sin)
            for project in (attention.q_proj, attention.k_proj)
        )
        self.value = heads(attention.v_proj(self.normed))
        self.attended = attend(self.query, self.key, self.value, self.visible)[0].transpose(1, 2).flatten(2)
        self.pieces = {
            "norm": (layer.input_layernorm, ["hidden"]),
            "projection": (attention.q_proj, ["normed"]),
            "cos and sin": (model.rotary_emb, ["hidden", "positions"]),
            "rotation": (lambda x, cos, sin: rotated(heads(x), cos, sin), ["normed", "cos", "sin"]),
            "projection and rotation": (
                lambda x, cos, sin: rotated(heads(attention.q_proj(x)), cos, sin),
                ["normed", "cos", "sin"],
            ),
            "output projection": (attention.o_proj, ["attended"]),
            "output projection and residual": (lambda x, y: x + attention.o_proj(y), ["hidden", "attended"]),
            "gate": (lambda x: F.silu(layer.mlp.gate_proj(x)), ["normed"]),
            "feed forward": (
                lambda x: x + layer.mlp(layer.post_attention_layernorm(x)),
                ["hidden"],
            ),
        }


@functools.cache
def the_layer():
    with torch.no_grad():
        return Layer()


def compiled(piece):
    return torch.compile(piece, backend="batchinv", dynamic=True)


def listed(result):
    return list(result) if isinstance(result, (tuple, list)) else [result]


def decoded(step):
    """The results of ``step(rows, t)``: for every TOGETHER rows, for every token, a list."""
    batches = [slice(first, first + TOGETHER) for first in range(0, BATCH, TOGETHER)]
    return [[listed(step(rows, t)) for t in range(TOKENS)] for rows in batches]


def assert_decoded(steps, whole, token_dim):
    for number, expected in enumerate(listed(whole)):
        parts = [torch.cat([step[number] for step in tokens], token_dim) for tokens in steps]
        result = torch.cat(parts)
        changed = (result.view(-1) != expected.reshape(-1)).sum().item()
        assert same_bits(result, expected.contiguous()), (
            f"result {number}: {changed} of {result.numel()} differ"
        )


@pytest.mark.parametrize("name", [
    "norm", "projection", "cos and sin", "rotation", "projection and rotation", "output projection",
    "output projection and residual", "gate", "feed forward",
])  # fmt: skip
def test_a_piece_of_a_layer_decodes_the_bits_of_its_prefill(name):
    layer = the_layer()
    piece, operands = layer.pieces[name]
    fn = compiled(piece)
    inputs = [getattr(layer, operand) for operand in operands]
    token_dim = 2 if "rotation" in name else 1
    with torch.no_grad():
        steps = decoded(lambda rows, t: fn(*(x[rows, t : t + 1] for x in inputs)))
        assert_decoded(steps, fn(*inputs), token_dim)


@pytest.mark.parametrize("rotation", [True, False])
def test_attention_of_a_layer_decodes_the_bits_of_its_prefill(rotation):
    layer = the_layer()
    fn = compiled(attend)
    query, key = layer.query, layer.key
    if not rotation:
        query, key = torch.randn_like(query), torch.randn_like(key)

    def step(rows, t):
        keys = slice(0, t + 1)
        mask = layer.visible[rows, :, t : t + 1, keys]
        return fn(query[rows, :, t : t + 1], key[rows, :, keys], layer.value[rows, :, keys], mask)

    with torch.no_grad():
        assert_decoded(decoded(step), fn(query, key, layer.value, layer.visible), 2)
