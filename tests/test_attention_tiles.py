"""The map of a mask's tiles: what it says, that kernels follow it, and that it changes no bit."""

import math
import random
import re

import attention_gradients
import pytest
import torch
import torch.nn.functional as F
from devices import compiled

from bi_inductor import certify, inspect
from bi_inductor.attention_backward_op import attention_backward
from bi_inductor.attention_op import attention
from bi_inductor.attention_tiles import GRANULE, WORD, attention_map, query_spans
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.ir.lowering import Lowering
from bi_inductor.testing import same_bits
from bi_inductor.ttgir import wrong_sums
from bi_inductor.virtual import virtual_gpu


def band(queries, keys, width=15, shift=20):
    """[L, S]: a window that moves, so that most tiles are hidden; no query sees the last keys."""
    return (torch.arange(keys) - torch.arange(queries)[:, None] - shift).abs() < width


def operands(queries, keys, heads=2, key_heads=1, head_dim=16, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, queries), (key_heads, keys), (key_heads, keys))
    return [torch.randn(2, *shape, head_dim, generator=generator).bfloat16().to(device) for shape in shapes]


def mapped(query, key, value, mask, tiles):
    return attention(query, key, value, mask, False, 0.25, tiles)


def unmapped(query, key, value, mask):
    return attention(query, key, value, mask, False, 0.25)


