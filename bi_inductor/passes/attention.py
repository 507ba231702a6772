"""``scaled_dot_product_attention`` in one form per device and dtype, for every shape.

Stock dispatch picks flash, memory-efficient, cuDNN or math by shape. Here a query row on a GPU is the ATTENTION form of
``contract.py``, one kernel, for bf16 and fp16 and heads of up to 576 elements (512 of values), as MLA has, and for fp32
and heads of up to 256. For fp64, wider heads, dropout and on the CPU it is two matrix products around one softmax::

    s[j] = (sum_e q[e] * k[j, e]) * scale      e ascending, fp32, never rounded to the input dtype
    s[j] = mask[j] ? s[j] : -inf               or s[j] + mask[j], in fp32
    p[j] = exp(s[j] - max_j s) / sum_j exp(...)  exact maximum, tree sum in key order; 0 where every key is masked
    p[j] = 0 or p[j] / (1 - dropout_p)         ``torch.dropout``, drawn by seed and position in [..., H, L, S]
    o[c] = round(sum_j round(p[j]) * v[j, c])  j ascending, one accumulator

with fp64 in place of fp32 for fp64 inputs. Rows meet nowhere, so a query gives the same bits alone, in a
chunk and in a full prefill; masked keys add exact zeros at the tail, so padding changes nothing. What is dropped is
another matter: it follows a query's place, and the numbers of queries and keys, but not the size of the outermost dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bi_inductor import contract, traced
from bi_inductor.attention_op import attention
from bi_inductor.attention_tiles import attention_map
from bi_inductor.certificate import source_line
from bi_inductor.errors import BatchInvarianceError
from bi_inductor.ops import bmm_rounding, bmm_wide, composite
from bi_inductor.passes.retarget import Retarget, argument

_SCHEMA = (
    "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
    "float dropout_p=0.0, bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor"
)


@composite(_SCHEMA)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``query [..., H, L, E]``, ``key [..., Hk, S, E]``, ``value [..., Hv, S, Ev]`` -> ``[..., H, L, Ev]``.

    Same arguments and meaning as ``torch.nn.functional.scaled_dot_product_attention``; without
    ``enable_gqa`` all leading dims broadcast and may be absent; or jagged tensors, as in ``jagged.py``. Raises
    RuntimeError for a ``dropout_p`` outside [0, 1].
    """
    torch._check(attn_mask is None or not is_causal, lambda: "attn_mask and is_causal exclude each other")
    with autocast_applied(query, key, value, attn_mask) as (query, key, value, attn_mask):
        if query.is_nested:
            from bi_inductor.passes.jagged import jagged_attention

            return jagged_attention(query, key, value, is_causal, scale, enable_gqa)
        return attend_safely(query, key, value, attn_mask, is_causal, scale, enable_gqa, dropout_p)


