"""C++ kernels: sums in tree order under every schedule."""

from unittest import mock

import pytest
import torch
from cpp_schedules import SCHEDULES, compiled, compiler, kernel_source, rows_of
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.virtualized import V

from bi_inductor import oracle
from bi_inductor.codegen import cpp as ours
from bi_inductor.errors import BatchInvarianceError
from bi_inductor.testing import same_bits

F = torch.nn.functional
NAN = float("nan")
INF = float("inf")
SHAPES = [(2, 65537), (3, 4097), (257, 33), (31, 32), (64, 31), (11, 127), (9, 128), (8, 129), (7, 1023)]
SHAPES += [(2, 1024), (3, 1025), (255, 9), (256, 513), (1024, 63), (1025, 64), (4099, 2)]


# ---------------------------------------------------------------- sums and products


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sums_equal_the_oracle(schedule: str) -> None:
    """Inner, outer and full sums of contiguous and transposed rows; one compiled function for all lengths."""

    def sums(x, factors):
        return x.sum(-1), x.sum(0), x.sum(), x.t().sum(-1), x.t().sum(0), factors.prod(-1)

    call = compiler(sums, schedule=schedule, dynamic=True)
    for rows, length in SHAPES:
        x = rows_of(length, rows)
        inner, outer, everything, transposed_inner, transposed_outer, product = call(x, 1 + x / 50)
        assert same_bits(inner, oracle.tree_sum(x, 1))
        assert same_bits(outer, oracle.tree_sum(x, 0))
        assert same_bits(everything, oracle.tree_sum(x))
        assert same_bits(transposed_inner, outer)
        assert same_bits(transposed_outer, inner)
        assert same_bits(product, oracle.tree_prod(1 + x / 50, 1))


@pytest.mark.parametrize("length", [8, 33, 1024, 4097])
def test_sums_of_static_lengths_equal_the_oracle(length: int) -> None:
    x = rows_of(length)
    inner, outer = compiled(lambda x: (x.sum(-1), x.t().contiguous().sum(0)), x)
    assert same_bits(inner, oracle.tree_sum(x, 1))
    assert same_bits(outer, inner)


LAYOUTS = {
    "middle": (lambda x: x, (1,)),
    "outer two": (lambda x: x, (0, 1)),
    "inner two": (lambda x: x, (1, 2)),
    "first and last": (lambda x: x, (0, 2)),
    "all": (lambda x: x, (0, 1, 2)),
    "strided": (lambda x: x[:, ::2, 1::3], (2,)),
    "permuted": (lambda x: x.permute(2, 0, 1), (1, 2)),
    "permuted, logical order": (lambda x: x.permute(2, 1, 0), (1, 2)),
    "permuted, all": (lambda x: x.permute(1, 2, 0), (0, 1, 2)),
    "broadcast": (lambda x: x[:, :1].expand(-1, 37, -1), (1,)),
}


@pytest.mark.parametrize("schedule", ["default", "scalar", "along", "across"])
def test_sums_of_any_layout_equal_the_oracle(schedule: str) -> None:
    """Reduced dimensions are visited in logical order, whatever their strides."""
    x = torch.randn(13, 34, 41, generator=torch.Generator().manual_seed(0))

    def sums(x):
        return [view(x).sum(dims) for view, dims in LAYOUTS.values()]

    results = compiled(sums, x, schedule=schedule)
    wrong = [
        name
        for (name, (view, dims)), result in zip(LAYOUTS.items(), results, strict=True)
        if not same_bits(result, oracle.tree_sum(view(x), dims))
    ]
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", ["default", "scalar", "across"])
def test_sums_of_other_dtypes_equal_the_oracle(dtype: torch.dtype, schedule: str) -> None:
    """fp64 in fp64; bf16 and fp16 in fp32, rounded once, and read as rounded by what is fused behind the sum."""

    def sums(x):
        totals = x.sum(-1), x.t().sum(0), x.sum(0), x.prod(-1)
        return *totals, *(total * 3 for total in totals)

    call = compiler(sums, schedule=schedule, dynamic=True)
    for length in (17, 100, 1030):
        x = rows_of(length, 19, dtype)
        results = call(x)
        inner, outer = (oracle.tree_sum(x, dim).to(dtype) for dim in (1, 0))
        expected = [inner, inner, outer, oracle.tree_prod(x, 1).to(dtype)]
        assert all(map(same_bits, results[:4], expected))
        assert all(map(same_bits, results[4:], [total * 3 for total in expected]))


@pytest.mark.parametrize("length", [65537, 131072])
def test_threads_do_not_share_a_sum(length: int) -> None:
    """Few long rows are where Inductor would let them."""
    x = rows_of(length, 1)[0]
    assert same_bits(compiled(torch.sum, x), oracle.tree_sum(x))
    assert "omp for" not in kernel_source(torch.sum, x)


