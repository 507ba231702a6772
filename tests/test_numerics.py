"""Fused equals unfused: rounding, multiplication and addition do not depend on what shares a kernel."""

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES, compiled, over_batches, random_rows

import bi_inductor
from bi_inductor.testing import changed_rows_over_batches, same_bits

UNFUSED = {"max_fusion_size": 1, "epilogue_fusion": False}
#: Inlining a producer into its consumer is fusion too: at one read, everything is stored first.
STORED = {**UNFUSED, "realize_reads_threshold": 0, "realize_opcount_threshold": 0}


def chain(x, w):
    y = x * 1.1 + w
    y = torch.sigmoid(y) * x - w * y
    return torch.tanh(y) + y / (1 + w * w), y


def norm_and_gelu(x, w):
    h = F.rms_norm(x, x.shape[-1:], w)
    return F.gelu(h) * h + x


def softmax_twice(x, w):
    return ((x * w).softmax(-1) * x).softmax(-1).sum(-1)


def mlp(x, w):
    weight = torch.outer(w, w) / w.numel()
    hidden = F.silu(x @ weight) * (x @ weight.t())
    return hidden @ weight + x


def multiply_add(x, w):
    return x * w + x, x * w - w


GRAPHS = {f.__name__: f for f in (chain, norm_and_gelu, softmax_twice, mlp, multiply_add)}


def together(x, w):
    """One graph of all: compiling C++ is what takes the time on a CPU."""
    return [graph(x, w) for graph in GRAPHS.values()]


CASES = [pytest.param("cpu", together, id="cpu-all")] + [
    pytest.param("cuda", graph, id=f"cuda-{name}", marks=pytest.mark.gpu) for name, graph in GRAPHS.items()
]


@pytest.mark.lengthy
@pytest.mark.parametrize(("device", "graph"), CASES)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.gpu)]
)
def test_fused_equals_unfused(graph, dtype, device):
    arguments = (
        random_rows(9, 130, dtype=dtype, device=device),
        random_rows(130, dtype=dtype, device=device),
    )
    results = []
    for options in ({}, UNFUSED, STORED):
        torch._dynamo.reset()
        results.append(compiled(graph, options=options)(*arguments))
    results = [torch.utils._pytree.tree_leaves(result) for result in results]
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


@pytest.mark.parametrize(("device", "graph"), CASES)
def test_fused_rows_do_not_depend_on_the_batch(graph, device):
    w = random_rows(130, dtype=torch.bfloat16, device=device)
    x = random_rows(64, 130, dtype=torch.bfloat16, device=device)
    fn = over_batches(lambda x: graph(x, w))
    changed = changed_rows_over_batches(fn, [x], [1, 2, 3, 8, 31, 64])
    assert not any(changed.values()), changed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_break_changes_nothing(dtype, device):
    def whole(x, w):
        return norm_and_gelu(softmax_twice(x, w).unsqueeze(-1) * x, w)

    def broken(x, w):
        y = softmax_twice(x, w).unsqueeze(-1) * x
        torch._dynamo.graph_break()
        return norm_and_gelu(y, w)

    arguments = (
        random_rows(9, 130, dtype=dtype, device=device),
        random_rows(130, dtype=dtype, device=device),
    )
    assert same_bits(compiled(whole)(*arguments), compiled(broken)(*arguments))


@pytest.mark.parametrize("device", DEVICES)
def test_low_precision_ops_round_where_eager_rounds(device):
    """x + 1 in bf16 loses what a fused fp32 intermediate would keep."""
    x = random_rows(4, 64, dtype=torch.bfloat16, device=device)

    def fn(x):
        return (x + 256.0) - 256.0

    assert same_bits(compiled(fn)(x), fn(x))


@pytest.mark.parametrize("device", DEVICES)
def test_no_contraction_of_multiply_and_add(device):
    x, y = (random_rows(64, 64, device=device, seed=seed) for seed in (1, 2))
    assert same_bits(compiled(lambda x, y: x * y + x)(x, y), (x * y) + x)


@pytest.mark.gpu
def test_tensors_that_one_kernel_copies_are_eagers():
    """More than eight inputs of fixed size are joined by one kernel, each by programs of its own."""

    def joined(*parts):
        return torch.cat(parts, -1)

    parts = [random_rows(257, 30 + i % 3, device="cuda", seed=i) for i in range(20)]
    run = compiled(joined, dynamic=False)
    assert same_bits(run(*parts), joined(*parts))
    assert any("foreach" in str(kernel) for kernel in bi_inductor.certificates()[-1].kernels)
    assert not any(changed_rows_over_batches(run, parts, (1, 2, 64, 257)).values())
