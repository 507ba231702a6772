"""Bit equality and the batch ladder: what every invariance test, ours or a user's, is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

#: Batch sizes with a reason each: 1 and 2 are specialised, odd ones have tails, 255-257 and 2048 cross tiles.
BATCH_LADDER = (1, 2, 3, 7, 8, 9, 31, 64, 255, 256, 257, 2048)
#: Reduced lengths at the edges of vectors, warps, blocks and splits.
LENGTH_LADDER = (1, 2, 31, 32, 33, 127, 128, 129, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 65537, 131072)

_INTEGER_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The bits of ``x`` as integers of the same width (so that -0 is not +0 and NaN equals itself)."""
    x = x.detach().contiguous()
    if x.dtype.is_complex:
        x = torch.view_as_real(x)
    if x.dtype == torch.bool:
        x = x.to(torch.uint8)
    return x.view(_INTEGER_VIEW[x.dtype.itemsize])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True if ``a`` and ``b`` have equal shape, dtype and bits."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b).to(a.device))


def count_changed_rows(a: Tensor, b: Tensor) -> int:
    """How many rows (dimension 0) of ``a`` differ from ``b`` in any bit. Shapes and dtypes must be equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"cannot compare {a.dtype}{list(a.shape)} with {b.dtype}{list(b.shape)}")
    if a.numel() == 0:
        return 0
    return int((bits(a) != bits(b).to(a.device)).reshape(a.shape[0], -1).any(1).sum())


def ulp_distance(a: Tensor, b: Tensor) -> int:
    """Largest number of representable values between corresponding elements of two float tensors."""
    if a.numel() == 0:
        return 0

    def ordered(x: Tensor) -> Tensor:
        raw = bits(x).to(torch.int64).flatten()
        sign = 1 << (x.dtype.itemsize * 8 - 1)
        return torch.where(raw < 0, -(raw + sign), raw)

    return int((ordered(a) - ordered(b)).abs().max())


def with_cancellation(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Operands whose bf16 or fp16 products ``x @ weight.t()`` show the last bits of the wide sums behind them.

    A result of 8 bits hides in which of two ways its sum of 24 was rounded, but for one element in 2**16. So each
    sum of ``x`` [M, K] and ``weight`` [N, K] is given minus its own value as two more terms: what is left to be
    rounded is its error. Returns [M, K + 2 N] and [N, K + 2 N] of the operands' dtype.
    """
    exact = x.double() @ weight.double().t()
    high = exact.to(x.dtype)
    low = (exact - high.double()).to(x.dtype)
    minus = -torch.eye(weight.shape[0], dtype=x.dtype, device=x.device)
    return torch.cat([x, high, low], 1), torch.cat([weight, minus, minus], 1)


def _rows(output: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def changed_rows_over_batches(
    fn: Callable[..., object], inputs: Sequence[Tensor], batches: Sequence[int] = BATCH_LADDER
) -> dict[int, int]:
    """Rows whose bits differ from the same rows computed alone in batches of 1, for each batch size.

    ``fn(*inputs)`` maps tensors whose dimension 0 is the batch to tensors whose dimension 0 is the batch;
    ``inputs`` have the largest batch needed. Batches larger than the inputs are left out.
    """
    total = inputs[0].shape[0]
    batches = [size for size in batches if size <= total]
    largest = max(batches)
    alone = [_rows(fn(*(x[row : row + 1] for x in inputs))) for row in range(largest)]
    changed = {}
    for size in batches:
        together = _rows(fn(*(x[:size] for x in inputs)))
        reference = [torch.cat([rows[i] for rows in alone[:size]]) for i in range(len(together))]
        changed[size] = sum(count_changed_rows(a, b) for a, b in zip(together, reference, strict=True))
    return changed


def assert_batch_invariant(
    fn: Callable[..., object], *inputs: Tensor, batches: Sequence[int] = BATCH_LADDER
) -> None:
    """Raise AssertionError naming the batch sizes at which any row of ``fn`` changed in any bit.

    >>> assert_batch_invariant(torch.compile(model, backend="batchinv"), torch.randn(64, 512))
    """
    changed = {k: v for k, v in changed_rows_over_batches(fn, inputs, batches).items() if v}
    if changed:
        raise AssertionError(f"rows that changed with the batch, as {{batch: rows}}: {changed}")
