"""Pooling: sums and maxima over windows, forward and backward, beside eager and at every batch size."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from devices import DEVICES, compiled, over_batches, random_rows

import bi_inductor
from bi_inductor import oracle
from bi_inductor.testing import same_bits

POOLS = {
    "avg, overlapping, padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg, ceil, padding not counted": lambda x: F.avg_pool2d(x, (3, 2), 2, 1, True, count_include_pad=False),
    "avg, divisor": lambda x: F.avg_pool2d(x, 2, 1, divisor_override=3),
    "adaptive avg": lambda x: F.adaptive_avg_pool2d(x, (4, 5)),
    "adaptive avg, more than there are": lambda x: F.adaptive_avg_pool2d(x, (11, 3)),
    "max": lambda x: F.max_pool2d(x, 3, 2, 1, 2),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, (4, 3)),
    "lp": lambda x: F.lp_pool2d(x, 3, 2),
    "local response": lambda x: F.local_response_norm(x, 2),
}


def with_gradient(pool):
    def run(x):
        y = pool(x)
        return y, torch.autograd.grad(y, x, torch.linspace(-1, 1, y[0].numel()).view_as(y[0]).expand_as(y))[0]

    return run


@pytest.mark.lengthy
@pytest.mark.parametrize("name", POOLS)
def test_values_and_gradients_are_eagers(name):
    x = random_rows(2, 3, 9, 7).requires_grad_()
    run = with_gradient(POOLS[name])
    y = compiled(POOLS[name])(x)
    upstream = torch.linspace(-1, 1, y[0].numel()).view_as(y[0]).expand_as(y)
    gradient = torch.autograd.grad(y, x, upstream)[0]
    for actual, expected in zip((y, gradient), run(x.detach().double().requires_grad_()), strict=True):
        assert actual.dtype == torch.float32
        assert_accurate(actual.detach(), expected.detach())


def test_a_window_is_the_oracles_tree():
    x = random_rows(2, 3, 9, 7)
    windows = x.unfold(2, 3, 2).unfold(3, 3, 2)
    assert same_bits(compiled(lambda x: F.avg_pool2d(x, 3, 2))(x), oracle.tree_sum(windows, (-2, -1)) / 9)
    whole = compiled(lambda x: F.adaptive_avg_pool2d(x, 1))(x)
    assert same_bits(whole[..., 0, 0], oracle.tree_sum(x, (-2, -1)) / 63)


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_their_gradients_do_not_see_the_batch(device):
    def pools(x):
        ys = [F.avg_pool2d(x, 3, 2, 1), F.adaptive_avg_pool2d(x, (4, 3)), F.max_pool2d(x, 3, 2)]
        return torch.cat([y.flatten(1) for y in ys], 1)

    call = over_batches(pools)

    def both(x):
        x = x.detach().requires_grad_()
        y = call(x)
        return y, torch.autograd.grad(y, x, torch.linspace(-1, 1, y.shape[1], device=device).expand_as(y))[0]

    bi_inductor.assert_batch_invariant(both, random_rows(9, 2, 7, 5, device=device), batches=(1, 2, 9))


def test_bf16_is_summed_wide_and_rounded_once():
    x = random_rows(2, 3, 8, 8, dtype=torch.bfloat16)
    windows = x.float().unfold(2, 4, 4).unfold(3, 4, 4)
    expected = (oracle.tree_sum(windows, (-2, -1)) / 16).bfloat16()
    assert same_bits(compiled(lambda x: F.avg_pool2d(x, 4))(x), expected)


def test_pooling_is_lowered_for_a_gpu():
    certificate = bi_inductor.inspect(
        lambda x: (F.avg_pool2d(x, 3, 2), F.adaptive_max_pool2d(x, 3)),
        random_rows(2, 3, 9, 7),
        target="sm_90",
    ).certificates[0]
    assert any(entry.form.startswith("Tree(float32, sum, 9") for entry in certificate.entries)
