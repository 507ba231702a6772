"""Numbers made from sizes: a kernel of a dynamic graph computes what a static one holds as a constant."""

import math

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloatPow, IntTrueDiv, OpaqueUnaryFn_sin

from bi_inductor import BatchInvarianceError, inspect
from bi_inductor.codegen.triton_sizes import FP64_ONE, SizePrinter
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.offline import compile_offline
from bi_inductor.testing import same_bits

N = sympy.Symbol("ks0", integer=True, positive=True)


def scaled(x):
    n = x.shape[-1]
    return x * (1 / n), x / n, x * (n / 3 + 0.5), x * (1 / math.sqrt(n)), x.mean(-1)


@pytest.mark.parametrize("length", [7, 999])
def test_static_and_dynamic_graphs_agree(length):
    x = torch.randn(5, length)
    static = run_in_interpreter(scaled, x)
    dynamic = run_in_interpreter(scaled, x, dynamic=True)
    for a, b in zip(static, dynamic, strict=True):
        assert same_bits(a, b)
    assert same_bits(dynamic[0], x * (1 / length))


@pytest.mark.lengthy
def test_quotients_are_computed_in_fp64():
    graph = inspect(scaled, torch.randn(5, 999), target="sm_90", dynamic=True)
    assert f"({FP64_ONE} * (1) / (ks0))" in graph.source
    (kernel,) = compile_offline(graph, "sm_90")
    assert "div.rn.f64" in kernel.ptx and "div.full.f32" not in kernel.ptx


def test_what_libraries_round_alike_is_printed_in_fp64():
    printed = SizePrinter().doprint
    assert printed(IntTrueDiv(N, sympy.Integer(3))) == f"({FP64_ONE} * (ks0) / (3))"
    assert printed(FloatPow(N, sympy.Float(0.5))) == f"libdevice.sqrt({FP64_ONE} * (ks0))"


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [-0.5, 0.5])
def test_roots_of_sizes_are_pythons_in_fp32(exponent):
    """A dynamic graph takes them from the GPU's library, which rounds one in four otherwise in fp64."""
    sizes = torch.arange(2, 2**22, dtype=torch.float64)
    python = torch.tensor([n**exponent for n in sizes.tolist()], dtype=torch.float64)
    library = torch.compile(lambda n: n**exponent, backend="batchinv")(sizes.cuda()).cpu()
    assert same_bits(library.float(), python.float())


@pytest.mark.parametrize("number", [OpaqueUnaryFn_sin(N), FloatPow(N, sympy.Float(1.5))])
def test_what_they_do_not_is_refused(number):
    with pytest.raises(BatchInvarianceError, match="no two libraries round this function alike"):
        SizePrinter().doprint(number)
