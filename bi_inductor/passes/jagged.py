"""Jagged tensors given to ``scaled_dot_product_attention``: attention of packed sequences, as in ``varlen.py``.

    [B, H, ragged, D], as ``x.unflatten(-1, (H, D)).transpose(1, 2)`` leaves it, is a pack [T, H, D] and its offsets

Each sequence has the bits that it has alone. Stock asks a device for flash, efficient or math attention by shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nested._internal.nested_tensor import nested_view_from_values_offsets

from bi_inductor.certificate import source_line
from bi_inductor.errors import BatchInvarianceError
from bi_inductor.passes.retarget import argument
from bi_inductor.passes.varlen import varlen_attention

_NAMES = ("query", "key", "value")


def jagged_attention(
    query: Any, key: Any, value: Any, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    """Jagged ``query [B, H, ragged, D]``, ``key [B, Hk, ragged, D]``, ``value [B, Hk, ragged, Dv]`` -> jagged."""
    queries, keys, values = (x.transpose(1, 2) for x in (query, key, value))
    output, _, _ = varlen_attention(
        queries.values(),
        keys.values(),
        values.values(),
        queries.offsets(),
        keys.offsets(),
        queries._get_max_seqlen(),
        keys._get_max_seqlen(),
        is_causal,
        scale,
        None,
        enable_gqa,
        one_length=_have_one_length(query, key),
    )
    shortest, longest = queries._maybe_min_seqlen, queries._maybe_max_seqlen
    sequences = nested_view_from_values_offsets(
        output, queries.offsets(), min_seqlen=shortest, max_seqlen=longest
    )
    return sequences.transpose(1, 2)


def _have_one_length(query: Any, key: Any) -> bool:
    """True if each sequence has as many keys as queries: the ragged sizes are one nested integer."""
    return bool(query.shape[2] == key.shape[2])


def jagged_refusal(node: Node) -> BatchInvarianceError | None:
    """The error for nested inputs that are not packed sequences of heads without a mask; None for plain tensors."""
    operands = [argument(node, place, name) for place, name in enumerate(_NAMES)]
    nested = [isinstance(x, Tensor) and x.is_nested for x in operands]
    if not any(nested):
        return None
    mask, dropout = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    reason, remedy = "", "pass padded tensors with a boolean mask: masked keys at the tail change no bit"
    if not all(nested) or any(x.layout != torch.jagged for x in operands):
        reason = "its inputs are not all jagged tensors"
    elif any(x.dim() != 4 or x._ragged_idx != 2 or x.lengths() is not None for x in operands):
        reason = "its inputs are not [batch, heads, ragged, head dim] of sequences side by side"
    elif any(x._max_seqlen_tensor is None for x in operands[:2]):
        reason = "how long the longest sequence is only the data knows"
        remedy = "give it: torch.nested.nested_tensor_from_jagged(values, offsets, max_seqlen=...)"
    elif mask is not None or dropout:
        reason = "jagged inputs with a mask or with dropout have no canonical form yet"
    elif argument(node, 5, "is_causal", False) and not _have_one_length(operands[0], operands[1]):
        reason = "queries and keys of other lengths are aligned differently by each kernel of stock's"
    if not reason:
        return None
    return BatchInvarianceError("scaled_dot_product_attention", reason, remedy, source_line(node))
