"""Matrix products as a plain chain of fused multiply-adds, the order the C++ kernels promise.

    acc = fma(a[m, k], b[k, n], acc)        k = 0 ... K-1, from +0, one rounding per step

A fused multiply-add is emulated exactly for fp32 (vectorised); for fp64 it is the C library's, one by one.
"""

from __future__ import annotations

import ctypes
import ctypes.util

import torch
from torch import Tensor

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fma.restype, _libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_libm.fmaf.restype, _libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3


def fma32(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """round32(a * b + c) for fp32 tensors, with one rounding.

    The product is exact in fp64. The fp64 sum is rounded to odd, and 53 >= 24 + 2 bits rounded to odd round
    to fp32 as the exact sum would.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)  # total + error is the exact sum
    bits = total.view(torch.int64)
    inexact = (error != 0) & total.isfinite() & error.isfinite() & (bits & 1 == 0)
    towards_error = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact, bits + towards_error, bits).view(torch.float64).float()


def chain(a: Tensor, b: Tensor) -> Tensor:
    """[..., M, K] @ [..., K, N] in fp32 (fp64 for fp64), one chain per element; every NaN the quiet one."""
    if a.dtype == torch.float64:
        return _one_nan(_chain64(a, b))
    a, b = a.float(), b.float()
    total = torch.zeros(*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    for k in range(a.shape[-1]):
        total = fma32(a[..., :, k, None].expand_as(total), b[..., None, k, :].expand_as(total), total)
    return _one_nan(total)


def _chain64(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == 3:
        return torch.stack([_chain64(*pair) for pair in zip(a, b, strict=True)])
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    for m, row in enumerate(a.tolist()):
        for n, column in enumerate(b.t().tolist()):
            accumulator = 0.0
            for left, right in zip(row, column, strict=True):
                accumulator = _libm.fma(left, right, accumulator)
            total[m, n] = accumulator
    return total


def epilogue(total: Tensor, bias: Tensor | None, alpha: float, beta: float, dtype: torch.dtype) -> Tensor:
    """round(alpha * total + beta * bias): multiply and add round separately, in the dtype of ``total``."""
    if alpha != 1:
        total = total * torch.tensor(alpha, dtype=total.dtype)
    if bias is not None:
        addend = bias.to(total.dtype)
        total = total + (addend if beta == 1 else addend * torch.tensor(beta, dtype=total.dtype))
    return _one_nan(total.to(dtype))  # a vectorised cast to bfloat16 writes other NaNs than a scalar one


def _one_nan(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.tensor(torch.nan, dtype=x.dtype), x)


def library_fma32(a: float, b: float, c: float) -> float:
    """The C library's fmaf: what ``fma32`` is checked against."""
    return _libm.fmaf(a, b, c)
