"""Strides found term by term are Inductor's."""

import pytest
import sympy
from torch._inductor.codegen import cpp
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from bi_inductor.codegen.cpp_strides import stride_at_vec_range

X, Y, Z, ROWS, WIDTH = sympy.symbols("d0 d1 d2 s0 s1", integer=True, nonnegative=True)

INDICES = [
    X,
    Y,
    5 * X + Y,
    WIDTH * (ROWS * X + Y) + 3 * X + Z,
    (X + 1) * (WIDTH + 2) - 2 * X,
    X * Y + X,
    FloorDiv(X, 16) + 3 * X,
    FloorDiv(X, 3) * WIDTH + ModularIndexing(X, 1, 3),
    WIDTH * ModularIndexing(X, 1, 32) + FloorDiv(Y, 5),
    ModularIndexing(X, 4, 8) * (ROWS + WIDTH) + X * WIDTH,
    ModularIndexing(X + 5 * Y, 2, 7),
    sympy.S(7),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("vector", [None, 8, 16])
def test_a_stride_is_inductors(index, vector):
    ours = stride_at_vec_range(index, X, vector, cpp.stride_at_vec_range)
    stock = cpp.stride_at_vec_range(index, X, vector)
    assert sympy.simplify(ours - stock) == 0 and ours.is_number == stock.is_number
    assert ours.has(X) == stock.has(X)
