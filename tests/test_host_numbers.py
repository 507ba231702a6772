"""Numbers made from sizes and Python floats are the same in static graphs, where Python computes them, and dynamic."""

import math

import pytest
import torch

from bi_inductor import BatchInvarianceError, host_numbers, inspect
from bi_inductor.testing import same_bits

LENGTHS = range(2, 200)
REFUSED = {
    "power": lambda x: x * x.shape[-1] ** 0.3,
    "root of floats in fp64": lambda x: x.double() * x.shape[-1] ** -0.5,
    "power of a quotient": lambda x: x * (x.shape[-1] / 3) ** 1.5,
    "power of two": lambda x: x * 2.0 ** x.shape[-1],
    "sine": lambda x: x + math.sin(x.shape[-1]),
    "logarithm": lambda x: x + math.log2(x.shape[-1]),
    "a tensor of them": lambda x: x * x.new_full((1, 1), x.shape[-1] ** -0.25),
    "power and more": lambda x: x * (2.5 * x.shape[-1] ** -0.5),
    "used in both precisions": lambda x: (x * x.shape[-1] ** -0.5, x.double() * x.shape[-1] ** -0.5),
}
KEPT = {
    "quotients": lambda x: x.double() * (1 / x.shape[-1]) + x.shape[-1] / 3,
    "square roots": lambda x: x.double() / math.sqrt(x.shape[-1]),
    "integers": lambda x: x * x.shape[-1] ** 2 + x.shape[-1] // 3,
    "roots in fp32": lambda x: x * x.shape[-1] ** -0.5 + (x.bfloat16() * x.shape[-1] ** 0.5).float(),
    "sizes": lambda x: x.new_zeros(int(x.shape[-1] ** 0.5) + 1),
    "logarithms of tensors": lambda x: torch.log2(x.abs()) * torch.tensor(0.3) ** x,
}


def compiled(fn, **options):
    torch._dynamo.reset()
    return torch.compile(fn, backend="batchinv", **options)


def differing_lengths(fn):
    """Those of ``LENGTHS`` at which a dynamic graph has other bits than eager, where Python computes the number."""
    run = compiled(fn, dynamic=True)
    inputs = [torch.linspace(0.1, 1, n) for n in LENGTHS]
    return [len(x) for x in inputs if not same_bits(run(x), fn(x))]


@pytest.mark.parametrize("target", ["cpu", "sm_90"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_libraries_round_otherwise_is_refused(name, target):
    with pytest.raises(BatchInvarianceError, match="no two libraries round it alike") as caught:
        inspect(REFUSED[name], torch.randn(5, 7), target=target, dynamic=True)
    assert "test_host_numbers.py" in caught.value.source and "shape[-1]" in caught.value.source
    assert "math.sqrt" in caught.value.remedy


@pytest.mark.parametrize("name", REFUSED)
def test_a_static_size_is_no_symbol(name):
    assert inspect(REFUSED[name], torch.randn(5, 7), target="sm_90", dynamic=False).graphs


@pytest.mark.parametrize("name", KEPT)
def test_what_they_round_alike_is_computed(name):
    assert inspect(KEPT[name], torch.randn(5, 7), target="sm_90", dynamic=True).graphs


@pytest.mark.parametrize("name", ["quotients", "square roots", "roots in fp32"])
def test_lengths_have_pythons_numbers(name):
    assert not differing_lengths(KEPT[name])


def test_without_the_rule_they_would_differ(monkeypatch):
    monkeypatch.setattr(host_numbers, "refusals", lambda gm: [])
    assert differing_lengths(lambda x: x.double() * x.shape[-1] ** 0.3)


def test_a_float_that_became_an_input():
    def scaled(x, factor):
        return x * factor**0.3

    run, x = compiled(scaled), torch.randn(5)
    assert same_bits(run(x, 0.7), scaled(x, 0.7))
    with pytest.raises(BatchInvarianceError, match="no two libraries round it alike"):
        run(x, 0.9)
    products = compiled(lambda x, factor: x.double() * (factor / 3 + math.sqrt(factor)))
    for factor in (0.7, 0.9, 1.1):
        assert same_bits(products(x, factor), x.double() * (factor / 3 + math.sqrt(factor)))
