"""Samples of an image at a grid: gradients add in a tree over the samples, whatever the batch."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from devices import DEVICES, compiled, random_rows

import bi_inductor
from bi_inductor.testing import same_bits


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_eagers_and_do_not_see_the_batch(device):
    """Places within and beyond the image; several of them hit one pixel."""
    image = random_rows(3, 2, 4, 5, device=device)
    places = (random_rows(3, 6, 7, 2, device=device, seed=1) / 2).clamp(-1.3, 1.3)

    def sample(image, places):
        return F.grid_sample(image, places, align_corners=False)

    upstream = random_rows(*sample(image, places).shape, device=device, seed=2)
    call = compiled(sample, dynamic=False)

    def results(function, rows, dtype=torch.float32):
        inputs = [x[rows].to(dtype).requires_grad_() for x in (image, places)]
        y = function(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, upstream[rows].to(dtype))]

    whole = results(call, slice(0, 3))
    for ours, exact in zip(whole, results(sample, slice(0, 3), torch.float64), strict=True):
        assert_accurate(ours, exact)
    for row in range(3):
        alone = results(call, slice(row, row + 1))
        assert all(same_bits(one, many[row : row + 1]) for one, many in zip(alone, whole, strict=True))


@pytest.mark.lengthy
@pytest.mark.parametrize("mode", ["nearest", "bicubic"])
def test_every_mode_has_a_gradient_on_a_gpu(mode):
    image, places = torch.randn(2, 2, 4, 5).requires_grad_(), torch.rand(2, 3, 3, 2)
    made = bi_inductor.inspect(
        lambda x, g: F.grid_sample(x, g, mode, "border", align_corners=True),
        image,
        places,
        target="sm_90",
        backward=True,
    )
    ops = {entry.op for entry in made.certificates[1].entries if entry.verdict == "CANONICAL"}
    assert "bi_inductor.segment_tree.default" in ops and "tl.atomic" not in made.source


def test_volumes_are_refused_by_name():
    with pytest.raises(bi_inductor.BatchInvarianceError, match="grid_sampler_3d"):
        bi_inductor.inspect(
            lambda x, g: F.grid_sample(x, g, align_corners=True),
            torch.randn(2, 2, 3, 4, 5),
            torch.rand(2, 3, 3, 3, 3),
        )
