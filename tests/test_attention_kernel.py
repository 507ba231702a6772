"""The GPU's attention kernels without a GPU: their form, their source, the oracle's bits in the interpreter."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate

from bi_inductor import contract, inspect, oracle, verifier
from bi_inductor.attention_op import OVERLOAD, attention
from bi_inductor.codegen import triton
from bi_inductor.errors import BatchInvarianceError
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.offline import compile_offline
from bi_inductor.templates import triton_attention
from bi_inductor.testing import same_bits

causal = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
full = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)


def masked(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def operands(batch, heads, key_heads, queries, keys, head_dim, value_dim=None, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (heads, queries, head_dim),
        (key_heads, keys, head_dim),
        (key_heads, keys, value_dim or head_dim),
    )
    return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]


def kernels(fn, *inputs, **options):
    (graph,) = inspect(fn, *inputs, **options).graphs
    return graph


class Numpy:
    """The interpreter's ``exp2``."""

    exp2 = staticmethod(lambda x: torch.from_numpy(numpy.exp2(x.numpy())))


@pytest.fixture
def short_chunks(monkeypatch):
    """The form with tiles and chunks so short that a few dozen keys have all kinds of borders."""
    stock = contract.attention_form

    def form(*arguments, **options):
        return dataclasses.replace(
            stock(*arguments, **options), tile=16, near_chunk=32, near_keys=64, far_chunk=64
        )

    monkeypatch.setattr(contract, "attention_form", form)
    return form


# ---------------------------------------------------------------- the form


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunks_are_whole_tiles(dtype):
    for width in range(1, 257 if dtype == torch.float32 else 577):
        form = contract.attention_form(width, 128, dtype)
        first, rest = triton_attention.pieces(width)
        assert first + rest >= width and first + rest <= max(16, 1 << (width - 1).bit_length())
        assert form.near_chunk % form.tile == form.far_chunk % form.tile == 0
        assert form.near_keys % form.near_chunk == 0
        assert form.free_symbols == set()


def test_what_has_no_form():
    assert contract.attention_form(64, 64, torch.float64) is None
    assert contract.attention_form(257, 64, torch.float32) is None
    assert contract.attention_form(577, 512, torch.bfloat16) is None
    assert contract.attention_form(576, 576, torch.bfloat16) is None
    assert contract.attention_gradient_form(576, 512, torch.bfloat16) is None


def test_tf32_is_another_form():
    forms = {str(contract.attention_form(64, 64, torch.float32, tf32=tf32)) for tf32 in (False, True)}
    assert len(forms) == 2
    assert contract.attention_form(64, 64, torch.bfloat16, tf32=True).accumulator == "float32"


def test_one_fingerprint_for_every_batch_query_length_and_key_length():
    shapes = [(1, 1, 7), (2, 1, 9000), (3, 70, 70), (7, 1000, 3000)]
    graphs = [kernels(full, *operands(b, 4, 2, q, k, 64)) for b, q, k in shapes]
    assert len({graph.certificate.fingerprint for graph in graphs}) == 1
    assert all("Attention(float32, 64, 512, 8192, 1024)" in str(graph.certificate) for graph in graphs)


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=str)
def test_nothing_to_attend_to(sizes):
    batch, queries, keys = sizes
    inputs = operands(batch, 4, 2, queries, keys, 16)
    assert not kernels(full, *inputs).certificate.counts.get("REFUSED")
    assert same_bits(run_in_interpreter(full, *inputs), full(*inputs))


# ---------------------------------------------------------------- the kernels' sums


@pytest.mark.parametrize(("head_dim", "value_dim", "keys"), [(24, 20, 150), (576, 512, 70)])
def test_the_oracles_bits(short_chunks, head_dim, value_dim, keys):
    """Of MLA's latent heads, too, which are held in two pieces."""
    inputs = operands(1, 2, 1, 40, keys, head_dim, value_dim)
    result = run_in_interpreter(full, *inputs)
    assert_accurate(result, full(*(x.double() for x in inputs)))
    query, key, value = inputs
    form = short_chunks(head_dim, value_dim, torch.bfloat16)
    for head in range(2):
        expected = oracle.attention(
            query[0, head], key[0, 0], value[0, 0], form, scale=1 / math.sqrt(head_dim), elementwise=Numpy
        )
        assert same_bits(result[0, head], expected)


def test_decoding_latent_heads_gives_the_bits_of_prefill(short_chunks):
    """Values are the first elements of the keys, as in MLA's cache."""
    query, cache, _ = operands(1, 2, 1, 40, 40, 576)
    prefill = run_in_interpreter(causal, query, cache, cache[..., :512])
    row = run_in_interpreter(full, query[:, :, -1:], cache, cache[..., :512])
    assert same_bits(row, prefill[:, :, -1:])
    sees_one_key = prefill[:, :, :1]
    assert same_bits(sees_one_key, cache[:, :, :1, :512].expand_as(sees_one_key))


