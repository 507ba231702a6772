"""compare names the first op whose bits differ: in stock when the batch grows, in nothing of ours."""

import pytest
import torch
import torch.nn.functional as F
from inspected import WIDTH, Block

from bi_inductor import Variant, compare
from bi_inductor.variants import run

WEIGHT = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))


def step(x):
    normed = F.layer_norm(x, (512,))
    scores = normed @ WEIGHT
    return torch.softmax(scores, -1)


@pytest.fixture(scope="module")
def x():
    return torch.randn(16, 512, generator=torch.Generator().manual_seed(1))


def test_stock_alone_and_together(x):
    """Negative control: stock's layer norm of a row (in torch 2.11 its product) is another one when it is alone."""
    found = compare(Variant(step, "inductor", rows=slice(0, 1)), Variant(step, "inductor"), x)
    assert not found and found.first.op in ("layer_norm", "matmul") and found.first.elements == 512
    assert found.first.ulp > 0 and 0 < found.first.largest < 1e-3 and 0 < found.first.changed < 512
    assert "test_compare.py" in str(found) and " = " in found.first.source


def test_ours_alone_and_together(x):
    found = compare(Variant(step, rows=slice(3, 4)), Variant(step, rows=slice(2, 9)), x)
    assert found and found.compared == 3 and not found.unlike and not found.unfaithful
    assert str(found) == "no bit differs in 3 values"


def test_stock_against_ours(x):
    assert compare(Variant(step, "inductor"), Variant(step), x).first.op == "layer_norm"


def test_a_product_that_the_backend_rewrites_is_still_the_users_op(x):
    def products(x):
        return F.linear(torch.matmul(x @ WEIGHT, WEIGHT), WEIGHT).exp()

    found = compare(Variant(products, "eager"), Variant(products), x)
    assert not found.reason and (found.compared == 4 or found.first.op in ("matmul", "linear"))
    assert [value.op for value in run(Variant(products), (x,), {}).values] == [
        value.op for value in run(Variant(products, "eager"), (x,), {}).values
    ]


@pytest.mark.lengthy
def test_training_against_inference():
    model, x = Block(), torch.randn(8, WIDTH)
    assert compare(Variant(model, grad=True), Variant(model), x)


@pytest.mark.parametrize("place", [0, 2])
def test_the_op_that_was_changed_is_named(place, x):
    def changed(k):
        def fn(x):
            y = x.exp() * (1 + 2**-22 if k == 0 else 1.0)
            z = y.sin() * (1 + 2**-22 if k == 1 else 1.0)
            return z.sum(-1) * (1 + 2**-22 if k == 2 else 1.0)

        return fn

    found = compare(changed(place), changed(-1), x)
    assert found.first.node == ("y", "z", "mul_2")[place] and found.first.ulp in range(1, 5)


def test_rows_that_are_folded_into_another_dimension(x):
    def folded(x):
        return F.linear(x.view(-1, 64), WEIGHT[:64, :64]).view(x.shape)

    assert compare(Variant(folded, rows=slice(5, 6)), Variant(folded), x).compared >= 2


@pytest.mark.lengthy
def test_what_does_not_fit_is_said(x):
    mixed = compare(Variant(lambda x: x[:7].exp(), rows=slice(0, 9)), Variant(lambda x: x[:7].exp()), x)
    assert mixed.unlike or mixed.compared
    with pytest.raises(ValueError, match="no row in common"):
        compare(Variant(step, rows=slice(0, 1)), Variant(step, rows=slice(1, 2)), x)
    with pytest.raises(ValueError, match="unknown backend"):
        Variant(step, "tvm")
    with pytest.raises(ValueError, match="give the function itself"):
        Variant(torch.compile(step))
    assert "graphs part" in compare(step, lambda x: step(2 * x), x).reason
    assert "values" in compare(step, lambda x: step(x) + 1, x).reason


@pytest.mark.lengthy
def test_keeping_values_changes_no_bit_of_ours():
    """Also in bf16, where stock rounds what it keeps and not what it fuses: its answer says so."""
    model, x = Block().bfloat16(), torch.randn(8, WIDTH, dtype=torch.bfloat16)
    ran = run(Variant(model), (x,), {})
    assert ran.is_faithful and len(ran.values) >= 5
    assert {value.source.rpartition(":")[2] != "" for value in ran.values} == {True}
