"""Random numbers for emitted Triton kernels: functions of the seed and of the element's position, in any kernel.

    draw i  =  word i % 4 of the Philox block i // 4 of the seed

A block of four words costs the same as one word. A thread whose neighbouring elements share a block computes it once,
which the compiler finds out by itself: of 8 elements a thread, 8 blocks become 2, in sums and in pointwise kernels. How
elements are laid out, what the kernel is fused with and whether it has a tile of one dimension or two is thus free.
(Inductor draws word 0 of block i in the one and, from torch 2.13, nearly this in the other, so that there the numbers
follow fusion, and for up to two elements the size of the tensor.)
"""

import triton
import triton.language as tl


@triton.jit
def _word(words, position):
    """The one of four words that belongs to ``position``."""
    lane = position % 4
    low = tl.where(lane == 0, words[0], words[1])
    high = tl.where(lane == 2, words[2], words[3])
    return tl.where(lane < 2, low, high)


@triton.jit
def uniform(seed, position):
    """fp32 in [0, 1) for each ``position`` (uint32)."""
    return _word(tl.rand4x(seed, position // 4), position)


@triton.jit
def normal(seed, position):
    """fp32, standard normal, for each ``position`` (uint32): Box-Muller of the words 0 and 1, and 2 and 3."""
    return _word(tl.randn4x(seed, position // 4), position)
