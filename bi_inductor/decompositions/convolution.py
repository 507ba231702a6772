"""Convolutions, their transposes and their gradients, as matrix products over unfolded windows.

    forward      out[n, o, p] = sum_(k, c) x[n, c, p * stride + k * dilation - padding] w[o, c, k]
    transposed   the forward of x, spread out by the stride, with w turned round and its channels exchanged
    gradients    of the input: the other of the two above; of the weight: sum_(n, p), a product over windows

Every sum is a CHAIN: over (k, c), kernel positions outermost, row-major, so that with channels last in memory a window
is read in long pieces and a weight as it lies there; over (n, p), samples outermost.
Windows are views of the padded input; the product reads them as one matrix, so the batch and the positions are
its rows and cannot enter the order. (No cuDNN: its algorithms are chosen by size.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..ops import row_major

aten = torch.ops.aten


def _per_dim(values: Sequence[int], dims: int) -> list[int]:
    return list(values) * dims if len(values) == 1 else list(values)


def _windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """x [N, C, *spatial] -> [N, C, *positions, *kernel], a view."""
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(dim, (size - 1) * gap + 1, step)[..., ::gap]
    return x


def _padded(x: Tensor, padding: Sequence[tuple[int, int]]) -> Tensor:
    """Zeros around the spatial dims (a negative number crops), by (before, after)."""
    if not any(before or after for before, after in padding):
        return x
    return F.pad(x, [amount for pair in reversed(padding) for amount in pair])


def _correlated(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """x [N, C, *spatial], padded; weight [O, C / groups, *kernel] -> [N, O, *positions]."""
    kernel = weight.shape[2:]
    dims = len(kernel)
    windows = _windows(x, kernel, stride, dilation)
    batch, positions = x.shape[0], windows.shape[2 : 2 + dims]
    inner = weight.shape[1] * math.prod(kernel)
    left = windows.unflatten(1, (groups, weight.shape[1])).movedim((1, 2), (0, -1))
    right = weight.movedim(1, -1)
    if math.prod(kernel) > 1 and x.is_cuda and x.dtype.itemsize == 2 and inner % 8:
        # A window is copied anyway, and rows of whole 16 bytes are loaded faster. Zeros at a chain's end add nothing.
        left, right = (F.pad(operand.flatten(-dims - 1), [0, -inner % 8]) for operand in (left, right))
        inner = left.shape[-1]
    left = row_major(left, [groups, batch * math.prod(positions), inner])
    right = row_major(right, [groups, weight.shape[0] // groups, inner]).transpose(1, 2)
    out = torch.bmm(left, right) if groups > 1 else torch.mm(left[0], right[0]).unsqueeze(0)
    if groups == 1:
        out = row_major(out, [batch, *positions, weight.shape[0]]).movedim(-1, 1)
    else:
        out = row_major(out, [groups, batch, *positions, weight.shape[0] // groups])
        out = row_major(out.movedim((0, -1), (1, 2)), [batch, weight.shape[0], *positions])
    return out.contiguous(memory_format=suggest_memory_format(x))  # the strides that eager code counts on


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """x [N, C, *spatial] with stride - 1 zeros between neighbours."""
    for dim, step in enumerate(stride, start=2):
        if step > 1:
            size = x.shape[dim]
            x = F.pad(x.unsqueeze(dim + 1), [0, 0] * (x.dim() - dim - 1) + [0, step - 1])
            x = x.flatten(dim, dim + 1).narrow(dim, 0, (size - 1) * step + 1)
    return x


def _turned(weight: Tensor, groups: int) -> Tensor:
    """Weight [G * A, B, *kernel] -> [G * B, A, *kernel] with each kernel turned round."""
    weight = weight.unflatten(0, (groups, weight.shape[0] // groups)).transpose(1, 2).flatten(0, 1)
    return weight.flip(list(range(2, weight.dim())))


def _forward(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    return _correlated(_padded(x, [(p, p) for p in padding]), weight, stride, dilation, groups)


def _transposed(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    extra: Sequence[Any],
    groups: int,
) -> Tensor:
    """``extra``: what the output has beyond the least size, per dim."""
    kernel = weight.shape[2:]
    reach = [(k - 1) * d - p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    around = [(r, r + e) for r, e in zip(reach, extra, strict=True)]
    return _correlated(
        _padded(_spread(x, stride), around), _turned(weight, groups), [1] * len(kernel), dilation, groups
    )


def _is_float(*tensors: Tensor) -> bool:
    return all(tensor.is_floating_point() for tensor in tensors)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    if not _is_float(input, weight):
        return NotImplemented
    dims = weight.dim() - 2
    unbatched = input.dim() == dims + 1
    x = input.unsqueeze(0) if unbatched else input
    stride, padding, dilation = (_per_dim(values, dims) for values in (stride, padding, dilation))
    if transposed:
        extra = _per_dim(output_padding, dims)
        out = _transposed(x, weight, stride, padding, dilation, extra, groups)
    else:
        out = _forward(x, weight, stride, padding, dilation, groups)
    if bias is not None:
        out = out + bias.reshape(-1, *[1] * dims)
    return out.squeeze(0) if unbatched else out


def _convolution_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    if not _is_float(grad_output, input, weight):
        return NotImplemented
    dims = weight.dim() - 2
    stride, padding, dilation = (_per_dim(values, dims) for values in (stride, padding, dilation))
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        if transposed:
            grad_input = _forward(grad_output, weight, stride, padding, dilation, groups)
            for dim, size in enumerate(
                input.shape[2:], start=2
            ):  # output_padding may leave room for one more
                grad_input = grad_input.narrow(dim, 0, size)
        else:
            grad_input = _transposed(
                grad_output,
                weight,
                stride,
                padding,
                dilation,
                _remainder(input, weight, stride, padding, dilation),
                groups,
            )
    if output_mask[1]:
        small, large = (input, grad_output) if transposed else (grad_output, input)
        grad_weight = _weight_gradient(small, large, weight, stride, padding, dilation, groups)
    if output_mask[2]:
        grad_bias = grad_output.sum([0, *range(2, grad_output.dim())])
    return grad_input, grad_weight, grad_bias


def _remainder(
    input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> list[Any]:
    """Elements at the end of each spatial dim that no window reached."""
    reach = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    return [
        (size + 2 * p - r) % s for size, p, r, s in zip(input.shape[2:], padding, reach, stride, strict=True)
    ]


def _weight_gradient(
    small: Tensor,
    large: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """sum_(n, p) small[n, a, p] window(large)[n, b, p, k] -> like weight [A, B / groups, *kernel]."""
    kernel = weight.shape[2:]
    dims = len(kernel)
    windows = _windows(_padded(large, [(p, p) for p in padding]), kernel, stride, dilation)
    positions = small.shape[2:]
    for dim, size in enumerate(positions, start=2):
        windows = windows.narrow(dim, 0, size)
    terms = small.shape[0] * math.prod(positions)
    rows, inner = weight.shape[0] // groups, weight.shape[1]
    left = row_major(small.unflatten(1, (groups, rows)).movedim((1, 2), (0, 1)), [groups, rows, terms])
    channels_last = suggest_memory_format(large) != torch.contiguous_format
    # Columns of the product, in an order that is free: the one in which the windows are copied in long pieces.
    right = windows.unflatten(1, (groups, inner)).movedim((1, 2), (0, -1 if channels_last else 2 + dims))
    right = row_major(right, [groups, terms, inner * math.prod(kernel)])
    product = torch.bmm(left, right) if groups > 1 else torch.mm(left[0], right[0])
    if channels_last:
        return product.reshape(weight.shape[0], *kernel, inner).movedim(-1, 1)
    return product.reshape(weight.shape)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
