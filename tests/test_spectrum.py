"""Fourier transforms as products, complex numbers as pairs."""

import pytest
import torch
from devices import DEVICES, compiled, over_batches, random_rows

import bi_inductor
from bi_inductor import BatchInvarianceError, verifier

TRANSFORMS = {
    "rfft": lambda x: torch.fft.rfft(x, norm="ortho"),
    "irfft of odd length": lambda x: torch.fft.irfft(torch.fft.rfft(x), 9),
    "fft2": lambda x: torch.fft.fft2(torch.complex(x, -x.flip(-1))),
    "ifftn": lambda x: torch.fft.ifftn(x),
    "hfft": lambda x: torch.fft.hfft(x, norm="forward"),
    "stft": lambda x: torch.stft(x, 8, 2, 8, torch.ones(8), return_complex=True),
}


@pytest.mark.lengthy
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_eagers_up_to_rounding(name):
    x = random_rows(3, 30)
    torch.testing.assert_close(compiled(TRANSFORMS[name])(x), TRANSFORMS[name](x), atol=2e-2, rtol=1e-4)


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_the_spectrum_of_a_row_does_not_see_the_batch(device):
    def spectrum(x):
        window = torch.hann_window(16, device=device)
        return torch.fft.rfft(x).abs(), torch.stft(x, 16, 4, 16, window, return_complex=True).abs()

    x = random_rows(9, 60, device=device)
    bi_inductor.assert_batch_invariant(over_batches(spectrum), x, batches=(1, 2, 9))


@pytest.mark.parametrize("length", [1, 2, 17])
@pytest.mark.parametrize("periodic", [True, False])
def test_windows_are_eagers_up_to_rounding(length, periodic):
    window = compiled(lambda x: x * torch.hann_window(length, periodic))(torch.ones(length))
    torch.testing.assert_close(window, torch.hann_window(length, periodic), atol=1e-6, rtol=0)


def test_a_long_transform_is_refused_with_the_limit():
    with pytest.raises(BatchInvarianceError, match="2048"):
        compiled(lambda x: torch.fft.rfft(x).abs())(torch.randn(1, 4097))


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_complex_arithmetic_does_not_see_the_batch(device):
    def arithmetic(a, b, c):
        x, y = torch.complex(a, b), torch.complex(b, c)
        parts = x * y, x / y, x + 2j * y, -x.conj(), x @ y.mT, (x / 100).exp(), x.sum(-1, keepdim=True)
        return *(torch.view_as_real(part.resolve_conj()) for part in parts), x.abs(), x.angle()

    inputs = [torch.randn(9, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    inputs = [x.to(device) for x in inputs]
    call = over_batches(arithmetic)
    for actual, expected in zip(call(*inputs), arithmetic(*(x.double() for x in inputs)), strict=True):
        torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)
    bi_inductor.assert_batch_invariant(call, *inputs, batches=(1, 2, 9))


def test_a_library_kernel_that_computes_on_complex_numbers_is_found():
    """Views of complex numbers are a library's; nothing else of theirs is."""
    source = bi_inductor.inspect(lambda x: torch.fft.rfft(x), random_rows(3, 30), target="sm_90").source
    call = "torch.ops.aten.view_as_complex.default("
    assert call in source and not verifier.verify(source)
    assert verifier.verify(source.replace(call, "torch.ops.aten.exp.default("))
