"""Small linear systems: eager's answers up to rounding, each matrix by itself."""

import pytest
import torch
from devices import DEVICES, compiled, over_batches, random_rows

import bi_inductor
from bi_inductor import BatchInvarianceError


def positive(batch, count, device="cpu"):
    """Symmetric matrices with eigenvalues from 1."""
    a = torch.randn(batch, count, count, generator=torch.Generator().manual_seed(0)).to(device)
    return a @ a.mT + torch.eye(count, device=device)


def systems(a, b):
    lu, pivots = torch.linalg.lu_factor(a)
    return (
        torch.linalg.inv(a),
        torch.linalg.det(a),
        torch.linalg.solve(a, b),
        torch.linalg.cholesky(a),
        torch.linalg.slogdet(a).logabsdet,
        torch.linalg.lu_solve(lu, pivots, b),
        torch.linalg.solve_triangular(a.tril(), b, upper=False),
        *torch.linalg.lu(a),
    )


@pytest.mark.lengthy
def test_they_are_solved():
    a, b = positive(3, 4), random_rows(3, 4, 2)
    for actual, expected in zip(compiled(systems)(a, b), systems(a.double(), b.double()), strict=True):
        torch.testing.assert_close(actual, expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_a_matrix_does_not_see_the_batch(device):
    a, b = positive(9, 3, device), random_rows(9, 3, 2, device=device)

    def few(a, b):
        return torch.linalg.solve(a, b), torch.linalg.det(a), torch.linalg.cholesky(a)

    bi_inductor.assert_batch_invariant(over_batches(few), a, b, batches=(1, 2, 9))


@pytest.mark.lengthy
@pytest.mark.parametrize("matrix", [torch.zeros(2, 3, 3), torch.eye(3)], ids=["singular", "regular"])
def test_a_singular_matrix_is_an_error_where_it_is_one_for_stock(matrix):
    """AOTAutograd of torch 2.11 drops the check for every backend."""

    def error(backend):
        torch._dynamo.reset()
        try:
            torch.compile(torch.linalg.inv, backend=backend)(matrix)
        except RuntimeError as error:
            return str(error)
        return None

    assert error("batchinv") == error("aot_eager")


def test_a_system_without_rows_keeps_the_batch():
    """The right-hand side is one for all: the batch is that of the matrices."""
    a = torch.zeros(3, 0, 0)
    assert compiled(torch.func.vmap(torch.cholesky_inverse))(a).shape == (3, 0, 0)
    assert compiled(torch.linalg.solve)(a, torch.zeros(0, 2)).shape == (3, 0, 2)


def test_larger_ones_are_refused_with_the_limit():
    with pytest.raises(BatchInvarianceError, match="16"):
        compiled(torch.linalg.det)(torch.randn(1, 17, 17))
