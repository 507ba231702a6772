"""``bi_inductor::attention``: one op from the Dynamo pass to the kernels, on devices that have a kernel for it.

    attention(query [B, H, L, D], key [B, Hk, S, D], value [B, Hk, S, Dv], mask, is_causal, scale)
        -> output [B, H, L, Dv], logsumexp [B, H, L]

``mask``: None, or bool (true: visible) or float (added to the scaled scores), expanded to [B, H, L, S].
``logsumexp``: fp32, log2 of the sum of exp2 of the scores in log2 units; -inf where no key is visible, and the
output's row is 0 there. H is a multiple of Hk. Causal means key <= query, counted from the first of each.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .ops import _LIBRARY, bmm_wide, wide_dtype

_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale)"
    " -> (Tensor, Tensor)"
)
attention = torch.ops.bi_inductor.attention.default
LOG2_E = math.log2(math.e)


def scores(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """[B, Hk, G * L, S] in a wide dtype and log2 units, hidden keys at -inf; rows are head by head."""
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1:3]
    rows = query.reshape(batch * groups, (heads // groups) * length, width)
    products = bmm_wide(rows, key.transpose(2, 3).reshape(batch * groups, width, keys))
    result = products.reshape(batch, heads, length, keys)
    if mask is not None and mask.dtype != torch.bool:
        result = (result * scale + mask.to(result.dtype)) * LOG2_E
    else:
        result = result * (scale * LOG2_E)
    if is_causal:
        visible = torch.arange(length, device=key.device)[:, None] >= torch.arange(keys, device=key.device)
        result = torch.where(visible, result, -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        result = torch.where(mask, result, -math.inf)
    return result.reshape(batch, groups, -1, keys)


@torch.library.impl(_LIBRARY, "attention", "CompositeExplicitAutograd")
def _attention_eager(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Reference: the same function in plain torch, with the library's orders."""
    t = scores(query, key, mask, is_causal, scale)
    highest = t.amax(-1, keepdim=True).clamp(min=torch.finfo(t.dtype).min) if t.shape[-1] else t.sum(-1, True)
    p = torch.exp2(t - highest)
    total = p.sum(-1, keepdim=True)
    output = torch.matmul(p, value.to(p.dtype)) / torch.where(total == 0, 1.0, total)
    shape = query.shape[:3]
    result = _empty_output(query, value)
    result.copy_(output.reshape(*shape, value.shape[-1]))
    return result, torch.log2(total).add(highest).reshape(shape)


def _empty_output(query: Tensor, value: Tensor) -> Tensor:
    """[B, H, L, Dv] with the heads of one query beside each other: joining them is a view."""
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


@torch.library.register_fake("bi_inductor::attention", lib=_LIBRARY)
def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return _empty_output(query, value), query.new_empty(query.shape[:3], dtype=wide_dtype(query.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, mask, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
    """From scores computed again; products round probabilities and their gradients to the inputs' dtype.

        p = exp2(t - logsumexp)           dv = round(p)^T g                       queries ascending
        dp = g v^T, delta = sum(g * o)    ds = p (dp - (delta - grad of logsumexp in nats))
        dq = round(ds) k scale            dk = round(ds)^T q scale                keys, queries ascending

    For dk and dv the queries of a group's heads are one chain, head after head.
    """
    query, key, value, mask, output, logsumexp = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(output)
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1:3]
    flat = (batch * groups, -1)
    t = scores(query, key, mask, ctx.is_causal, ctx.scale)
    seen = logsumexp.reshape(batch, groups, -1, 1)
    p = torch.where(seen == -math.inf, 0.0, torch.exp2(t - seen)).reshape(*flat, keys)
    g = grad.reshape(*flat, value.shape[-1])
    v = value.reshape(*flat, value.shape[-1])
    delta = (g.to(p.dtype) * output.reshape(g.shape).to(p.dtype)).sum(-1, keepdim=True)
    if grad_logsumexp is not None:
        delta = delta - grad_logsumexp.reshape(delta.shape) * LOG2_E
    ds = p * (bmm_wide(g, v.transpose(1, 2)) - delta)
    rounded = ds.to(query.dtype)
    dq = bmm_wide(rounded, key.reshape(*flat, width)) * ctx.scale
    dk = bmm_wide(rounded.transpose(1, 2), query.reshape(*flat, width)) * ctx.scale
    dv = torch.bmm(p.to(value.dtype).transpose(1, 2), g)
    dmask = None
    if ctx.needs_input_grad[3] and mask is not None:
        dmask = ds.reshape(batch, heads, length, keys).to(mask.dtype)
    return (
        dq.reshape(query.shape).to(query.dtype),
        dk.reshape(key.shape).to(key.dtype),
        dv.reshape(value.shape),
        dmask,
        None,
        None,
    )


torch.library.register_autograd("bi_inductor::attention", _backward, setup_context=_save, lib=_LIBRARY)


@torch.library.register_vmap("bi_inductor::attention", lib=_LIBRARY)
def _attention_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """The mapped dim becomes part of the batch."""
    size = info.batch_size
    tensors = [
        x if x is None else (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
        for x, dim in zip(arguments[:4], in_dims[:4], strict=True)
    ]
    results = attention(*tensors, *arguments[4:])
    return tuple(x.unflatten(0, (size, -1)) for x in results), (0, 0)
