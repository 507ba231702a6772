"""``bi_inductor::attention_backward``: the gradients of ``bi_inductor::attention``, one op up to the kernels.

    attention_backward(grad [B, H, L, Dv], query [B, H, L, D], key [B, Hk, S, D], value [B, Hk, S, Dv], mask,
                       logsumexp [B, H, L], delta [B, H, L], is_causal, scale, tiles, spans, score, derivative,
                       captured)
        -> dq [B, H, L, D], dk [B, Hk, S, D], dv [B, Hk, S, Dv]

    p = exp2(t - logsumexp), 0 where logsumexp is -inf        dv = round(p)^T grad        queries ascending
    ds = p (grad value^T - delta)                             dq = round(ds) key scale    keys ascending
                                                              dk = round(ds)^T query scale   queries ascending

``t``: the scores, computed again. ``round``: to the inputs' dtype. ``delta``: fp32, the sum of grad times the output,
minus the gradient of the logsumexp in nats. For dk and dv the queries of a group's heads are one chain, head after
head. ``tiles`` and ``spans``: None, or ``attention_map`` and ``query_spans`` of a mask of bools; they change no bit.
``score``, ``derivative``, ``captured``: as in ``attention_op.py``; ds is the gradient of the score that the product
gave. ``composite`` says it in plain ops, with all scores in memory; kernels have its bits for finite inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import _LIBRARY, bmm_wide
from .score_programs import run_on_grid

_LIBRARY.define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor logsumexp,"
    " Tensor delta, bool is_causal, float scale, Tensor? tiles, Tensor? spans, str score,"
    " str derivative, Tensor[] captured)"
    " -> (Tensor, Tensor, Tensor)"
)
OVERLOAD = torch.ops.bi_inductor.attention_backward.default
LOG2_E = math.log2(math.e)


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    logsumexp: Tensor,
    delta: Tensor,
    is_causal: bool,
    scale: float,
    tiles: Tensor | None = None,
    spans: Tensor | None = None,
    score: str = "",
    derivative: str = "",
    captured: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """The op; arguments and results as above."""
    options = (is_causal, scale, tiles, spans, score, derivative, list(captured))
    return OVERLOAD(grad, query, key, value, mask, logsumexp, delta, *options)  # type: ignore[no-any-return]


def scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    score: str = "",
    captured: Sequence[Tensor] = (),
) -> Tensor:
    """[B, Hk, G * L, S] in a wide dtype and log2 units, hidden keys at -inf; rows are head by head."""
    batch, _, length, _ = query.shape
    groups, keys = key.shape[1:3]
    result = _products(query, key)
    is_float = mask is not None and mask.dtype != torch.bool
    if score or is_float:
        result = result * scale
        if score:
            result = run_on_grid(score, result, (), captured)
        if is_float:
            result = result + mask.to(result.dtype)  # type: ignore[union-attr]
        result = result * LOG2_E
    else:
        result = result * (scale * LOG2_E)
    if is_causal:
        visible = torch.arange(length, device=key.device)[:, None] >= torch.arange(keys, device=key.device)
        result = torch.where(visible, result, -math.inf)
    if mask is not None and not is_float:
        result = torch.where(mask, result, -math.inf)
    return result.reshape(batch, groups, -1, keys)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """query key^T: [B, H, L, S] in a wide dtype."""
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1:3]
    rows = query.reshape(batch * groups, (heads // groups) * length, width)
    products = bmm_wide(rows, key.transpose(2, 3).reshape(batch * groups, width, keys))
    return products.reshape(batch, heads, length, keys)


def composite(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    logsumexp: Tensor,
    delta: Tensor,
    is_causal: bool,
    scale: float,
    score: str = "",
    derivative: str = "",
    captured: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, ds [B, H, L, S] in the wide dtype) in ops that have forms of their own."""
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1:3]
    flat = (batch * groups, -1)
    t = scores(query, key, mask, is_causal, scale, score, captured)
    seen = logsumexp.reshape(batch, groups, -1, 1)
    p = torch.where(seen == -math.inf, 0.0, torch.exp2(t - seen)).reshape(*flat, keys)
    g = grad.reshape(*flat, value.shape[-1])
    v = value.reshape(*flat, value.shape[-1])
    ds = p * (bmm_wide(g, v.transpose(1, 2)) - delta.reshape(*flat, 1))
    if derivative:
        given = ds.reshape(batch, heads, length, keys)
        ds = run_on_grid(derivative, _products(query, key) * scale, (given,), captured).reshape(ds.shape)
    rounded = ds.to(query.dtype)
    dq = bmm_wide(rounded, key.reshape(*flat, width)) * scale
    dk = bmm_wide(rounded.transpose(1, 2), query.reshape(*flat, width)) * scale
    dv = torch.bmm(p.to(value.dtype).transpose(1, 2), g)
    return (
        dq.reshape(query.shape).to(query.dtype),
        dk.reshape(key.shape).to(key.dtype),
        dv.reshape(value.shape),
        ds.reshape(batch, heads, length, keys),
    )