@pytest.mark.lengthy
def test_decoding_gives_the_oracles_bits_of_prefill(short_chunks):
    """Causal prefill in tiles of 64 rows; decoding with chunks side by side."""
    query, key, value = operands(1, 2, 1, 100, 100, 16)
    visible = torch.ones(100, 100, dtype=torch.bool).tril()
    prefill = run_in_interpreter(causal, query, key, value)
    form = short_chunks(16, 16, torch.bfloat16)
    expected = oracle.attention(
        query[0, 1], key[0, 0], value[0, 0], form, scale=0.25, mask=visible, elementwise=Numpy
    )
    assert same_bits(prefill[0, 1], expected)
    for t in (0, 31, 32, 99):
        row = run_in_interpreter(full, query[:, :, t : t + 1], key[:, :, : t + 1], value[:, :, : t + 1])
        assert same_bits(row, prefill[:, :, t : t + 1]), t


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_and_rows_without_a_key(short_chunks, kind):
    inputs = operands(2, 2, 1, 9, 70, 16)
    mask = torch.rand(2, 1, 9, 70, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[0, 0, 3] = False
    if kind == "float":
        mask = torch.randn(9, 70).masked_fill(~mask, -math.inf)
    result = run_in_interpreter(masked, *inputs, mask)
    wide = mask.double() if kind == "float" else mask
    assert_accurate(result, masked(*(x.double() for x in inputs), wide))
    assert not result[0, :, 3].any() and not result.isnan().any()


# ---------------------------------------------------------------- source and cubins


def test_few_rows_compute_chunks_side_by_side_and_many_in_sequence():
    decode = kernels(full, *operands(1, 32, 8, 1, 4096, 128), dynamic=True).source
    prefill = kernels(causal, *operands(1, 64, 32, 200, 2000, 128)).source
    assert "attention.one_chunk(" in decode and "attention.fold_chunks(" in decode
    assert "attention.all_chunks(" in prefill and "one_chunk" not in prefill


@pytest.mark.parametrize(("head_dim", "queries"), [(48, 2000), (64, 2000), (128, 2000), (128, 1 << 17)])
def test_many_queries_have_warps_of_two_kinds_on_hopper_without_stack(head_dim, queries):
    """What their products start from is read as in every other kernel."""
    shape = (1, 64, queries, head_dim)
    inputs = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    found = kernels(causal, *inputs)
    assert "attention_specialised.attend(" in found.source and len(found.kernels) == 1
    (kernel,) = compile_offline(found.kernels)
    assert not kernel.spills and kernel.num_warps == 12


@pytest.mark.lengthy
def test_others_have_warps_of_one_kind():
    q, k, v = operands(1, 64, 32, 300, 300, 64)
    long = torch.empty((1, 64, 1 << 19, 128), dtype=torch.bfloat16, device="meta")  # addresses are int64
    unaligned = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    for found in (
        kernels(causal, q, k, v, target="sm_80"),
        kernels(causal, *(x.float() for x in (q, k, v))),
        kernels(full, q, k, v, attn_mask=torch.ones(300, 300, dtype=torch.bool)),
        kernels(causal, *unaligned),
        kernels(causal, long, torch.empty_like(long), torch.empty_like(long)),
    ):
        assert "attention.all_chunks(" in found.source and "attend(" not in found.source


@pytest.mark.lengthy
def test_warps_of_two_kinds_in_training_where_all_sizes_are_symbols():
    """The width of a head is one of them until a kernel asks."""

    def layer(x, weight):
        q, k, v = (x @ weight).view(2, -1, 12, 128).split([8, 2, 2], 2)
        return causal(*(each.transpose(1, 2) for each in (q, k, v))).relu()

    x = torch.randn(2, 600, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(64, 1536, dtype=torch.bfloat16, requires_grad=True)
    found = inspect(layer, x, weight, dynamic=True, backward=True).kernels.values()
    assert sum("attention_specialised.attend(" in text for text in found) == 1


def test_wrong_sums_of_warps_of_two_kinds_are_refused(monkeypatch, tmp_path):
    """A sum that starts from ones in the place of zeros is found in what Triton's passes left of the kernel."""
    source = (Path(triton_attention.__file__).parents[1] / "runtime" / "attention_specialised.py").read_text()
    assert source.count("no_acc = gl.zeros(") == 1
    (kernel,) = kernels(causal, *operands(1, 64, 32, 300, 300, 64)).kernels.values()
    path = tmp_path / "wrong_attention.py"
    path.write_text(
        source.replace(
            "no_acc = gl.zeros([GROUP_ROWS, BLOCK_DV], ", "no_acc = gl.full([GROUP_ROWS, BLOCK_DV], 1.0, "
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    changed = kernel.replace(
        "from bi_inductor.runtime import attention_specialised",
        "import wrong_attention as attention_specialised",
    )
    with pytest.raises(BatchInvarianceError, match="accumulator starts as arith"):
        compile_offline({"triton_tem_fused_attention_0": changed})


def test_query_length_that_is_only_known_at_run_time_splits_where_there_are_few():
    """Of many queries no chunk is stored, whose states would grow with them: one graph, whichever came first."""
    first, second = (kernels(full, *operands(2, 4, 2, q, 4096, 64), dynamic=True) for q in (3, 300))
    assert list(first.kernels.values()) == list(second.kernels.values()) and len(first.kernels) == 4
    cores = (
        "attention.all_chunks",
        "attention_specialised.attend",
        "attention.one_chunk",
        "attention.fold_chunks",
    )
    assert all(f"{core}(" in first.source for core in cores)
    launches = re.findall(r"tem_fused_attention_\d\.run\(.*, s\d+, (.*), 1, stream", first.source)
    queries = re.search(r"assert_size_stride.*\(2, 4, (s\d+), 64", first.source)[1]
    for count, expected in ((16, [0, 0, 4 * 8, 16 * 8]), (17, [4, 0, 0, 0]), (256, [0, 16, 0, 0])):
        sizes = {queries: count, "min": min, "max": max}
        other = rf"\bs(?!{queries[1:]}\b)\d+\b"  # the number of keys
        programs = [eval(re.sub(other, "4096", text), {}, sizes) for text in launches]
        assert [math.prod(each) for each in programs] == expected


@pytest.mark.parametrize("queries", [3, 17])
def test_one_graph_for_few_and_many_queries_has_the_bits_of_others(short_chunks, queries):
    """16 rows of a key head, chunks side by side, and more, in sequence; the same source serves both."""
    inputs = operands(1, 2, 1, queries, 100, 16)
    assert same_bits(run_in_interpreter(full, *inputs, dynamic=True), run_in_interpreter(full, *inputs))


def beside_attention(x):
    """``x`` clamped reads what attention reads and has its size: Inductor computes it in attention's kernel."""
    return F.scaled_dot_product_attention(x, x, x), x.clamp(-2, 1)


def test_nothing_else_is_computed_in_a_kernel_that_may_have_no_program():
    (x, *_) = operands(5, 1, 1, 3, 3, 16)
    attended, clamped = run_in_interpreter(beside_attention, x, dynamic=True)
    assert same_bits(attended, run_in_interpreter(full, x, x, x)) and same_bits(clamped, x.clamp(-2, 1))


def test_where_it_is_some_of_it_is_not_written(monkeypatch):
    """The guard for it switched off."""
    with_guard = kernels(beside_attention, *operands(5, 1, 1, 3, 3, 16)[:1], dynamic=True)
    monkeypatch.setattr(triton, "_may_be_idle", lambda *nodes: False)
    without = kernels(beside_attention, *operands(5, 1, 1, 3, 3, 16)[:1], dynamic=True)
    assert len(without.kernels) == len(with_guard.kernels) - 1
    assert "clamp" in next(iter(without.kernels)) and "clamp" not in next(iter(with_guard.kernels))


def test_it_is_computed_in_one_that_has():
    (graph,) = inspect(beside_attention, *operands(5, 1, 1, 3, 3, 16)[:1]).graphs
    assert "clamp" in next(iter(graph.kernels))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_cubins(target):
    for fn, inputs in (
        (causal, operands(2, 8, 2, 256, 256, 128)),
        (full, operands(1, 8, 2, 1, 4096, 64)),
    ):
        for kernel in compile_offline(inspect(fn, *inputs, target=target), target):
            assert 0 < kernel.registers <= 255 and kernel.stack_bytes <= 512, str(kernel)


@pytest.mark.lengthy
@pytest.mark.parametrize(("target", "shared"), [("sm_80", 163 << 10), ("sm_90", 227 << 10)])
def test_latent_heads_fit(target, shared):
    for fn, queries in ((causal, 300), (full, 1)):
        inputs = operands(1, 128, 1, queries, 4096, 576, 512)
        for kernel in compile_offline(inspect(fn, *inputs, target=target), target):
            assert kernel.shared_bytes <= shared and kernel.stack_bytes <= 256, str(kernel)


@pytest.fixture(scope="module")
def emitted():
    made = {
        "prefill": kernels(causal, *operands(2, 8, 2, 250, 250, 128), dynamic=True),
        "decode": kernels(full, *operands(2, 8, 2, 1, 4096, 96)),
        "mask": kernels(masked, *operands(2, 8, 2, 40, 300, 64), torch.rand(2, 1, 40, 300) > 0.5),
    }
    return {name: (graph.source, graph.certificate) for name, graph in made.items()}


@pytest.mark.parametrize("name", ["prefill", "decode", "mask"])
def test_emitted_code_is_clean(emitted, name):
    assert verifier.verify(*emitted[name]) == ()


CORRUPTIONS = {
    "another tile": ("prefill", r"BLOCK_N : tl.constexpr = 64", "BLOCK_N : tl.constexpr = 32"),
    "another chunk": ("decode", r"NEAR_CHUNK : tl.constexpr = 512", "NEAR_CHUNK : tl.constexpr = 256"),
    "other precision": ("prefill", r"'ieee'\n", "'tf32'\n"),
    "keys beyond the mask": ("prefill", r"last_position \+ 1\)", "last_position + 2)"),
    "not all keys": ("decode", r"end = KEYS", "end = KEYS - 1"),
    "rows that do not exist": ("mask", r"idx_m, exists, tiles, scored\)", "idx_m, inside, tiles, scored)"),
    "full tiles too far": (
        "prefill",
        r"first_position \+ 1\) // BLOCK_N \*",
        "last_position + 1) // BLOCK_N *",
    ),
    "rows of another head": ("prefill", r"key_head \* GROUP \+ rows % GROUP", "key_head * GROUP"),
    "chunks swapped": ("decode", r"chunk_start\(idx_c, ", "chunk_start(idx_c + 1, "),
    "a chunk twice": ("decode", r"low, full, high", "low, full, end"),
    "the state of another row": ("decode", r"SUMS, row, ROWS", "SUMS, 0, ROWS"),
    "sums unfinished": ("prefill", r"attention\.finish\(m, sums, acc\)", "(acc, sums)"),
    "causal by name only": ("prefill", r"CAUSAL : tl.constexpr = True", "CAUSAL : tl.constexpr = False"),
    "keys at an address that was loaded": (
        "decode",
        r"k_base = K \+ idx_b \* \(",
        "k_base = K + idx_b * (triton_helpers.div_floor_integer(tl.load(V), 4) + ",
    ),
    "the map of other queries": ("mask", r"\(first_position // GRANULE,", "(last_position // GRANULE,"),
    "the map of another head": ("mask", r"(tiles_base = .*) \+ key_head \*", r"\1 + idx_b *"),
    "another function": ("decode", r"attention\.one_chunk\(", "attention.all_chunks("),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_found(emitted, name):
    base, old, new = CORRUPTIONS[name]
    source, certificate = emitted[base]
    corrupted = re.sub(old, new, source, count=1)
    assert corrupted != source, "the corruption changes nothing"
    assert "attention" in {finding.rule for finding in verifier.verify(corrupted, certificate)}


# ---------------------------------------------------------------- the op


def test_the_op_and_its_gradients():
    inputs = [x.double().requires_grad_() for x in operands(1, 4, 2, 2, 3, 4, 3, torch.float64)]
    mask = torch.randn(1, 4, 2, 3, dtype=torch.float64).requires_grad_()
    torch.library.opcheck(OVERLOAD, (*inputs, None, True, 0.3, None, "", "", []))
    torch.autograd.gradcheck(lambda *x: attention(*x, False, 0.3), (*inputs, mask), eps=1e-6, atol=1e-7)
    torch.autograd.gradcheck(lambda *x: attention(*x, None, True, 0.3), inputs, eps=1e-6, atol=1e-7)


def test_the_op_maps_to_one_op():
    query, key, value = operands(6, 4, 2, 5, 7, 8, dtype=torch.float32)
    split = [x.unflatten(0, (2, 3)) for x in (query, key, value)]
    mapped, _ = torch.vmap(lambda *x: attention(*x, None, True, 0.3))(*split)
    assert same_bits(mapped.flatten(0, 1), attention(query, key, value, None, True, 0.3)[0])


@pytest.mark.parametrize(("dtype", "widths"), [(torch.float32, (16, 16)), (torch.bfloat16, (576, 512))])
def test_the_backward_is_made_of_canonical_ops(dtype, widths):
    inputs = [x.to(dtype).requires_grad_() for x in operands(2, 4, 2, 33, 33, *widths)]
    graphs = inspect(causal, *inputs, backward=True).graphs
    assert len(graphs) == 2
    for graph in graphs:
        assert verifier.verify(graph.source, graph.certificate) == ()
