"""What AOTAutograd makes of an op does not follow the batch: the same ATen ops, in the same order, at 1, 2 and 7."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from devices import DEVICES
from torch._inductor.decomposition import select_decomp_table
from tracing import computing_targets, traced

from bi_inductor.decompositions import decompositions

aten = torch.ops.aten


def floats(*shape):
    return lambda n: torch.randn([n if size == "n" else size for size in shape], requires_grad=True)


def constant(*shape):
    return lambda n: torch.rand([n if size == "n" else size for size in shape])


def labels(*shape):
    return lambda n: torch.randint(3, [n if size == "n" else size for size in shape])


#: name: (function, makers of its arguments from the batch n).
OPS = {
    "matmul, vectors": (torch.matmul, [floats(8), floats(8)]),
    "matmul, matrix and vector": (torch.matmul, [floats("n", 8), floats(8)]),
    "matmul, batch and vector": (torch.matmul, [floats("n", 3, 8), floats(8)]),
    "matmul, vector and batch": (torch.matmul, [floats(8), floats("n", 8, 3)]),
    "matmul, batch and matrix": (torch.matmul, [floats("n", 3, 8), floats(8, 5)]),
    "matmul, matrix and batch": (torch.matmul, [floats(5, 8), floats("n", 8, 3)]),
    "matmul, transposed batch": (lambda a, b: a.transpose(0, 1) @ b, [constant(3, "n", 8), constant(8, 5)]),
    "matmul, batches": (torch.matmul, [floats("n", 2, 3, 8), floats("n", 2, 8, 5)]),
    "matmul, one inner element": (torch.matmul, [floats("n", 3, 1), floats(1, 5)]),
    "bmm, one inner element": (torch.bmm, [floats("n", 3, 1), floats("n", 1, 5)]),
    "bmm, one row and column": (torch.bmm, [floats("n", 1, 8), floats("n", 8, 1)]),
    "mm to one column": (torch.mm, [floats("n", 8), floats(8, 1)]),
    "addmm to one column": (torch.addmm, [floats(1), floats("n", 8), floats(8, 1)]),
    "mv": (torch.mv, [floats("n", 8), floats(8)]),
    "addmv": (torch.addmv, [floats("n"), floats("n", 8), floats(8)]),
    "dot": (torch.dot, [floats(8), floats(8)]),
    "vdot": (torch.vdot, [floats(8), floats(8)]),
    "inner": (torch.inner, [floats("n", 8), floats(5, 8)]),
    "outer": (torch.outer, [floats("n"), floats(5)]),
    "addr": (torch.addr, [floats("n", 5), floats("n"), floats(5)]),
    "addbmm": (torch.addbmm, [floats("n", 5), floats(3, "n", 8), floats(3, 8, 5)]),
    "baddbmm": (torch.baddbmm, [floats("n", 4, 5), floats("n", 4, 8), floats("n", 8, 5)]),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 2), [floats("n", 3, 8), floats(3, 8, 5)]),
    "einsum bi,bi->b": (lambda a, b: torch.einsum("bi,bi->b", a, b), [floats("n", 8), floats("n", 8)]),
    "einsum bi,i->b": (lambda a, b: torch.einsum("bi,i->b", a, b), [floats("n", 8), floats(8)]),
    "einsum bhld,bhsd": (
        lambda a, b: torch.einsum("bhld,bhsd->bhls", a, b),
        [floats("n", 2, 4, 8), floats("n", 2, 4, 8)],
    ),
    "matrix_power": (lambda a: torch.matrix_power(a, 5), [floats("n", 4, 4)]),
    "bilinear": (F.bilinear, [floats("n", 8), floats("n", 3), floats(5, 8, 3), floats(5)]),
    "cdist": (torch.cdist, [constant("n", 8), constant(25, 8)]),
    "cosine_similarity": (F.cosine_similarity, [floats("n", 8), floats("n", 8)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (8,), w, b), [floats("n", 3, 8), floats(8), floats(8)]),
    "rms_norm": (lambda x, w: F.rms_norm(x, (8,), w), [floats("n", 3, 8), floats(8)]),
    "group_norm": (
        lambda x, w, b: F.group_norm(x, 2, w, b),
        [floats("n", 8, 3, 3), floats(8), floats(8)],
    ),
    "instance_norm": (F.instance_norm, [floats("n", 8, 3, 3)]),
    "batch_norm, eval": (F.batch_norm, [floats("n", 8, 3), constant(8), constant(8), floats(8), floats(8)]),
    "batch_norm, training": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        [floats("n", 8, 3), floats(8), floats(8)],
    ),
    "cross_entropy": (F.cross_entropy, [floats("n", 8), labels("n")]),
    "cross_entropy, smoothed": (
        lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1, reduction="none"),
        [floats("n", 8), labels("n")],
    ),
    "cross_entropy of probabilities": (F.cross_entropy, [floats("n", 8), constant("n", 8)]),
    "softmax": (lambda x: F.softmax(x, -1), [floats("n", 8)]),
    "softmax in another dtype": (lambda x: F.softmax(x, -1, dtype=torch.float64), [floats("n", 8)]),
    "log_softmax": (lambda x: F.log_softmax(x, -1), [floats("n", 8)]),
    "logsumexp": (lambda x: torch.logsumexp(x, -1), [floats("n", 8)]),
    "gelu": (F.gelu, [floats("n", 8)]),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), [floats("n", 8)]),
    "silu": (F.silu, [floats("n", 8)]),
    "glu": (F.glu, [floats("n", 8)]),
    "dropout": (F.dropout, [floats("n", 8)]),
    "bernoulli": (torch.bernoulli, [constant("n", 8)]),
    "bernoulli of one probability": (lambda x: torch.bernoulli(x, 0.3), [constant("n", 8)]),
    "dropout, mapped": (torch.vmap(lambda x: F.dropout(x, 0.3), randomness="different"), [floats("n", 8)]),
    "randn_like": (torch.randn_like, [constant("n", 8)]),
    "gumbel_softmax": (F.gumbel_softmax, [floats("n", 8)]),
    "var": (lambda x: x.var(-1), [floats("n", 8)]),
    "std_mean": (lambda x: torch.std_mean(x, -1), [floats("n", 8)]),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, dim=-1), [floats("n", 8)]),
    "normalize": (F.normalize, [floats("n", 8)]),
    "prod": (lambda x: x.prod(-1), [floats("n", 8)]),
    "mse_loss": (F.mse_loss, [floats("n", 8), floats("n", 8)]),
    "lerp": (torch.lerp, [floats("n", 8), floats("n", 8), floats("n", 8)]),
    "addcmul": (torch.addcmul, [floats("n", 8), floats("n", 8), floats("n", 8)]),
    "cat": (lambda a, b: torch.cat([a, b]) * 2, [floats("n", 8), floats(3, 8)]),
    "embedding": (lambda i, w: F.embedding(i, w) * 2, [labels("n"), floats(9, 8)]),
    "index_add": (lambda x, i, y: x.index_add(1, i, y), [floats("n", 8), labels(3), floats("n", 3)]),
    "conv2d": (F.conv2d, [floats("n", 3, 8, 8), floats(4, 3, 3, 3), floats(4)]),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 1), [floats("n", 3, 8, 8)]),
}


def on(device, tensor):
    return tensor.detach().to(device).requires_grad_(tensor.requires_grad)


def graphs(fn, makers, n, device="cpu", **how):
    inputs = [on(device, make(n)) for make in makers]
    return [tuple(computing_targets(graph)) for graph in traced(fn, *inputs, **how)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_the_ops_do_not_follow_the_batch(name, device):
    fn, makers = OPS[name]
    alone, pair, several = (graphs(fn, makers, n, device) for n in (1, 2, 7))
    assert alone == pair == several


@pytest.mark.parametrize("name", [name for name in OPS if "matmul" in name or "norm" in name])
def test_the_forward_ops_do_not_follow_dynamic_shapes(name):
    fn, makers = OPS[name]
    assert graphs(fn, makers, 7)[0] == graphs(fn, makers, 7, dynamic=True)[0]


def test_stock_decompositions_follow_the_batch(monkeypatch):
    """Teeth: with Inductor's own table the same comparison fails."""
    monkeypatch.setattr("tracing.decompositions", select_decomp_table)
    fn, makers = OPS["mm to one column"]
    assert graphs(fn, makers, 1) != graphs(fn, makers, 7)


