"""The tools of invariance tests see what they are made to see."""

import torch

from bi_inductor.testing import with_cancellation


def chain(x, weight, order):
    """The fp32 sum over K, one term after another in ``order``; products of bf16 numbers are exact."""
    total = torch.zeros(x.shape[0], weight.shape[0])
    for k in order:
        total = total + x[:, k, None].float() * weight[:, k].float()
    return total


def test_cancellation_shows_every_difference_that_rounding_hides():
    torch.manual_seed(0)
    x, weight = torch.randn(32, 100).bfloat16(), torch.randn(24, 100).bfloat16()
    longer, longer_weight = with_cancellation(x, weight)
    assert longer.shape == (32, 148) and longer_weight.shape == (24, 148) and longer.dtype == torch.bfloat16
    ascending, swapped = list(range(100)), [k ^ 1 for k in range(100)]
    sums = [chain(x, weight, order) for order in (ascending, swapped)]
    assert torch.equal(*(x.bfloat16() for x in sums))
    tail = list(range(100, 148))
    shown = [chain(longer, longer_weight, order + tail).bfloat16() for order in (ascending, swapped)]
    assert torch.equal(shown[0] != shown[1], sums[0] != sums[1]) and (sums[0] != sums[1]).sum() > 50
