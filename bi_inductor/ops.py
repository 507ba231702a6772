"""Operators of our own in the ``bi_inductor`` namespace.

``bmm_wide`` is a primitive that the lowerings know. ``bmm_rounding`` exists for its gradient alone: the
decomposition table turns it into ordinary ops. Everything registered through :func:`composite` is only a name
for a few plain torch ops: the dispatcher expands it before autograd, so AOTAutograd never sees it, but an FX
graph that holds it stays cacheable and prints readably.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("bi_inductor", "FRAGMENT")
_WIDE_DTYPE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def composite(schema: str) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Turn a Python function of plain torch ops into ``bi_inductor::<schema>``; returns the overload."""

    def register(function: Callable[..., Any]) -> torch._ops.OpOverload:
        name = _LIBRARY.define(schema).split("(")[0]
        # The second key is vmap's: without it a mapped call would be unrolled into one call per sample.
        for key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
            _LIBRARY.impl(name, function, key)
        return getattr(torch.ops.bi_inductor, name.split("::")[-1]).default

    return register


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a matmul accumulates in: fp32 for bf16 and fp16, the dtype itself otherwise."""
    return _WIDE_DTYPE.get(dtype, dtype)


_LIBRARY.define("bmm_wide(Tensor a, Tensor b) -> Tensor")
_LIBRARY.define("bmm_rounding(Tensor a, Tensor b) -> Tensor")

bmm_wide = torch.ops.bi_inductor.bmm_wide.default
"""``bmm_wide(a [B, M, K], b [B, K, N]) -> [B, M, N]``: one accumulator each, K ascending, *not rounded*.

bf16 and fp16 operands give the fp32 accumulator; fp32 and fp64 give their own dtype: ordinary ``bmm``.
"""

bmm_rounding = torch.ops.bi_inductor.bmm_rounding.default
"""``bmm_rounding(a [B, M, K], b [B, K, N])``: ``bmm`` of ``a``, in a wide dtype, rounded to the dtype of ``b``.

The same as ``bmm(a.to(b.dtype), b)`` but for the gradient of ``a``, which keeps the wide dtype.
"""


@torch.library.impl(_LIBRARY, "bmm_wide", "CompositeExplicitAutograd")
def _bmm_wide_eager(a: Tensor, b: Tensor) -> Tensor:
    """Reference: the products of the widened operands. The library's order; ours is in the lowering."""
    dtype = wide_dtype(a.dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))


@torch.library.impl(_LIBRARY, "bmm_rounding", "CompositeExplicitAutograd")
def bmm_rounding_decomposed(a: Tensor, b: Tensor) -> Tensor:
    """The plain ops that ``bmm_rounding`` stands for."""
    return torch.bmm(a.to(b.dtype), b)


def _check_shapes(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    torch._check(a.dim() == 3 and b.dim() == 3, lambda: "both operands must be 3-D")
    torch._check(a.size(0) == b.size(0), lambda: "the operands differ in batch size")
    torch._check(a.size(2) == b.size(1), lambda: "the operands' inner sizes differ")
    return a.size(0), a.size(1), b.size(2)


@torch.library.register_fake("bi_inductor::bmm_wide", lib=_LIBRARY)
def _bmm_wide_fake(a: Tensor, b: Tensor) -> Tensor:
    torch._check(a.dtype == b.dtype, lambda: f"the operands differ in dtype: {a.dtype} and {b.dtype}")
    return a.new_empty(_check_shapes(a, b), dtype=wide_dtype(a.dtype))


@torch.library.register_fake("bi_inductor::bmm_rounding", lib=_LIBRARY)
def _bmm_rounding_fake(a: Tensor, b: Tensor) -> Tensor:
    return b.new_empty(_check_shapes(a, b))


def _save_operands(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _bmm_wide_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Ordinary bmm on the gradient rounded once to the operands' dtype.

    Rounding first keeps both products in the operands' own dtype (one canonical form, tensor cores on a GPU).
    It costs half an ulp per term, the same that flash attention pays for dS, and less than the rounding of the
    result, which has the operands' dtype in any case.
    """
    a, b = ctx.saved_tensors
    grad = grad.to(a.dtype)
    grad_a = torch.bmm(grad, b.transpose(1, 2)) if ctx.needs_input_grad[0] else None
    grad_b = torch.bmm(a.transpose(1, 2), grad) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b


def _bmm_rounding_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of ``a`` is not rounded: a softmax backward subtracts it from what nearly equals it."""
    a, b = ctx.saved_tensors
    grad_a = bmm_wide(grad, b.transpose(1, 2)).to(a.dtype) if ctx.needs_input_grad[0] else None
    grad_b = torch.bmm(a.to(b.dtype).transpose(1, 2), grad) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b


def _mapped(overload: torch._ops.OpOverload) -> Callable[..., tuple[Tensor, int]]:
    """The vmap rule: the mapped dim becomes part of the batch, so that one product stays one product."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *operands: Tensor) -> tuple[Tensor, int]:
        size = info.batch_size
        spread = [
            x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(operands, in_dims, strict=True)
        ]
        return overload(*(x.flatten(0, 1) for x in spread)).unflatten(0, (size, -1)), 0

    return rule


for _op, _backward in ((bmm_wide, _bmm_wide_backward), (bmm_rounding, _bmm_rounding_backward)):
    _name = _op._schema.name
    torch.library.register_autograd(_name, _backward, setup_context=_save_operands, lib=_LIBRARY)
    torch.library.register_vmap(_name, _mapped(_op), lib=_LIBRARY)