@pytest.mark.parametrize("op", ["mm", "bmm", "addmm", "baddbmm"])
def test_products_are_not_decomposed(op):
    packet = getattr(aten, op)
    others = {getattr(packet, name) for name in packet.overloads()} - {packet.default}
    assert not others & set(decompositions())
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(2, 2, dtype=dtype).expand(3, 2, 2) if "b" in op else torch.ones(2, 2, dtype=dtype)
        operands = [x] * len([a for a in packet.default._schema.arguments if a.type.kind() == "TensorType"])
        assert decompositions()[packet.default](*operands) is NotImplemented


def test_the_table_is_a_copy():
    decompositions().clear()
    assert decompositions() and aten.mm.default in select_decomp_table()


BY_PRODUCTS = {
    "mv": (aten.mv.default, [(5, 8), (8,)], {}),
    "mv of nothing": (aten.mv.default, [(5, 0), (0,)], {}),
    "dot": (aten.dot.default, [(8,), (8,)], {}),
    "vdot": (aten.vdot.default, [(8,), (8,)], {}),
    "addmv": (aten.addmv.default, [(5,), (5, 8), (8,)], {"beta": 0.5, "alpha": 2}),
    "addmv of a scalar": (aten.addmv.default, [(), (5, 8), (8,)], {}),
    "addmv of one element": (aten.addmv.default, [(1,), (5, 8), (8,)], {}),
    "addbmm": (aten.addbmm.default, [(5, 4), (3, 5, 8), (3, 8, 4)], {"beta": 0.5, "alpha": 2}),
    "addbmm of a row": (aten.addbmm.default, [(4,), (3, 5, 8), (3, 8, 4)], {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", BY_PRODUCTS)
def test_relatives_of_products(name, dtype):
    op, shapes, arguments = BY_PRODUCTS[name]
    inputs = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    result = decompositions()[op](*inputs, **arguments)
    assert result.dtype == dtype
    assert_accurate(result, op(*(x.double() for x in inputs), **arguments))


def test_complex_numbers_are_left_alone():
    x = torch.ones(3, dtype=torch.complex64)
    assert decompositions()[aten.dot.default](x, x) is NotImplemented
    assert decompositions()[aten.mv.default](x.expand(2, 3), x) is NotImplemented
