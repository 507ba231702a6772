"""The canonical forms executed in plain torch: the specification that kernels are compared with, bit for bit.

Written to be read, not to be fast. Every function takes float tensors on any device, computes in the
accumulator dtype (fp32; fp64 for fp64) and returns the accumulator dtype unless said otherwise.

``elementwise`` is where exp, log and div come from: torch itself, or any object with these attributes when the
device's own elementwise results are to be fed in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _accumulator(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _reduced_last(x: Tensor, dim: int | Sequence[int] | None) -> Tensor:
    """``x`` with the reduced dimensions moved last, in ascending logical order, and flattened row-major."""
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    reduced = sorted(d % x.ndim for d in dims) if x.ndim else []
    kept = [d for d in range(x.ndim) if d not in reduced]
    return x.permute(*kept, *reduced).reshape([x.shape[d] for d in kept] + [-1])


def _tree(x: Tensor, combine: Callable[[Tensor, Tensor], Tensor], identity: float) -> Tensor:
    """((x0 . x1) . (x2 . x3)) . ... over the last dimension, padded with ``identity`` to a power of two."""
    length = max(1, x.shape[-1])
    padded = 1 << (length - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, padded - x.shape[-1]), value=identity)
    while x.shape[-1] > 1:
        x = combine(x[..., 0::2], x[..., 1::2])
    return x[..., 0]


def tree_sum(x: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    """sum_i x_i: aligned binary tree of adjacent pairs, then ``+ 0.0`` (a total of -0.0 becomes 0.0)."""
    return _tree(_reduced_last(_accumulator(x), dim), torch.add, 0.0) + 0.0


def tree_prod(x: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    """prod_i x_i: aligned binary tree of adjacent pairs."""
    return _tree(_reduced_last(_accumulator(x), dim), torch.mul, 1.0)


def mean(x: Tensor, dim: int | Sequence[int] | None = None, *, elementwise: Any = torch) -> Tensor:
    """tree_sum(x) / n."""
    total = tree_sum(x, dim)
    return elementwise.div(total, torch.full_like(total, _reduced_last(x, dim).shape[-1]))


def var_mean(
    x: Tensor,
    dim: int | Sequence[int] | None = None,
    *,
    correction: float = 1,
    elementwise: Any = torch,
) -> tuple[Tensor, Tensor]:
    """Two passes: mean by tree; then the tree of squared differences over max(0, n - correction)."""
    flat = _reduced_last(_accumulator(x), dim)
    average = mean(flat, -1, elementwise=elementwise)
    difference = flat - average.unsqueeze(-1)
    total = tree_sum(difference * difference, -1)
    return elementwise.div(total, torch.full_like(total, max(0.0, flat.shape[-1] - correction))), average


def softmax(x: Tensor, *, elementwise: Any = torch) -> Tensor:
    """Over the last dimension: exact maximum, exp(x - max), divided by its tree sum."""
    x = _accumulator(x)
    numerator = elementwise.exp(x - x.amax(-1, keepdim=True))
    return elementwise.div(numerator, tree_sum(numerator, -1).unsqueeze(-1).expand_as(numerator))


def logsumexp(x: Tensor, *, elementwise: Any = torch) -> Tensor:
    """Over the last dimension: log(tree_sum(exp(x - max))) + max, with an infinite max replaced by 0."""
    x = _accumulator(x)
    maximum = x.amax(-1, keepdim=True)
    maximum = torch.where(maximum.abs() == torch.inf, torch.zeros_like(maximum), maximum)
    return elementwise.log(tree_sum(elementwise.exp(x - maximum), -1)) + maximum.squeeze(-1)


def scan(x: Tensor, combine: str = "sum") -> Tensor:
    """Inclusive prefixes over the last dimension: left-to-right fold of the blocks of m's binary digits."""
    x, prefixes = _accumulator(x), []
    for count in range(1, x.shape[-1] + 1):
        total, first = torch.full_like(x[..., 0], 0.0 if combine == "sum" else 1.0), 0
        for bit in reversed(range(count.bit_length())):
            if count >> bit & 1:
                block = x[..., first : first + (1 << bit)]
                first += 1 << bit
                total = total + tree_sum(block, -1) if combine == "sum" else total * tree_prod(block, -1)
        prefixes.append(total)
    return torch.stack(prefixes, -1)


