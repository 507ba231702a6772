"""Masks that attention's kernels compute: the bits of the same masks in memory, and no trace of them there."""

import re

import pytest
import torch
import torch.nn.functional as F
from devices import compiled
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bi_inductor import inspect, verifier
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.testing import same_bits


def positions(queries, keys, device):
    return torch.arange(queries, device=device)[:, None] + keys - queries, torch.arange(keys, device=device)


def causal(queries, keys, extra):
    i, j = positions(queries, keys, extra.device)
    return i >= j


def window(queries, keys, extra):
    i, j = positions(queries, keys, extra.device)
    return (i >= j) & (i - j < 40)


def documents(queries, keys, extra):
    """``extra [S]``: the document of each position."""
    return (extra[keys - queries :, None] == extra) & causal(queries, keys, extra)


def padded(queries, keys, extra):
    """[B, 1, L, S]: ``extra``'s first two elements are the lengths of two rows of a batch."""
    lengths = extra[:2, None, None, None] * 8 + 20
    return (torch.arange(keys, device=extra.device) < lengths) & causal(queries, keys, extra)


def alibi(queries, keys, extra):
    """[1, H, L, S] in bf16, with a slope for each head."""
    i, j = positions(queries, keys, extra.device)
    slopes = torch.exp2(-torch.arange(1, 5, device=extra.device, dtype=torch.float32))
    return (slopes[:, None, None] * (j - i)).to(torch.bfloat16)


def hidden_by_floats(queries, keys, extra):
    """As transformers writes it."""
    lowest = torch.finfo(torch.bfloat16).min
    return torch.where(documents(queries, keys, extra), 0.0, lowest).to(torch.bfloat16)[None, None]


def everything(queries, keys, extra):
    """Hides nothing; its function returns a constant."""
    return torch.ones(queries, keys, dtype=torch.bool, device=extra.device)


MASKS = {f.__name__: f for f in (everything, causal, window, documents, padded, alibi, hidden_by_floats)}


def operands(queries, keys, head_dim=16, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, queries), (2, keys), (2, keys))
    tensors = [torch.randn(2, *shape, head_dim, generator=generator).bfloat16() for shape in shapes]
    extra = torch.randint(0, 7, (keys,), generator=generator).sort().values
    return [x.to(device) for x in (*tensors, extra)]


def attend(mask_of):
    def fn(query, key, value, extra):
        mask = mask_of(query.shape[2], key.shape[2], extra)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    return fn


def given(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize(
    ("name", "queries"),
    [
        *((name, 40) for name in MASKS),
        *((name, 3) for name in ("documents", "padded", "alibi")),
        ("causal", 1),
    ],
)
def test_the_bits_of_the_mask_in_memory(name, queries):
    """Chunks in sequence, and with few queries side by side; a first token under a mask of one element."""
    *inputs, extra = operands(queries, {1: 1, 3: 600}.get(queries, 150))
    mask = MASKS[name](queries, inputs[1].shape[2], extra)
    found = run_in_interpreter(attend(MASKS[name]), *inputs, extra)
    assert same_bits(found, run_in_interpreter(given, *inputs, mask))


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*((name, False) for name in MASKS), *((name, True) for name in ("documents", "padded"))],
)
def test_no_mask_is_in_memory(name, dynamic):
    """Neither in a forward nor for its gradients, which compute it again."""
    inputs = operands(70, 300)
    leaves = [x.requires_grad_(x.is_floating_point()) for x in inputs]
    graphs = inspect(attend(MASKS[name]), *leaves, backward=True, dynamic=dynamic).graphs
    for graph in graphs:
        assert "arg_MASKS" not in graph.source and "COMPUTED, computed_mask" in graph.source
    assert not re.search(r"return \(.*\b70, 300\)", graphs[0].source)


def test_what_a_mask_reads_comes_before_it_and_changes_after_it():
    """Documents are counted in the graph, and the counter is overwritten when attention has run."""

    def fn(query, key, value, extra):
        counted = extra.ne(3).cumsum(0)
        mask = (counted[:, None] >= counted) & (extra[:, None] >= extra)
        out = given(query, key, value, mask)
        extra.copy_(extra * 0 + 9)
        return out

    *inputs, extra = operands(150, 150)
    counted = extra.ne(3).cumsum(0)
    mask = (counted[:, None] >= counted) & (extra[:, None] >= extra)
    (graph,) = inspect(fn, *inputs, extra).graphs
    assert "COMPUTED, computed_mask" in graph.source
    assert same_bits(run_in_interpreter(fn, *inputs, extra), run_in_interpreter(given, *inputs, mask))


def test_a_mask_that_reads_more_than_it_has_is_in_memory():
    def fn(query, key, value, a, b):
        return given(query, key, value, a & b)

    masks = [torch.ones(2, 1, 70, 300, dtype=torch.bool) for _ in range(2)]
    (graph,) = inspect(fn, *operands(70, 300)[:3], *masks).graphs
    assert "arg_MASKS" in graph.source and "COMPUTED, 0, SCALE_FIRST" in graph.source


def test_what_a_mask_draws_is_drawn_once():
    def fn(query, key, value):
        return given(query, key, value, torch.rand(70, 300, device=query.device) < 0.5)

    (graph,) = inspect(fn, *operands(70, 300)[:3]).graphs
    function = graph.source.split("def computed_mask(")[1].split("return")[0]
    assert "tl.load(" in function and "draws." not in function


