"""F.linear and matmul: one product for every shape, layout and batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import TOLERANCE, assert_accurate
from devices import DEVICES, compiled, random_rows
from tracing import computing_targets, traced

from bi_inductor.passes.canonicalize import canonicalize
from bi_inductor.passes.linear import linear
from bi_inductor.passes.matmul import matmul
from bi_inductor.testing import same_bits

DTYPES = list(TOLERANCE)
LEADING = [(), (1,), (5,), (2, 3), (1, 4), (2, 1, 3), (0,), (2, 0, 3)]

MATMUL_SHAPES = [
    ((8,), (8,)),
    ((5, 8), (8,)),
    ((2, 5, 8), (8,)),
    ((8,), (8, 3)),
    ((8,), (2, 8, 3)),
    ((5, 8), (8, 3)),
    ((2, 5, 8), (8, 3)),
    ((5, 8), (2, 8, 3)),
    ((2, 5, 8), (2, 8, 3)),
    ((2, 5, 8), (1, 8, 3)),
    ((4, 1, 5, 8), (3, 8, 2)),
    ((0, 8), (8, 3)),
    ((2, 5, 0), (0, 3)),
]


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("bias_shape", [None, (6,), (1,), ()])
def test_shapes_and_values_of_linear(leading, bias_shape):
    x, w = random_rows(*leading, 9), random_rows(6, 9, seed=1)
    b = None if bias_shape is None else random_rows(6, seed=2)[: math.prod(bias_shape)].reshape(bias_shape)
    exact = F.linear(x.double(), w.double(), None if b is None else b.double())
    assert_accurate(linear(x, w, b), exact)


def test_a_bias_with_dims_of_its_own():
    x, w, b = random_rows(2, 3, 9), random_rows(6, 9, seed=1), random_rows(3, 6, seed=2)
    assert_accurate(linear(x, w, b), x.double() @ w.double().t() + b.double())


@pytest.mark.parametrize("leading", LEADING)
def test_a_one_dimensional_weight(leading):
    x, w = random_rows(*leading, 9), random_rows(9, seed=1)
    assert_accurate(linear(x, w), F.linear(x.double(), w.double()))


@pytest.mark.parametrize("shapes", MATMUL_SHAPES, ids=str)
def test_shapes_and_values_of_matmul(shapes):
    a, b = random_rows(*shapes[0]), random_rows(*shapes[1], seed=1)
    assert_accurate(matmul(a, b), a.double() @ b.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype):
    inputs = [torch.randn(s).to(dtype) for s in ((2, 7, 33), (5, 33), (5,))]
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    linear(*ours).double().square().sum().backward()
    F.linear(*exact).square().sum().backward()
    for a, b in zip(ours, exact, strict=True):
        assert_accurate(a.grad, b.grad, slack=4)


LAYOUTS = {
    "contiguous": lambda n, dims: torch.randn(n, *dims),
    "transposed": lambda n, dims: torch.randn(dims[0], n, *dims[1:]).transpose(0, 1),
    "strided": lambda n, dims: torch.randn(n, *dims[:-1], 2 * dims[-1])[..., ::2],
    "expanded": lambda n, dims: torch.randn(1, *dims).expand(n, *dims),
}


@pytest.mark.parametrize("dims", [(8,), (4, 8), (2, 3, 8)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_batch_and_layout_is_one_addmm(dims, layout):
    if layout == "transposed" and len(dims) == 1:
        dims = (1, 8)
    w, b = torch.randn(5, 8), torch.randn(5)
    for n in (1, 2, 7):
        (graph,) = traced(F.linear, LAYOUTS[layout](n, dims), w, b)
        assert computing_targets(graph) == ["aten.addmm.default"]


def test_stock_depends_on_the_layout():
    """What the rewrite is for: without it a batch of one is another op than a batch of two."""

    def stock(n):
        x, w, b = torch.randn(4, n, 8).transpose(0, 1), torch.randn(5, 8), torch.randn(5)
        return torch.fx.experimental.proxy_tensor.make_fx(F.linear)(x, w, b)

    assert computing_targets(stock(1)) != computing_targets(stock(2))


@pytest.mark.parametrize("module", [torch.nn.Linear(8, 5), torch.nn.Linear(8, 5, bias=False)], ids=str)
def test_a_module_call_is_inlined(module):
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(module, torch.nn.ReLU()))
    x = torch.randn(3, 8)
    expected = graph(x)
    canonicalize(graph)
    assert linear in [node.target for node in graph.graph.nodes]
    torch.testing.assert_close(graph(x), expected)


def test_an_exported_graph():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(8, 5)

        def forward(self, x):
            return self.inner(x) @ x.transpose(0, 1)[:5]

    x = torch.randn(8, 8)
    graph = torch.export.export(Model(), (x,)).module()
    expected = graph(x)
    canonicalize(graph)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert linear in targets and matmul in targets
    torch.testing.assert_close(graph(x), expected)


def test_bodies_of_checkpoints_are_rewritten():
    def fn(x, w, b):
        return torch.utils.checkpoint.checkpoint(F.linear, x, w, b, use_reentrant=False)

    x = torch.randn(2, 4, 8).transpose(1, 2).requires_grad_()
    forward, _ = traced(fn, x, torch.randn(3, 4, requires_grad=True), torch.randn(3))
    assert computing_targets(forward) == ["aten.addmm.default"]


def test_the_users_line_survives():
    def fn(x, w, b):
        return F.linear(x, w, b)  # the user's line

    (graph,) = traced(fn, torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5))
    (addmm,) = [node for node in graph.graph.nodes if node.target is torch.ops.aten.addmm.default]
    assert "# the user's line" in addmm.meta["stack_trace"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_do_not_depend_on_batch_dims_or_layout(dtype, device):
    """One row alone, in a matrix, in a 3-D tensor, transposed: the same bits."""
    x = random_rows(6, 4, 300, dtype=dtype, device=device)
    w = random_rows(70, 300, dtype=dtype, device=device, seed=1)
    b = random_rows(70, dtype=dtype, device=device, seed=2)
    fn = compiled(F.linear, dynamic=False)
    whole = fn(x, w, b)
    assert_accurate(whole, F.linear(x.double(), w.double(), b.double()))
    assert same_bits(fn(x.transpose(0, 1), w, b).transpose(0, 1), whole)
    assert same_bits(fn(x[2:3], w, b), whole[2:3])
    assert same_bits(fn(x[3], w, b), whole[3])
    assert same_bits(fn(x[3, 1], w, b), whole[3, 1])
