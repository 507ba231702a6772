"""Which outputs can see another row: what mixes is found by op and line, what does not is left in peace."""

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

from bi_inductor.product_ops import scaled_product
from bi_inductor.row_mixing import row_mixing
from bi_inductor.row_mixing.place import INDEPENDENT, Mixed, Rows
from bi_inductor.row_mixing.rules import Step, place_of

W, TABLE = torch.randn(8, 8), torch.randn(20, 8)

APART = {
    "pointwise": lambda x: F.gelu(x) * 2 + W[0],
    "softmax": lambda x: x.softmax(-1),
    "reduction": lambda x: (x.sum((1, 2)), x.mean(1, keepdim=True), x.var(2), x.amax(1)),
    "cumsum": lambda x: x.cumsum(1),
    "sort": lambda x: x.sort(-1).values,
    "topk": lambda x: x.topk(2, dim=1).values,
    "linear": lambda x: F.linear(x, W, W[0]),
    "rows as columns": lambda x: (W @ x[:, 0].t()).t(),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "batched product": lambda x: x @ x.transpose(1, 2),
    "merged with positions": lambda x: (x.flatten(0, 1) @ W).view(x.shape) + x,
    "batch in the middle": lambda x: x.transpose(0, 1).reshape(5, -1, 2, 4).softmax(-1).transpose(0, 1),
    "embedding": lambda x: F.embedding(x.argmax(-1), TABLE),
    "gather": lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    "shift along the width": lambda x: torch.cat([x[..., 1:], x[..., :1]], -1),
    "convolution": lambda x: F.conv1d(x, torch.ones(3, 5, 3), padding=1),
    "batch norm in eval": lambda x: F.batch_norm(x, W[0, :5], W[1, :5].abs()),
    "windows": lambda x: x.unfold(2, 3, 1).sum(-1),
    "dropout": lambda x: F.dropout(x, 0.5) + torch.rand_like(x),
    "attention with dropout": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "dropout of rows and positions": lambda x: F.dropout(x.flatten(0, 1), 0.5).view(x.shape) + x,
}

MIXING = {
    "mean over the batch": lambda x: x - x.mean(0),
    "sum of all": lambda x: x.sum(),
    "softmax over the batch": lambda x: x.softmax(0),
    "cumsum over the batch": lambda x: x.cumsum(0),
    "sort over the batch": lambda x: x.sort(0).values,
    "batch norm in training": lambda x: F.batch_norm(x, None, None, training=True),
    "rows look up rows": lambda x: x[x[:, 0, 0].long().clamp(0, 1)],
    "gather over the batch": lambda x: x.gather(0, torch.zeros_like(x, dtype=torch.int64)),
    "the first row": lambda x: x + x[0],
    "turned round": lambda x: x.flip(0),
    "rolled": lambda x: x.roll(1, 0),
    "similarities": lambda x: x[:, 0] @ x[:, 0].t(),
    "pairs": lambda x: x[:, None] - x[None],
    "the number of rows": lambda x: x / x.shape[0],
    "regrouped": lambda x: x.transpose(0, 1).reshape(x.shape) + x,
    "einsum over rows": lambda x: torch.einsum("bik,bjk->ij", x, x),
    "dropout of another dimension's rows": lambda x: F.dropout(x.transpose(0, 1), 0.5),
    "dropout of attention among heads and rows": lambda x: (
        lambda y: F.scaled_dot_product_attention(y, y, y, dropout_p=0.5)
    )(x.unflatten(2, (2, 1, 4)).permute(2, 0, 3, 1, 4)),
    "dropout of positions and rows": lambda x: F.dropout(x.transpose(0, 1).reshape(-1, 8), 0.5),
}


@pytest.mark.parametrize("name", APART)
def test_rows_stay_apart(name):
    found = row_mixing(APART[name], torch.randn(3, 5, 8))
    assert not found, str(found)
    assert all(output.dim is not None for outputs in found.graphs for output in outputs)


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_found_with_its_line(name):
    found = row_mixing(MIXING[name], torch.randn(3, 5, 8))
    assert found and "ROW-MIXING" in str(found)
    assert any(f'"{name}"' in cause.source or "lambda" in cause.source for cause in found.causes), str(found)


