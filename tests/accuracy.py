"""Accuracy against fp64: how far a result may be off, relative to the largest value of the exact one."""

import torch

#: A few roundings of the dtype: inputs are exact, products accumulate in fp32, results round once or twice.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_accurate(result, exact, slack=1.0, terms=None):
    """``exact`` is fp64; ``slack`` multiplies the tolerance of the result's dtype (gradients round more often).

    Where the terms of a sum may cancel, ``terms`` is the sum of their absolute values (fp64): the error of a sum
    is relative to that, not to what is left of it.
    """
    assert result.shape == exact.shape
    assert torch.equal(result.isnan(), exact.isnan())
    if result.numel() == 0:
        return
    error = (result.double() - exact).nan_to_num().abs().max()
    largest = (exact if terms is None else terms).nan_to_num().abs().max()
    assert error <= slack * TOLERANCE[result.dtype] * largest, float(error)
