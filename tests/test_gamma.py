"""digamma and polygamma: near their mathematical values, the same in every place, and fused on a GPU."""

import math

import mpmath
import pytest
import torch
from devices import DEVICES, compiled, over_batches

import bi_inductor
from bi_inductor.decompositions import decompositions
from bi_inductor.testing import same_bits

ORDERS = (0, 1, 2, 5)


def derivatives(x):
    return [torch.polygamma(n, x) for n in ORDERS]


def arguments(dtype):
    """Both sides of 0 and of the borders of the formulas, large, small, and near a pole; no pole."""
    spread = torch.linspace(-12.03, 14.02, 97, dtype=torch.float64)
    chosen = [1e-4, -1e-4, 0.5, 0.4999, 1.4616321449683623, 10.0, 9.999, 300.0, 1e5, -50.3, -2.001]
    return torch.cat([spread, torch.tensor(chosen, dtype=torch.float64)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_are_those_of_mathematics(dtype):
    """Within units in the last place of the larger of 1 and the value."""
    x = arguments(dtype)
    for n, values in zip(ORDERS, compiled(derivatives)(x), strict=True):
        exact = [mpmath.polygamma(n, mpmath.mpf(value)) for value in x.tolist()]
        errors = [abs(v - e) / max(abs(e), 1) for v, e in zip(values.tolist(), exact, strict=True)]
        assert max(errors) <= 16 * torch.finfo(dtype).eps, (n, x[errors.index(max(errors))])


@pytest.mark.parametrize("n", [12, 25, 120, 700])
def test_high_orders(n):
    rule = decompositions()[torch.ops.aten.polygamma.default]
    x = torch.tensor([0.75, 3.0, 40.0, -1.3], dtype=torch.float64)
    if n > 170:  # n! is no number of fp64
        assert not rule(n, x).isfinite().any()
        return
    exact = torch.tensor([float(mpmath.polygamma(n, value)) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(rule(n, x), exact, rtol=1e-13, atol=0)


def test_poles_and_what_is_no_number():
    x = torch.tensor([0.0, -0.0, -1.0, -2.0, math.inf, -math.inf, math.nan])
    digamma, *others = compiled(derivatives)(x)
    assert same_bits(digamma.nan_to_num(7.0), torch.digamma(x).nan_to_num(7.0))
    for n, values in zip(ORDERS[1:], others, strict=True):
        pole = math.inf if n % 2 else -math.inf
        assert values[:4].tolist() == [pole] * 4
        assert values[4] == 0
        assert values[5:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_value_has_the_same_bits_in_every_place(device):
    def gradient(x):
        rate = x.exp() + 0.01
        return (
            torch.special.psi(x),
            torch.func.grad(lambda r: torch.lgamma(r).sum())(rate),
            torch.polygamma(2, x),
        )

    x = torch.randn(31, 16, generator=torch.Generator().manual_seed(0)).to(device)
    bi_inductor.assert_batch_invariant(over_batches(gradient), x, batches=(1, 2, 7, 31))


def test_16_bits_and_integers_are_computed_in_fp32():
    narrow, whole = torch.tensor([0.3, 2.5, -1.25, 40.0]).bfloat16(), torch.tensor([1, 2, 9, 4])

    @compiled
    def call(*inputs):
        return [torch.stack([torch.digamma(x), torch.polygamma(3, x)]) for x in inputs]

    actual, of_wide, of_whole, of_float = call(narrow, narrow.float(), whole, whole.float())
    assert same_bits(actual, of_wide.bfloat16())
    assert same_bits(of_whole, of_float)


def test_a_negative_order_is_eagers_error():
    with pytest.raises(RuntimeError, match="does not support negative n"):
        compiled(lambda x: torch.polygamma(-1, x))(torch.ones(3))


def test_on_a_gpu_they_fuse():
    def product(x):
        return torch.digamma(x) * torch.polygamma(1, x)

    result = bi_inductor.inspect(product, torch.ones(5, 7), target="sm_90")
    assert len(result.kernels) == 1
