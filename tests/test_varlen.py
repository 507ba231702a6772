"""Packed sequences: each has the bits of scaled_dot_product_attention alone, wherever it lies, whatever beside it."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from devices import DEVICES, compiled
from torch.nn.attention import varlen
from torch.nn.attention.varlen import AuxRequest, varlen_attn

import bi_inductor
from bi_inductor.testing import same_bits

LENGTHS = (5, 1, 17, 0, 9)
HEADS, KEY_HEADS, WIDTH, PAGE = 4, 2, 16, 4
#: On a CPU, where each takes seconds to compile, two of them.
WINDOWS = {"cpu": ((-1, 0), (3, 4)), "cuda": ((-1, -1), (-1, 0), (3, 0), (2, 4))}
HAS_PAGES = hasattr(varlen, "varlen_attn_out")


def borders(lengths, device="cpu"):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)


def documents(lengths, heads, seed, device="cpu"):
    """[length, heads, WIDTH] for each, the same whichever others there are."""
    generators = [torch.Generator().manual_seed(seed + 7 * n) for n in lengths]
    return [
        torch.randn(n, heads, WIDTH, generator=g).to(device) for n, g in zip(lengths, generators, strict=True)
    ]


def visible(queries, keys, window, device):
    """[queries, keys]: the last query stands at the last key."""
    place = torch.arange(queries, device=device)[:, None] + keys - queries
    key, (left, right) = torch.arange(keys, device=device), window
    return (key >= place - (left if left >= 0 else keys)) & (key <= place + (right if right >= 0 else keys))


def alone(query, key, value, *masks):
    """One document, [length, heads, D], under each mask."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    attend = F.scaled_dot_product_attention
    return [attend(query, key, value, attn_mask=m, enable_gqa=True)[0].transpose(0, 1) for m in masks]


def masks_of(queries, keys, device):
    return [visible(queries, keys, window, device) for window in WINDOWS[device]]


def in_every_window(query, key, value, cu, longest):
    windows = WINDOWS[query.device.type]
    return [
        varlen_attn(query, key, value, cu, cu, longest, longest, window_size=window) for window in windows
    ]


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_a_document_has_the_bits_it_has_alone(device):
    torch._dynamo.reset()
    run, by_itself = compiled(in_every_window, dynamic=True), compiled(alone, dynamic=True)
    texts = dict(
        zip(LENGTHS, zip(*(documents(LENGTHS, HEADS, i, device) for i in range(3)), strict=True), strict=True)
    )
    expected = {n: by_itself(*texts[n], *masks_of(n, n, device)) for n in LENGTHS if n}
    packs = [LENGTHS, LENGTHS[::-1], (17,), (9, 17), (0, 5, 1, 0, 0)]
    for lengths, longest in [(pack, max(pack)) for pack in packs] + [(LENGTHS, 40), (LENGTHS, 33)]:
        pack = [torch.cat(x) for x in zip(*(texts[n] for n in lengths), strict=True)]
        for number, result in enumerate(run(*pack, borders(lengths, device), longest)):
            for length, rows in zip(lengths, result.split(lengths), strict=True):
                assert length == 0 or same_bits(rows, expected[length][number])


@pytest.mark.lengthy
def test_the_values_are_those_of_a_softmax():
    """Of rows that no document has, zeros."""
    query, key, value = (torch.cat(documents((7, 3, 2), HEADS, i)) for i in range(3))
    cu, reference = borders((7, 3)), [x.double() for x in (query, key, value)]
    run = compiled(lambda *x: varlen_attn(*x, 7, 7, scale=0.4, return_aux=AuxRequest(lse=True)))
    output, logsumexp = run(query, key, value, cu, cu)
    for a, b in ((0, 7), (7, 10)):
        scores = torch.einsum("qhd,khd->hqk", *(x[a:b] for x in reference[:2])) * 0.4
        assert_accurate(output[a:b], torch.einsum("hqk,khd->qhd", scores.softmax(-1), reference[2][a:b]))
        assert_accurate(logsumexp[:, a:b], scores.logsumexp(-1))
    assert not output[10:].any()


