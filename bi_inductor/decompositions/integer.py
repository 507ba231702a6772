"""Matrix products of integers: sums modulo 2**bits, which are exact in every order.

    mm, bmm         sum_k a[.., m, k] b[.., k, n]
    addmm, baddbmm  beta c[.., m, n] + alpha sum_k a[.., m, k] b[.., k, n]
    _int_mm         the same of 8-bit operands, in int32

Integers narrower than 32 bits are summed in int32 and cut to their width: arithmetic modulo 2**8 follows from
arithmetic modulo 2**32. On a GPU the product of two int8 matrices stays ``_int_mm``, which runs on tensor cores;
all others become one reduction that multiplies as it loads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

#: Dtypes whose products are sums modulo a power of two, with the dtype they are summed in.
SUMMED_IN = {
    torch.uint8: torch.int32,
    torch.int8: torch.int32,
    torch.int16: torch.int32,
    torch.int32: torch.int32,
    torch.int64: torch.int64,
}


def has_integer_product(*tensors: Tensor) -> bool:
    """True for integers. Raises as eager does for two dtypes, and for bool and the wider unsigned integers."""
    first = tensors[0].dtype
    for tensor in tensors:
        torch._check(
            tensor.dtype == first,
            lambda other=tensor.dtype: (
                f"expected both matrices to have the same dtype, but got: {first} != {other}"
            ),  # type: ignore[misc]
        )
    if first.is_floating_point or first.is_complex:
        return False
    if first not in SUMMED_IN:
        raise NotImplementedError(f"matrix products are not implemented for {first}")
    return True


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [.., M, K], b [.., K, N] -> [.., M, N] in the dtype that ``a`` is summed in."""
    if a.dtype == b.dtype == torch.int8 and a.dim() == 2 and a.device.type == "cuda":
        return aten._int_mm.default(a, b)
    dtype = SUMMED_IN[a.dtype]
    terms = a.to(dtype).unsqueeze(-1) * b.to(dtype).unsqueeze(-3)
    return terms.sum(-2, dtype=dtype)


def _mm(self: Tensor, mat2: Tensor) -> Tensor:
    if not has_integer_product(self, mat2):
        return NotImplemented
    return _product(self, mat2).to(self.dtype)


def _addmm(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: int = 1, alpha: int = 1) -> Tensor:
    if not has_integer_product(mat1, mat2):
        return NotImplemented
    product = _product(mat1, mat2) * int(alpha)
    if beta != 0:
        product = product + self.to(product.dtype) * int(beta)
    return product.to(mat1.dtype)


def _int_mm(self: Tensor, mat2: Tensor) -> Tensor:
    if self.device.type == "cuda" and self.dtype == mat2.dtype == torch.int8:
        return NotImplemented  # it is what the template computes
    terms = self.to(torch.int32).unsqueeze(-1) * mat2.to(torch.int32).unsqueeze(-3)
    return terms.sum(-2, dtype=torch.int32)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten._int_mm.default: _int_mm,
}