def test_a_mask_of_an_op_with_two_results_is_in_memory():
    def by_exponent(queries, keys, extra):
        i, j = positions(queries, keys, extra.device)
        return torch.frexp(i.float() + j)[1] < 8

    *inputs, extra = operands(70, 100)
    (graph,) = inspect(attend(by_exponent), *inputs, extra).graphs
    assert "arg_MASKS" in graph.source and "COMPUTED, 0, SCALE_FIRST" in graph.source


def test_layers_share_a_mask_and_its_map():
    """Each layer writes it again; a graph for inference would have it once for each."""

    def layers(query, key, value, extra):
        for _ in range(3):
            query = attend(documents)(query, key, value, extra)
        return query

    (graph,) = inspect(layers, *operands(70, 70)).graphs
    assert (
        graph.source.count("attention_map.bounded_rows(") == 1
        and graph.source.count("attention.all_chunks(") >= 1
    )
    assert len(re.findall(r"attention_map\w*\.run\(", graph.source)) == 1


def test_other_masks_have_maps_of_their_own():
    def layers(query, key, value, extra):
        return attend(documents)(attend(causal)(query, key, value, extra), key, value, extra)

    (graph,) = inspect(layers, *operands(70, 70)).graphs
    assert len(re.findall(r"attention_map\w*\.run\(", graph.source)) == 2


def test_one_fingerprint_for_every_batch():
    prints = set()
    for batch in (1, 2):
        inputs = [x[:batch] if x.dim() == 4 else x for x in operands(70, 300)]
        (graph,) = inspect(attend(documents), *inputs).graphs
        prints.add(graph.certificate.fingerprint)
    assert len(prints) == 1


@pytest.fixture(scope="module")
def emitted():
    (graph,) = inspect(attend(documents), *operands(70, 300)).graphs
    return graph.source, graph.certificate


def test_emitted_code_is_clean(emitted):
    assert verifier.verify(*emitted) == ()


CORRUPTIONS = {
    "another element's mask": (r"tmp\d+ = \(idx_n\)\n", "tmp4 = tl.sum(idx_n)\n"),
    "the number of a program": (r"tmp\d+ = \(idx_n\)\n", "tmp4 = tl.program_id(0)\n"),
    "an index of the kernel's": (r"(tmp\d+) = \(idx_n\)\n", r"\1 = (idx_n)\n    idx_m = \1\n"),
    "a loop": (r"(    tmp\d+ = \(idx_n\)\n)", r"    for i in range(2):\n    \1"),
    "a branch": (r"(    tmp\d+ = \(idx_n\)\n)", r"    if idx_b == 0:\n    \1"),
    "a store": (r"(    tmp\d+ = \(idx_n\)\n)", r"\1    tl.store(in_ptr4, idx_n)\n"),
    "other operands": (r"def computed_mask\(idx_b, idx_h", "def computed_mask(idx_h, idx_b"),
    "another decorator": (r"@triton.jit\ndef computed_mask", "@tl.jit\ndef computed_mask"),
    "another function": (r"def computed_mask", "def another_mask"),
    "rows that do not exist": (r"tl.minimum\(idx_m, 70 - 1\)", "idx_m"),
    "all queries": (r"attention_map\.lowest_of_rows\((tmp\d+)\)", r"tl.min(\1)"),
    "one bound": (r"(    return tmp\d+), tmp\d+\n", r"\1\n"),
    "bounds of nothing": (r"\(computed_bounds,\)", "(computed_mask,)"),
    "another granule": (r"part \* HEIGHT, granules", "part * HEIGHT + 1, granules"),
    "another batch": (r"mask_base = \(captured, idx_b,", "mask_base = (captured, idx_b * 0,"),
    "by name only": (r"COMPUTED : tl.constexpr = True", "COMPUTED : tl.constexpr = False"),
    "something else that computes": (r"COMPUTED, computed_mask,", "COMPUTED, attention.join,"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_found(emitted, name):
    source, certificate = emitted
    corrupted = re.sub(*CORRUPTIONS[name], source)
    assert corrupted != source, "the corruption changes nothing"
    assert verifier.verify(corrupted, certificate)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASKS)
def test_bits_and_gradients_of_the_mask_in_memory_on_a_gpu(name):
    for queries, keys in ((1, 2000), (300, 2000), (700, 700)):
        *inputs, extra = operands(queries, keys, 64, "cuda")
        mask = MASKS[name](queries, keys, extra)
        leaves = [x.requires_grad_() for x in inputs]
        results = []
        for fn, last in ((attend(MASKS[name]), extra), (given, mask)):
            torch._dynamo.reset()
            out = compiled(fn, dynamic=False)(*leaves, last)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
        assert all(map(same_bits, *results))


@pytest.mark.gpu
def test_rows_of_flex_attention_do_not_see_the_batch():
    """With the mask in the kernels: a row alone, and in batches, forward and gradients."""
    *inputs, extra = operands(300, 300, 64, "cuda")
    inputs = [x.repeat(4, 1, 1, 1) for x in inputs]

    def visible(b, h, i, j):
        return (extra[i] == extra[j]) & (i >= j)

    def fn(query, key, value, block_mask):
        return flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)

    def run(rows):
        leaves = [x[rows].detach().clone().requires_grad_() for x in inputs]
        block_mask = create_block_mask(visible, None, None, 300, 300, device="cuda")
        out = compiled(fn, dynamic=False)(*leaves, block_mask)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    whole = run(slice(0, 8))
    for first, last in ((0, 1), (3, 5), (1, 8)):
        torch._dynamo.reset()
        assert all(same_bits(a, b[first:last]) for a, b in zip(run(slice(first, last)), whole, strict=True))
