"""Inputs for the gradients of attention, and the two ways to compute them: the kernels, and the composite."""

import math

import torch

from bi_inductor.attention_backward_op import attention_backward, composite


def fused(is_causal, scale):
    """The op, as a function of its tensors."""
    return lambda *tensors: attention_backward(*tensors, is_causal, scale)


def composite_of(is_causal, scale):
    """What the op means, in products that have forms of their own; all scores are in memory."""
    return lambda *tensors: composite(*tensors, is_causal, scale)[:3]


def operands(batch, heads, key_heads, queries, keys, head_dim, value_dim, dtype, mask=None, device="cpu"):
    """(grad, query, key, value, mask, logsumexp, delta) of random numbers; one row in the middle sees no key.

    ``mask``: None, "bool", or the name of a float dtype, with keys that it hides.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator)

    query, key = random(batch, heads, queries, head_dim), random(batch, key_heads, keys, head_dim)
    value, grad = random(batch, key_heads, keys, value_dim), random(batch, heads, queries, value_dim)
    logsumexp, delta = random(batch, heads, queries) + 3, random(batch, heads, queries)
    logsumexp[:, 0, queries // 2 : queries // 2 + 1] = -math.inf
    added = None
    if mask is not None:
        visible = torch.rand(batch, heads, queries, keys, generator=generator) > 0.4
        added = visible
        if mask != "bool":
            added = random(*visible.shape).masked_fill(~visible, -math.inf).to(getattr(torch, mask))
    tensors = [x.to(dtype) for x in (grad, query, key, value)]
    return [x if x is None else x.to(device) for x in (*tensors, added, logsumexp, delta)]


def cancelling_keys(batch, heads, keys, width, dtype):
    """Operands whose dq ends near 0: what is left to be rounded is the error of its fp32 sums.

    Queries are 0, so that every p is exp2(-logsumexp) and keys are free; a head's queries have one gradient, so that
    the last two keys can cancel the sums of all its rows. [batch, heads, 70 queries or ``keys`` keys, width].
    """
    generator = torch.Generator().manual_seed(1)
    grad, key, value = _random(generator, batch, heads, dtype, (1, width), (keys, width), (keys, width))
    logsumexp, delta = torch.full((batch, heads, 70), 3.0), torch.randn(batch, heads, 1, generator=generator)
    ds = 2.0**-3 * ((grad @ value.transpose(2, 3)).float() - delta[..., None])
    key = _cancelled(ds.to(dtype).double()[:, :, 0], key, dtype)
    query = torch.zeros(batch, heads, 70, width, dtype=torch.float64)
    tensors = [x.to(dtype) for x in (grad.expand(-1, -1, 70, -1), query, key, value)]
    return [*tensors, None, logsumexp, delta.expand(-1, -1, 70).contiguous()]


def cancelling_queries(batch, heads, queries, width, dtype):
    """The same for dk and dv: keys are 0, and a head's 50 keys have one value; the last two queries, and their
    gradients, cancel the sums of all its keys."""
    generator = torch.Generator().manual_seed(2)
    grad, query, value = _random(
        generator, batch, heads, dtype, (queries, width), (queries, width), (1, width)
    )
    logsumexp = torch.randint(1, 4, (batch, heads, queries), generator=generator).float()
    delta = torch.randn(batch, heads, queries, generator=generator)
    p = torch.exp2(-logsumexp)
    grad = _cancelled(p.double(), grad, dtype)
    ds = p * ((grad @ value.transpose(2, 3)).float()[..., 0] - delta)
    query = _cancelled(ds.to(dtype).double(), query, dtype)
    key = torch.zeros(batch, heads, 50, width, dtype=torch.float64)
    tensors = [x.to(dtype) for x in (grad, query, key, value.expand(-1, -1, 50, -1))]
    return [*tensors, None, logsumexp, delta]


def _random(generator, batch, heads, dtype, *sizes):
    return [torch.randn(batch, heads, *size, generator=generator).to(dtype).double() for size in sizes]


def _cancelled(weights, rows, dtype):
    """``rows`` [B, H, N, D] whose last two are such that the sum of weights [B, H, N] times rows is almost 0."""
    rows = rows.clone()
    left = -(weights[..., :-2, None] * rows[:, :, :-2]).sum(2)
    for last in (-2, -1):
        rows[:, :, last] = (left / weights[..., last, None]).to(dtype).double()
        left = left - weights[..., last, None] * rows[:, :, last]
    return rows
