"""Pooling, adaptive or by windows, and its gradients: each output is a sum or a maximum over a window.

    average    out[o] = round(tree(x[j] for j in the window of o, row-major) / elements of the window)
    gradient   grad[j] = round(tree(g[o] / elements of o's window, for the windows o that hold j, ascending along
               each dimension, last to first by kernel position)): a window of windows, gathered, never scattered
    maximum    exact; the first of equal elements

Adaptive windows have lengths of their own: they are read as windows of the greatest length, what is past their end
as zero (or as -infinity). Spatial sizes are static; the batch and the channels need not be.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..ops import wide_dtype
from .convolution import _padded, _per_dim, _spread, _windows

aten = torch.ops.aten


def _with_batch(x: Tensor, dims: int) -> Tensor:
    return x.unsqueeze(0) if x.dim() == dims + 1 else x


def _like_eager(out: Tensor, x: Tensor) -> Tensor:
    """``out`` in the shape and memory format that eager code gives a pooled ``x``."""
    if out.dim() != x.dim():
        return out.squeeze(0).contiguous()
    return out.contiguous(memory_format=suggest_memory_format(x))


def _kernel_dims(dims: int) -> list[int]:
    return list(range(-dims, 0))


# ---------------------------------------------------------------- average, by windows


def _positions(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    reach = size + 2 * padding - kernel
    count = (-(-reach // stride) if ceil_mode else reach // stride) + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


class _Windows:
    """Geometry of a pooling by windows, per spatial dimension; sizes become static."""

    def __init__(
        self,
        x: Tensor,
        dims: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        ceil_mode: bool,
        dilation: Sequence[int] = (1,),
    ) -> None:
        self.dims = dims
        self.sizes = [int(size) for size in x.shape[-dims:]]
        self.kernel = _per_dim(kernel_size, dims)
        self.stride = _per_dim(stride, dims) if stride else self.kernel
        self.padding, self.dilation = _per_dim(padding, dims), _per_dim(dilation, dims)
        self.has_tails = ceil_mode or any(self.padding)
        geometry = zip(self.sizes, self.kernel, self.stride, self.padding, strict=True)
        self.count = [_positions(*each, ceil_mode) for each in geometry]

    def of(self, x: Tensor) -> Tensor:
        """x [N, C, *sizes] -> [N, C, *count, *kernel], zeros outside."""
        around = [
            (pad, (count - 1) * step + length - size - pad)
            for pad, count, step, length, size in zip(
                self.padding, self.count, self.stride, self.kernel, self.sizes, strict=True
            )
        ]
        return _windows(_padded(x, around), self.kernel, self.stride, [1] * self.dims)

    def of_windows(self, g: Tensor, fill: int = 0) -> Tensor:
        """g [N, C, *count] -> [N, C, *sizes, *kernel]: what belongs to the windows that hold each element."""
        g = _spread(g - fill, self.stride) if fill else _spread(g, self.stride)
        around = []
        for size, length, pad, gap, present in zip(
            self.sizes, self.kernel, self.padding, self.dilation, g.shape[2:], strict=True
        ):
            before = (length - 1) * gap - pad
            around.append((before, size + (length - 1) * gap - before - present))
        spread = _windows(_padded(g, around), self.kernel, [1] * self.dims, self.dilation)
        return spread + fill if fill else spread

    def divisor(self, count_include_pad: bool, override: int | None, device: torch.device) -> Any:
        """Elements of each window, as a number or as a tensor [*count]."""
        if override is not None or not self.has_tails:
            return override or math.prod(self.kernel)
        total: Any = 1
        for dim in range(self.dims):
            size, pad = self.sizes[dim], self.padding[dim]
            start = torch.arange(self.count[dim], device=device) * self.stride[dim] - pad
            end = (start + self.kernel[dim]).clamp(max=size + pad)
            if not count_include_pad:
                start, end = start.clamp(min=0), end.clamp(max=size)
            total = total * (end - start).reshape(-1, *[1] * (self.dims - 1 - dim))
        return total


def _avg_pool(dims: int) -> Callable[..., Tensor]:
    def avg_pool(
        self: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        if not self.is_floating_point():
            return NotImplemented
        windows = _Windows(self, dims, kernel_size, stride, padding, ceil_mode)
        wide = wide_dtype(self.dtype)
        total = windows.of(_with_batch(self, dims).to(wide)).sum(_kernel_dims(dims))
        mean = total / windows.divisor(count_include_pad, divisor_override, self.device)
        return _like_eager(mean.to(self.dtype), self)

    return avg_pool


def _avg_pool_backward(dims: int) -> Callable[..., Tensor]:
    def avg_pool_backward(
        grad_output: Tensor,
        self: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Tensor:
        if not self.is_floating_point():
            return NotImplemented
        windows = _Windows(self, dims, kernel_size, stride, padding, ceil_mode)
        divisor = windows.divisor(count_include_pad, divisor_override, self.device)
        g = _with_batch(grad_output, dims).to(wide_dtype(self.dtype)) / divisor
        return _like_eager(windows.of_windows(g).sum(_kernel_dims(dims)).to(self.dtype), self)

    return avg_pool_backward


def _max_pool_backward(dims: int) -> Callable[..., Tensor]:
    def max_pool_backward(
        grad_output: Tensor,
        self: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
        indices: Tensor,
    ) -> Tensor:
        windows = _Windows(self, dims, kernel_size, stride, padding, ceil_mode, dilation)
        taken = windows.of_windows(_with_batch(indices, dims), fill=-1)
        g = windows.of_windows(_with_batch(grad_output, dims).to(wide_dtype(self.dtype)))
        here = _flat_index(windows.sizes, self.device).reshape(*windows.sizes, *[1] * dims)
        total = torch.where(taken == here, g, 0.0).sum(_kernel_dims(dims))
        return _like_eager(total.to(self.dtype), self)

    return max_pool_backward


def _flat_index(sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.arange(math.prod(sizes), device=device)


# ---------------------------------------------------------------- adaptive


def _adaptive_windows(x: Tensor, sizes: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """x [.., *sizes] -> (elements [.., *counts, *lengths], whether they are inside the window).

    Window o of a dimension is floor(o * size / count) ... ceil((o + 1) * size / count) - 1. The windows that hold
    an element of the input are the same with sizes and counts exchanged.
    """
    dims = len(sizes)
    lengths = [
        max(-(-(o + 1) * size // count) - o * size // count for o in range(count))
        for size, count in zip(sizes, counts, strict=True)
    ]
    inside: Any = True
    indices = []
    for dim, (size, count, length) in enumerate(zip(sizes, counts, lengths, strict=True)):
        window = torch.arange(count, device=x.device)[:, None]
        position = window * size // count + torch.arange(length, device=x.device)
        end = ((window + 1) * size + count - 1) // count
        shape = [1] * (2 * dims)
        shape[dim], shape[dims + dim] = count, length
        indices.append(position.clamp(max=size - 1).reshape(shape))
        inside = (position < end).reshape(shape) & inside
    everything = [..., *indices]
    return x[tuple(everything)], inside


def _window_lengths(sizes: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """Elements of each adaptive window, [*counts]."""
    total: Any = 1
    for dim, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        window = torch.arange(count, device=device)
        length = ((window + 1) * size + count - 1) // count - window * size // count
        total = total * length.reshape(-1, *[1] * (len(sizes) - 1 - dim))
    return total


def _adaptive_avg_pool(dims: int) -> Callable[..., Tensor]:
    def adaptive_avg_pool(self: Tensor, output_size: Sequence[int]) -> Tensor:
        sizes, counts = _static(self.shape[-dims:]), _static(output_size)
        if not self.is_floating_point() or 0 in counts:
            return NotImplemented
        elements, inside = _adaptive_windows(self.to(wide_dtype(self.dtype)), sizes, counts)
        total = torch.where(inside, elements, 0.0).sum(_kernel_dims(dims))
        return _like_eager((total / _window_lengths(sizes, counts, self.device)).to(self.dtype), self)

    return adaptive_avg_pool


def _adaptive_avg_pool_backward(dims: int) -> Callable[..., Tensor]:
    def adaptive_avg_pool_backward(grad_output: Tensor, self: Tensor) -> Tensor:
        sizes, counts = _static(self.shape[-dims:]), _static(grad_output.shape[-dims:])
        if not self.is_floating_point() or 0 in counts:
            return NotImplemented
        g = grad_output.to(wide_dtype(self.dtype)) / _window_lengths(sizes, counts, self.device)
        elements, inside = _adaptive_windows(g, counts, sizes)
        total = torch.where(inside, elements, 0.0).sum(_kernel_dims(dims))
        return _like_eager(total.to(self.dtype), self)

    return adaptive_avg_pool_backward


def _adaptive_max_pool(dims: int) -> Callable[..., Any]:
    def adaptive_max_pool(self: Tensor, output_size: Sequence[int]) -> Any:
        sizes, counts = _static(self.shape[-dims:]), _static(output_size)
        if not self.is_floating_point() or 0 in counts:
            return NotImplemented
        elements, inside = _adaptive_windows(self, sizes, counts)
        index, _ = _adaptive_windows(_flat_index(sizes, self.device).reshape(sizes), sizes, counts)
        flat = torch.where(inside, elements, -torch.inf).flatten(-dims)
        first = flat.argmax(-1, keepdim=True)
        values = flat.gather(-1, first).squeeze(-1)
        indices = index.flatten(-dims).expand(flat.shape).gather(-1, first).squeeze(-1)
        return _like_eager(values, self), _like_eager(indices, self)

    return adaptive_max_pool


def _adaptive_max_pool_backward(dims: int) -> Callable[..., Tensor]:
    def adaptive_max_pool_backward(grad_output: Tensor, self: Tensor, indices: Tensor) -> Tensor:
        sizes, counts = _static(self.shape[-dims:]), _static(grad_output.shape[-dims:])
        g, inside = _adaptive_windows(grad_output.to(wide_dtype(self.dtype)), counts, sizes)
        taken, _ = _adaptive_windows(indices, counts, sizes)
        here = _flat_index(sizes, self.device).reshape(*sizes, *[1] * dims)
        total = torch.where(inside & (taken == here), g, 0.0).sum(_kernel_dims(dims))
        return _like_eager(total.to(self.dtype), self)

    return adaptive_max_pool_backward


def _static(sizes: Sequence[Any]) -> list[int]:
    return [int(size) for size in sizes]


def _fractional_backward(dims: int) -> Callable[..., Tensor]:
    def fractional_max_pool_backward(
        grad_output: Tensor, self: Tensor, kernel_size: Any, output_size: Any, indices: Tensor
    ) -> Tensor:
        """Windows start where random numbers say: each contribution is scattered to its maximum."""
        zero = torch.zeros_like(self, memory_format=torch.contiguous_format).flatten(-dims)
        return zero.scatter_add(-1, indices.flatten(-dims), grad_output.flatten(-dims)).reshape(self.shape)

    return fractional_max_pool_backward


def _table() -> dict[Any, Callable[..., Any]]:
    found = {
        (aten.avg_pool2d, aten.avg_pool3d): _avg_pool,
        (aten.avg_pool2d_backward, aten.avg_pool3d_backward): _avg_pool_backward,
        (aten.max_pool2d_with_indices_backward, aten.max_pool3d_with_indices_backward): _max_pool_backward,
        (aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d): _adaptive_avg_pool,
        (
            aten._adaptive_avg_pool2d_backward,
            aten._adaptive_avg_pool3d_backward,
        ): _adaptive_avg_pool_backward,
        (aten.adaptive_max_pool2d, aten.adaptive_max_pool3d): _adaptive_max_pool,
        (aten.adaptive_max_pool2d_backward, aten.adaptive_max_pool3d_backward): _adaptive_max_pool_backward,
        (aten.fractional_max_pool2d_backward, aten.fractional_max_pool3d_backward): _fractional_backward,
    }
    pairs = itertools.chain.from_iterable(
        ((packets[0], make(2)), (packets[1], make(3))) for packets, make in found.items()
    )
    return {packet.default: rule for packet, rule in pairs}


TABLE: dict[Any, Callable[..., Any]] = _table()
