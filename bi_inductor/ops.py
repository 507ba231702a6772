"""Operators of our own in the ``bi_inductor`` namespace.

``bmm_wide``, ``segment_tree``, ``block_scan``, ``row_major`` and ``store_rows`` are primitives that the
lowerings know.
``bmm_rounding`` exists for its gradient alone: the decomposition table turns it into ordinary ops. Everything
registered through :func:`composite` is only a name for a few plain torch ops: the dispatcher expands it before
autograd, so AOTAutograd never sees it, but an FX graph that holds it stays cacheable and prints readably.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


# ---------------------------------------------------------------- segments, prefixes and rows

_LIBRARY.define(
    "moved_rows(Tensor x, Tensor index, Tensor exists, Tensor inverse, Tensor has_place) -> Tensor"
)

moved_rows = torch.ops.bi_inductor.moved_rows.default
"""``moved_rows(x [T, ...], index [P], exists [P], inverse [T], has_place [T]) -> [P, ...]``: rows of ``x``, or zeros.

``out[p] = x[index[p]]`` where ``exists[p]``. ``inverse`` says for row t of ``x`` where it went, ``has_place`` whether
it went anywhere: no row goes to two places, so a gradient moves back, and nothing is added. For that gradient alone
this is an op: the decomposition table turns it into ordinary ones.
"""


@torch.library.impl(_LIBRARY, "moved_rows", "CompositeExplicitAutograd")
def moved_rows_decomposed(
    x: Tensor, index: Tensor, exists: Tensor, inverse: Tensor, has_place: Tensor
) -> Tensor:
    """The plain ops that ``moved_rows`` stands for."""
    if x.shape[0] == 0:
        return x.new_zeros(index.shape[0], *x.shape[1:])
    rows = x.index_select(0, index.clamp(0, x.shape[0] - 1))
    return torch.where(exists.view(-1, *(1,) * (x.dim() - 1)), rows, 0)


@torch.library.register_fake("bi_inductor::moved_rows", lib=_LIBRARY)
def _moved_rows_fake(x: Tensor, index: Tensor, exists: Tensor, inverse: Tensor, has_place: Tensor) -> Tensor:
    return x.new_empty(index.shape[0], *x.shape[1:])


def _save_map(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _moved_rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    index, exists, inverse, has_place = ctx.saved_tensors
    return moved_rows(grad, inverse, has_place, index, exists), None, None, None, None


torch.library.register_autograd(
    "bi_inductor::moved_rows", _moved_rows_backward, setup_context=_save_map, lib=_LIBRARY
)

SEGMENT_COMBINES = ("sum", "prod", "amax", "amin", "logaddexp")


def combine_identity(combine: str, dtype: torch.dtype) -> float | int:
    """The value that changes nothing: 0, 1, the lowest (log 0 for logaddexp) or the highest of ``dtype``."""
    if combine in ("sum", "prod"):
        identity = 0 if combine == "sum" else 1
        return float(identity) if dtype.is_floating_point else identity
    if dtype.is_floating_point:
        return torch.inf if combine == "amin" else -torch.inf
    limits = torch.iinfo(dtype)
    return limits.min if combine == "amax" else limits.max


_EAGER_COMBINE = {
    "sum": torch.add,
    "prod": torch.mul,
    "amax": torch.maximum,
    "amin": torch.minimum,
    "logaddexp": torch.logaddexp,
}

_LIBRARY.define("segment_tree(Tensor values, Tensor start, Tensor end, str combine, int bits) -> Tensor")
_LIBRARY.define("block_scan(Tensor x, int dim, str combine, int bits) -> Tensor")
_LIBRARY.define("row_major(Tensor x, SymInt[] shape) -> Tensor")
_LIBRARY.define("store_rows(Tensor base, Tensor rows, Tensor values) -> Tensor")

segment_tree = torch.ops.bi_inductor.segment_tree.default
"""``segment_tree(values [T, D], start [T], end [T], combine, bits) -> [T, D]`` in the accumulator's dtype.

