"""Products of integer matrices: exact, so equal to eager's whatever the order, on every target."""

import pytest
import torch
from devices import DEVICES, compiled

import bi_inductor
from bi_inductor import inspect
from bi_inductor.interpreter import run_in_interpreter

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def integers(*shape, dtype=torch.int8):
    """Values over the whole range of ``dtype``, so that sums leave it."""
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, shape, dtype=dtype)


FAMILY = {
    "mm": (torch.mm, [(5, 70), (70, 9)]),
    "one row": (torch.mm, [(1, 70), (70, 9)]),
    "one column": (torch.mm, [(5, 70), (70, 1)]),
    "no depth": (torch.mm, [(5, 0), (0, 9)]),
    "bmm": (torch.bmm, [(3, 5, 17), (3, 17, 9)]),
    "broadcast": (torch.matmul, [(3, 5, 17), (17, 9)]),
    "mv": (torch.mv, [(5, 70), (70,)]),
    "dot": (torch.dot, [(70,), (70,)]),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, alpha=3, beta=-2), [(9,), (5, 70), (70, 9)]),
    "addmm without bias": (lambda c, a, b: torch.addmm(c, a, b, beta=0), [(5, 9), (5, 70), (70, 9)]),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b, beta=2), [(3, 5, 9), (3, 5, 17), (3, 17, 9)]),
    "linear": (torch.nn.functional.linear, [(2, 5, 17), (9, 17), (9,)]),
    "einsum": (lambda a, b: torch.einsum("bik,bjk->bij", a, b), [(3, 5, 17), (3, 9, 17)]),
}


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_the_family_equals_eager(dtype):
    """All in one graph: compiling takes longer than computing."""

    def family(*groups):
        return [fn(*operands) for (fn, _), operands in zip(FAMILY.values(), groups, strict=True)]

    groups = [[integers(*shape, dtype=dtype) for shape in shapes] for _, shapes in FAMILY.values()]
    for name, ours, eager in zip(FAMILY, compiled(family)(*groups), family(*groups), strict=True):
        assert torch.equal(ours, eager), name
    assert not any("mm" in entry.op for entry in bi_inductor.certificates()[-1].entries)


def test_every_integer_dtype():
    def squares(*matrices):
        return [torch.mm(x, x) for x in matrices]

    matrices = [integers(20, 20, dtype=dtype) for dtype in INTEGERS]
    for ours, eager in zip(compiled(squares)(*matrices), squares(*matrices), strict=True):
        assert torch.equal(ours, eager), eager.dtype


def test_the_form_is_exact():
    compiled(torch.mm)(integers(5, 70), integers(70, 9))
    (form,) = {entry.form for entry in bi_inductor.certificates()[-1].entries} - {""}
    assert form == "Exact(int32, sum, 70)"


@pytest.mark.parametrize("device", DEVICES)
def test_int_mm(device):
    product = compiled(torch._int_mm, dynamic=True)
    for m, n, k in [(1, 1, 1), (2, 5, 3), (33, 24, 64), (17, 40, 8), (300, 72, 1000)]:
        a, b = integers(m, k).to(device), integers(k, n).to(device)
        expected = (a.long().cpu() @ b.long().cpu()).int()
        assert torch.equal(product(a, b).cpu(), expected), (m, n, k)
        assert torch.equal(product(a.t().contiguous().t(), b.t().contiguous().t()).cpu(), expected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 9, 70), (40, 80, 300), (3, 1, 17)], ids=str)
def test_the_tensor_core_kernel_in_the_interpreter(shape):
    m, n, k = shape
    a, b = integers(m, k), integers(n, k).t()
    assert torch.equal(run_in_interpreter(torch._int_mm, a, b), torch._int_mm(a, b))
    assert torch.equal(run_in_interpreter(torch.mm, a, b), a @ b)


def test_dequantising_is_fused_and_reads_the_exact_sum():
    def layer(a, b, scale):
        return (torch._int_mm(a, b).float() * scale).bfloat16() + 1

    a, b, scale = integers(5, 70), integers(9, 70).t(), torch.rand(9)
    assert len(inspect(layer, a, b, scale).kernels) == 1
    assert torch.equal(run_in_interpreter(layer, a, b, scale), layer(a, b, scale))


def test_int8_is_the_one_that_runs_on_tensor_cores():
    def emitted(dtype):
        return inspect(torch.mm, integers(64, 64, dtype=dtype), integers(64, 64, dtype=dtype)).source

    assert "tl.dot(" in emitted(torch.int8)
    assert "tl.dot(" not in emitted(torch.int32)


def test_mistakes_get_eager_s_error():
    with pytest.raises(Exception, match=r"same reduction dim|Incompatible matrix sizes"):
        compiled(torch._int_mm)(integers(5, 70), integers(3, 9))
    with pytest.raises(Exception, match="same dtype"):
        compiled(torch.mm)(integers(5, 70), integers(70, 9, dtype=torch.int64))
    with pytest.raises(Exception, match=r"not implemented for torch\.bool"):
        compiled(torch.mm)(torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool))
