"""The lines a random graph can have. Every one computes each row from that row alone, whatever dim the batch is.

An operation gets ``choose`` (one of a list), the operand ``a`` and all values so far; it returns an Expression in
which ``{a}`` is the operand, ``{b}`` a second value and ``{p0}``, ``{p1}`` are parameters it asks for, or None where
it does not apply. What shape comes out is found by running the line on shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .program import BATCH, Value

Choose = Callable[[Sequence[Any]], Any]


@dataclasses.dataclass(frozen=True)
class Expression:
    """A line with holes: a second operand, and shapes of parameters in the dtype of the first."""

    template: str
    second: Value | None = None
    parameters: tuple[tuple[int, ...], ...] = ()


Operation = Callable[[Choose, Value, Sequence[Value]], "Expression | None"]

POINTWISE = (
    "torch.tanh({a})",
    "torch.sigmoid({a})",
    "torch.relu({a})",
    "F.gelu({a})",
    "F.gelu({a}, approximate='tanh')",
    "F.silu({a})",
    "F.softplus({a})",
    "torch.exp(-{a}.abs())",
    "torch.erf({a})",
    "torch.sin({a})",
    "torch.log1p({a}.abs())",
    "torch.sqrt({a}.abs() + 0.25)",
    "torch.rsqrt({a} * {a} + 1)",
    "{a} / (1 + {a}.abs())",
    "{a}.pow(3)",
    "{a}.clamp(-2, 5)",
    "{a} * 0.37 + 1.1",
    "{a} - {a}.detach().floor()",
    "torch.where({a} > 0, {a}, {a} * 0.1)",
    "F.hardswish({a})",
    "F.leaky_relu({a}, 0.2)",
    "torch.nan_to_num({a}, 0.0, 9.0, -9.0)",
)
BINARY = (
    "{a} + {b}",
    "{a} - {b}",
    "{a} * {b}",
    "{a} / ({b}.abs() + 1)",
    "torch.maximum({a}, {b})",
    "torch.where({a} > {b}, {a}, {b} * 0.5)",
    "torch.lerp({a}, {b}.to({a}.dtype), 0.3)",
    "torch.addcmul({a}, {a}, {b}.to({a}.dtype), value=0.7)",
    "torch.hypot({a}.float(), {b}.float())",
)
ALONG_A_DIM = (
    "{a}.softmax({d})",
    "{a}.log_softmax({d})",
    "{a}.cumsum({d})",
    "{a}.tanh().cumprod({d})",
    "{a} - {a}.mean({d}, keepdim=True)",
    "{a} - {a}.amax({d}, keepdim=True)",
    "F.normalize({a}, dim={d})",
    "{a}.flip({d})",
    "{a}.roll(1, {d})",
    "{a}.sort(dim={d}, stable=True).values",
    "torch.gather({a}, {d}, {a}.detach().argsort(dim={d}, stable=True))",
    "{a}.gather({d}, {a}.argmax({d}, keepdim=True))",
    "torch.zeros_like({a}).scatter_add({d}, {a}.detach().abs().long().clamp(0, {last}), {a})",
    "{a}.index_select({d}, torch.arange({half}, device={a}.device) // 2)",
    "{a}.narrow({d}, 0, {half})",
    "torch.cat([{a}, {a}.flip({d})], {d})",
)
REDUCTIONS = (
    "{a}.sum({d}{k})",
    "{a}.mean({d}{k})",
    "{a}.var({d}{k})",
    "{a}.std({d}, correction=0{k})",
    "{a}.logsumexp({d}{k})",
    "torch.linalg.vector_norm({a}, dim={d}{k})",
    "torch.linalg.vector_norm({a}, ord=1, dim={d}{k})",
    "{a}.amax({d}{k})",
    "{a}.float().sum({d}{k})",
    "({a} * {a}).sum({d}{k})",
)
_OTHER_DTYPES = {
    torch.float32: ("torch.bfloat16", "torch.float16"),
    torch.bfloat16: ("torch.float32",),
    torch.float16: ("torch.float32",),
}


def pointwise(choose: Choose, a: Value, values: Sequence[Value]) -> Expression | None:
    return Expression(choose(POINTWISE))


def cast(choose: Choose, a: Value, values: Sequence[Value]) -> Expression | None:
    return Expression(f"{{a}}.to({choose(_OTHER_DTYPES[a.dtype])})")


def _meet(a: Value, b: Value) -> bool:
    """True if the two broadcast, and the batch of both is in the same place from the right."""
    pairs = list(zip(reversed(a.shape), reversed(b.shape), strict=False))
    aligned = len(a.shape) - a.batch_dim == len(b.shape) - b.batch_dim
    return aligned and all(x == y or 1 in (x, y) for x, y in pairs)


def binary(choose: Choose, a: Value, values: Sequence[Value]) -> Expression | None:
    partners = [b for b in values if _meet(a, b) and b.name != a.name]
    if not partners:
        return None
    return Expression(choose(BINARY), choose(partners))


def along_a_dim(choose: Choose, a: Value, values: Sequence[Value]) -> Expression | None:
    if not a.free_dims:
        return None
    dim = choose(a.free_dims)
    last = a.shape[dim] - 1
    places = {"{d}": dim, "{last}": last, "{half}": (last + 2) // 2}
    return Expression(_filled(choose(ALONG_A_DIM), places))


def reduction(choose: Choose, a: Value, values: Sequence[Value]) -> Expression | None:
    if not a.free_dims:
        return None
    options = [[dim] for dim in a.free_dims] + [a.free_dims]
    dims, keep = choose(options), choose(["", ", keepdim=True"])
    return Expression(_filled(choose(REDUCTIONS), {"{d}": tuple(dims), "{k}": keep}))


def _filled(template: str, places: dict[str, Any]) -> str:
    for hole, value in places.items():
        template = template.replace(hole, str(value))
    return template


def movement(choose: Choose, a: Value, values: Sequence[Value]) -> Expression | None:
    rank = len(a.shape)
    options = ["{a}.unsqueeze(-1)", "{a}.unsqueeze(0)", "{a}.contiguous()"] if rank < 4 else []
    if rank > 1:
        options += ["{a}.transpose(0, -1)", "{a}.transpose(-1, -2)", "{a}.transpose(0, 1).contiguous()"]
    if rank > 2:
        options.append("{a}.movedim(0, -1)")
    squeezable = [dim for dim in a.free_dims if a.shape[dim] == 1 and rank > 2]
    options += [f"{{a}}.squeeze({dim})" for dim in squeezable]
    if rank > 1 and a.shape[-1] != BATCH:
        options += ["{a}[..., ::2]", "{a}[..., -1]", "F.pad({a}, (1, 2))", "{a}.repeat_interleave(2, -1)"]
        options += ["torch.stack([{a}, {a} * 2], -1)"] if rank < 4 else []
    if rank > 2 and a.shape[-2] != BATCH and a.shape[-1] != BATCH:
        options.append("{a}.flatten(-2)")
    return Expression(choose(options)) if options else None


_WIDTHS = (1, 3, 16, 40)


def product(choose: Choose, a: Value, values: Sequence[Value]) -> Expression | None:
    """Products with a parameter: rows as rows, rows as columns, batched over another dim."""
    rank, options = len(a.shape), []
    width = choose(_WIDTHS)
    if rank > 1 and a.shape[-1] != BATCH:
        length = a.shape[-1]
        options += [
            Expression("{a} @ {p0}", parameters=((length, width),)),
            Expression("F.linear({a}, {p0}, {p1})", parameters=((width, length), (width,))),
            Expression("F.linear({a}, {p0})", parameters=((width, length),)),
            Expression("torch.einsum('...i,ij->...j', {a}, {p0})", parameters=((length, width),)),
            Expression("{a} @ {p0}", parameters=((length,),)),
        ]
    if rank > 1 and a.shape[-2] != BATCH:
        options.append(Expression("{p0} @ {a}", parameters=((width, a.shape[-2]),)))
    if rank == 3 and a.batch_dim == 1:
        options.append(Expression("torch.bmm({a}, {p0})", parameters=((a.shape[0], a.shape[2], width),)))
    return choose(options) if options else None


def product_of_rows(choose: Choose, a: Value, values: Sequence[Value]) -> Expression | None:
    """Products of two values of one row."""
    if len(a.shape) != 3 or a.batch_dim != 0:
        return None
    partners = [b for b in values if b.shape == a.shape and b.dtype == a.dtype]
    template = choose(
        (
            "{a} @ {b}.transpose(1, 2)",
            "torch.bmm({a}.transpose(1, 2), {b})",
            "torch.einsum('bik,bjk->bij', {a}, {b})",
            "F.scaled_dot_product_attention({a}, {b}, {b})",
            "F.scaled_dot_product_attention({a}, {b}, {a}, is_causal=True)",
        )
    )
    return Expression(template, choose(partners))


def norm(choose: Choose, a: Value, values: Sequence[Value]) -> Expression | None:
    if len(a.shape) < 2 or a.shape[-1] == BATCH:
        return None
    width = a.shape[-1]
    options = [
        Expression(f"F.layer_norm({{a}}, ({width},), {{p0}}, {{p1}})", parameters=((width,), (width,))),
        Expression(f"F.rms_norm({{a}}, ({width},), {{p0}})", parameters=((width,),)),
        Expression(f"F.layer_norm({{a}}, ({width},))"),
    ]
    if len(a.shape) == 3 and a.batch_dim == 0 and a.shape[1] % 2 == 0:
        options.append(Expression("F.group_norm({a}, 2)"))
    return choose(options)


def convolution(choose: Choose, a: Value, values: Sequence[Value]) -> Expression | None:
    if len(a.shape) != 3 or a.batch_dim != 0:
        return None
    channels = a.shape[1]
    options = [
        Expression("F.conv1d({a}, {p0}, padding=1)", parameters=((4, channels, 3),)),
        Expression(f"F.conv1d({{a}}, {{p0}}, padding=1, groups={channels})", parameters=((channels, 1, 3),)),
        Expression("F.conv2d({a}.unsqueeze(1), {p0}, padding=1).flatten(1, 2)", parameters=((2, 1, 3, 3),)),
        Expression("F.max_pool1d({a}, 2, ceil_mode=True)"),
    ]
    return choose(options)


def lookup(choose: Choose, a: Value, values: Sequence[Value]) -> Expression | None:
    index = "{a}.detach().nan_to_num(0.0).clamp(0, 8).long()"
    return choose(
        [
            Expression(f"F.embedding({index}, {{p0}})", parameters=((9, 4),)),
            Expression(f"{{p0}}[{index}]", parameters=((9,),)),
        ]
    )


#: Name -> (operation, how often beside the others).
OPERATIONS: dict[str, tuple[Operation, int]] = {
    "pointwise": (pointwise, 5),
    "binary": (binary, 4),
    "cast": (cast, 2),
    "along_a_dim": (along_a_dim, 4),
    "reduction": (reduction, 4),
    "movement": (movement, 3),
    "product": (product, 4),
    "product_of_rows": (product_of_rows, 2),
    "norm": (norm, 3),
    "convolution": (convolution, 1),
    "lookup": (lookup, 1),
}
