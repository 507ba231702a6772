"""Random numbers of every distribution out of uniform and normal ones: functions of seed and position alone.

Position is the element's in its tensor, row-major, however that is laid out in memory: with the batch as outermost
dimension neither its size nor a neighbour's contents can change a row, but a row that moves draws other numbers.
Distributions by rejection (poisson, gamma, binomial) draw as many numbers as the data want and are refused.

    exponential  -log1p(-u) / rate          geometric   ceil(log1p(-u) / log1p(-p))
    cauchy       median + sigma tan(pi (u - 1/2))          log_normal  exp(mean + std n)
    multinomial  with replacement: where the scan of the weights passes u times its end; without: the largest
                 weight / exponential, a race in which the first of equals wins
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import compute_elementwise_output_logical_to_physical_perm

aten = torch.ops.aten


def _uniform_like(x: Tensor) -> Tensor:
    """In [0, 1)."""
    return torch.rand(x.shape, dtype=x.dtype, device=x.device)


def _normal_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, device=x.device)


def _rand_like(
    self: Tensor, *, dtype: Any = None, memory_format: Any = torch.preserve_format, **settings: Any
) -> Tensor:
    values = torch.rand(self.shape, dtype=dtype or self.dtype, device=settings.get("device") or self.device)
    return _laid_out(values, self, memory_format)


def _randn_like(
    self: Tensor, *, dtype: Any = None, memory_format: Any = torch.preserve_format, **settings: Any
) -> Tensor:
    values = torch.randn(self.shape, dtype=dtype or self.dtype, device=settings.get("device") or self.device)
    return _laid_out(values, self, memory_format)


def _randint_like(self: Tensor, high: int, **settings: Any) -> Tensor:
    return _randint_like_from(self, 0, high, **settings)


def _randint_like_from(
    self: Tensor,
    low: int,
    high: int,
    *,
    dtype: Any = None,
    memory_format: Any = torch.preserve_format,
    **settings: Any,
) -> Tensor:
    device = settings.get("device") or self.device
    values = torch.randint(low, high, self.shape, dtype=dtype or self.dtype, device=device)
    return _laid_out(values, self, memory_format)


def _laid_out(values: Tensor, like: Tensor, memory_format: Any) -> Tensor:
    """``values`` in memory as ``like``, or in the memory format asked for: drawn first, so no layout reaches them."""
    if memory_format != torch.preserve_format:
        return values.to(memory_format=memory_format)
    order, _ = compute_elementwise_output_logical_to_physical_perm(like)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return (
        values if order == inverse == sorted(order) else values.permute(order).contiguous().permute(inverse)
    )


def _uniform(self: Tensor, low: float = 0, high: float = 1, *, generator: Any = None) -> Tensor:
    return _uniform_like(self) * (high - low) + low


def _exponential(self: Tensor, rate: float = 1, *, generator: Any = None) -> Tensor:
    return -torch.log1p(-_uniform_like(self)) / rate


def _geometric(self: Tensor, p: float, *, generator: Any = None) -> Tensor:
    u = torch.rand(self.shape, dtype=torch.float32, device=self.device)
    return (torch.log1p(-u) / math.log1p(-p)).ceil().clamp(min=1).to(self.dtype)


def _cauchy(self: Tensor, median: float = 0, sigma: float = 1, *, generator: Any = None) -> Tensor:
    return median + sigma * torch.tan(math.pi * (_uniform_like(self) - 0.5))


def _log_normal(self: Tensor, mean: float = 1, std: float = 2, *, generator: Any = None) -> Tensor:
    return torch.exp(_normal_like(self) * std + mean)


def _normal_functional(self: Tensor, mean: float = 0, std: float = 1, *, generator: Any = None) -> Tensor:
    return _normal_like(self) * std + mean


def _normal(mean: Any, std: Any = 1, *, generator: Any = None) -> Tensor:
    """Of which one is a tensor at least."""
    tensors = [x for x in (mean, std) if isinstance(x, Tensor)]
    dtype = torch.promote_types(tensors[0].dtype, tensors[-1].dtype)
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return torch.randn(shape, dtype=dtype, device=tensors[0].device) * std + mean


def _normal_of_size(
    mean: float,
    std: float,
    size: Sequence[Any],
    *,
    generator: Any = None,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> Tensor:
    return torch.randn(size, dtype=dtype, device=device) * std + mean


def _bernoulli(self: Tensor, p: float, *, generator: Any = None) -> Tensor:
    """1 where a number in [0, 1) is below ``p``; what dropout under vmap becomes."""
    return (torch.rand(self.shape, dtype=torch.float32, device=self.device) < p).to(self.dtype)


def _multinomial(
    self: Tensor, num_samples: Any, replacement: bool = False, *, generator: Any = None
) -> Tensor:
    if not self.is_floating_point():
        return NotImplemented
    if not replacement:
        race = self / _exponential(self)
        return race.topk(num_samples, -1).indices
    prefix = self.cumsum(-1)
    shape = [*self.shape[:-1], num_samples]
    wanted = torch.rand(shape, dtype=self.dtype, device=self.device) * prefix[..., -1:]
    return torch.searchsorted(prefix, wanted, right=True).clamp(max=self.shape[-1] - 1)


def _randperm(
    n: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Tensor:
    return torch.randint(2**62, (n,), device=device).argsort(stable=True).to(dtype or torch.int64)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.rand_like.default: _rand_like,
    aten.randn_like.default: _randn_like,
    aten.randint_like.default: _randint_like,
    aten.randint_like.low_dtype: _randint_like_from,
    aten.uniform.default: _uniform,
    aten.exponential.default: _exponential,
    aten.geometric.default: _geometric,
    aten.cauchy.default: _cauchy,
    aten.log_normal.default: _log_normal,
    aten.normal_functional.default: _normal_functional,
    aten.normal.Tensor_float: _normal,
    aten.normal.Tensor_Tensor: _normal,
    aten.normal.float_Tensor: _normal,
    aten.normal.float_float: _normal_of_size,
    aten.bernoulli.p: _bernoulli,
    aten.multinomial.default: _multinomial,
    aten.randperm.default: _randperm,
}