def scatter_sum(base: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """out[v] = base[v] + tree_sum of values[t] over the t with rows[t] = v, ascending; [V, D], [T], [T, D]."""
    result = _accumulator(base).clone()
    for row in rows.unique().tolist():
        result[row] = result[row] + tree_sum(values[rows == row], 0)
    return result


def chain_matmul(a: Tensor, b: Tensor, accumulator: Tensor | None = None) -> Tensor:
    """[M, K] @ [K, N] in fp64 steps: acc = round32(acc + a_k * b_k) for ascending k, exact products.

    ``accumulator`` [M, N]: what the chain starts from, if not from 0.

    For fp32 operands this is a chain of fused multiply-adds up to double rounding, so it is a specification
    of the order; bits are compared where products are exact in fp32 (bf16 and fp16 operands).
    """
    if accumulator is None:
        accumulator = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    for k in range(a.shape[1]):
        product = a[:, k, None].double() * b[None, k, :].double()
        accumulator = (accumulator.double() + product).float()
    return accumulator


def chunked_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor | None = None, scale_b: Tensor | None = None, chunk: int = 128
) -> Tensor:
    """[M, K] @ [K, N]: the chain over every ``chunk`` of K from 0, these sums added left to right in fp32.

    With scale_a [M, chunks] and scale_b [chunks, N], sum i is first multiplied by scale_a[m, i], then by scale_b[i, n].
    """
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    for index, start in enumerate(range(0, a.shape[1], chunk)):
        part = chain_matmul(a[:, start : start + chunk], b[start : start + chunk])
        if scale_a is not None and scale_b is not None:
            part = part * scale_a[:, index, None] * scale_b[None, index]
        total = total + part
    return total


def _fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """round32(a * b + c) for fp32; the product is exact in fp64, their sum is rounded twice in rare cases."""
    return (a.double() * b.double() + c.double()).float()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    form: Any,
    *,
    scale: float,
    mask: Tensor | None = None,
    elementwise: Any = torch,
) -> Tensor:
    """[M, D], [S, D], [S, DV] -> [M, DV]: ``form`` is a ``contract.Attention``; mask [M, S] is bool or None.

    The steps are those of ``runtime/attention.py``; ``scale`` is positive.
    """
    factor = torch.tensor(scale * math.log2(math.e), dtype=torch.float32)
    lowest = torch.full((len(query),), torch.finfo(torch.float32).min)
    borders, joined = [0], (lowest, torch.zeros(len(query)), torch.zeros(len(query), value.shape[1]))
    while borders[-1] < len(key):
        borders.append(borders[-1] + (form.near_chunk if borders[-1] < form.near_keys else form.far_chunk))
    for low, high in itertools.pairwise(borders):
        highest, sums, acc = lowest, torch.zeros(len(query), 4), torch.zeros(len(query), value.shape[1])
        for start in range(low, min(high, len(key)), form.tile):
            keys = slice(start, start + form.tile)
            t = chain_matmul(query, key[keys].T)
            if mask is not None:
                t = torch.where(mask[:, keys], t, -math.inf)
            missing = form.tile - t.shape[1]
            t = torch.nn.functional.pad(t, (0, missing), value=-math.inf)
            before, highest = highest, torch.maximum(highest, t.amax(1) * factor)
            rescale = elementwise.exp2(before - highest)
            p = elementwise.exp2(_fused_multiply_add(t, factor, -highest[:, None]))
            pairs = p.unflatten(1, (-1, 4, 2)).sum(3)
            sums = sums * rescale[:, None] + _tree(pairs.movedim(1, -1), torch.add, 0.0)
            rows = torch.nn.functional.pad(value[keys], (0, 0, 0, missing))
            acc = chain_matmul(p.to(value.dtype), rows, acc * rescale[:, None])
        joined = _join(
            joined, (highest, (sums[:, 0] + sums[:, 1]) + (sums[:, 2] + sums[:, 3]), acc), elementwise
        )
    _, total, acc = joined
    inverse = torch.where(total == 0, 0.0, 1.0 / total)
    return (acc * inverse[:, None] + 0.0).to(query.dtype)


def _join(a: tuple[Tensor, ...], b: tuple[Tensor, ...], elementwise: Any) -> tuple[Tensor, ...]:
    """Two states (maximum [M], sum [M], accumulator [M, DV]) of consecutive chunks."""
    highest = torch.maximum(a[0], b[0])
    old, new = elementwise.exp2(a[0] - highest), elementwise.exp2(b[0] - highest)
    total = _fused_multiply_add(a[1], old, b[1] * new)
    return highest, total, _fused_multiply_add(a[2], old[:, None], b[2] * new[:, None])