Rows p with equal ``start[p]`` are one segment ``start[p] ... end[p] - 1``. Its first row receives the aligned
tree of adjacent pairs over its rows, never -0.0 but for a product; other rows are unspecified. ``bits``: tree
levels, 2**bits >= every segment's length.
"""

block_scan = torch.ops.bi_inductor.block_scan.default
"""``block_scan(x, dim, combine, bits) -> `` like x in the accumulator's dtype: inclusive prefixes along ``dim``.

A prefix of m elements is the left-to-right fold of the aligned blocks of m's binary digits, highest first, each
block a tree of adjacent pairs. It depends on m alone, not on the length. ``bits``: digits of the length.
"""

row_major = torch.ops.bi_inductor.row_major.default
"""``row_major(x, shape)``: the elements of ``x`` in row-major order, as a tensor of ``shape``.

A reshape that does not ask whether sizes divide each other: products of dynamic sizes cannot always be told to.
"""

store_rows = torch.ops.bi_inductor.store_rows.default
"""``store_rows(base [V, D], rows [T], values [T, D]) -> [V, D]``: base with ``out[rows[t]] = values[t]``.

Where a row occurs twice its values must have the same bits: then no order of the stores can be seen.
"""


@torch.library.impl(_LIBRARY, "segment_tree", "CompositeExplicitAutograd")
def _segment_tree_eager(values: Tensor, start: Tensor, end: Tensor, combine: str, bits: int) -> Tensor:
    values = values.to(wide_dtype(values.dtype))
    identity = torch.full_like(values[:1], combine_identity(combine, values.dtype))
    rows = torch.arange(len(values), device=values.device)
    for bit in range(bits):
        partner = rows + (1 << bit)
        inside = (partner < end)[:, None]
        other = torch.where(inside, values[partner.clamp(max=len(values) - 1)], identity)
        values = _EAGER_COMBINE[combine](values, other)
    return values if combine == "prod" else values + 0


@torch.library.impl(_LIBRARY, "block_scan", "CompositeExplicitAutograd")
def _block_scan_eager(x: Tensor, dim: int, combine: str, bits: int) -> Tensor:
    level = x.to(wide_dtype(x.dtype)).movedim(dim, -1)
    count = torch.arange(1, x.shape[dim] + 1, device=x.device)
    identity = torch.full_like(level, combine_identity(combine, level.dtype))
    taken = []
    for bit in range(bits):
        first = (count >> (bit + 1)) * 2
        present = (count >> bit) & 1 == 1
        gathered = level[..., first.clamp(max=level.shape[-1] - 1)]
        taken.append(torch.where(present, gathered, identity))
        whole = level.shape[-1] // 2
        if whole == 0:
            break
        level = _EAGER_COMBINE[combine](level[..., 0 : 2 * whole : 2], level[..., 1 : 2 * whole : 2])
    total = identity
    for block in reversed(taken):
        total = _EAGER_COMBINE[combine](total, block)
    return (total + 0 if combine == "sum" else total).movedim(-1, dim).contiguous()


@torch.library.impl(_LIBRARY, "row_major", "CompositeExplicitAutograd")
def _row_major_eager(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(shape)


@torch.library.impl(_LIBRARY, "store_rows", "CompositeExplicitAutograd")
def _store_rows_eager(base: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    result = base.clone()
    result[rows] = values
    return result


@torch.library.register_fake("bi_inductor::segment_tree", lib=_LIBRARY)
def _segment_tree_fake(values: Tensor, start: Tensor, end: Tensor, combine: str, bits: int) -> Tensor:
    return values.new_empty(values.shape, dtype=wide_dtype(values.dtype))


@torch.library.register_fake("bi_inductor::block_scan", lib=_LIBRARY)
def _block_scan_fake(x: Tensor, dim: int, combine: str, bits: int) -> Tensor:
    return x.new_empty(x.shape, dtype=wide_dtype(x.dtype))


@torch.library.register_fake("bi_inductor::row_major", lib=_LIBRARY)
def _row_major_fake(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape)


@torch.library.register_fake("bi_inductor::store_rows", lib=_LIBRARY)
def _store_rows_fake(base: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    return base.new_empty(base.shape)
