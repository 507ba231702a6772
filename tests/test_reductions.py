"""Reductions: rows that do not depend on the batch, and bits equal to the oracle's order."""

import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES, compiled, over_batches, random_rows

from bi_inductor import oracle
from bi_inductor.testing import BATCH_LADDER, changed_rows_over_batches, same_bits

LENGTHS = [1, 2, 7, 8, 31, 33, 129, 1023, 1024, 1025, 4097, 8191, 65537, 131072]

#: Written out, in a loop and in chunks. A CPU takes half a minute for each and has some of them.
SOME_LENGTHS = [1, 7, 33, 1025, 4097, 65537]


def lengths(*on_cpu, on_gpu):
    return [("cpu", length) for length in on_cpu] + [
        pytest.param("cuda", length, marks=pytest.mark.gpu) for length in on_gpu
    ]


ROW_FUNCTIONS = {
    "sum": lambda x: x.sum(-1),
    "mean": lambda x: x.mean(-1),
    "prod": lambda x: (1 + x / 1e4).prod(-1),
    "var": lambda x: x.var(-1, correction=0),
    "std_mean": lambda x: torch.std_mean(x, -1, correction=0),
    "norm": lambda x: torch.linalg.vector_norm(x, 2, -1),
    "norm1": lambda x: x.norm(p=1, dim=-1),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "extremes": lambda x: (x.amax(-1), x.amin(-1), x.argmax(-1), x.argmin(-1)),
    "any_all": lambda x: ((x > 2).any(-1), (x > -2).all(-1)),
    "two_sums": lambda x: (x.sum(-1), (x * x).sum(-1)),
}


def ladder(device, length):
    """Batch sizes for a row length: all of them where that is cheap."""
    largest = 2048 if device == "cuda" and length < 2000 else 257 if length < 2000 else 9
    return [size for size in BATCH_LADDER if size <= largest]


def together(functions):
    """One graph of several functions: compiling C++ is what takes the time on a CPU."""
    return lambda x: [fn(x) for fn in functions]


SOME = together([ROW_FUNCTIONS[name] for name in ("sum", "var", "softmax", "layer_norm", "logsumexp")])

#: On the CPU many functions in one graph; on a GPU each in a graph of its own.
ROW_CASES = [
    pytest.param("cpu", SOME, 7, id="7-cpu-some"),
    pytest.param("cpu", together(ROW_FUNCTIONS.values()), 1025, id="1025-cpu-all"),
    pytest.param("cpu", SOME, 65537, id="65537-cpu-some"),
] + [
    pytest.param("cuda", fn, length, id=f"{length}-cuda-{name}", marks=pytest.mark.gpu)
    for length in SOME_LENGTHS
    for name, fn in ROW_FUNCTIONS.items()
]


@pytest.mark.lengthy
@pytest.mark.parametrize(("device", "fn", "length"), ROW_CASES)
def test_rows_do_not_depend_on_the_batch(length, device, fn):
    batches = ladder(device, length)
    x = random_rows(max(batches), length, device=device)
    changed = changed_rows_over_batches(over_batches(fn), [x], batches)
    assert set(changed) == set(batches) and not any(changed.values()), changed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_other_dtypes(dtype, device):
    batches = [1, 2, 3, 8, 31, 257]
    x = random_rows(257, 1000, device=device, dtype=dtype)
    changed = changed_rows_over_batches(compiled(SOME, dynamic=True), [x], batches)
    assert not any(changed.values()), changed


@pytest.mark.parametrize(("device", "length"), lengths(1, 8, 33, 1023, 4097, 131072, on_gpu=LENGTHS))
def test_sums_equal_the_oracle(length, device):
    def fn(x):
        return x.sum(-1), x.mean(-1), *torch.var_mean(x, -1, correction=0), (1 + x / 1e6).prod(-1)

    x = random_rows(3, length, device=device)
    total, mean, variance, also_mean, product = compiled(fn)(x)
    elementwise = device_elementwise()
    assert same_bits(product, oracle.tree_prod(1 + elementwise.div(x, torch.full_like(x, 1e6)), -1))
    assert same_bits(total, oracle.tree_sum(x, -1))
    assert same_bits(mean, oracle.mean(x, -1, elementwise=elementwise))
    expected_variance, expected_mean = oracle.var_mean(x, -1, correction=0, elementwise=elementwise)
    assert same_bits(also_mean, expected_mean)
    assert same_bits(variance, expected_variance)


@pytest.mark.parametrize(("device", "length"), lengths(1, 33, 4097, on_gpu=SOME_LENGTHS))
def test_softmax_and_logsumexp_equal_the_oracle(length, device):
    x = random_rows(3, length, device=device)
    elementwise = device_elementwise()
    softmax, logsumexp = compiled(lambda x: (x.softmax(-1), x.logsumexp(-1)))(x)
    assert same_bits(softmax, oracle.softmax(x, elementwise=elementwise))
    assert same_bits(logsumexp, oracle.logsumexp(x, elementwise=elementwise))


def device_elementwise():
    """exp, log and div as the target computes them, each compiled alone."""
    return types.SimpleNamespace(
        exp=compiled(lambda x: torch.exp(x), dynamic=True),
        log=compiled(lambda x: torch.log(x), dynamic=True),
        div=compiled(lambda x, y: torch.div(x, y), dynamic=True),
    )


