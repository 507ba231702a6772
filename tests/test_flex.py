"""flex_attention: its functions of positions decide, its blocks do not."""

import math

import pytest
import torch
from accuracy import assert_accurate
from devices import compiled
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from bi_inductor import inspect
from bi_inductor.errors import BatchInvarianceError
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.passes import flex
from bi_inductor.testing import same_bits

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def on_gpu(function):
    return pytest.param(function, "cuda", marks=pytest.mark.gpu)


BIAS = torch.linspace(-1, 1, 4)
DOCUMENTS = torch.arange(3).repeat_interleave(torch.tensor([1, 60, 39]))


def soft_cap_and_alibi(score, b, h, q, k):
    return 5 * torch.tanh(score / 5) + BIAS.to(score.device)[h] * (q - k)


def documents(b, h, q, k):
    seen = DOCUMENTS.to(q.device)
    return (seen[q] == seen[k]) & (q >= k)


def window(b, h, q, k):
    return (q - k).abs() < 40


def operands(batch=2, queries=100, keys=100, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, queries), (2, keys), (2, keys))
    return [torch.randn(batch, *shape, 16, generator=generator).to(dtype).to(device) for shape in shapes]


def with_mask(mask_mod, block_size, length=100, device="cpu"):
    blocks = create_block_mask(mask_mod, None, None, length, length, device=device, BLOCK_SIZE=block_size)
    return lambda q, k, v: flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)


def plain(q, k, v):
    return flex_attention(q, k, v, enable_gqa=True)


def scored(q, k, v):
    return flex_attention(q, k, v, score_mod=soft_cap_and_alibi, enable_gqa=True)


@pytest.mark.parametrize(
    ("name", "dynamic"), [("plain", True), ("score_mod", False), ("documents", False), ("both", True)]
)
def test_what_eager_computes(name, dynamic):
    blocks = create_block_mask(documents, None, None, 100, 100, device="cpu", BLOCK_SIZE=32)
    arguments = {
        "score_mod": soft_cap_and_alibi if name in ("score_mod", "both") else None,
        "block_mask": blocks if name in ("documents", "both") else None,
        "return_aux": AuxRequest(lse=True),
    }

    def fn(q, k, v):
        output, aux = flex_attention(q, k, v, enable_gqa=True, **arguments)
        return output, aux.lse

    inputs = operands()
    results, expected = compiled(fn, dynamic=dynamic)(*inputs), fn(*(x.double() for x in inputs))
    for result, exact in zip(results, expected, strict=True):
        assert_accurate(result, exact, slack=4)


def test_rows_without_a_key():
    def hidden(b, h, q, k):
        return q != 3

    blocks = create_block_mask(hidden, None, None, 100, 100, device="cpu")
    fn = compiled(
        lambda q, k, v: flex_attention(q, k, v, block_mask=blocks, enable_gqa=True, return_lse=True)
    )
    output, logsumexp = fn(*operands())
    assert not output[:, :, 3].any() and (logsumexp[:, :, 3] == -math.inf).all()
    assert output.isfinite().all()


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("fn", "device"),
    [(scored, "cpu"), on_gpu(scored), on_gpu(plain)],
    ids=["scored", "scored-gpu", "plain-gpu"],
)
def test_a_row_depends_on_itself_alone(fn, device):
    inputs = operands(batch=5, dtype=torch.bfloat16, device=device)
    attend = compiled(fn, dynamic=True)
    whole = attend(*inputs)
    for batch in (slice(2, 3), slice(1, 4)):
        assert same_bits(attend(*(x[batch] for x in inputs)), whole[batch])


@pytest.mark.parametrize(
    ("mask_mod", "device"),
    [(documents, "cpu"), on_gpu(documents), on_gpu(window)],
    ids=["documents", "documents-gpu", "window-gpu"],
)
def test_which_block_a_key_is_in_changes_no_bit(mask_mod, device):
    """Full, partial and empty blocks differ between these sizes; the mask does not. It is a boolean mask's."""
    inputs = operands(dtype=torch.bfloat16, device=device)
    results = [compiled(with_mask(mask_mod, size, device=device))(*inputs) for size in (16, 128)]
    assert same_bits(*results)
    grid = torch.arange(100, device=device)
    mask = mask_mod(0, 0, grid[:, None], grid)
    sdpa = compiled(torch.nn.functional.scaled_dot_product_attention)
    assert same_bits(sdpa(*inputs, attn_mask=mask, enable_gqa=True), results[0])


