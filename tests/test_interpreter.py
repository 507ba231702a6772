"""Emitted Triton reductions, executed in Triton's interpreter, give the oracle's bits."""

import numpy
import pytest
import torch
from devices import random_rows
from inspected import REDUCTIONS, WIDTH, Block

from bi_inductor import oracle
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.testing import bits, same_bits


class Numpy:
    """The interpreter's elementary functions, for the oracle: numpy's."""

    div = staticmethod(torch.div)
    exp = staticmethod(lambda x: torch.from_numpy(numpy.exp(x.numpy())))
    log = staticmethod(lambda x: torch.from_numpy(numpy.log(x.numpy())))


EXPECTED = {
    "sum inner": lambda x: oracle.tree_sum(x, -1),
    "sum outer": lambda x: oracle.tree_sum(x, 0),
    "sum middle": lambda x: oracle.tree_sum(x.unflatten(1, (4, -1)), 1),
    "sum two dims": lambda x: oracle.tree_sum(x.unflatten(1, (4, -1)), (0, 2)),
    "sum all": lambda x: oracle.tree_sum(x),
    "mean": lambda x: oracle.mean(x, -1),
    "prod": lambda x: oracle.tree_prod(1 + x / 1024, -1),
    "var": lambda x: oracle.var_mean(x, -1)[0],
    "softmax": lambda x: oracle.softmax(x, elementwise=Numpy),
    "logsumexp": lambda x: oracle.logsumexp(x, elementwise=Numpy),
    "argmax": lambda x: (x.argmax(-1), x.amin(-1)),
    "any": lambda x: (x > 3).any(-1),
}

#: A persistent kernel, a looped one with a short last block, one element, a power of two.
SHAPES = [(3, 300), (2, 5000), (5, 4), (4, 1024)]


def assert_same(actual, expected):
    actual = actual if isinstance(actual, tuple) else (actual,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, e in zip(actual, expected, strict=True):
        assert same_bits(a, e), (bits(a) != bits(e)).sum()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EXPECTED)
def test_reductions_equal_the_oracle(name, shape):
    x = random_rows(*shape)
    assert_same(run_in_interpreter(REDUCTIONS[name], x), EXPECTED[name](x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["sum inner", "sum outer", "mean"])
def test_other_dtypes_equal_the_oracle(name, dtype):
    x = random_rows(3, 300, dtype=dtype)
    assert_same(run_in_interpreter(REDUCTIONS[name], x), EXPECTED[name](x).to(dtype))


def test_one_kernel_copies_many_tensors():
    """More than eight inputs are joined so. If they are alike, torch 2.14 writes one copy, with pointers to choose."""
    parts = [random_rows(4, 300, seed=seed) for seed in range(20)]

    def joined(*parts):
        return torch.cat(parts)

    assert_same(run_in_interpreter(joined, *parts), joined(*parts))


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_other_targets_have_the_same_bits(target):
    x = random_rows(3, 5000)
    assert_same(run_in_interpreter(lambda x: x.sum(-1), x, target=target), oracle.tree_sum(x, -1))


@pytest.mark.parametrize("config_number", range(4))
@pytest.mark.parametrize("name", ["sum inner", "sum outer", "sum all", "var"])
def test_every_configuration_has_the_same_bits(name, config_number):
    x = random_rows(40, 3000)
    assert_same(run_in_interpreter(REDUCTIONS[name], x, config_number=config_number), EXPECTED[name](x))


@pytest.mark.parametrize("length", [1, 2, 7, 1025, 5000])
def test_dynamic_shapes_equal_the_oracle(length):
    x = random_rows(3, length)
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(x, dim) if x.shape[dim] > 1 else None
    result = run_in_interpreter(lambda x: x.sum(-1), x, dynamic=True)
    assert_same(result, oracle.tree_sum(x, -1))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -0.0], ids=str)
def test_special_values(special):
    x = torch.full((2, 300), -0.0)
    x[0, 7] = special
    assert_same(run_in_interpreter(lambda x: x.sum(-1), x), oracle.tree_sum(x, -1))


def test_strided_inputs_have_the_bits_of_their_logical_order():
    x = random_rows(300, 6)
    assert_same(run_in_interpreter(lambda x: x.sum(-1), x.t()), oracle.tree_sum(x.t().contiguous(), -1))
    y = random_rows(4, 700)[:, ::2]
    assert_same(run_in_interpreter(lambda x: x.sum((0, 1)), y), oracle.tree_sum(y.contiguous(), (0, 1)))


def test_several_kernels_and_outputs():
    def fn(x, g):
        y = (x - x.mean(-1, keepdim=True)) * g
        return y.sum(0), y.sum(1), x

    x, g = random_rows(6, 200), random_rows(200, seed=1)
    y = (x - oracle.mean(x, -1)[:, None]) * g
    assert_same(run_in_interpreter(fn, x, g), (oracle.tree_sum(y, 0), oracle.tree_sum(y, 1), x))


def test_a_whole_block_is_close_and_its_rows_are_alone():
    model, x = Block().eval(), random_rows(5, WIDTH)
    together = run_in_interpreter(model, x)
    torch.testing.assert_close(together, model(x), atol=1e-5, rtol=1e-5)
    for row in range(5):
        assert same_bits(run_in_interpreter(model, x[row : row + 1])[0], together[row])


def test_the_interpreter_notices_another_order():
    """The harness has teeth: the same sum of reversed rows is another tree."""
    x = random_rows(3, 300)
    assert not same_bits(run_in_interpreter(lambda x: x.sum(-1), x.flip(-1)), oracle.tree_sum(x, -1))


def test_failures_show_the_worker_s_traceback():
    from bi_inductor.interpreter import run_module

    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_module("1 / 0", [])
