"""Sorts and scans.

A sort is made of a stable sort of integer keys, which has one answer whatever the algorithm, and a gather: equal
values keep their order, -0.0 equals 0.0, NaN is the largest. topk is the head of that.

A scan is ``ops.block_scan``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import block_scan
from .scatter import bit_count

aten = torch.ops.aten

_KEY_DTYPE = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
#: The bits of infinity; NaNs have larger magnitudes.
_INFINITY = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}


def sort_key(x: Tensor, descending: bool = False) -> Tensor:
    """Integers in the order of the floats ``x``, by integer operations alone: no float simplification reaches them.

    The sign and magnitude of a float's bits become a two's complement, so that both zeros are 0.
    """
    dtype = _KEY_DTYPE[x.dtype]
    largest = torch.iinfo(dtype).max
    infinity = _INFINITY[x.dtype]
    bits = x.view(dtype)
    bits = bits.int() if dtype == torch.int16 else bits
    magnitude = bits & largest
    key = torch.where(bits < 0, -magnitude, magnitude)
    key = torch.where(magnitude > infinity, largest, key)
    return ~key if descending else key


def _sort_stable(self: Tensor, *, stable: bool | None = True, dim: int = -1, descending: bool = False) -> Any:
    if self.dim() == 0:
        return self.clone(), torch.zeros_like(self, dtype=torch.int64)
    if self.is_floating_point():
        if self.dtype not in _KEY_DTYPE:
            return NotImplemented
        _, order = torch.sort(sort_key(self, descending), dim=dim, stable=True)
        return torch.gather(self, dim, order), order
    if stable or self.dtype.is_complex:
        return NotImplemented
    return torch.sort(self, dim=dim, descending=descending, stable=True)


def _sort(self: Tensor, dim: int = -1, descending: bool = False) -> Any:
    return torch.sort(self, dim=dim, descending=descending, stable=True)


def _topk(self: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    values, order = torch.sort(self, dim=dim, descending=largest, stable=True)
    if self.dim() == 0:
        return values, order
    return values.narrow(dim, 0, k), order.narrow(dim, 0, k)


def _scan(combine: str) -> Callable[..., Tensor]:
    def scan(self: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or (self.dtype if self.is_floating_point() or self.is_complex() else torch.int64)
        if dtype.is_complex or dtype == torch.bool:
            return NotImplemented
        x = self.to(dtype)
        if x.dim() == 0 or x.numel() == 0:
            return x.clone()
        dim = dim % x.dim()
        return block_scan(x, dim, combine, bit_count(x.shape[dim] + 1)).to(dtype)

    return scan


def _logcumsumexp(self: Tensor, dim: int) -> Tensor:
    if not self.is_floating_point():
        return NotImplemented
    if self.dim() == 0 or self.numel() == 0:
        return self.clone()
    dim = dim % self.dim()
    return block_scan(self, dim, "logaddexp", bit_count(self.shape[dim] + 1)).to(self.dtype)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.sort.default: _sort,
    aten.sort.stable: _sort_stable,
    aten.topk.default: _topk,
    aten.cumsum.default: _scan("sum"),
    aten.cumprod.default: _scan("prod"),
    aten.logcumsumexp.default: _logcumsumexp,
}
