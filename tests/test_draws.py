"""A random number of a Triton kernel follows seed and position: Philox, in whatever kernel, tile or layout."""

import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from devices import compiled
from torch._inductor.codegen.triton import TritonKernelOverrides

from bi_inductor import BatchInvarianceError, inspect
from bi_inductor.codegen.triton import BatchInvariantTritonKernel
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.testing import same_bits

SEED, COLUMNS = 7, 3


def philox(block):
    """The four words of one block: Philox4x32-10 (Salmon et al. 2011) with the seed for its key."""
    words, key = [block, 0, 0, 0], [SEED & 0xFFFFFFFF, SEED >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            (second >> 32) ^ words[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ words[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words


def uniform(count):
    """Triton's numbers in [0, 1) out of words, the first ``count``."""
    words = numpy.array([philox(i // 4)[i % 4] for i in range(count)], dtype=numpy.uint32).view(numpy.int32)
    positive = numpy.where(words < 0, -words - 1, words).astype(numpy.float32)
    return torch.from_numpy(positive * numpy.float32(4.6566127342e-10))


def drawn(shape, seed, kind="rand"):
    return torch.ops.prims.inductor_random(list(shape), seed, kind)


def beside_a_sum(x, seed):
    numbers = drawn(x.shape, seed)
    return numbers, (numbers + x).softmax(-1)


KERNELS = {
    "alone": lambda x, seed: drawn(x.shape, seed) + x,
    "one column": lambda x, seed: (drawn((x.numel(), 1), seed) + 0).view(x.shape) + x,
    "beside a sum": lambda x, seed: beside_a_sum(x, seed)[0],
    "turned": lambda x, seed: (drawn(x.shape, seed) + x).t().contiguous().t(),
    "turned and beside a sum": lambda x, seed: (drawn(x.shape, seed).t() + x.t()).contiguous().t(),
    "from the second": lambda x, seed: drawn((x.numel() + 1,), seed)[1:].view(x.shape) + x,
}


def expected(name, rows):
    numbers = uniform(rows * COLUMNS + 1)
    return (numbers[1:] if name == "from the second" else numbers[:-1]).view(rows, COLUMNS)


@pytest.mark.parametrize("name", KERNELS)
def test_numbers_follow_the_position(name):
    for rows in (1, 2, 8, 50):
        numbers = run_in_interpreter(KERNELS[name], torch.zeros(rows, COLUMNS), torch.tensor(SEED))
        assert same_bits(numbers.contiguous(), expected(name, rows)), rows


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_numbers_follow_the_position_on_a_gpu(name):
    fn = compiled(KERNELS[name], dynamic=False)
    for rows in (1, 2, 8, 50, 5000):
        numbers = fn(torch.zeros(rows, COLUMNS, device="cuda"), torch.tensor(SEED, device="cuda"))
        assert same_bits(numbers.cpu().contiguous(), expected(name, rows)), rows


@pytest.mark.parametrize("kind", ["rand", "randn"])
def test_few_numbers(kind):
    """Of one and two elements a tile is smaller than a block of words."""

    def fn(x, seed):
        return drawn(x.shape, seed, kind) + x

    many = run_in_interpreter(fn, torch.zeros(64), torch.tensor(SEED))
    for count in (1, 2, 3, 9):
        assert same_bits(run_in_interpreter(fn, torch.zeros(count), torch.tensor(SEED)), many[:count]), count


def test_normal_numbers_are_normal():
    numbers = run_in_interpreter(
        lambda x, s: drawn(x.shape, s, "randn") + x, torch.zeros(20000), torch.tensor(SEED)
    ).double()
    assert abs(numbers.mean()) < 5 / math.sqrt(20000) and abs(numbers.std() - 1) < 0.03
    assert (
        abs((numbers[1:] * numbers[:-1]).mean()) < 0.04
        and abs((numbers.abs() < 1).double().mean() - 0.6827) < 0.02
    )


def test_numbers_drawn_as_stock_draws_them_are_found(monkeypatch):
    """Guard: from torch 2.13 they would follow fusion; the verifier reads every kernel."""
    monkeypatch.setattr(BatchInvariantTritonKernel, "overrides", TritonKernelOverrides)
    for fn in (lambda x: F.dropout(x, 0.5), torch.randn_like, lambda x: F.dropout(x.softmax(-1), 0.5)):
        with pytest.raises(BatchInvarianceError, match=r"tl\.randn?|triton_helpers\.randn?4x"):
            inspect(lambda x, fn=fn: fn(x) + 1, torch.zeros(8, 64), target="sm_90")