DIMS = {
    "inner": ((37, 65), 1),
    "outer": ((1030, 37), 0),
    "outer_few": ((3, 37), 0),
    "middle": ((5, 1030, 7), 1),
    "first_two": ((5, 33, 7), (0, 1)),
    "last_two": ((5, 33, 7), (1, 2)),
    "outer_and_inner": ((5, 7, 33), (0, 2)),
    "all": ((5, 33, 7), None),
    "long_outer": ((20000, 8), 0),
    "one_long": ((1, 131072), 1),
}


LAYOUTS = ["contiguous", "transposed", "strided", "expanded", "offset"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", DIMS)
def test_any_dims_and_strides_have_the_logical_order(case, device):
    shape, dim = DIMS[case]
    inputs = [with_layout(random_rows(*shape, device=device), layout) for layout in LAYOUTS]
    fn = compiled(lambda *inputs: [x.sum(dim) if dim is not None else x.sum() for x in inputs])
    for x, total, layout in zip(inputs, fn(*inputs), LAYOUTS, strict=True):
        assert same_bits(total, oracle.tree_sum(x, dim)), layout


def with_layout(x, layout):
    """A tensor equal to ``x`` (or to a repeated slice of it) with other strides."""
    if layout == "transposed":
        order = tuple(range(x.ndim))[::-1]
        return x.permute(order).contiguous().permute(order)
    if layout == "strided":
        return torch.stack([x, -x], -1)[..., 0]
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "offset":
        return torch.cat([x.flatten()[:3], x.flatten()])[3:].view(x.shape)
    return x


@pytest.mark.parametrize("device", DEVICES)
def test_neighbours_do_not_matter(device):
    def fn(x):
        return (x.sum(-1), x.softmax(-1), F.layer_norm(x, x.shape[-1:]), x.var(-1))

    fast, x = compiled(fn, dynamic=True), random_rows(9, 300, device=device)
    expected = fast(x)
    for poison in (float("nan"), float("inf"), -float("inf"), 3e38, 1e-42, -0.0):
        y = x.clone()
        y[::2] = poison
        for before, after in zip(expected, fast(y), strict=True):
            assert same_bits(before[1::2], after[1::2]), poison


@pytest.mark.parametrize("device", DEVICES)
def test_order_of_rows_does_not_matter(device):
    fn, x = compiled(lambda x: (x.sum(-1), x.softmax(-1)), dynamic=True), random_rows(257, 129, device=device)
    order = torch.randperm(257, generator=torch.Generator().manual_seed(1)).to(device)
    for straight, shuffled in zip(fn(x), fn(x[order].contiguous()), strict=True):
        assert same_bits(straight[order], shuffled)


@pytest.mark.parametrize("device", DEVICES)
def test_the_sign_of_a_zero_and_the_payload_of_a_nan_are_fixed(device):
    zeros = torch.tensor([[-0.0, 0.0], [0.0, -0.0], [-0.0, -0.0]], device=device)
    fn = compiled(lambda x: (x.amax(-1), x.amin(-1), x.sum(-1)))
    for result in fn(zeros):
        assert same_bits(result, torch.zeros(3, device=device))
    quiet = torch.tensor([[0x7FC00001, 0x7FC00000], [0x7FC00000, 0xFFC00002 - 2**32]], dtype=torch.int32)
    for result in fn(quiet.view(torch.float32).to(device)):
        assert same_bits(result[:1], result[1:])


@pytest.mark.parametrize("device", DEVICES)
def test_padding_a_sum_with_zeros_does_not_change_it(device):
    fn, x = compiled(lambda x: x.sum(-1), dynamic=True), random_rows(8, 1000, device=device)
    for padding in (1, 24, 25, 500, 4000):
        assert same_bits(fn(x), fn(F.pad(x, (0, padding))))


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_static_and_dynamic_lengths_agree(device):
    def fn(x):
        return (x.sum(-1), x.prod(-1), x.softmax(-1), x.var(-1, correction=0), x.mean(-1))

    dynamic = compiled(fn, dynamic=True)
    for length in (1, 2, 8, 33, 20000) if device == "cpu" else LENGTHS:
        x = random_rows(5, length, device=device)
        torch._dynamo.reset()
        for a, b in zip(compiled(fn, dynamic=False)(x), dynamic(x), strict=True):
            assert same_bits(a, b), length


@pytest.mark.parametrize("device", DEVICES)
def test_group_norm(device):
    fn = compiled(lambda x: F.group_norm(x, 4), dynamic=True)
    x = random_rows(31, 16, 9, 5, device=device)
    changed = changed_rows_over_batches(fn, [x], [1, 2, 3, 8, 31])
    assert not any(changed.values()), changed


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_stock_inductor_violates_what_is_tested_here(device):
    """Negative control: the harness finds a batch that changes stock's rows."""

    def changed(name, dynamic, length):
        torch._dynamo.reset()
        fn = torch.compile(ROW_FUNCTIONS[name], backend="inductor", dynamic=dynamic)
        x = random_rows(9, length, device=device)
        return sum(changed_rows_over_batches(fn, [x], [1, 3, 9]).values())

    names = ("sum", "var", "layer_norm", "softmax")
    tried = [("sum", False, 100_000), *itertools.product(names, (True, False), (4097,))]
    assert any(changed(*case) for case in tried)


def test_a_short_bf16_sum_beside_fp16():
    """Written out, it stands in a kernel that holds values of another dtype."""
    x, y = random_rows(9, 5, 24, dtype=torch.bfloat16), random_rows(9, 24)
    total, product = compiled(lambda x, y: (x.sum(1), x.sum(1) * y.half()), dynamic=False)(x, y)
    assert same_bits(total, oracle.tree_sum(x, 1).bfloat16())
    assert same_bits(product, total * y.half())
