"""``bi_inductor::attention``: one op from the Dynamo pass to the kernels, on devices that have a kernel for it.

    attention(query [B, H, L, D], key [B, Hk, S, D], value [B, Hk, S, Dv], mask, is_causal, scale, tiles, score,
              derivative, captured)
        -> output [B, H, L, Dv], logsumexp [B, H, L]

``mask``: None, or bool (true: visible) or float (added to the scaled scores), [B, H, L, S], of which B and H may be 1.
``tiles``: None, or for a mask of bools its ``attention_tiles.attention_map``, which saves time and changes no bit.
``score``: "", or a program (``score_programs.py``) that a scaled score goes through before a mask of floats is added;
with its ``derivative``, and what both read. ``logsumexp``: fp32, log2 of the sum of exp2 of the scores in log2 units;
-inf where no key is visible, and the output's row is 0 there. H is a multiple of Hk. Causal means key <= query, counted
from the first of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import contract
from .attention_backward_op import (
    LOG2_E,
    as_batch,
    attention_backward,
    captured_gradients,
    composite,
    empty_heads,
    scores,
)
from .attention_tiles import query_spans
from .ops import _LIBRARY, wide_dtype

_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale,"
    " Tensor? tiles, str score, str derivative, Tensor[] captured) -> (Tensor, Tensor)"
)
OVERLOAD = torch.ops.bi_inductor.attention.default


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    tiles: Tensor | None = None,
    score: str = "",
    derivative: str = "",
    captured: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """The op; arguments and results as above."""
    options = (is_causal, scale, tiles, score, derivative, list(captured))
    return OVERLOAD(query, key, value, mask, *options)  # type: ignore[no-any-return]


@torch.library.impl(_LIBRARY, "attention", "CompositeExplicitAutograd")
def _attention_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    tiles: Tensor | None,
    score: str,
    derivative: str,
    captured: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Reference: the same function in plain torch, with the library's orders."""
    t = scores(query, key, mask, is_causal, scale, score, captured)
    highest = t.amax(-1, keepdim=True).clamp(min=torch.finfo(t.dtype).min) if t.shape[-1] else t.sum(-1, True)
    p = torch.exp2(t - highest)
    total = p.sum(-1, keepdim=True)
    output = torch.matmul(p, value.to(p.dtype)) / torch.where(total == 0, 1.0, total)
    shape = query.shape[:3]
    result = empty_heads(query, value.shape[-1])
    result.copy_(output.reshape(*shape, value.shape[-1]))
    return result, torch.log2(total).add(highest).reshape(shape)


@torch.library.register_fake("bi_inductor::attention", lib=_LIBRARY)
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return empty_heads(query, value.shape[-1]), query.new_empty(
        query.shape[:3], dtype=wide_dtype(query.dtype)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, ctx.is_causal, ctx.scale, tiles, *ctx.programs, captured = inputs
    ctx.save_for_backward(query, key, value, mask, tiles, *output, *captured)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Any, ...]:
    """``attention_backward_op.py``; its composite where a mask of floats needs a gradient, which is all of ds, and for
    heads that its kernels do not hold. What a score_mod reads has gradients in plain ops."""
    query, key, value, mask, tiles, output, logsumexp, *captured = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(output)
    delta = (grad.to(logsumexp.dtype) * output.to(logsumexp.dtype)).sum(-1)
    if grad_logsumexp is not None:
        delta = delta - grad_logsumexp * LOG2_E
    inputs = (grad, query, key, value, mask, logsumexp, delta, ctx.is_causal, ctx.scale)
    modified = (*ctx.programs, captured)
    dmask, of_captured = None, [None] * len(captured)
    if any(ctx.needs_input_grad[9]):
        of_captured = captured_gradients(*inputs, *modified)
    needs_mask = ctx.needs_input_grad[3] and mask is not None
    widths = int(query.shape[-1]), int(value.shape[-1])
    if needs_mask or contract.attention_gradient_form(*widths, query.dtype) is None:
        dq, dk, dv, ds = composite(*inputs, *modified)
        dmask = ds.sum_to_size(mask.shape).to(mask.dtype) if needs_mask else None
    else:
        spans = None if tiles is None else query_spans(tiles, query.shape[2])
        dq, dk, dv = attention_backward(*inputs, tiles, spans, *modified)
    return dq, dk, dv, dmask, *[None] * 5, of_captured


torch.library.register_autograd("bi_inductor::attention", _backward, setup_context=_save, lib=_LIBRARY)


@torch.library.register_vmap("bi_inductor::attention", lib=_LIBRARY)
def _attention_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """The mapped dim becomes part of the batch."""
    if arguments[7]:
        raise NotImplementedError("vmap over flex_attention with a score_mod")
    size = info.batch_size
    tensors: list[Any] = as_batch(size, in_dims[:4], arguments[:4])
    results = attention(*tensors, *arguments[4:6])
    return tuple(x.unflatten(0, (size, -1)) for x in results), (0, 0)
