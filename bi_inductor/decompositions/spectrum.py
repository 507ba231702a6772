"""Discrete Fourier transforms as matrix products with the table of roots of unity.

    forward  X[k] = scale * sum_j x[j] exp(-2 pi i j k / n)        a CHAIN over (j, part), real part before imaginary
    inverse  the same with the other sign

One product gives both parts: a row of n complex numbers is 2 n reals. The table holds cos and sin of 2 pi m / n, taken
in fp64 for m = j k mod n, so that it depends on n alone. Several dimensions are transformed last first.

Lengths up to ``LONGEST``: n * n products are what this costs. A real input of a complex product on tensor cores would
be rounded to tf32 where torch allows that for matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .complex_pairs import as_pairs

aten = torch.ops.aten

#: A transform of this length costs as many operations per row as a linear layer of 4096 x 4096.
LONGEST = 2048


def _roots(length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi m / length for m = 0 ... length - 1, in the dtype of ``like``."""
    m = torch.arange(length, device=like.device, dtype=torch.float64)
    angle = m * (2 * math.pi / length)
    return torch.cos(angle).to(like.dtype), torch.sin(angle).to(like.dtype)


def _powers(length: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """j * k mod length, [rows, columns]."""
    j, k = torch.arange(rows, device=device), torch.arange(columns, device=device)
    return j[:, None] * k % length


def _product(x: Tensor, table: Tensor, shape: Sequence[Any]) -> Tensor:
    return torch.mm(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), table).reshape(shape)


def _from_real(x: Tensor, kept: int, forward: bool) -> Tensor:
    """x [.., n] real -> [.., kept, 2]."""
    length = int(x.shape[-1])
    cos, sin = _roots(length, x)
    power = _powers(length, length, kept, x.device)
    table = torch.stack([cos[power], -sin[power] if forward else sin[power]], -1)
    return _product(x, table.reshape(length, 2 * kept), [*x.shape[:-1], kept, 2])


def _from_complex(x: Tensor, forward: bool) -> Tensor:
    """x [.., n, 2] -> [.., n, 2]."""
    length = int(x.shape[-2])
    cos, sin = _roots(length, x)
    power = _powers(length, length, length, x.device)
    cosine, sine = cos[power], sin[power] if forward else -sin[power]
    real, imaginary = torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)
    table = torch.stack([real, imaginary], 1).reshape(2 * length, 2 * length)
    return _product(x.reshape(*x.shape[:-2], 2 * length), table, x.shape)


def _to_real(x: Tensor, length: int) -> Tensor:
    """Half a spectrum x [.., n // 2 + 1, 2] -> n reals [.., n]; the inverse of ``_from_real``, not scaled."""
    kept = length // 2 + 1
    x = x[..., :kept, :]
    cos, sin = _roots(length, x)
    power = _powers(length, kept, length, x.device)
    k = torch.arange(kept, device=x.device)[:, None]
    single = (k == 0) | (2 * k == length)  # what stands once in the whole spectrum, and is real
    table = torch.stack([torch.where(single, 1, 2) * cos[power], torch.where(single, 0, -2) * sin[power]], 1)
    return _product(
        x.reshape(*x.shape[:-2], 2 * kept), table.reshape(2 * kept, length), [*x.shape[:-2], length]
    )


def _scaled(x: Tensor, lengths: Sequence[int], normalization: int) -> Tensor:
    count = math.prod(lengths)
    return x / {0: 1, 1: math.sqrt(count), 2: count}[normalization] if normalization else x


def _is_sane(sizes: Sequence[Any], dtype: torch.dtype) -> bool:
    single = dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128)
    return single and all(1 <= size <= LONGEST for size in sizes)


def _along(pairs: Tensor, dim: int, forward: bool) -> Tensor:
    """Pairs [.., 2] transformed along ``dim``, counted without the last."""
    return _from_complex(pairs.movedim(dim, -2), forward).movedim(-2, dim)


def _fft_c2c(self: Tensor, dim: Sequence[int], normalization: int, forward: bool) -> Tensor:
    dims = [d % self.dim() for d in dim]
    if not _is_sane([self.shape[d] for d in dims], self.dtype):
        return NotImplemented
    pairs = as_pairs(self)
    for d in reversed(dims):
        pairs = _along(pairs, d, forward)
    pairs = _scaled(pairs, [int(self.shape[d]) for d in dims], normalization)
    return torch.view_as_complex(pairs.contiguous())


def _fft_r2c(self: Tensor, dim: Sequence[int], normalization: int, onesided: bool) -> Tensor:
    *others, last = [d % self.dim() for d in dim]
    if not _is_sane([self.shape[d] for d in (*others, last)], self.dtype):
        return NotImplemented
    length = int(self.shape[last])
    pairs = _from_real(self.movedim(last, -1), length // 2 + 1 if onesided else length, True).movedim(
        -2, last
    )
    for d in reversed(others):
        pairs = _along(pairs, d, True)
    pairs = _scaled(pairs, [int(self.shape[d]) for d in dim], normalization)
    return torch.view_as_complex(pairs.contiguous())


def _fft_c2r(self: Tensor, dim: Sequence[int], normalization: int, last_dim_size: Any) -> Tensor:
    *others, last = [d % self.dim() for d in dim]
    if not _is_sane([*(self.shape[d] for d in others), last_dim_size], self.dtype):
        return NotImplemented
    pairs = as_pairs(self)
    for d in others:
        pairs = _along(pairs, d, False)
    length = int(last_dim_size)
    real = _to_real(pairs.movedim(last, -2), length).movedim(-1, last)
    return _scaled(real, [*(int(self.shape[d]) for d in others), length], normalization)


def _hann_window(window_length: int, periodic: bool = True, **tensor: Any) -> Tensor:
    """(1 - cos(2 pi m / n)) / 2 for m = 0 ... window_length - 1, n one less where it is not periodic; in fp64."""
    dtype, device = tensor.get("dtype") or torch.get_default_dtype(), tensor.get("device")
    length = window_length if periodic else window_length - 1
    m = torch.arange(window_length, device=device, dtype=torch.float64)
    if window_length == 1:
        return torch.ones_like(m, dtype=dtype)
    return ((1 - torch.cos(m * (2 * math.pi / length))) / 2).to(dtype)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.hann_window.default: _hann_window,
    aten.hann_window.periodic: _hann_window,
    aten._fft_c2c.default: _fft_c2c,
    aten._fft_r2c.default: _fft_r2c,
    aten._fft_c2r.default: _fft_c2r,
}
