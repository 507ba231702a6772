"""embedding_bag, its gradients, and the renormalisation of embeddings.

    sum   out[b] = round(tree(w[indices[t]] * weight[t] for t of bag b, ascending)); 0 for an empty bag
    mean  the same over the bag's size, padding left out
    max   exact; the gradient goes to the first of equal maxima
Gradients of the weights are scatters: see ``scatter.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import BatchInvarianceError
from ..ops import segment_tree, wide_dtype
from .scatter import bit_count

aten = torch.ops.aten
_SUM, _MEAN, _MAX = 0, 1, 2


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    """(out [B, D], bag of each index [T], size of each bag [B], row of the maximum [B, D])."""
    if indices.numel() == 0 or not weight.is_floating_point():
        return NotImplemented
    count = indices.shape[0]
    starts = offsets[:-1] if include_last_offset else offsets
    number = torch.arange(count, device=indices.device)
    bag = torch.searchsorted(starts.contiguous(), number.to(starts.dtype), right=True) - 1
    ends = (
        torch.cat([starts[1:], starts.new_full((1,), 0) + count]) if not include_last_offset else offsets[1:]
    )
    used = indices != padding_idx if padding_idx >= 0 else torch.ones_like(indices, dtype=torch.bool)
    terms = weight[indices].to(wide_dtype(weight.dtype))
    if per_sample_weights is not None:
        terms = (terms.to(weight.dtype) * per_sample_weights[:, None]).to(terms.dtype)
    first = starts.clamp(max=count - 1)

    def reduced(values: Tensor, combine: str) -> Tensor:
        tree = segment_tree(values, starts[bag], ends[bag], combine, bit_count(count))
        return tree[first]

    size = torch.where(ends > starts, reduced(used[:, None].long(), "sum")[:, 0], 0)
    filled = (size > 0)[:, None]
    if mode == _MAX:
        terms = torch.where(used[:, None], terms, -torch.inf)
        out = reduced(terms, "amax")
        place = torch.where(terms == out[bag], number[:, None], count)
        row = indices[reduced(place, "amin").clamp(max=count - 1)]
    else:
        out = reduced(torch.where(used[:, None], terms, 0.0), "sum")
        row = torch.zeros_like(out, dtype=indices.dtype)
    if mode == _MEAN:
        out = out / size.clamp(min=1)[:, None]
    return torch.where(filled, out, 0.0).to(weight.dtype), bag.to(indices.dtype), size, row


def _embedding_bag_backward(
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor,
    offset2bag: Tensor,
    bag_size: Tensor,
    maximum_indices: Tensor,
    num_weights: Any,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Tensor | None,
    padding_idx: int = -1,
) -> Tensor:
    if sparse:
        raise BatchInvarianceError(
            "a sparse gradient of embedding_bag", "it has no dense result", "leave out sparse=True"
        )
    zero = torch.zeros((num_weights, grad.shape[1]), dtype=grad.dtype, device=grad.device)
    if mode == _MAX:
        return zero.scatter_add(0, maximum_indices, torch.where((bag_size > 0)[:, None], grad, 0.0))
    terms = grad[offset2bag]
    if per_sample_weights is not None:
        terms = terms * per_sample_weights[:, None]
    if mode == _MEAN:
        terms = terms / bag_size[offset2bag][:, None]
    if scale_grad_by_freq:
        times = torch.zeros((num_weights,), dtype=torch.int64, device=grad.device)
        terms = terms / times.scatter_add(0, indices, torch.ones_like(indices))[indices][:, None]
    if padding_idx >= 0:
        terms = torch.where((indices != padding_idx)[:, None], terms, 0.0)
    return zero.index_add(0, indices, terms)


def _weights_backward(
    grad: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    offset2bag: Tensor,
    mode: int,
    padding_idx: int = -1,
) -> Tensor:
    products = (grad[offset2bag] * weight[indices]).sum(-1)
    return torch.where(indices != padding_idx, products, 0.0) if padding_idx >= 0 else products


def _embedding_renorm(self: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Each row that occurs is scaled once, to a norm of ``max_norm`` at most; equal rows store equal bits."""
    flat = indices.reshape(-1)
    rows = self[flat]
    norm = torch.linalg.vector_norm(rows, norm_type, dim=-1, keepdim=True)
    scaled = torch.where(norm > max_norm, rows * (max_norm / (norm + 1e-7)), rows)
    return self.index_put((flat,), scaled)


TABLE: dict[Any, Callable[..., Any]] = {
    aten._embedding_bag.default: _embedding_bag,
    aten._embedding_bag_forward_only.default: _embedding_bag,
    aten._embedding_bag_backward.default: _embedding_bag_backward,
    aten._embedding_bag_per_sample_weights_backward.default: _weights_backward,
    aten.embedding_renorm.default: _embedding_renorm,
}