@pytest.mark.lengthy
def test_input_gradients_are_those_of_documents_alone():
    def gradients(fn, *inputs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = fn(*leaves)
        (output * torch.linspace(-1, 2, WIDTH)).sum().backward()
        return [x.grad for x in leaves]

    torch._dynamo.reset()
    lengths = (5, 11)
    texts = [documents(lengths, HEADS, i) for i in range(3)]
    cu = borders(lengths)
    run = compiled(lambda *x: varlen_attn(*x, cu, cu, 11, 11, window_size=(-1, 0)), dynamic=True)
    whole = gradients(run, *map(torch.cat, texts))
    by_itself = compiled(lambda *x: alone(*x, visible(len(x[0]), len(x[1]), (-1, 0), "cpu"))[0], dynamic=True)
    for number, (a, b) in enumerate(((0, 5), (5, 16))):
        own = gradients(by_itself, *(x[number] for x in texts))
        assert all(same_bits(x[a:b], y) for x, y in zip(whole, own, strict=True))


def paged(texts, slots, device):
    """Pages in which the documents lie scattered, and their table: [pages, PAGE, heads, D], [N, most]."""
    most = max(-(-len(x) // PAGE) for x in texts) + 1
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(1))
    table = order[: len(texts) * most].view(len(texts), most)
    pages = torch.full((slots, PAGE, *texts[0].shape[1:]), torch.nan, device=device)
    for row, text in zip(table, texts, strict=True):
        for number, part in enumerate(text.split(PAGE)):
            pages[row[number], : len(part)] = part
    return pages, table.int().to(device)


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_chunks_of_queries_over_a_cache(device):
    """The last part of a document as the queries. Keys in a pack and, since torch 2.13, by fewer heads in slots longer
    than they are and in pages, past their end whatever memory holds."""
    torch._dynamo.reset()
    queries, keys, window = (3, 1, 4), (9, 17, 4), (-1, 0)
    key_heads = KEY_HEADS if HAS_PAGES else HEADS
    texts = [
        documents(n, h, i, device) for i, (n, h) in enumerate([(queries, HEADS)] + [(keys, key_heads)] * 2)
    ]
    used, cu, cu_k = (
        torch.tensor(keys, dtype=torch.int32, device=device),
        borders(queries, device),
        borders(keys, device),
    )
    slots = [
        torch.cat([F.pad(x, (0, 0, 0, 0, 0, 20 - len(x)), value=torch.nan) for x in texts[i]]) for i in (1, 2)
    ]
    (key_pages, table), (value_pages, _) = (paged(texts[i], 40, device) for i in (1, 2))
    how = {"window_size": window, **({"enable_gqa": True} if HAS_PAGES else {})}

    def run(query, packs, slots, pages):
        if not HAS_PAGES:
            return (varlen_attn(query, *packs, cu, cu_k, 4, 17, **how),)
        out = torch.empty_like(query)
        varlen.varlen_attn_out(out, query, *packs, cu, cu_k, 4, 17, **how)
        return (
            out,
            varlen_attn(query, *packs, cu, cu_k, 4, 17, num_splits=1, **how),
            varlen_attn(query, *slots, cu, borders((20,) * 3, device), 4, 20, seqused_k=used, **how),
            varlen_attn(query, *pages, cu, None, 4, 25, seqused_k=used, block_table=table, **how),
        )

    results = compiled(run)(
        torch.cat(texts[0]), [torch.cat(x) for x in texts[1:]], slots, [key_pages, value_pages]
    )
    by_itself = compiled(alone, dynamic=True)
    for number, (n, m) in enumerate(zip(queries, keys, strict=True)):
        (expected,) = by_itself(*(x[number] for x in texts), visible(n, m, window, device))
        assert all(same_bits(result.split(queries)[number], expected) for result in results)


def test_on_a_gpu_it_is_one_kernel_that_needs_no_mask_where_causal():
    x = torch.empty(64, HEADS, 64, dtype=torch.bfloat16)

    def train(q, k, v, cu):
        return varlen_attn(q, k, v, cu, cu, 32, 32, window_size=(-1, 0))

    graph = bi_inductor.inspect(train, x, x.clone(), x.clone(), borders((32, 32)), target="sm_90").graphs[0]
    (kernel,) = [text for text in graph.kernels.values() if "attention.all_chunks(" in text]
    assert "CAUSAL : tl.constexpr = True" in kernel and "MASK : tl.constexpr = 0" in kernel
    assert any(entry.form.startswith("Attention(") for entry in graph.certificate.entries)
    leaves = [x.clone().requires_grad_() for _ in range(3)]
    made = bi_inductor.inspect(train, *leaves, borders((32, 32)), target="sm_90", backward=True, dynamic=True)
    assert len(made.graphs) == 2 and "segment" not in made.source


def test_a_stock_call_is_what_it_replaces():
    """Teeth: without the rewrite the op is a custom one, of which nothing is known."""
    from bi_inductor.passes import canonicalize

    rewrites = tuple(rewrite for rewrite in canonicalize.REWRITES if not rewrite.name.startswith("varlen"))
    x = torch.empty(8, HEADS, 64, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canonicalize, "REWRITES", rewrites)
        with pytest.raises(bi_inductor.BatchInvarianceError, match="_varlen_attn"):
            bi_inductor.inspect(
                lambda x, cu: varlen_attn(x, x, x, cu, cu, 8, 8), x, borders((8,)), target="sm_90"
            )
