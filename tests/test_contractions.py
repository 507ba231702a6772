"""Products of several operands: eager's values, and an association that no size can change."""

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from tracing import computing_targets, traced

from bi_inductor import inspect
from bi_inductor.errors import BatchInvarianceError
from bi_inductor.passes import contractions
from bi_inductor.passes.canonicalize import canonicalize
from bi_inductor.passes.einsum import einsum


def chain(*shapes):
    return [torch.randn(shape) for shape in shapes]


def rewritten(fn, *inputs):
    return torch.compile(fn, backend=lambda graph, _: canonicalize(graph), fullgraph=True)(*inputs)


def products(graph):
    """The result shapes of the matrix products of a graph, in order: the association."""
    nodes = [
        node
        for node in graph.graph.nodes
        if node.target in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
    ]
    return [tuple(node.meta["val"].shape) for node in nodes]


FUNCTIONS = {
    "multi_dot": (lambda a, b, c: torch.linalg.multi_dot([a, b, c]), [(5, 8), (8, 3), (3, 4)]),
    "multi_dot of vectors": (lambda a, b, c: torch.linalg.multi_dot([a, b, c]), [(8,), (8, 3), (3,)]),
    "chain_matmul": (lambda a, b, c: torch.chain_matmul(a, b, c), [(5, 8), (8, 3), (3, 4)]),
    "einsum": (lambda a, b, c: torch.einsum("bi,ij,bj->b", a, b, c), [(5, 8), (8, 3), (5, 3)]),
    "einsum of a list": (lambda a, b, c: torch.einsum("bi,ij,bj->b", [a, b, c]), [(5, 8), (8, 3), (5, 3)]),
    "einsum of two": (lambda a, b: torch.einsum("bi,bi->b", a, b), [(5, 8), (5, 8)]),
    "bilinear": (F.bilinear, [(5, 8), (5, 3), (4, 8, 3), (4,)]),
    "bilinear, leading dims": (F.bilinear, [(2, 5, 8), (2, 5, 3), (4, 8, 3)]),
    "bilinear of vectors": (F.bilinear, [(8,), (3,), (4, 8, 3), (4,)]),
    "cdist": (torch.cdist, [(5, 8), (3, 8)]),
    "cdist in batches": (lambda a, b: torch.cdist(a, b, p=1.0), [(2, 1, 5, 8), (3, 30, 8)]),
    "cdist by products": (
        lambda a, b: torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist"),
        [(2, 5, 8), (2, 3, 8)],
    ),
}


@pytest.mark.filterwarnings("ignore:.*chain_matmul:UserWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(name):
    fn, shapes = FUNCTIONS[name]
    inputs = [x.requires_grad_() for x in chain(*shapes)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    result, exact = rewritten(fn, *inputs), fn(*doubles)
    assert_accurate(result, exact)
    result.square().sum().backward()
    exact.square().sum().backward()
    for a, b in zip(inputs, doubles, strict=True):
        assert_accurate(a.grad, b.grad, slack=4)


@pytest.mark.parametrize("batch", [1, 2, 7, 100])
def test_left_to_right_at_every_size(batch):
    (graph,) = traced(lambda a, b, c: torch.linalg.multi_dot([a, b, c]), *chain((batch, 8), (8, 50), (50, 3)))
    assert products(graph) == [(batch, 50), (batch, 3)]
    (graph,) = traced(three_factors, *chain((batch, 8), (8, 50), (50, 3)))
    assert [math.prod(shape) for shape in products(graph)] == [batch * 50, batch * 3]


def three_factors(a, b, c):
    return torch.einsum("bi,ij,jk->bk", a, b, c)


def test_einsum_ignores_opt_einsum(monkeypatch):
    """Where opt_einsum is installed, stock einsum follows the path it makes from the sizes."""
    planner = types.SimpleNamespace(contract_path=lambda *arguments, **options: ([(1, 2), (0, 1)], None))
    installed = types.SimpleNamespace(
        enabled=True, strategy="auto", is_available=lambda: True, get_opt_einsum=lambda: planner
    )
    monkeypatch.setitem(sys.modules, "torch.backends.opt_einsum", installed)
    monkeypatch.setattr(torch.backends, "opt_einsum", installed)
    inputs = chain((5, 8), (8, 50), (50, 3))
    stock = torch.fx.experimental.proxy_tensor.make_fx(three_factors)(*inputs)
    assert [math.prod(shape) for shape in products(stock)] == [8 * 3, 5 * 3]
    (ours,) = traced(three_factors, *inputs)
    assert [math.prod(shape) for shape in products(ours)] == [5 * 50, 5 * 3]


EQUATIONS = {
    "...i,ij->...j": [(2, 5, 8), (8, 3)],
    "bhid,bhjd->bhij": [(2, 3, 5, 8), (2, 3, 4, 8)],
    "bij,bjk": [(2, 5, 8), (2, 8, 3)],
    "i,j->ji": [(5,), (8,)],
    "bi,bi->bi": [(5, 8), (5, 8)],
    "bik,bjk->ij": [(2, 5, 8), (2, 4, 8)],
    "b...k,k...->...b": [(2, 4, 8), (8, 4)],
    "...ik,...kj->...ij": [(2, 1, 5, 8), (3, 8, 4)],
    "bij,k->bk": [(2, 5, 8), (3,)],
    "bii,bi->b": [(2, 5, 5), (2, 5)],
    "ab,bc,cd,de->ae": [(2, 3), (3, 4), (4, 5), (5, 6)],
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_is_einsum(equation):
    operands = chain(*EQUATIONS[equation])
    exact = torch.einsum(equation, *(x.double() for x in operands))
    terms = torch.einsum(equation, *(x.double().abs() for x in operands))
    assert_accurate(einsum(equation, operands), exact, terms=terms)


def test_a_batch_of_one_is_the_same_einsum():
    """ATen's graph reads its operands through other views where a size is 1."""
    made = [
        inspect(
            lambda x, w: torch.einsum("...i,ij->...j", x, w),
            torch.randn(batch, 24, requires_grad=True),
            torch.randn(24, 16),
            target="cpu",
            backward=True,
        )
        for batch in (1, 8)
    ]
    assert made[0].fingerprint == made[1].fingerprint


def test_the_sublist_form_of_einsum_is_refused():
    def fn(a, b, c):
        return torch.einsum(a, [0, 1], b, [1, 2], c, [2, 3], [0, 3])  # the user's line

    with pytest.raises(BatchInvarianceError, match="the user's line"):
        rewritten(fn, *chain((5, 8), (8, 50), (50, 3)))


def test_cdist_has_no_threshold():
    few, many = (traced(torch.cdist, *chain((rows, 8), (5, 8)))[0] for rows in (25, 26))
    assert computing_targets(few) == computing_targets(many)
    assert not any("mm" in op for op in computing_targets(many))


def test_every_rewrite_has_a_name_of_its_own():
    names = [rewrite.name for rewrite in contractions.CONTRACTIONS]
    assert len(set(names)) == len(names)
