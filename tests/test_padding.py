"""Gradients of padding: edges that were copied add up, in trees over the copies, whatever the batch."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from devices import DEVICES, compiled, over_batches, random_rows

import bi_inductor
from bi_inductor import oracle
from bi_inductor.testing import same_bits

#: Sizes after batch and channels, pads from the last dim on: both edges, one edge, cut off, one element for both edges.
PADS = {
    "1d": ((9,), (3, 2)),
    "2d": ((6, 7), (2, 3, 1, 4)),
    "2d, cut off": ((6, 7), (-2, 3, 1, -3)),
    "2d, one element": ((1, 5), (0, 1, 2, 3)),
    "3d": ((3, 4, 5), (1, 2, 0, 1, 2, 0)),
}


def gradient(padded, x, upstream):
    return torch.autograd.grad(padded, x, upstream.expand_as(padded))[0]


@pytest.mark.lengthy
def test_gradients_are_eagers():
    def padded(*xs):
        return [F.pad(x, pad, mode="replicate") for x, (_, pad) in zip(xs, PADS.values(), strict=True)]

    xs = [random_rows(2, 3, *size).requires_grad_() for size, _ in PADS.values()]
    exact = [x.detach().double().requires_grad_() for x in xs]
    upstream = [random_rows(*y.shape, seed=1) for y in padded(*xs)]
    found = torch.autograd.grad(compiled(padded)(*xs), xs, upstream)
    expected = torch.autograd.grad(padded(*exact), exact, [g.double() for g in upstream])
    for ours, eagers in zip(found, expected, strict=True):
        assert_accurate(ours, eagers)


def test_an_edge_is_the_oracles_tree():
    x, upstream = random_rows(2, 3, 40).requires_grad_(), random_rows(2, 3, 40 + 6 + 11, seed=1)
    found = gradient(compiled(lambda x: F.pad(x, (6, 11), mode="replicate"))(x), x, upstream)
    assert same_bits(found[..., 0], oracle.tree_sum(upstream[..., :7], (-1,)))
    assert same_bits(found[..., -1], oracle.tree_sum(upstream[..., -12:], (-1,)))
    assert same_bits(found[..., 1:-1], upstream[..., 7:-12])


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_rows_do_not_see_the_batch(device):
    def padded(x):
        return F.pad(x, (2, 3, 1, -1), mode="replicate")

    call = over_batches(padded)
    x = random_rows(7, 3, 6, 7, dtype=torch.bfloat16, device=device)
    upstream = random_rows(*padded(x).shape, dtype=torch.bfloat16, device=device, seed=1)

    def rows(index):
        row = x[index].requires_grad_()
        return gradient(call(row), row, upstream[index])

    whole = rows(slice(0, 7))
    for size in (1, 3):
        for start in (0, 3, 7 - size):
            piece = slice(start, start + size)
            assert same_bits(rows(piece), whole[piece])


def test_generated_for_a_gpu_it_is_a_tree():
    x = torch.randn(4, 3, 6, 7).requires_grad_()
    made = bi_inductor.inspect(
        lambda x: F.pad(x, (2, 3, 1, 4), mode="replicate"), x, target="sm_90", backward=True
    )
    forms = [entry.form for entry in made.certificates[1].entries if entry.form]
    assert forms == [f"Tree(float32, sum, {copies})" for copies in (3, 4, 2, 5)]


def test_a_derivative_that_is_zero_has_a_form():
    """That of ``sgn`` starts from an efficient zero tensor."""
    made = bi_inductor.inspect(
        lambda x: torch.sgn(x) * x, torch.randn(4, 3).requires_grad_(), target="sm_90", backward=True
    )
    assert [graph.is_backward for graph in made.graphs] == [False, True]
