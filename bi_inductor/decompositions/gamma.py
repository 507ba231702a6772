"""The gamma function's logarithmic derivatives, from sums of a fixed number of terms.

    digamma(x)       psi(x) = log(w) - 1 / (2 w) - sum_(j = 1..8) B_2j / (2 j w**2j) - sum_(k < m) 1 / (x + k)
                     with m = max(ceil(10 - x), 0) and w = x + m
    polygamma(n, x)  psi_n(x) = (-1)**(n + 1) n! zeta(n + 1, x), and by Euler and Maclaurin, with w = x + 10 + n,
                     zeta(n + 1, x) = sum_(k < 10 + n) (x + k)**-(n + 1) + w**-n (1 / n + 1 / (2 w)
                         + sum_(j = 1..8) B_2j / (2 j)! (n + 1) ... (n + 2 j - 1) / w**2j)

Left of 0 (digamma) and of 1/2 (polygamma) by reflection::

    psi_n(x) = (-1)**n psi_n(1 - x) - pi (d/dx)**n cot(pi x)

Each element's value is a function of the element alone, so it fuses, where Inductor calls a kernel of ATen's on a GPU.
16-bit values are computed in fp32. At poles: digamma gives -+inf at +-0 and NaN at negative integers, polygamma the
infinity of its n.

Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 6.3, 6.4 and 23.2; DLMF 5.5.4, 5.15.6, 25.11.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

#: B_2, B_4, ... B_16. At w >= 10 the next term is below half a unit in the last place of fp64.
_BERNOULLI = tuple(map(Fraction, "1/6 -1/30 1/42 -1/30 5/66 -691/2730 7/6 -3617/510".split()))
_SHIFT = 10


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """``coefficients[0] + coefficients[1] x + ...`` by Horner's rule, from the highest power."""
    *lower, value = coefficients
    total = torch.full_like(x, value)
    for coefficient in reversed(lower):
        total = total * x + coefficient
    return total


def _power(x: Tensor, n: int) -> Tensor:
    """``x ** n`` by squaring, n >= 1."""
    if n == 1:
        return x
    half = _power(x, n // 2)
    return half * half * x if n % 2 else half * half


def _cotangent(x: Tensor) -> Tensor:
    """cot(pi x), to the last places near its zeros and poles too: x is reduced where that is exact."""
    rest = x - x.round()
    is_beyond = rest.abs() > 0.25
    tangent = torch.tan(math.pi * torch.where(is_beyond, 0.5 - rest.abs(), rest.abs()))
    return torch.copysign(torch.where(is_beyond, tangent, 1 / tangent), rest)


def _psi(x: Tensor) -> Tensor:
    """psi of x > 0. Inductor writes a value out wherever it is read: none that holds a sum is read twice."""
    steps = (_SHIFT - x).ceil().clamp(min=0)
    removed = torch.where(steps > 0, 1 / x, 0.0)
    for k in range(1, _SHIFT):
        removed = removed + torch.where(steps > k, 1 / (x + k), 0.0)
    x = x + steps
    inverse = 1 / x
    square = inverse * inverse
    series = [float(b / (2 * j)) for j, b in enumerate(_BERNOULLI, 1)]
    return torch.log(x) - 0.5 * inverse - square * _polynomial(square, series) - removed


def _psi_n(n: int, x: Tensor) -> Tensor:
    """psi_n of x >= 1/2, n >= 1."""
    terms = _SHIFT + n
    total = _power(1 / x, n + 1)
    for k in range(1, terms):
        total = total + _power(1 / (x + k), n + 1)
    inverse = 1 / (x + terms)
    square = inverse * inverse
    rising = [math.prod(range(n + 1, n + 2 * j)) for j in range(1, len(_BERNOULLI) + 1)]
    series = [
        float(b * r / math.factorial(2 * j))
        for j, (b, r) in enumerate(zip(_BERNOULLI, rising, strict=True), 1)
    ]
    tail = 1 / n + 0.5 * inverse + square * _polynomial(square, series)
    zeta = total + _power(inverse, n) * tail
    return (-1) ** (n + 1) * _as_float(math.factorial(n)) * zeta


def _as_float(n: int) -> float:
    infinity = math.inf if n > 0 else -math.inf
    return float(n) if n.bit_length() < 1024 else infinity


def _derivative_of_cotangent(n: int) -> list[float]:
    """(d/dx)**n cot(pi x) / pi**n as a polynomial in c = cot(pi x): c' = -pi (1 + c**2).

    All its coefficients have one sign, and every second is 0.
    """
    coefficients = [0, 1]
    for _ in range(n):
        slope = [-power * value for power, value in enumerate(coefficients)][1:]
        coefficients = [a + b for a, b in zip([*slope, 0, 0], [0, 0, *slope], strict=True)]
    return [_as_float(value) for value in coefficients]


def _in_working_precision(rule: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if x.is_complex():
        return NotImplemented
    if not x.is_floating_point():
        return rule(x.to(torch.get_default_dtype()))
    return rule(x.float()).to(x.dtype) if x.dtype.itemsize < 4 else rule(x)


def _digamma(self: Tensor) -> Tensor:
    def rule(x: Tensor) -> Tensor:
        is_left = x < 0
        right = _psi(torch.where(is_left, 1 - x, x))
        left = torch.where(x == x.floor(), math.nan, right - math.pi * _cotangent(x))
        return torch.where(
            x == 0, torch.copysign(torch.full_like(x, math.inf), -x), torch.where(is_left, left, right)
        )

    return _in_working_precision(rule, self)


def _polygamma(n: int, self: Tensor) -> Tensor:
    torch._check(n >= 0, lambda: "polygamma(n, x) does not support negative n.")
    if n == 0:
        return _digamma(self)

    def rule(x: Tensor) -> Tensor:
        is_left = x < 0.5
        right = _psi_n(n, torch.where(is_left, 1 - x, x))
        cotangent = _cotangent(x)
        odd = (n + 1) % 2
        slope = _polynomial(cotangent * cotangent, _derivative_of_cotangent(n)[odd::2])
        scale = math.pi ** (n + 1) if n < 600 else math.inf
        slope = scale * (slope * cotangent if odd else slope)
        return torch.where(is_left, (-1) ** n * right - slope, right)

    return _in_working_precision(rule, self)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.digamma.default: _digamma,
    aten.polygamma.default: _polygamma,
}
