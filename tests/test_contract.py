"""The forms are values of length and dtype alone, and the oracle is the tree they name."""

import pytest
import sympy
import torch

from bi_inductor import contract, oracle
from bi_inductor.testing import bits, count_changed_rows, same_bits, ulp_distance


def test_a_form_mentions_reduced_lengths_only():
    length = sympy.Symbol("s1")
    form = contract.reduction_form("sum", length * 2, torch.bfloat16)
    assert form == contract.Tree("float32", "sum", 2 * length)
    assert form.free_symbols == {length}
    assert str(form) == "Tree(float32, sum, 2*s1)"


@pytest.mark.parametrize("kind", ["max", "min", "any", "argmax", "xor_sum"])
def test_exact_reductions_have_no_order(kind):
    assert isinstance(contract.reduction_form(kind, 5, torch.float32), contract.Exact)


def test_integer_sums_are_exact_and_float_sums_are_not():
    assert isinstance(contract.reduction_form("sum", 5, torch.int64), contract.Exact)
    assert isinstance(contract.reduction_form("sum", 5, torch.float64), contract.Tree)


@pytest.mark.parametrize("kind", ["welford_reduce", "online_softmax_reduce"])
def test_path_dependent_reductions_have_no_form(kind):
    with pytest.raises(ValueError, match=kind):
        contract.reduction_form(kind, 5, torch.float32)


def test_the_oracle_adds_adjacent_pairs():
    # 1e8 swallows 1 unless the ones meet first: only (1 + 1) + (1e8 - 1e8) gives 2.
    assert oracle.tree_sum(torch.tensor([1.0, 1.0, 1e8, -1e8])).item() == 2
    assert oracle.tree_sum(torch.tensor([1.0, 1e8, 1.0, -1e8])).item() == 0


def test_an_aligned_stretch_is_a_subtree():
    x = torch.randn(8, 1024)
    partial = torch.stack([oracle.tree_sum(part, -1) for part in x.split(128, -1)], -1)
    assert same_bits(oracle.tree_sum(partial, -1), oracle.tree_sum(x, -1))


def test_several_dims_are_one_row_major_dim():
    x = torch.randn(3, 5, 7).transpose(0, 2)
    assert same_bits(oracle.tree_sum(x, (0, 2)), oracle.tree_sum(x.permute(1, 0, 2).reshape(5, 21), 1))


def test_bits_tell_zeros_apart_and_nans_together():
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert same_bits(torch.tensor(float("nan")), torch.tensor(float("nan")))
    assert count_changed_rows(torch.zeros(3, 2), torch.tensor([[0.0, 0], [0, -0.0], [0, 0]])) == 1
    assert bits(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.int16


def test_ulp_distance_counts_representable_values():
    one = torch.tensor([1.0, -1.0])
    assert ulp_distance(one, torch.nextafter(one, torch.zeros(2))) == 1
    assert ulp_distance(torch.tensor([1e-45]), torch.tensor([-1e-45])) == 2
