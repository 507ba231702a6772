"""Elements picked by rank or by a mask: one answer, eager's where eager has one."""

import pytest
import torch
from devices import DEVICES, compiled, random_rows
from test_sort_and_scan import stable, with_ties

import bi_inductor
from bi_inductor import oracle
from bi_inductor.testing import same_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_running_extremes_are_eagers(device, dtype):
    x = with_ties(3, 70, dtype=dtype)

    def running(x):
        return *x.cummax(-1), *x.cummin(-1)

    for actual, expected in zip(compiled(running)(x.to(device)), running(x), strict=True):
        assert same_bits(actual.cpu().nan_to_num(5.5), expected.nan_to_num(5.5))


def test_order_statistics_are_those_of_the_stable_sort():
    x = with_ties(6, 71)
    values, order = stable(x)
    numbers = (~x.isnan()).sum(-1, keepdim=True)

    def statistics(x):
        return *x.kthvalue(9, -1), *x.median(-1), *x.nanmedian(-1), *x.t().median(0)

    positions = torch.full_like(numbers, 8), torch.where(numbers < 71, numbers, 35), (numbers - 1) // 2
    found = compiled(statistics)(x)
    for i, position in enumerate([*positions, positions[1]]):
        assert torch.equal(found[2 * i + 1], order.gather(-1, position)[:, 0])
        assert same_bits(found[2 * i].nan_to_num(5.5), values.gather(-1, position)[:, 0].nan_to_num(5.5))


def test_the_mode_is_eagers():
    x = torch.randint(0, 9, (20, 31), generator=torch.Generator().manual_seed(0)).float()
    values, indices = compiled(lambda x: x.mode(-1))(x)
    assert torch.equal(values, x.mode(-1).values) and torch.equal(
        x.gather(-1, indices[:, None])[:, 0], values
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_mask_takes_the_values_in_order(device):
    x, y = random_rows(5, 7, device=device), random_rows(35, device=device, seed=1)
    mask = x > 0
    rows = torch.tensor([True, False, True, True, False], device=device)

    def masked(x, y, mask, rows):
        picked = x.index_put((rows,), y[:21].view(3, 7))
        return x.masked_scatter(mask, y), picked, torch.nonzero_static(mask, size=9, fill_value=-1)

    for actual, expected in zip(compiled(masked)(x, y, mask, rows), masked(x, y, mask, rows), strict=True):
        assert same_bits(actual, expected)


@pytest.mark.lengthy
def test_histograms_are_eagers():
    x, w = random_rows(500, scale=2), torch.ones(500)
    edges = torch.tensor([-3.0, -1.0, -0.5, 0.0, 2.0])

    def histograms(x, w):
        return (
            x.histc(9, -2, 2),
            x.histc(5),
            *x.histogram(7),
            *x.histogram(edges),
            x.histogram(4, weight=w).hist,
        )

    for actual, expected in zip(compiled(histograms)(x, w), histograms(x, w), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_logcumsumexp_of_a_prefix_does_not_depend_on_what_follows(device):
    call, x = compiled(lambda x: x.logcumsumexp(-1), dynamic=True), random_rows(4, 600, device=device)
    whole = call(x)
    for length in (9, 513):
        assert same_bits(call(x[:, :length].contiguous()), whole[:, :length].contiguous())
    torch.testing.assert_close(whole, x.double().logcumsumexp(-1).float())
    bi_inductor.assert_batch_invariant(call, x, batches=(1, 2, 4))


def test_logcumsumexp_of_infinities_is_eagers():
    x = torch.tensor([[-torch.inf, -torch.inf, 0.0, torch.inf, 1.0], [torch.inf, torch.inf, torch.nan, 0, 0]])
    assert same_bits(
        compiled(lambda x: x.logcumsumexp(-1))(x).nan_to_num(5.5), x.logcumsumexp(-1).nan_to_num(5.5)
    )


@pytest.mark.lengthy
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings(mode):
    """Each bag is a tree over its words; the gradient is a tree over the places where a word occurs."""
    weight = random_rows(11, 6).requires_grad_()
    words = torch.randint(0, 11, (90,), generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 40, 40, 41])

    def bags(weight):
        return torch.nn.functional.embedding_bag(words, weight, offsets, mode=mode)

    out = compiled(bags)(weight)
    pieces = [weight.detach()[part] for part in words.tensor_split(offsets[1:].tolist())]
    reduced = {
        "sum": lambda p: oracle.tree_sum(p, 0),
        "mean": lambda p: oracle.tree_sum(p, 0) / max(len(p), 1),
        "max": lambda p: p.amax(0) if len(p) else torch.zeros(6),
    }[mode]
    assert same_bits(out, torch.stack([reduced(piece) for piece in pieces]))
    upstream = random_rows(4, 6, seed=1)
    gradient = torch.autograd.grad(out, weight, upstream)[0]
    reference = torch.autograd.grad(bags(weight), weight, upstream)[0]
    torch.testing.assert_close(gradient, reference)


def test_renormalised_embeddings_are_scaled_once():
    words = torch.tensor([3, 1, 3, 3])

    def renormalised(weight):
        return torch.nn.functional.embedding(words, weight, max_norm=1.0)

    weight = random_rows(11, 6)
    torch.testing.assert_close(compiled(renormalised)(weight.clone()), renormalised(weight.clone()))