def test_gradients():
    """Eager cannot say on the CPU: against the same function in fp64 through autograd of plain ops."""
    q, k, v = [x.requires_grad_() for x in operands(1, 20, 30)]
    names = torch.fx.symbolic_trace(
        lambda score, b, h, i, j, bias: 5 * torch.tanh(score / 5) + bias[h] * (i - j)
    )
    causal = torch.fx.symbolic_trace(lambda b, h, i, j: i >= j)
    bias = BIAS.clone().requires_grad_()
    output, logsumexp, largest = flex.flex_attention(q, k, v, names, (causal,), 0.3, {}, (bias,))
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, bias)]
    key, value = (x.repeat_interleave(2, 1) for x in leaves[1:3])
    i, j = torch.arange(20)[:, None], torch.arange(30)
    scores = 5 * torch.tanh(leaves[0] @ key.mT * 0.3 / 5) + leaves[3][:, None, None] * (i - j)
    scores = scores.masked_fill(i < j, -math.inf)
    exact, exact_lse = scores.softmax(-1) @ value, scores.logsumexp(-1) / math.log(2)
    assert_accurate(largest, scores.detach().amax(-1) / math.log(2), slack=4)
    (output.sum() + logsumexp.sum()).backward()
    (exact.sum() + exact_lse.sum()).backward()
    for ours, reference in zip((q, k, v, bias), leaves, strict=True):
        assert_accurate(ours.grad, reference.grad, slack=10)


def test_blocks_without_a_mask_mod_are_refused():
    made = create_block_mask(window, None, None, 100, 100, device="cpu", BLOCK_SIZE=32)
    blocks = BlockMask.from_kv_blocks(
        made.kv_num_blocks, made.kv_indices, BLOCK_SIZE=32, seq_lengths=(100, 100)
    )

    def fn(q, k, v):
        return flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)  # the user's line

    with pytest.raises(BatchInvarianceError, match="the user's line") as caught:
        compiled(fn)(*operands())
    assert "mask_mod" in caught.value.remedy


def test_a_mask_alone_is_the_attention_kernel_and_a_score_mod_that_copies_to_the_gpu_is_not():
    def masked(q, k, v):
        return with_mask(window, 32, device=q.device)(q, k, v)

    def counts(fn):
        (graph,) = inspect(fn, *operands(dtype=torch.bfloat16)).graphs
        return str(graph.certificate).count("Attention(float32"), graph.source.count("attention.all_chunks(")

    assert counts(masked)[1] == counts(plain)[1] == 1
    assert counts(scored) == (0, 0)


def test_the_kernel_in_the_interpreter():
    def masked(q, k, v):
        return with_mask(window, 32, 40, q.device)(q, k, v)

    inputs = operands(1, 40, 40, torch.bfloat16)
    assert_accurate(run_in_interpreter(masked, *inputs), masked(*(x.double() for x in inputs)))


def causal(b, h, q, k):
    return q >= k


def soft_cap_and_slope(score, b, h, q, k):
    return 5 * torch.tanh(score / 5) + 0.01 * h * (k - q)


def backwards(b, h, q, k):
    return k <= q + 0


def later(b, h, q, k):
    return q + 1 >= k


def earlier(b, h, q, k):
    return q > k


def and_near(b, h, q, k):
    return (q >= k) & (q - k < 200)


def blocks_of(mask_mod, query):
    """A BlockMask of one block that is on ``query``'s device."""
    count = torch.ones(1, 1, 1, dtype=torch.int32, device=query.device)
    index = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=query.device)
    return BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=128, mask_mod=mask_mod, seq_lengths=(100, 100))


@pytest.mark.parametrize("mask_mod", [causal, backwards])
@pytest.mark.parametrize("score_mod", [None, soft_cap_and_slope], ids=["plain", "scored"])
def test_a_mask_that_is_causal_needs_no_map_and_has_its_bits(mask_mod, score_mod):
    """``and_near`` says the same of 100 keys, and is a mask that the kernels compute."""

    def attend(mask_mod):
        return lambda q, k, v: flex_attention(q, k, v, score_mod, blocks_of(mask_mod, q), enable_gqa=True)

    inputs = operands(dtype=torch.bfloat16)
    (graph,) = inspect(attend(mask_mod), *inputs).graphs
    assert "CAUSAL : tl.constexpr = True" in graph.source and "computed_mask" not in graph.source
    (graph,) = inspect(attend(and_near), *inputs).graphs
    assert "CAUSAL : tl.constexpr = False" in graph.source and "computed_mask" in graph.source
    expected = run_in_interpreter(attend(and_near), *inputs)
    assert same_bits(run_in_interpreter(attend(mask_mod), *inputs), expected)


@pytest.mark.parametrize("mask_mod", [later, earlier, and_near])
def test_what_is_not_causal_is_a_mask(mask_mod):
    def attend(q, k, v):
        return flex_attention(q, k, v, block_mask=blocks_of(mask_mod, q), enable_gqa=True)

    (graph,) = inspect(attend, *operands(dtype=torch.bfloat16)).graphs
    assert "CAUSAL : tl.constexpr = False" in graph.source and "computed_mask" in graph.source
