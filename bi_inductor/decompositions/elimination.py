"""Small linear systems by elimination: every step is a pointwise op over all matrices of the batch.

    LU         columns left to right, the pivot is the first of the largest elements; for k ascending
               a[i, j] = a[i, j] - l[i, k] u[k, j], each product and difference rounded
    Cholesky   the same without pivots; l[k, k] = sqrt(a[k, k])
    triangular x[i] = (b[i] - l[i, 0] x[0] - l[i, 1] x[1] ...) / l[i, i], one subtraction after the other
    det        the tree product of the pivots, with the sign of the permutation

The steps are written out, so matrices are small: above ``LARGEST`` rows the op is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

#: A step is about ten ops of the graph; more rows than this take minutes to compile.
LARGEST = 16


def _is_small(*matrices: Tensor) -> bool:
    return all(
        x.dtype in (torch.float32, torch.float64) and x.dim() >= 2 and max(x.shape[-2:]) <= LARGEST
        for x in matrices
    )


def _rows(count: int, like: Tensor) -> Tensor:
    """[count, 1]: the number of each row."""
    return torch.arange(count, device=like.device)[:, None]


def _lu(a: Tensor, pivot: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(L and U in one, pivots counted from 1 as int32, first zero pivot counted from 1, or 0)."""
    height, width = int(a.shape[-2]), int(a.shape[-1])
    rows, columns = _rows(height, a), _rows(width, a).T
    info = torch.zeros(a.shape[:-2], dtype=torch.int32, device=a.device)
    pivots = []
    for k in range(min(height, width)):
        chosen = torch.full_like(info, k, dtype=torch.int64)
        if pivot:
            chosen = a[..., k:, k].abs().argmax(-1) + k
            other = chosen[..., None, None]
            order = torch.where(rows == k, other, torch.where(rows == other, k, rows))
            a = a.gather(-2, order.expand(a.shape))
        pivots.append(chosen + 1)
        head = a[..., k : k + 1, k : k + 1]
        factor = torch.where(head != 0, a[..., :, k : k + 1] / head, a[..., :, k : k + 1])
        updated = torch.where(columns > k, a - factor * a[..., k : k + 1, :], factor)
        info = torch.where((info == 0) & (head[..., 0, 0] == 0), k + 1, info)
        a = torch.where((rows > k) & (columns >= k), updated, a)
    stacked = torch.stack(pivots, -1) if pivots else info[..., None].narrow(-1, 0, 0)
    return a.contiguous(), stacked.to(torch.int32), info.to(torch.int32)


def _permuted(b: Tensor, pivots: Tensor, backwards: bool = False) -> Tensor:
    """The exchanges of rows that LU noted down, carried out on ``b``, first to last or last to first."""
    rows = _rows(int(b.shape[-2]), b)
    steps = range(pivots.shape[-1])
    for k in reversed(steps) if backwards else steps:
        other = (pivots[..., k].long() - 1)[..., None, None]
        order = torch.where(rows == k, other, torch.where(rows == other, k, rows))
        shape = torch.broadcast_shapes(b.shape, (*order.shape[:-1], 1))
        b = b.expand(shape).gather(-2, order.expand(shape))
    return b


def _substituted(a: Tensor, b: Tensor, upper: bool, unit: bool) -> Tensor:
    """x with a x = b for triangular ``a``."""
    count = int(a.shape[-1])
    if count == 0:
        return b.expand(torch.broadcast_shapes(b.shape, (*a.shape[:-2], 1, 1))).clone()
    rows, found = _rows(count, a), []
    for k in reversed(range(count)) if upper else range(count):
        x = b[..., k : k + 1, :]
        x = x.expand(torch.broadcast_shapes(x.shape, (*a.shape[:-2], 1, 1)))
        if not unit:
            x = x / a[..., k : k + 1, k : k + 1]
        found.append(x)
        rest = rows < k if upper else rows > k
        b = torch.where(rest, b - a[..., :, k : k + 1] * x, b)
    return torch.cat(found[::-1] if upper else found, -2)