def captured_gradients(*arguments: Any) -> list[Tensor | None]:
    """Gradients of what a score_mod reads, in plain ops with all scores in memory; ``arguments`` of ``composite``."""
    *_, score, _, captured = arguments
    before_derivative: Any = (*arguments[:-3], score, "", captured)
    of_modified = composite(*before_derivative)[3]
    _, query, key, *_, scale = arguments[:-3]
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in captured]
    with torch.enable_grad():
        modified = run_on_grid(score, (_products(query, key) * scale).detach(), (), leaves)
        wanted = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(modified, wanted, of_modified, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in leaves]


def empty_heads(like: Tensor, width: Any) -> Tensor:
    """[B, H, L, ``width``] with the heads of one position beside each other: joining them is a view."""
    batch, heads, length, _ = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


@torch.library.impl(_LIBRARY, "attention_backward", "CompositeExplicitAutograd")
def _eager(*arguments: Any) -> tuple[Tensor, ...]:
    """Reference: the composite, with the library's orders."""
    results = [empty_heads(x, x.shape[-1]) for x in arguments[1:4]]
    options = arguments[:9] + arguments[11:]
    for result, gradient in zip(results, composite(*options), strict=False):
        result.copy_(gradient)
    return tuple(results)


@torch.library.register_fake("bi_inductor::attention_backward", lib=_LIBRARY)
def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(empty_heads(x, x.shape[-1]) for x in arguments[1:4])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.captured = inputs[13]
    ctx.save_for_backward(*inputs[:7])
    ctx.options = (*inputs[7:9], *inputs[11:13])


def _second_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """The gradient of the composite, op by op."""
    tensors = [x if x is None else x.detach() for x in ctx.saved_tensors]
    leaves = [x.requires_grad_() for place, x in enumerate(tensors) if x is not None and place != 4]
    arguments: Any = (*tensors, *ctx.options, ctx.captured)
    with torch.enable_grad():
        results = composite(*arguments)[:3]
        *first, of_logsumexp, of_delta = torch.autograd.grad(results, leaves, grads)
    return (*first, None, of_logsumexp, of_delta, *[None] * 6, [None] * len(ctx.captured))


torch.library.register_autograd(
    "bi_inductor::attention_backward", _second_backward, setup_context=_save, lib=_LIBRARY
)


@torch.library.register_vmap("bi_inductor::attention_backward", lib=_LIBRARY)
def _vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """The mapped dim becomes part of the batch."""
    if arguments[11]:
        raise NotImplementedError("vmap over the gradient of flex_attention with a score_mod")
    tensors: list[Any] = as_batch(info.batch_size, in_dims[:7], arguments[:7])
    results = attention_backward(*tensors, *arguments[7:9])
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0, 0)


def as_batch(
    size: int, in_dims: tuple[int | None, ...], tensors: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Tensors mapped along ``in_dims``, with the mapped dim as part of the batch, which is the first's for all."""
    moved = [
        x if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]
    assert moved[0] is not None
    shape = moved[0].shape[:2]
    return [x if x is None else x.expand(*shape, *x.shape[2:]).flatten(0, 1) for x in moved]
