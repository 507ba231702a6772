"""Complex arithmetic on pairs of reals: every op below is written out in real ones, each of which rounds by itself.

    product   (a + bi)(c + di) = (ac - bd) + (ad + bc)i
    quotient  x / y = x conj(y) / |y|^2 with y divided by the greater of its parts first, so that nothing overflows
    |x|       hypot
Matrix products are four real ones. What stays complex is moved only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

aten, prims = torch.ops.aten, torch.ops.prims
Rule: TypeAlias = Callable[..., Any]


def _parts(x: Any) -> tuple[Any, Any]:
    """Real and imaginary part of a tensor or number."""
    if not isinstance(x, Tensor):
        return (x.real, x.imag) if isinstance(x, complex) else (x, 0.0)
    if not x.is_complex():
        return x, torch.zeros_like(x)
    pairs = as_pairs(x)
    return pairs[..., 0], pairs[..., 1]


def as_pairs(x: Tensor) -> Tensor:
    """``x [..]`` complex -> ``[.., 2]`` real; a conjugate that eager code has put off is taken here."""
    return torch.view_as_real(x.resolve_conj())


def _complex(real: Tensor, imaginary: Tensor) -> Tensor:
    real, imaginary = torch.broadcast_tensors(real, imaginary)
    return torch.view_as_complex(torch.stack([real, imaginary], -1))


def with_complex(rule: Rule, otherwise: Rule | None) -> Rule:
    """``rule`` where an operand or the result is complex; ``otherwise`` for reals."""

    def decomposed(*args: Any, **kwargs: Any) -> Any:
        leaves = [*args, *kwargs.values()]
        dtypes = [
            x if isinstance(x, torch.dtype) else x.dtype
            for x in leaves
            if isinstance(x, Tensor | torch.dtype)
        ]
        if any(dtype.is_complex for dtype in dtypes) or any(isinstance(x, complex) for x in leaves):
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return otherwise(*args, **kwargs) if otherwise else NotImplemented

    return decomposed


def _to_pairs(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as complex ``dtype``, or the real part of a complex ``x`` as real ``dtype``."""
    if not dtype.is_complex:
        return _parts(x)[0].to(dtype)
    real, imaginary = (part.to(dtype.to_real()) for part in _parts(x))
    return _complex(real, imaginary)


def _convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    return NotImplemented if x.dtype == dtype or dtype == torch.bool else _to_pairs(x, dtype)


def _to_copy(x: Tensor, *, dtype: torch.dtype | None = None, **how: Any) -> Tensor:
    device = how.get("device")
    is_elsewhere = device is not None and torch.device(device) != x.device
    return NotImplemented if dtype is None or is_elsewhere else _convert(x, dtype)


def _add(x: Any, y: Any, *, alpha: Any = 1) -> Tensor:
    (a, b), (c, d) = _parts(x), _parts(y if alpha == 1 else y * alpha)
    return _complex(a + c, b + d)


def _sub(x: Any, y: Any, *, alpha: Any = 1) -> Tensor:
    (a, b), (c, d) = _parts(x), _parts(y if alpha == 1 else y * alpha)
    return _complex(a - c, b - d)


def _mul(x: Any, y: Any) -> Tensor:
    (a, b), (c, d) = _parts(x), _parts(y)
    return _complex(a * c - b * d, a * d + b * c)


def _div(x: Any, y: Any) -> Tensor:
    (a, b), (c, d) = _parts(x), _parts(y)
    if not (isinstance(y, Tensor) and y.is_complex()):
        return _complex(a / c, b / c)
    scale = torch.maximum(c.abs(), d.abs())
    c, d = c / scale, d / scale
    length = (c * c + d * d) * scale
    return _complex((a * c + b * d) / length, (b * c - a * d) / length)


def _neg(x: Tensor) -> Tensor:
    real, imaginary = _parts(x)
    return _complex(-real, -imaginary)


def _conjugate(x: Tensor) -> Tensor:
    real, imaginary = _parts(x)
    return _complex(real, -imaginary) if x.is_complex() else x.clone()


def _abs(x: Tensor) -> Tensor:
    return torch.hypot(*_parts(x))


def _angle(x: Tensor) -> Tensor:
    real, imaginary = _parts(x)
    return torch.atan2(imaginary, real)


def _polar(magnitude: Tensor, angle: Tensor) -> Tensor:
    return _complex(magnitude * torch.cos(angle), magnitude * torch.sin(angle))


def _exp(x: Tensor) -> Tensor:
    real, imaginary = _parts(x)
    return _polar(torch.exp(real), imaginary)


def _sum(
    x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    if dtype is not None and not dtype.is_complex:
        return NotImplemented
    dims = list(range(x.dim())) if dim is None or len(dim) == 0 else [d % x.dim() for d in dim]
    return torch.view_as_complex(as_pairs(x).sum(dims, keepdim))


def _sum_all(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return _sum(x, dtype=dtype)


def _matrix_product(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def multiplied(x: Tensor, y: Tensor) -> Tensor:
        (a, b), (c, d) = _parts(x), _parts(y)
        return _complex(product(a, c) - product(b, d), product(a, d) + product(b, c))

    return multiplied


#: For operands or results that are complex.
RULES: dict[Any, Rule] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.add.Scalar: _add,
    aten.sub.Scalar: _sub,
    aten.mul.Scalar: _mul,
    aten.div.Scalar: _div,
    aten.neg.default: _neg,
    aten.abs.default: _abs,
    aten.angle.default: _angle,
    aten.exp.default: _exp,
    aten.sum.default: _sum_all,
    aten.sum.dim_IntList: _sum,
    aten.mm.default: _matrix_product(torch.mm),
    aten.bmm.default: _matrix_product(torch.bmm),
    prims.convert_element_type.default: _convert,
    aten._to_copy.default: _to_copy,
    aten._conj.default: _conjugate,
    aten._conj_physical.default: _conjugate,
    aten.conj_physical.default: _conjugate,
}
#: Whose result is complex whatever the operands.
TABLE: dict[Any, Rule] = {aten.complex.default: _complex, aten.polar.default: _polar}
