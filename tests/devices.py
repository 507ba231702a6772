"""The devices every invariance test runs on: the CPU always, CUDA where there is one."""

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def compiled(fn, **options):
    """``fn`` through the backend as a user calls it; keyword arguments are those of torch.compile."""
    return torch.compile(fn, backend="batchinv", **options)


def over_batches(fn, **options):
    """``compiled(fn)`` with dimension 0 of every tensor argument as a symbol and no other size.

    Automatic dynamic shapes end there when only the batch changes. ``dynamic=True`` makes a symbol of every size, which
    the tests of lengths need and which takes several times as long to compile.
    """
    call = compiled(fn, **options)

    def run(*arguments):
        for argument in arguments:
            torch._dynamo.maybe_mark_dynamic(argument, 0)
        return call(*arguments)

    return run


def random_rows(*shape, dtype=torch.float32, device="cpu", seed=0, scale=1.0):
    """Signed values with a few large ones, so that cancellation shows a changed order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    spikes = torch.rand(*shape, generator=generator) < 0.01
    return torch.where(spikes, values * 1000, values).to(dtype).to(device)
