"""C++ kernels: one implementation per elementary function, rounding at every op, one NaN."""

from collections.abc import Callable

import pytest
import torch
from cpp_schedules import compiled, compiler, kernel_source, rows_of
from torch._inductor.utils import run_and_get_code

from bi_inductor import oracle
from bi_inductor.testing import same_bits

NAN = float("nan")
INF = float("inf")

# ---------------------------------------------------------------- elementary functions

F = torch.nn.functional
UNARY = {
    **{
        name: getattr(torch, name)
        for name in """exp exp2 expm1 log log2 log10 log1p sin cos tan tanh sinh cosh asin acos atan asinh acosh
        atanh erf erfc erfinv lgamma digamma sqrt rsqrt reciprocal round floor trunc frac sign abs neg sigmoid
        signbit isnan isinf nan_to_num""".split()
    },
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "softplus": F.softplus,
    "elu": F.elu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "relu": F.relu,
    "clamp": lambda x: x.clamp(-1, 1),
    "divided": lambda x: x / 3,
    "cube": lambda x: x**3,
    "power": lambda x: x**2.5,
}
BINARY = {
    **{
        name: getattr(torch, name)
        for name in """pow fmod remainder atan2 hypot nextafter copysign maximum minimum fmax fmin add mul sub div
        logaddexp xlogy lerp_ addcmul_""".split()
        if not name.endswith("_")
    },
    "floor division": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "where": lambda x, y: torch.where(x > y, x, y * 2),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
}
CASTS = {
    str(dtype): lambda x, dtype=dtype: x.to(dtype)
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
}
FUNCTIONS = {**UNARY, **BINARY, **CASTS}


def _specimens(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """512 pairs of values: the specials, where Sleef changes its ways, both signs, 12 decades."""
    generator = torch.Generator().manual_seed(4)
    special = [0.0, -0.0, 1, NAN, -NAN, INF, -INF, -1, 0.5, 2, 1e-38, 1e-45, 3e38, -3.5, 124, 126, 1e5, 39001]
    special += [1e15, 1e30, -170.3, 88.8, -104, 710, 2.5, -2.5, 300, -129, 3e9, 65504, 65520, 448, 464, 57344]
    special += [61440, 14.9]
    x = (torch.rand(512, generator=generator, dtype=torch.float64) * 28 - 14).exp()
    x *= torch.where(torch.rand(512, generator=generator) < 0.5, -1, 1)
    x[: len(special)] = torch.tensor(special, dtype=torch.float64)
    x[100:300] = torch.randn(200, generator=generator, dtype=torch.float64)
    y = x[torch.randperm(512, generator=generator)]
    y[: len(special)] = x[: len(special)].flip(0)
    return x.to(dtype), y.to(dtype)


def _apply(names: list[str]) -> Callable:
    return lambda x, y: [FUNCTIONS[name](x, y) if name in BINARY else FUNCTIONS[name](x) for name in names]


def _in_groups(names: list[str], size: int = 26) -> list[list[str]]:
    return [names[i : i + size] for i in range(0, len(names), size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", _in_groups(list(FUNCTIONS)), ids=lambda names: names[0])
def test_a_value_has_the_same_bits_in_every_place(names: list[str], dtype: torch.dtype) -> None:
    """A vector's lane, beside other neighbours, at another alignment, in a masked tail and in a scalar kernel."""
    x, y = _specimens(dtype)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    places = torch.cat([torch.arange(len(x)), order, torch.arange(3, len(x)).flip(0)])
    assert len(places) % 16 == 13
    vector, (code,) = run_and_get_code(compiler(_apply(names)), x[places], y[places])
    assert "x0+=static_cast<int64_t>(1L)" not in code
    scalar = compiled(_apply(names), x[places], y[places], schedule="scalar")
    wrong = [
        name
        for name, result, other in zip(names, vector, scalar, strict=True)
        if not (same_bits(result, result[: len(x)][places]) and same_bits(result, other))
    ]
    assert not wrong


def test_the_places_are_what_they_are_called() -> None:
    x, _ = _specimens(torch.float32)
    assert "Vectorized<float>::loadu" in kernel_source(torch.exp, x)
    assert "Vectorized" not in kernel_source(torch.exp, x, schedule="scalar")
    assert "x0_tail" in kernel_source(torch.exp, x[3:], schedule="scalar tails")
    assert "x0_tail" not in kernel_source(torch.exp, x[3:])


def test_a_float_index_is_rounded_once() -> None:
    """Positions beyond 2**24 as floats: counting up from a rounded start would give other values in a lane."""

    def positions():
        return torch.arange(2**24 - 3, 2**24 + 90, dtype=torch.float32) * 1.0

    expected = torch.arange(2**24 - 3, 2**24 + 90, dtype=torch.int64).float()
    for schedule in ("default", "scalar"):
        assert same_bits(compiled(positions, schedule=schedule), expected)


@pytest.mark.parametrize("schedule", ["default", "scalar"])
def test_arithmetic_gives_one_nan_and_moves_keep_theirs(schedule: str) -> None:
    """Which payload an addition of two NaNs keeps is up to the compiler; a copy may not be a kernel at all."""
    x = torch.full((21,), 0x7FC00001, dtype=torch.int32).view(torch.float32)
    y = torch.full((21,), -0x3FFFFE, dtype=torch.int32).view(torch.float32)

    def both(x, y):
        z = x * y
        made = x + y, z, -z, z.abs(), torch.where(x > y, z, y + 1)
        moved = torch.where(x > y, x, y), torch.cat([x, y]), torch.nn.functional.pad(x, (3, 0)), x.flip(0)
        return *made, *moved, z.signbit(), torch.copysign(torch.ones_like(x), z), torch.where(x > y, z, y)

    results = compiled(both, x, y, schedule=schedule)
    assert all(same_bits(made, torch.full_like(x, NAN)) for made in results[:5])
    moved = y, torch.cat([x, y]), torch.cat([torch.zeros(3), x]), x
    assert all(map(same_bits, results[5:9], moved))
    assert not results[9].any()
    assert same_bits(results[10], torch.ones_like(x))
    assert same_bits(results[11], y)


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", ["default", "scalar"])
def test_every_op_rounds_in_a_fused_kernel(dtype: torch.dtype, schedule: str) -> None:
    """A chain of ops in one kernel equals the same ops one kernel each: eager's rounding, no contraction."""
    x, y, z = (rows_of(515, 3, dtype) * scale for scale in (1, 3, 0.1))

    def steps(x, y, z):
        a = x * y
        b = a + z
        c = b.relu() + a
        return c, (c * c - y).sum(-1), c.float() * 3, torch.where(c > 0, c - y, z)

    expected = steps(x, y, z)
    results = compiled(steps, x, y, z, schedule=schedule)
    for index in (0, 2, 3):
        assert same_bits(results[index], expected[index])
    assert same_bits(results[1], oracle.tree_sum(expected[0] * expected[0] - y, -1).to(dtype))


def test_products_and_sums_are_not_contracted() -> None:
    x, y, z = (rows_of(515, 3) for _ in range(3))
    x, y, z = x, y * 1.37 + 0.1, z.flip(1)
    for schedule in ("default", "scalar"):
        assert same_bits(compiled(lambda x, y, z: x * y + z, x, y, z, schedule=schedule), x * y + z)
        assert same_bits(compiled(lambda x, y, z: z - x * y, x, y, z, schedule=schedule), z - x * y)