def test_only_the_outputs_behind_the_op_are_mixed():
    def fn(x):
        y = x * 2
        return y, y.sum(-1) - y.sum(-1).mean(), W.sum(0)

    apart, mixed, constant = row_mixing(fn, torch.randn(3, 5, 8)).graphs[0]
    assert (apart.dim, apart.mixing) == (0, ()) and constant.dim is None and not constant.mixing
    assert [cause.op for cause in mixed.mixing] == ["aten.mean.default"]
    assert "y.sum(-1).mean()" in mixed.mixing[0].source


def test_transformer_layers_do_not_mix():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    assert not row_mixing(layer, torch.randn(3, 5, 16))
    normed = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())
    assert {cause.op for cause in row_mixing(normed, torch.randn(3, 16)).causes} <= {
        "aten.var_mean.correction",
        "aten.mean.dim",
        "aten.var.correction",
        "aten.squeeze.dims",
    }
    assert not row_mixing(normed.eval(), torch.randn(3, 16))


def test_an_op_without_a_rule_counts_as_mixing():
    found = row_mixing(lambda x: torch.as_strided(x, (x.shape[0], 2), (40, 1)), torch.randn(3, 5, 8))
    assert [cause.reason for cause in found.causes] == ["nothing is known about it"]


def test_another_batch_dim():
    x = torch.randn(5, 3, 8)
    assert row_mixing(lambda x: x.sum(1), x, batch_dim=1) and not row_mixing(
        lambda x: x.sum(0), x, batch_dim=1
    )


@pytest.mark.parametrize(
    ("x", "scale", "expected"),
    [
        (Rows(0), Rows(0), Rows(0)),
        (Rows(0), INDEPENDENT, Rows(0)),
        (Rows(1), INDEPENDENT, Mixed),
        (INDEPENDENT, Rows(0), Rows(0)),
        (Rows(0), Rows(1), Mixed),
    ],
)
def test_scaled_products_exist_on_a_gpu_only(x, scale, expected):
    """On a CPU they are ordinary products, so the rule is asked by itself."""
    graph = torch.fx.Graph()
    shapes = {"a": (6, 32), "b": (32, 16), "scale_a": (6, 1), "scale_b": (1, 16)}
    nodes = {name: graph.placeholder(name) for name in shapes}
    for name, node in nodes.items():
        node.meta["val"] = torch.empty(shapes[name])
    product = graph.call_function(scaled_product, (*nodes.values(), None, False, False, torch.bfloat16))
    product.meta["val"] = torch.empty(6, 16)
    places = dict(zip(nodes.values(), (x, INDEPENDENT, scale, INDEPENDENT), strict=True))
    found = place_of(Step(product, places, sympy.Symbol("s0")))
    assert isinstance(found, Mixed) if expected is Mixed else found == expected


COUNTING = {
    "a tensor that holds it": lambda x: x * torch.full((1,), float(x.shape[0])),
    "ones added up": lambda x: x / torch.ones(x.shape[0]).sum(),
    "ones multiplied": lambda x: x + (torch.ones(1, x.shape[0]) @ torch.ones(x.shape[0], 1)),
}


@pytest.mark.parametrize("name", COUNTING)
def test_the_number_of_rows_is_found_in_what_has_no_rows(name):
    found = row_mixing(COUNTING[name], torch.randn(3, 5, 8))
    assert [cause.reason for cause in found.causes] == ["its result follows the batch size"], str(found)


def test_ones_for_each_row_are_no_number_of_rows():
    assert not row_mixing(lambda x: x * torch.ones(x.shape[0], 5, 8) + torch.ones(x.shape[0], 5, 8).sum(-1, True),
                          torch.randn(3, 5, 8))  # fmt: skip


def test_a_branch_is_not_looked_into():
    def fn(x):
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y.clone(), (x,))

    assert row_mixing(fn, torch.randn(3, 5, 8))
    opaque = row_mixing(
        lambda x: torch.cond(W[0, 0] > 0, lambda y: y * 2, lambda y: y + 1, (x,)), torch.randn(3, 5, 8)
    )
    assert [cause.reason for cause in opaque.causes] == ["nothing is known about it"]