def attend_safely(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """The output alone, 0 where every key is masked.

    Without dropout by the kernel, if there is one for these dtypes and head dims.
    """
    if dropout_p == 0.0 and has_kernel(query, key, value):
        leading, query, key, value, attn_mask = _as_batch_of_heads(query, key, value, attn_mask, enable_gqa)
        tiles = None
        if attn_mask is not None and attn_mask.dtype == torch.bool and not _is_decoding(query):
            tiles = tiles_of(attn_mask, query, key, value)
        output, _ = attention(query, key, value, attn_mask, is_causal, _scale(query, scale), tiles)
        return output.reshape(*leading, *output.shape[-2:])
    softmax = with_dropout(torch.ops.aten._safe_softmax.default, dropout_p)
    return attend(query, key, value, attn_mask, is_causal, scale, enable_gqa, softmax)[0]


def with_dropout(
    softmax: Callable[[Tensor, int], Tensor], dropout_p: float
) -> Callable[[Tensor, int], Tensor]:
    """``softmax``, then dropout of its results where ``dropout_p`` is not 0; forward and backward draw once."""
    if dropout_p == 0.0:
        return softmax
    return lambda scores, dim: torch.dropout(softmax(scores, dim), dropout_p, True)


def has_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True if these inputs have the ATTENTION form: by device, dtype and head dims, never by another size."""
    if traced.device_type(query) != "cuda" or not query.dtype == key.dtype == value.dtype:
        return False
    head_dim, value_dim = int(query.shape[-1]), int(value.shape[-1])
    return contract.attention_form(head_dim, value_dim, query.dtype) is not None


def tiles_of(visible: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The map of the tiles of ``visible [B or 1, H or 1, L, S]`` for inputs that have the ATTENTION form."""
    form = contract.attention_form(int(query.shape[-1]), int(value.shape[-1]), query.dtype)
    assert form is not None, "asked for before"
    return attention_map(visible, int(key.shape[1]), form.tile)


def _is_decoding(query: Tensor) -> bool:
    """True if there are known to be so few queries that a map of tiles costs more than it saves."""
    return isinstance(query.shape[2], int) and query.shape[2] <= 16


def _as_batch_of_heads(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[Any, ...]:
    """Leading shape of the result, and all four as ``[B, heads, rows, columns]`` views where strides allow it.

    Key and value get the same number of heads. The mask is expanded to ``[B, H, L, S]``, B and H where it has them.
    """
    kept = 3 if enable_gqa else 2
    batch = torch.broadcast_shapes(*(t.shape[:-kept] for t in (query, key, value)))
    leading = (*batch, query.shape[-3]) if enable_gqa else batch
    if enable_gqa and key.shape[-3] != value.shape[-3]:
        heads = math.lcm(int(key.shape[-3]), int(value.shape[-3]))
        key, value = (t.repeat_interleave(heads // int(t.shape[-3]), -3) for t in (key, value))
    query, key, value = (t.expand(*batch, *t.shape[-kept:]) for t in (query, key, value))
    if mask is not None and len(leading) == 2:
        mask = mask[(None,) * (4 - mask.dim())].expand(-1, -1, query.shape[-2], key.shape[-2])
    elif mask is not None:
        mask = mask.expand(*leading, query.shape[-2], key.shape[-2])
        mask = _four_dims(mask, enable_gqa)
    query, key, value = (_four_dims(t, enable_gqa) for t in (query, key, value))
    # Numbers of heads are a model's constants too: how many rows share a key head is known to the kernel.
    torch._check(int(query.shape[1]) % int(key.shape[1]) == 0, lambda: "key heads do not divide query heads")
    return leading, query, key, value, mask


def _four_dims(x: Tensor, enable_gqa: bool) -> Tensor:
    """``[B, heads, rows, columns]``; the batch of three dims stands first unless it is known to be heads."""
    if x.dim() > 4:
        return x.flatten(0, x.dim() - 4)
    if x.dim() == 3 and not enable_gqa:
        return x.unsqueeze(1)
    return x[(None,) * (4 - x.dim())]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    softmax: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, Tensor]:
    """The form above; returns the output and the fp32 (fp64) probabilities ``[..., H, L, S]``."""
    for tensor in (query, key, value):
        _specialize(tensor, enable_gqa)
    leading, query, key, value = _align(query, key, value, enable_gqa)
    scores = grouped_product(query, key.transpose(-2, -1), bmm_wide)
    scores = scores.reshape(*leading, *scores.shape[-2:]) * _scale(query, scale)
    probabilities = softmax(_mask(scores, attn_mask, is_causal), -1)
    rows = probabilities.reshape(*query.shape[:3], key.shape[2])
    output = grouped_product(rows, value, bmm_rounding)
    return output.reshape(*leading, *output.shape[-2:]), probabilities


@contextmanager
def autocast_applied(*tensors: Tensor | None) -> Iterator[list[Any]]:
    """As autocast treats this op: floats but fp64 take the autocast dtype, and inside it is off."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        yield list(tensors)
        return
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float32, torch.float16, torch.bfloat16)
    with torch.autocast(device, enabled=False):
        yield [t.to(dtype) if t is not None and t.dtype in eligible else t for t in tensors]


def _specialize(x: Tensor, enable_gqa: bool) -> None:
    """Make numbers of the head dim and, where there are heads for sure, of how many: both are a model's constants.

    With a symbol for each, every reshape is a proof about products of symbols, which is slow.
    """
    for dim in (-1, -3) if enable_gqa else (-1,):
        int(x.shape[dim])


def _align(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Bring all three to ``[B, heads, rows, columns]`` with one B; ``heads`` differ only under
    ``enable_gqa``.

    Returns the leading shape of the result as well. Sizes are only multiplied and broadcast, never
    compared, except for the size-1 rule of broadcasting itself.
    """
    kept = 3 if enable_gqa else 2
    batch = torch.broadcast_shapes(*(t.shape[:-kept] for t in (query, key, value)))
    aligned = []
    for tensor in (query, key, value):
        heads = tensor.shape[-3] if enable_gqa else 1
        expanded = tensor.expand(*batch, *tensor.shape[-kept:])
        aligned.append(expanded.reshape(math.prod(batch), heads, *tensor.shape[-2:]))
    leading = (*batch, query.shape[-3]) if enable_gqa else batch
    return leading, *aligned


def grouped_product(rows: Tensor, columns: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``rows [B, H, M, K]`` times ``columns [B, Hc, K, N]``, H a multiple of Hc, without repeating the
    columns.

    The H // Hc heads of one group become more rows of one product, ``[B * Hc, G * M, K]``: the same bits
    per row.
    """
    batch, heads, height, inner = rows.shape
    groups = columns.shape[1]
    torch._check(heads % groups == 0, lambda: f"{groups} key/value heads do not divide {heads} query heads")
    folded = rows.reshape(batch * groups, (heads // groups) * height, inner)
    result = product(folded, columns.reshape(batch * groups, inner, columns.shape[-1]))
    return result.reshape(batch, heads, height, columns.shape[-1])


def _scale(query: Tensor, scale: float | None) -> float:
    # The head dim is a model's constant: a symbolic one is specialised, so that the scale is the same Python
    # float in a static and in a dynamic graph.
    return 1.0 / math.sqrt(int(query.shape[-1])) if scale is None else scale


def _mask(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """``scores [..., L, S]`` with hidden keys at -inf; ``is_causal`` aligns to the top left, as in torch."""
    if is_causal:
        rows = torch.arange(scores.shape[-2], device=scores.device).unsqueeze(-1)
        attn_mask = rows >= torch.arange(scores.shape[-1], device=scores.device)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return torch.where(attn_mask, scores, -math.inf)
    return scores + attn_mask.to(scores.dtype)


def nested_refusal(node: Node, op: str) -> BatchInvarianceError | None:
    """The error for a nested (jagged) first argument, or None for a plain tensor."""
    value = argument(node, 0, "query")
    if not (isinstance(value, Tensor) and value.is_nested):
        return None
    reason = "nested (jagged) inputs have no canonical form yet"
    remedy = "pass padded tensors with a boolean mask: masked keys at the tail change no bit"
    return BatchInvarianceError(op, reason, remedy, source_line(node))


def _jagged_refusal(node: Node) -> BatchInvarianceError | None:
    from bi_inductor.passes.jagged import jagged_refusal

    return jagged_refusal(node)


ATTENTION = Retarget(
    name="attention",
    targets=frozenset(
        {
            torch.nn.functional.scaled_dot_product_attention,
            torch._C._nn.scaled_dot_product_attention,
            torch.ops.aten.scaled_dot_product_attention.default,
        }
    ),
    replacement=scaled_dot_product_attention,
    refuse=_jagged_refusal,
)
