"""The devices every invariance test runs on: the CPU always, CUDA where there is one."""

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def compiled(fn, **options):
    """``fn`` through the backend as a user calls it; keyword arguments are those of torch.compile."""
    return torch.compile(fn, backend="batchinv", **options)


def random_rows(*shape, dtype=torch.float32, device="cpu", seed=0, scale=1.0):
    """Signed values with a few large ones, so that cancellation shows a changed order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    spikes = torch.rand(*shape, generator=generator) < 0.01
    return torch.where(spikes, values * 1000, values).to(dtype).to(device)