@pytest.mark.parametrize("heads", [1, 4])
def test_what_the_map_says(heads):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, heads, 37, 700, generator=generator) < 0.01
    mask[:, :, :16, 64:100] = True
    mask[1, -1, 16:] = False
    groups, tile = (2, 16) if heads == 4 else (1, 16)
    tiles = attention_map(mask, 2, tile)
    spans = query_spans(tiles, 37)
    assert tiles.shape == (2, groups, 3, 6) and spans.shape == (2, groups, 64, 4)
    for b, group in ((b, g) for b in range(2) for g in range(groups)):
        here = mask[b, group * 2 : group * 2 + 2] if heads == 4 else mask[b]
        for granule, key_tile in ((g, t) for g in range(3) for t in range(44)):
            block = here[:, granule * GRANULE :, key_tile * tile :][:, :GRANULE, :tile]
            seen, holes = tiles[b, group, granule, 2 * (key_tile // WORD) :][:2] >> key_tile % WORD & 1
            assert (seen, holes) == (block.any(), not block.all() or block.shape[-1] < tile)
            first, last = tiles[b, group, granule, -2:].tolist()
            assert first <= key_tile < last or not seen
        for key_tile, span in enumerate(spans[b, group]):
            block = here[:, :, key_tile * tile :][:, :, :tile]
            granules = (block.any(0).any(-1).nonzero().flatten() // GRANULE * GRANULE).tolist()
            first, last, whole, until = span.tolist()
            assert [first, last] == ([granules[0], min(granules[-1] + GRANULE, 37)] if granules else [37, 0])
            assert until <= last and block[:, whole:until].all()


def test_spans_of_a_window_are_as_long_as_they_can_be():
    """What only some of the keys see is at both ends."""
    mask = band(208, 208, 40, 0)[None, None]
    for tile, (first, last, whole, until) in enumerate(
        query_spans(attention_map(mask, 1, 16), 208)[0, 0, :13].tolist()
    ):
        block = mask[0, 0, :, tile * 16 :][:, :16].unflatten(0, (-1, GRANULE))
        assert (
            block[whole // GRANULE : until // GRANULE].all()
            and until - whole == int(block.all(-1).all(-1).sum()) * GRANULE
        )
        assert not block[: first // GRANULE].any() and not block[last // GRANULE :].any() and first < last


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("keys", [700, 4096])
def test_the_kernel_of_the_map(heads, keys):
    """It says what the plain ops say, of a mask in memory and of one that it computes."""
    tile, masks = (
        64,
        [torch.rand(1, heads, 37, keys) < 0.01, band(37, keys, 500, 300).expand(1, heads, 37, keys)],
    )
    masks[0][..., 200:600] = True
    for mask in masks:
        found = run_in_interpreter(lambda mask: attention_map(mask, 2, tile), mask)
        assert torch.equal(found, attention_map(mask, 2, tile))

    def computing(places):
        visible = (places - places[:37, None] - 300).abs() < 500
        return attention_map(visible[None, None], 2, tile)

    found = run_in_interpreter(computing, torch.arange(keys))
    assert torch.equal(found, attention_map(masks[1][:, :1], 2, tile))


def places(queries, keys, device):
    return torch.arange(queries, device=device)[:, None] + keys - queries, torch.arange(keys, device=device)


def causal(i, j, extra):
    return i >= j


def window(i, j, extra):
    return (i >= j) & (i - j < 100)


def around(i, j, extra):
    return (i - j).abs() < 70


def not_causal(i, j, extra):
    return ~(i >= j) | (j == i) & (i != 40)


def blocks(i, j, extra):
    return i // 128 >= j // 128


def documents(i, j, extra):
    ascending = extra.sort().values
    return (i >= j) & (ascending[i] == ascending[j])


def shuffled(i, j, extra):
    """Documents whose numbers do not ascend."""
    return (i <= j) & (extra[i] == extra[j])


def pairs_of_blocks(i, j, extra):
    """Read from a table of blocks."""
    return extra[: 6 * 6].reshape(6, 6)[i // 128, j // 128] > 2


def padded(i, j, extra):
    lengths = extra[:2, None, None, None] * 50 + 20
    return (j < lengths) & (i < lengths + 300)


def by_head(i, j, extra):
    return (i >= j) & (i - j < 30 * torch.arange(1, 5, device=extra.device)[:, None, None])


def by_float(i, j, extra):
    return i.float() * 0.5 >= j


def shifted(i, j, extra):
    """Read through a padding, an operation with a function of its own."""
    return (i >= j) & (F.pad(extra[1:], (1, 0)) > 2)


#: Mask -> whether its bounds are those of all its pairs; None: it has none.
BOUNDED = {
    causal: True, window: True, around: True, not_causal: False, blocks: True, documents: True, shuffled: False,
    pairs_of_blocks: None, padded: True, by_head: True, by_float: None,
    shifted: None,
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mask", BOUNDED, ids=lambda mask: mask.__name__)
def test_bounds_are_never_wrong(mask, dynamic):
    """No tile is said to be hidden, or to hide nothing, that does not; most are known exactly."""
    queries, keys = 215, 700
    extra = torch.randint(0, 9, (keys,), generator=torch.Generator().manual_seed(0))

    def fn(extra, like):
        visible = mask(*places(like.shape[0], extra.shape[0], extra.device), extra)
        visible = visible.reshape((1,) * (4 - visible.dim()) + visible.shape)
        return attention_map(visible, 2, 64)

    like = torch.empty(queries)
    found, expected = run_in_interpreter(fn, extra, like, dynamic=dynamic), fn(extra, like)
    (graph,) = inspect(fn, extra, like, dynamic=dynamic).graphs
    assert ("attention_map.bounded_rows(" in graph.source) == (BOUNDED[mask] is not None)
    if BOUNDED[mask] is not False:
        assert torch.equal(found, expected)
    assert not (expected[..., :-2] & ~found[..., :-2]).any()
    assert (found[..., -2] <= expected[..., -2]).all() and (found[..., -1] >= expected[..., -1]).all()
    assert not ((found[..., 0] == 2**11 - 1) & (found[..., 1] == -1)).all(), "something is known"


OF_QUERIES = ["i", "i // 5", "i - 40", "i % 7", "2 * i", "extra[i]", "extra[i // 2]", "extra[0] * 20"]
OF_KEYS = ["j", "j // 64", "j - 17", "j % 33", "extra[j]", "extra[j // 3]", "extra[1] * 20"]
COMPARISONS = [">=", ">", "<=", "<", "==", "!="]


def written(generator, depth):
    """A mask, as text: comparisons of what queries and keys decide, and of sums of both, joined at random."""
    if depth == 0 or generator.random() < 0.3:
        sign = generator.choice(COMPARISONS)
        sides = [generator.choice(OF_QUERIES), generator.choice(OF_KEYS)]
        generator.shuffle(sides)
        return generator.choice([
            f"({sides[0]} {sign} {sides[1]})",
            f"(i {generator.choice('+-')} j {sign} {generator.randrange(-50, 400)})",
            f"((i - j).abs() {sign} {generator.choice(['90', 'extra[2] * 9', 'extra[i]'])})",
        ])  # fmt: skip
    first, second = written(generator, depth - 1), written(generator, depth - 1)
    return generator.choice([f"({first} & {second})", f"({first} | {second})", f"(~{first})"])


@pytest.mark.parametrize("seed", range(8))
def test_bounds_of_random_masks_are_never_wrong(seed):
    generator = random.Random(seed)
    text, (queries, keys) = written(generator, 3), generator.choice([(5, 130), (40, 300), (70, 700)])
    scope = {}
    exec(f"def mask(i, j, extra):\n    return {text}", scope)
    extra = torch.randint(0, 20, (keys,), generator=torch.Generator().manual_seed(seed))
    if seed % 2:
        extra = extra.sort().values

    def fn(extra):
        visible = scope["mask"](
            torch.arange(queries, device=extra.device)[:, None], places(1, keys, extra.device)[1], extra
        )
        return attention_map(visible.expand(1, 1, queries, keys), 1, 64)

    found, expected = run_in_interpreter(fn, extra), fn(extra)
    assert not (expected[..., :-2] & ~found[..., :-2]).any(), text
    assert (found[..., -2] <= expected[..., -2]).all() and (found[..., -1] >= expected[..., -1]).all(), text


@pytest.mark.parametrize("queries", [1, 17], ids=["split", "in sequence"])
def test_the_map_changes_no_bit(queries):
    """Many tiles are hidden, some in whole chunks, and some hide nothing."""
    inputs = [x[:1] for x in operands(queries, 1100)]
    mask = (band(queries, 1100) | band(queries, 1100, 80, 1000))[None, None]
    tiles = attention_map(mask, 1, 64)
    found = run_in_interpreter(mapped, *inputs, mask, tiles)
    assert all(map(same_bits, found, run_in_interpreter(unmapped, *inputs, mask)))


def test_kernels_follow_the_map():
    """Teeth: tiles are left out, and masks not read, because the map says so."""
    inputs = operands(1, 600)
    mask = band(1, 600, 80, 300)[None, None]
    tiles = attention_map(mask, 1, 64)
    found = run_in_interpreter(mapped, *inputs, mask, tiles)
    output, logsumexp = run_in_interpreter(mapped, *inputs, mask, torch.zeros_like(tiles))
    assert not output.any() and (logsumexp == -math.inf).all()
    tiles[..., 1:-2:2] = 0  # no tile hides anything
    assert not same_bits(run_in_interpreter(mapped, *inputs, mask, tiles)[0], found[0])


def test_what_hidden_tiles_hold_is_not_met():
    """No query of a program sees these keys: their values may be anything, and keys may wherever they are hidden."""
    inputs = operands(20, 300)
    mask = band(20, 300)[None, None]
    tiles = attention_map(mask, 1, 64)
    expected = run_in_interpreter(mapped, *inputs, mask, tiles)
    _, key, value = inputs
    hidden = ~mask[0, 0].any(0)
    key[:, :, hidden] = math.nan
    value[:, :, 128:] = math.inf
    assert all(map(same_bits, run_in_interpreter(mapped, *inputs, mask, tiles), expected))


@pytest.mark.parametrize("call", ["all_chunks", "one_chunk", "query_gradients"])
def test_what_is_left_of_a_word_is_carried_by_the_gpus_ir(call):
    """Compilers drop what they think nobody uses; in the interpreter there are none."""
    keys = 2200 if call == "one_chunk" else 500
    query, key, value = operands(100, keys, head_dim=64)
    mask = band(100, keys)[None, None]
    tiles = attention_map(mask, 1, 64)
    spans = query_spans(tiles, 100)
    if call == "query_gradients":
        statistics = torch.zeros(2, 2, 2, 100).unbind()
        (graph,) = inspect(
            lambda *tensors: attention_backward(*tensors[:7], False, 0.25, *tensors[7:]),
            query, query, key, value, mask, *statistics, tiles, spans,
        ).graphs  # fmt: skip
    else:
        (graph,) = inspect(mapped, query, key, value, mask, tiles).graphs
    ((name, text),) = [item for item in graph.kernels.items() if f".{call}(" in item[1]]
    with virtual_gpu("sm_90") as device:
        lowered = Lowering(text, name, device).lowered(0)
    assert not wrong_sums(lowered.ttgir, lowered.ttir)
    dropped = re.sub(r"(scf\.for .* -> \(.*), i64\)", r"\1)", lowered.ttgir)
    assert dropped != lowered.ttgir and "left of a word" in wrong_sums(dropped, lowered.ttir)[0]


@pytest.mark.parametrize("key_heads", [1, 2])
def test_the_map_changes_no_bit_of_gradients(key_heads):
    inputs = attention_gradients.operands(1, 2, key_heads, 100, 200, 16, 16, torch.bfloat16, "bool")
    mask = band(100, 200)[None, None] & (inputs[4] if key_heads == 2 else True)
    inputs[4] = mask
    tiles = attention_map(mask, key_heads, 64)
    spans = query_spans(tiles, mask.shape[2])

    def backward(*tensors):
        return attention_backward(*tensors[:7], False, 0.3, *tensors[7:])

    expected = run_in_interpreter(attention_gradients.fused(False, 0.3), *inputs)
    assert all(map(same_bits, run_in_interpreter(backward, *inputs, tiles, spans), expected))
    of_query, _, _ = run_in_interpreter(backward, *inputs, torch.zeros_like(tiles), torch.zeros_like(spans))
    assert not of_query.any()


def masked(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def test_many_queries_have_a_map_and_it_is_not_in_the_fingerprint():
    def graph(queries):
        (found,) = inspect(masked, *operands(queries, 300), torch.ones(2, 1, queries, 300).bool()).graphs
        return found

    prefill, decode = graph(70), graph(1)
    assert "TILES" in prefill.source and "TILES" not in decode.source
    assert prefill.certificate.fingerprint == decode.certificate.fingerprint


def test_a_map_mixes_no_rows():
    inputs = (*operands(70, 300), torch.ones(2, 1, 70, 300).bool())
    made = certify(masked, *inputs, batch_dim=0)
    assert made.batch.holds and not made.batch.row_mixing


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 40, 1000])
def test_the_map_changes_no_bit_on_a_gpu(queries):
    inputs = operands(queries, 4000, 8, 2, 128, "cuda")
    for heads in (1, 8):
        mask = band(queries, 4000, 300, 900).cuda() | (torch.arange(4000, device="cuda") < 100)
        mask = mask & (
            torch.arange(8, device="cuda")[:heads, None, None] * 130 < torch.arange(4000, device="cuda")
        )
        mask = mask[None].contiguous()
        tiles = attention_map(mask, 2, 64)
        torch._dynamo.reset()
        expected = compiled(unmapped, dynamic=False)(*inputs, mask)
        assert all(map(same_bits, compiled(mapped, dynamic=False)(*inputs, mask, tiles), expected))
        leaves = [x.clone().requires_grad_() for x in inputs]
        gradients = [
            torch.autograd.grad(fn(*leaves, mask, *extra)[0].float().square().sum(), leaves)
            for fn, extra in (
                (compiled(unmapped, dynamic=False), ()),
                (compiled(mapped, dynamic=False), (tiles,)),
            )
        ]
        assert all(map(same_bits, *gradients))
