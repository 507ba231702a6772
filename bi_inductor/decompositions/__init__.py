"""The decomposition table AOTAutograd runs with: Inductor's, without what follows sizes, plus the matmul
family.

Stock Inductor turns ``mm``, ``bmm`` and ``addmm`` into pointwise products or sums when M, N, K or the batch
is 1 (and some more under coordinate descent tuning), which is another order of additions with other
roundings. Here they stay what they are, and their relatives with a 1-D operand or a summed batch become one
of them::

    mv     round(sum_k a[m, k] x[k])                          mm with N = 1
    dot    round(sum_k x[k] y[k])                             mm with M = N = 1
    addmv  round(beta c[m] + alpha sum_k a[m, k] x[k])        addmm with N = 1
    addbmm round(beta c[m, n] + alpha sum_(b, k) a[b, m, k] b[b, k, n])   addmm over K' = (b, k), b outermost

Integer products are exact in every order; convolutions and Fourier transforms become matrix products; pooling becomes
sums over windows; scatters, sorts, scans and what picks elements by rank become ops with one answer; complex numbers
become pairs, small linear systems steps of elimination: see the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bi_inductor.accumulation.ops import continuing, continuing_decomposed
from bi_inductor.decompositions import (
    bags,
    complex_pairs,
    convolution,
    elimination,
    foreach,
    gamma,
    grouped,
    histogram,
    integer,
    interpolation,
    order,
    padding,
    pooling,
    random,
    recurrent,
    scaled,
    scatter,
    selection,
    spectrum,
    views,
)
from bi_inductor.ops import bmm_rounding, bmm_rounding_decomposed, moved_rows, moved_rows_decomposed

aten = torch.ops.aten

_SIZE_DEPENDENT = (
    aten.mm,
    aten.bmm,
    aten.addmm,
    aten.baddbmm,
    aten.mv,
    aten.dot,
    aten.vdot,
    aten.addmv,
    aten.addbmm,
)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A fresh table for ``compile_fx(decompositions=...)``."""
    from torch._inductor.decomposition import select_decomp_table

    dropped = {getattr(packet, overload) for packet in _SIZE_DEPENDENT for overload in packet.overloads()}
    table = {op: rule for op, rule in select_decomp_table().items() if op not in dropped}
    ours = {
        **_MATMUL_FAMILY,
        **integer.TABLE,
        **scaled.TABLE,
        **grouped.table(),
        **convolution.TABLE,
        **foreach.TABLE,
        **gamma.TABLE,
        **pooling.TABLE,
        **selection.TABLE,
        **histogram.TABLE,
        **random.TABLE,
        **spectrum.TABLE,
        **bags.TABLE,
        **interpolation.TABLE,
        **padding.TABLE,
        **elimination.TABLE,
        **recurrent.TABLE,
        **views.TABLE,
        **_from_torch(),
        **complex_pairs.TABLE,
        **scatter.TABLE,
        **order.TABLE,
        aten._efficientzerotensor.default: _zeros,
        bmm_rounding: bmm_rounding_decomposed,
        moved_rows: moved_rows_decomposed,
        continuing: continuing_decomposed,
    }
    table.update(ours)
    for op, rule in complex_pairs.RULES.items():
        table[op] = complex_pairs.with_complex(rule, table.get(op))
    return _Table(table)


#: Rules of torch's own that Inductor does not use: each is made of ops that have a canonical form.
_TORCH_RULES = (
    aten.glu.default,
    aten.glu_backward.default,
    aten.soft_margin_loss_backward.default,
    aten.upsample_trilinear3d.default,
)


def _from_torch() -> dict[Any, Callable[..., Any]]:
    from torch._decomp import decomposition_table

    return {op: decomposition_table[op] for op in _TORCH_RULES if op in decomposition_table}


class _Table(dict[Any, Callable[..., Any]]):
    """Enters cache keys by name: some stock rules cannot be pickled, and from torch 2.13 the graph cache would
    then be bypassed. What the table holds follows from torch's sources and ours, which the keys hold already."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[[], Any], tuple[()]]:
        return decompositions, ()


def _has_product(*tensors: Tensor) -> bool:
    """Real floating point, which has chains, or integers, which are exact."""
    return all(tensor.is_floating_point() for tensor in tensors) or integer.has_integer_product(*tensors)


def _mv(self: Tensor, vec: Tensor) -> Tensor:
    return torch.mm(self, vec.unsqueeze(1)).squeeze(1) if _has_product(self, vec) else NotImplemented


def _dot(self: Tensor, tensor: Tensor) -> Tensor:
    if not _has_product(self, tensor):
        return NotImplemented
    return torch.mm(self.unsqueeze(0), tensor.unsqueeze(1)).squeeze(1).squeeze(0)


def _vdot(self: Tensor, other: Tensor) -> Tensor:
    return _dot(self, other)


def _addmv(self: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not _has_product(self, mat, vec):
        return NotImplemented
    column = self.unsqueeze(1) if self.dim() else self
    return torch.addmm(column, mat, vec.unsqueeze(1), beta=beta, alpha=alpha).squeeze(1)


def _addbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not _has_product(self, batch1, batch2):
        return NotImplemented
    batch, rows, inner = batch1.shape
    left = batch1.transpose(0, 1).reshape(rows, batch * inner)
    right = batch2.reshape(batch * inner, batch2.shape[2])
    return torch.addmm(self, left, right, beta=beta, alpha=alpha)


def _zeros(size: Sequence[Any], **options: Any) -> Tensor:
    """What derivatives that are zero start from; it has no memory of its own in eager mode."""
    return torch.zeros(size, **options)


_MATMUL_FAMILY: dict[Any, Callable[..., Any]] = {
    aten.mv.default: _mv,
    aten.dot.default: _dot,
    aten.vdot.default: _vdot,
    aten.addmv.default: _addmv,
    aten.addbmm.default: _addbmm,
}