def _solve_triangular(
    self: Tensor, B: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    if not _is_small(self):
        return NotImplemented
    if left:
        return _substituted(self, B, upper, unitriangular)
    return _substituted(self.mT, B.mT, not upper, unitriangular).mT


def _triangular_solve(
    self: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    if not _is_small(A):
        return NotImplemented
    matrix, is_upper = (A.mT, not upper) if transpose else (A, upper)
    shape = torch.broadcast_shapes(self.shape[:-2], A.shape[:-2])
    return _substituted(matrix, self, is_upper, unitriangular), A.expand(*shape, *A.shape[-2:]).clone()


def _lu_solve(LU: Tensor, pivots: Tensor, B: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    if not _is_small(LU):
        return NotImplemented
    if not left:
        return _lu_solve(LU, pivots, B.mT, adjoint=not adjoint).mT
    if adjoint:
        x = _substituted(LU.mT, B, upper=False, unit=False)
        return _permuted(_substituted(LU.mT, x, upper=True, unit=True), pivots, backwards=True)
    x = _substituted(LU, _permuted(B, pivots), upper=False, unit=True)
    return _substituted(LU, x, upper=True, unit=False)


def _lu_factor_ex(A: Tensor, *, pivot: bool = True, check_errors: bool = False) -> Any:
    return _lu(A, pivot) if _is_small(A) else NotImplemented


def _unpacked(LU: Tensor, pivots: Tensor, data: bool = True, pivot: bool = True) -> Any:
    if not _is_small(LU):
        return NotImplemented
    height, width = int(LU.shape[-2]), int(LU.shape[-1])
    rank = min(height, width)
    eye = torch.eye(height, dtype=LU.dtype, device=LU.device)
    empty = LU.new_empty([0])
    lower = (LU[..., :, :rank].tril(-1) + eye[:, :rank]) if data else empty
    upper = LU[..., :rank, :].triu() if data else empty
    permutation = eye.expand(*LU.shape[:-2], height, height)
    return (_permuted(permutation, pivots, backwards=True) if pivot else empty), lower, upper


def _linalg_lu(A: Tensor, *, pivot: bool = True) -> Any:
    if not _is_small(A):
        return NotImplemented
    permutation, lower, upper = _unpacked(*_lu(A, pivot)[:2])
    return (permutation if pivot else A.new_empty([0])), lower, upper


def _sign(pivots: Tensor, like: Tensor) -> Tensor:
    """1 or -1: each pivot that stands elsewhere is one exchange."""
    place = torch.arange(1, pivots.shape[-1] + 1, device=pivots.device)
    return (1 - 2 * ((pivots != place).sum(-1) % 2)).to(like.dtype)


def _det(A: Tensor) -> Any:
    if not _is_small(A):
        return NotImplemented
    lu, pivots, _ = _lu(A)
    return lu.diagonal(0, -2, -1).prod(-1) * _sign(pivots, A), lu, pivots


def _slogdet(A: Tensor) -> Any:
    if not _is_small(A):
        return NotImplemented
    lu, pivots, _ = _lu(A)
    diagonal = lu.diagonal(0, -2, -1)
    return diagonal.sign().prod(-1) * _sign(pivots, A), diagonal.abs().log().sum(-1), lu, pivots


def _solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    if not _is_small(A):
        return NotImplemented
    lu, pivots, info = _lu(A)
    is_vector = B.dim() == 1 or (B.dim() == A.dim() - 1 and B.shape == A.shape[:-1])
    x = _lu_solve(lu, pivots, B.unsqueeze(-1) if is_vector else B, left=left or is_vector)
    return (x.squeeze(-1) if is_vector else x), lu, pivots, info


def _inv_ex(A: Tensor, *, check_errors: bool = False) -> Any:
    if not _is_small(A):
        return NotImplemented
    lu, pivots, info = _lu(A)
    return _lu_solve(lu, pivots, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)), info


def _cholesky_ex(self: Tensor, *, upper: bool = False, check_errors: bool = False) -> Any:
    if not _is_small(self):
        return NotImplemented
    a = self.mT if upper else self
    count = int(a.shape[-1])
    rows, columns = _rows(count, a), _rows(count, a).T
    info = torch.zeros(a.shape[:-2], dtype=torch.int32, device=a.device)
    for k in range(count):
        head = a[..., k : k + 1, k : k + 1]
        info = torch.where((info == 0) & ~(head[..., 0, 0] > 0), k + 1, info)
        root = head.sqrt()
        column = torch.where(rows == k, root, a[..., :, k : k + 1] / root)
        updated = torch.where(columns > k, a - column * column.mT, column)
        a = torch.where((rows >= k) & (columns >= k), updated, a)
    lower = a.tril()
    return (lower.mT if upper else lower).contiguous(), info.to(torch.int32)


def _cholesky(self: Tensor, upper: bool = False) -> Tensor:
    return _cholesky_ex(self, upper=upper)[0] if _is_small(self) else NotImplemented


def _cholesky_solve(self: Tensor, input2: Tensor, upper: bool = False) -> Tensor:
    if not _is_small(input2):
        return NotImplemented
    lower = input2.mT if upper else input2
    return _substituted(lower.mT, _substituted(lower, self, False, False), True, False)


def _cholesky_inverse(self: Tensor, upper: bool = False) -> Tensor:
    return _cholesky_solve(torch.eye(self.shape[-1], dtype=self.dtype, device=self.device), self, upper)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.linalg_lu_factor_ex.default: _lu_factor_ex,
    aten.linalg_lu.default: _linalg_lu,
    aten.linalg_lu_solve.default: _lu_solve,
    aten.lu_unpack.default: _unpacked,
    aten._linalg_det.default: _det,
    aten._linalg_slogdet.default: _slogdet,
    aten._linalg_solve_ex.default: _solve_ex,
    aten.linalg_inv_ex.default: _inv_ex,
    aten.linalg_solve_triangular.default: _solve_triangular,
    aten.triangular_solve.default: _triangular_solve,
    aten.linalg_cholesky_ex.default: _cholesky_ex,
    aten.cholesky_solve.default: _cholesky_solve,
    aten.cholesky_inverse.default: _cholesky_inverse,
}
if hasattr(aten, "cholesky"):  # torch 2.14 has linalg_cholesky_ex alone
    TABLE[aten.cholesky.default] = _cholesky