@pytest.mark.parametrize("schedule", ["default", "scalar", "scalar tails"])
def test_sums_over_transposed_tiles_equal_the_oracle(schedule: str) -> None:
    """Operands contiguous along different axes make Inductor transpose tiles, with tails on both axes."""
    x, y = rows_of(45, 37), rows_of(37, 45)

    def sums(x, y):
        z = x + y.t()
        return z.sum(-1), z.sum(0), z.sum(), z * 2

    *totals, doubled = compiled(sums, x, y, schedule=schedule)
    z = x + y.t()
    expected = [oracle.tree_sum(z, 1), oracle.tree_sum(z, 0), oracle.tree_sum(z), z * 2]
    assert all(map(same_bits, [*totals, doubled], expected))
    assert ("transpose_mxn" in kernel_source(sums, x, y, schedule=schedule)) == (schedule != "scalar")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_have_one_nan(dtype: torch.dtype) -> None:
    """Whether a sum is finished as a scalar or as a lane, and whichever NaN went in."""
    x = rows_of(100, 24, dtype)
    x[1, 5], x[2, 7], x[3, 9], x[3, 11], x[4, 0], x[4, 99] = NAN, -NAN, INF, -INF, NAN, -NAN
    scalar, lane = compiled(lambda x, y: (x.sum(-1), y.sum(0)), x, x.t().contiguous())
    assert same_bits(scalar, lane)
    assert scalar[1:5].isnan().all()
    assert same_bits(scalar[1:5], scalar[1].expand(4))


def test_a_zero_total_is_positive() -> None:
    x = torch.full((3, 64), -0.0)  # a power of two: no pad adds a positive zero
    for schedule in ("default", "scalar", "across"):
        assert same_bits(compiled(lambda x: x.sum(-1), x, schedule=schedule), torch.zeros(3))


@pytest.mark.lengthy
def test_rows_are_not_disturbed() -> None:
    """All rows of layer norm, softmax and sums, for batches on both sides of vectors and threads."""
    rows = torch.randn(257, 100, generator=torch.Generator().manual_seed(1)) * 3
    rows[5, 3], rows[7, 0] = NAN, INF

    def model(x):
        x = torch.nn.functional.layer_norm(x, (100,))
        return x.softmax(-1), x.logsumexp(-1), x.var(-1), (x.bfloat16() * 2).sum(-1), x.amax(-1)

    whole = compiled(model, rows)
    dynamic = compiler(model, dynamic=True)
    for call, batches in ((compiler(model), (1, 3)), (dynamic, (2, 7, 8, 9, 31, 64, 255, 256, 257))):
        for batch in batches:
            for result, expected in zip(call(rows[:batch]), whole, strict=True):
                assert same_bits(result, expected[:batch])


# ---------------------------------------------------------------- maxima


@pytest.mark.parametrize("schedule", ["default", "scalar", "along", "across", "scalar tails"])
def test_extremes_do_not_depend_on_the_schedule(schedule: str) -> None:
    """Zeros of both signs and NaNs of several payloads; the first of equal extremes is the index."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-1, 2, (24, 61), generator=generator) * torch.tensor(0.0)
    x[3] = -0.0
    x[4, 7:] = NAN
    x[5, 9] = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    x[6] = torch.randint(0, 3, (61,), generator=generator).float()

    def extremes(x, y):
        return (
            x.amax(-1),
            x.amin(-1),
            y.amax(0),
            y.amin(0),
            x.argmax(-1),
            x.argmin(-1),
            y.argmax(0),
            y.argmin(0),
        )

    y = x.t().contiguous()
    results = compiled(extremes, x, y, schedule=schedule)
    assert all(map(same_bits, results[:2], results[2:4]))
    assert all(map(same_bits, results, compiled(extremes, x, y)))
    assert torch.equal(results[4], x.argmax(-1))
    assert torch.equal(results[6], x.argmax(-1))


# ---------------------------------------------------------------- what kernels look like


def test_rows_stay_vectorised() -> None:
    source = kernel_source(lambda x: F.layer_norm(x, (384,)).softmax(-1), torch.randn(64, 384))
    lanes = pick_vec_isa().nelements()  # fp32 values in a vector of this machine
    assert source.count(f"x1+=static_cast<int64_t>({lanes}L)") >= 4
    assert "x1+=static_cast<int64_t>(1L)" not in source


def test_an_atomic_addition_is_refused() -> None:
    kernel = ours.OrderedKernel.__new__(ours.OrderedKernel)
    graph = mock.Mock(get_dtype=lambda name: torch.float32)
    with V.set_graph_handler(graph), pytest.raises(BatchInvarianceError):
        kernel.store("buf0", 0, None, mode="atomic_add")
