"""Ordered sums for emitted Triton kernels.

Everything here computes the TREE form of ``contract.py``: the aligned binary tree of adjacent pairs. The order
follows indices, never the layout: a two-element ``tl.sum`` has one order, so XBLOCK, R0_BLOCK, num_warps and
the compiler's choice of layout cannot change a bit.
"""

import triton
import triton.language as tl


@triton.jit
def _sum_pairs(x):
    """[..., n] -> [..., n / 2]: y[i] = x[2 i] + x[2 i + 1]."""
    rank: tl.constexpr = len(x.shape)
    half: tl.constexpr = x.shape[rank - 1] // 2
    if rank == 1:
        pairs = tl.reshape(x, [half, 2])
    elif rank == 2:
        pairs = tl.reshape(x, [x.shape[0], half, 2])
    else:
        pairs = tl.reshape(x, [x.shape[0], x.shape[1], half, 2])
    return tl.sum(pairs, rank)


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _multiply_pairs(x):
    """[..., n] -> [..., n / 2]: y[i] = x[2 i] * x[2 i + 1]."""
    rank: tl.constexpr = len(x.shape)
    half: tl.constexpr = x.shape[rank - 1] // 2
    if rank == 1:
        pairs = tl.reshape(x, [half, 2])
    elif rank == 2:
        pairs = tl.reshape(x, [x.shape[0], half, 2])
    else:
        pairs = tl.reshape(x, [x.shape[0], x.shape[1], half, 2])
    return tl.reduce(pairs, rank, _multiply)


@triton.jit
def tree_sum(x):
    """Sum over the last axis (a power of two): ((x0 + x1) + (x2 + x3)) + ..."""
    if x.shape[len(x.shape) - 1] > 2:
        result = tree_sum(_sum_pairs(x))
    else:
        result = tl.sum(x, len(x.shape) - 1)
    return result


@triton.jit
def tree_prod(x):
    """Product over the last axis (a power of two): ((x0 * x1) * (x2 * x3)) * ..."""
    if x.shape[len(x.shape) - 1] > 2:
        result = tree_prod(_multiply_pairs(x))
    else:
        result = tl.reduce(x, len(x.shape) - 1, _multiply)
    return result


@triton.jit
def new_stack(identity, blocks: tl.constexpr):
    """Partial results of a looped tree over at most ``blocks`` blocks: one slot per level of the tree."""
    if blocks > 1:
        stack = new_stack(identity, blocks // 2) + (identity,)
    else:
        stack = (identity,)
    return stack


@triton.jit
def push_sum(stack, value, block):
    """Add the sum of block number ``block`` (0, 1, 2, ...): a binary counter whose digits are aligned subtrees.

    Slot l holds the sum of an aligned stretch of 2**l blocks. A new block carries upwards through the slots
    that are full, always as ``slot + carry``, which is the order of the tree; one carry a block on average.
    """
    if len(stack) == 1:
        pushed = (value,)
    else:
        lowest = value
        higher = stack[1:]
        if (block & 1) != 0:
            lowest = stack[0]
            higher = push_sum(stack[1:], stack[0] + value, block >> 1)
        pushed = (lowest,) + higher
    return pushed


@triton.jit
def push_prod(stack, value, block):
    """As ``push_sum``, with products."""
    if len(stack) == 1:
        pushed = (value,)
    else:
        lowest = value
        higher = stack[1:]
        if (block & 1) != 0:
            lowest = stack[0]
            higher = push_prod(stack[1:], stack[0] * value, block >> 1)
        pushed = (lowest,) + higher
    return pushed


@triton.jit
def total_sum(stack, identity, blocks):
    """The root of the tree after ``blocks`` blocks: full slots folded from the right, ``slot + rest``."""
    total = identity
    for level in tl.static_range(len(stack)):
        full = ((blocks >> level) & 1) != 0
        total = tl.where(full, stack[level] + total, total)
    return total


@triton.jit
def total_prod(stack, identity, blocks):
    """As ``total_sum``, with products."""
    total = identity
    for level in tl.static_range(len(stack)):
        full = ((blocks >> level) & 1) != 0
        total = tl.where(full, stack[level] * total, total)
    return total
