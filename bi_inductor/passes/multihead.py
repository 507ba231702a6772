"""``F.multi_head_attention_forward``, which Dynamo keeps as one node, and the fused encoder layer.

Stock, both decompose by shape behind our back: the projections become addmm or mm + add by contiguity, the
attention picks a kernel, and in eval mode ``nn.TransformerEncoderLayer`` is a single opaque op. Here they are
our ``linear`` and our attention, so training and inference run the same sums.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bi_inductor.ops import composite
from bi_inductor.passes.attention import (
    attend,
    attend_safely,
    autocast_applied,
    nested_refusal,
    with_dropout,
)
from bi_inductor.passes.linear import linear
from bi_inductor.passes.retarget import Retarget

_SCHEMA = (
    "multi_head_attention_forward(Tensor query, Tensor key, Tensor value, SymInt embed_dim_to_check, "
    "SymInt num_heads, Tensor? in_proj_weight, Tensor? in_proj_bias, Tensor? bias_k, Tensor? bias_v, "
    "bool add_zero_attn, float dropout_p, Tensor out_proj_weight, Tensor? out_proj_bias, bool training=True, "
    "Tensor? key_padding_mask=None, bool need_weights=True, Tensor? attn_mask=None, "
    "bool use_separate_proj_weight=False, Tensor? q_proj_weight=None, Tensor? k_proj_weight=None, "
    "Tensor? v_proj_weight=None, Tensor? static_k=None, Tensor? static_v=None, "
    "bool average_attn_weights=True, bool is_causal=False) -> (Tensor, Tensor?)"
)


@composite(_SCHEMA)
def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``query [L, N, E]``, ``key [S, N, Ek]``, ``value [S, N, Ev]``, or all without N.

    Returns ``[L, N, E]`` and, if wanted, the weights ``[N, L, S]`` (``[N, heads, L, S]`` unless averaged), after
    their dropout in training.
    """
    batched = query.dim() == 3
    if not batched:
        query, key, value, key_padding_mask = _with_batch(query, key, value, key_padding_mask)
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    q, k, v = _project(query, key, value, in_proj_weight, weights, in_proj_bias)
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(1, *k.shape[1:])])
        v = torch.cat([v, bias_v.expand(1, *v.shape[1:])])
    q = _split_heads(q, num_heads)
    k = _split_heads(k, num_heads) if static_k is None else static_k.unflatten(0, (-1, num_heads))
    v = _split_heads(v, num_heads) if static_v is None else static_v.unflatten(0, (-1, num_heads))
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    # Without weights to return, eager takes the hint instead of the mask it describes.
    hinted = is_causal and key_padding_mask is None and not need_weights
    extra_keys = int(bias_k is not None) + int(add_zero_attn)
    mask = None if hinted else _merge_masks(attn_mask, key_padding_mask, q, extra_keys)
    output, probabilities = _attention(q, k, v, mask, hinted, need_weights, dropout_p if training else 0.0)
    output = linear(output.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    shown = None
    if probabilities is not None:
        shown = (probabilities.mean(dim=1) if average_attn_weights else probabilities).to(output.dtype)
    if batched:
        return output, shown
    return output.squeeze(1), None if shown is None else shown.squeeze(0)


def _with_batch(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> tuple[Any, ...]:
    same = query is key and key is value
    query = query.unsqueeze(1)
    key, value = (query, query) if same else (key.unsqueeze(1), value.unsqueeze(1))
    return query, key, value, None if padding is None else padding.unsqueeze(0)


def _project(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed_weight: Tensor | None,
    weights: tuple[Tensor | None, ...] | None,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """The three projections; one product for self-attention, which gives every column the same bits."""
    if weights is None and packed_weight is not None:
        if query is key and key is value:
            return linear(query, packed_weight, bias).chunk(3, dim=-1)
        weights = packed_weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(linear(x, w, b) for x, w, b in zip((query, key, value), weights or (), biases, strict=True))


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[L, N, heads * D]`` -> ``[N, heads, L, D]``."""
    return x.unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3)


def _float_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A module's boolean mask says what is *hidden*, the opposite of SDPA's; floats are added."""
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask, -math.inf, torch.zeros((), dtype=dtype, device=mask.device))


def _merge_masks(
    attn_mask: Tensor | None, padding: Tensor | None, query: Tensor, extra_keys: int
) -> Tensor | None:
    """``[L, S]`` or ``[N * heads, L, S]`` and ``[N, S]`` -> one additive mask broadcasting to ``[N, heads,
    L, S]``.

    ``extra_keys`` are the appended bias and zero keys, which no mask hides.
    """
    merged = None
    if attn_mask is not None:
        merged = F.pad(_float_mask(attn_mask, query.dtype), (0, extra_keys))
        merged = merged.unflatten(0, (-1, query.shape[1])) if merged.dim() == 3 else merged
    if padding is not None:
        padding = F.pad(_float_mask(padding, query.dtype), (0, extra_keys)).unsqueeze(1).unsqueeze(1)
        merged = padding if merged is None else merged + padding
    return merged


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    need_weights: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor | None]:
    """Rows with every key hidden are NaN with weights and 0 without: what eager returns."""
    with autocast_applied(query, key, value, mask) as (query, key, value, mask):
        if need_weights:
            softmax = with_dropout(torch.softmax, dropout_p)
            return attend(query, key, value, mask, is_causal, None, False, softmax)
        return attend_safely(query, key, value, mask, is_causal, dropout_p=dropout_p), None


_ENCODER_SCHEMA = (
    "transformer_encoder_layer(Tensor src, int embed_dim, int num_heads, Tensor qkv_weight, Tensor qkv_bias, "
    "Tensor proj_weight, Tensor proj_bias, bool use_gelu, bool norm_first, float eps, Tensor norm_weight_1, "
    "Tensor norm_bias_1, Tensor norm_weight_2, Tensor norm_bias_2, Tensor ffn_weight_1, Tensor ffn_bias_1, "
    "Tensor ffn_weight_2, Tensor ffn_bias_2, Tensor? mask=None, int? mask_type=None) -> Tensor"
)


@composite(_ENCODER_SCHEMA)
def transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``torch._transformer_encoder_layer_fwd`` on ``src [N, L, E]``, spelled as the layer computes in
    training.

    ``mask_type`` 0: attention mask [L, L]; 1: key padding [N, L]; 2: both merged, [N, heads, L, L].
    """
    padding = mask if mask_type == 1 else None
    attn_mask = None if mask_type == 1 else mask
    if attn_mask is not None and attn_mask.dim() == 4:
        attn_mask = attn_mask.flatten(0, 1)

    def attention(x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        arguments = (qkv_weight, qkv_bias, None, None, False, 0.0, proj_weight, proj_bias, False, padding)
        output, _ = multi_head_attention_forward(x, x, x, embed_dim, num_heads, *arguments, False, attn_mask)
        return output.transpose(0, 1)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = linear(x, ffn_weight_1, ffn_bias_1)
        return linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attention(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attention(src))
    return norm_2(x + feed_forward(x))


MULTIHEAD = Retarget(
    name="multihead",
    targets=frozenset({F.multi_head_attention_forward}),
    replacement=multi_head_attention_forward,
    refuse=lambda node: nested_refusal(node, "multi_head_attention_forward"),
)
ENCODER_LAYER = Retarget(
    name="encoder_layer",
    targets=frozenset(
        {torch._transformer_encoder_layer_fwd, torch.ops.aten._transformer_encoder_layer_fwd.default}
    ),
    replacement=transformer_encoder_layer,
    refuse=lambda node: nested_refusal(node, "_transformer_encoder_layer_fwd"),
)
