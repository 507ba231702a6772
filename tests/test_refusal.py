"""What has no canonical form is refused by name, with the user's line and a remedy; or marked UNPROVEN."""

import traceback
import warnings

import pytest
import torch
import torch.nn.functional as F
from devices import compiled

import bi_inductor
from bi_inductor import BatchInvarianceError


def spectrum(x):
    return torch.linalg.svdvals(x)  # the line the error has to name


REFUSED = {
    "svd": (spectrum, (torch.randn(2, 3, 9),)),
    "eigh": (torch.linalg.eigh, (torch.eye(3),)),
    "poisson": (torch.poisson, (torch.rand(2, 9),)),
    "complex cumsum": (lambda x: x.cumsum(-1), (torch.randn(2, 9, dtype=torch.complex64),)),
    "scatter_add of complex numbers": (
        lambda x, i: x.scatter_add(0, i, x),
        (torch.randn(4, dtype=torch.complex64), torch.zeros(4, dtype=torch.int64)),
    ),
    "large systems": (torch.linalg.det, (torch.randn(2, 17, 17),)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    fn, arguments = REFUSED[name]
    with pytest.raises(BatchInvarianceError) as caught:
        compiled(lambda *a: fn(*a))(*arguments)
    error = caught.value
    assert error.op in str(error) and error.reason and "batchinv.unproven" in error.remedy


def test_the_error_names_the_users_line():
    with pytest.raises(BatchInvarianceError, match=r"test_refusal\.py:\d+: return torch\.linalg"):
        compiled(spectrum)(torch.randn(2, 3, 9))


def test_its_traceback_leaves_out_the_compiler():
    with pytest.raises(BatchInvarianceError) as caught:
        compiled(spectrum)(torch.randn(2, 3, 9))
    assert len(traceback.extract_tb(caught.value.__traceback__)) <= 5


def test_a_custom_op_is_refused():
    @torch.library.custom_op("batchinv_tests::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.register_fake(torch.empty_like)
    with pytest.raises(BatchInvarianceError, match="custom op"):
        compiled(lambda x: double(x) + 1)(torch.ones(2))


def test_unproven_compiles_the_stock_lowering_warns_once_and_says_so():
    x = torch.randn(2, 3, 9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = compiled(spectrum, options={"batchinv.unproven": "warn"})(x)
        torch._dynamo.reset()
        compiled(spectrum, options={"batchinv.unproven": "warn"})(x)
    torch.testing.assert_close(result, spectrum(x))
    assert sum("UNPROVEN" in str(warning.message) for warning in caught) == 1
    assert bi_inductor.certificates()[-1].counts["UNPROVEN"] == 1


def test_a_composite_that_is_let_through_is_unproven_too():
    def contract(x):
        return torch.einsum(x, [0, 1], x, [2, 1], [0, 2])

    x = torch.randn(5, 8)
    with pytest.raises(BatchInvarianceError, match="sublist"):
        compiled(contract)(x)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="UNPROVEN"):
        compiled(contract, options={"batchinv.unproven": "warn"})(x)
    assert bi_inductor.certificates()[-1].counts["UNPROVEN"] == 1


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout(x, 0.5),
        torch.rand_like,
        torch.randn_like,
        lambda x: torch.randint_like(x, 3, 1000),
    ],
    ids=["dropout", "rand_like", "randn_like", "randint_like"],
)
def test_random_numbers_are_drawn_by_position_whatever_the_batch(draw, layout):
    fn = compiled(lambda x: draw(x) + 0, dynamic=True)
    x = torch.randn(64, 9) if layout == "contiguous" else torch.randn(9, 64).t()
    results = []
    for rows in (64, 3, 2):
        torch.manual_seed(5)
        results.append(fn(x[:rows]))
    assert torch.equal(results[0][:3], results[1]) and torch.equal(results[1][:2], results[2])
    assert any(entry.form.startswith("Drawn(") for entry in bi_inductor.certificates()[-1].entries)


def test_the_second_look_finds_a_library_kernel(monkeypatch):
    """Guard: an op admitted by mistake, whose lowering calls a library, is still refused."""
    from bi_inductor import verdicts

    monkeypatch.setitem(verdicts._SPECIAL, "_linalg_svd", verdicts._invariant)
    with pytest.raises(BatchInvarianceError, match="library kernel"):
        compiled(spectrum)(torch.randn(2, 3, 9))
