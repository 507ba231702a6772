"""Ops over lists of tensors, as optimizers call them: the op on each tensor for itself.

Stock lowers a list op by formulas of its own (addcmul and lerp round in other places there), and merges the kernels
of a list. Here a parameter's step is the same alone and in any group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

#: Pointwise ops that take their scalar by position, list op and single op alike.
_POINTWISE = """
    abs acos add asin atan ceil clamp_max clamp_min clone cos cosh div erf erfc exp expm1 floor frac lerp lgamma log
    log10 log1p log2 maximum minimum mul neg pow reciprocal round rsqrt sigmoid sign sin sinh sqrt sub tan tanh trunc
""".split()


def _addcmul(x: Tensor, a: Tensor, b: Tensor, value: Any = 1) -> Tensor:
    return torch.addcmul(x, a, b, value=value)


def _addcdiv(x: Tensor, a: Tensor, b: Tensor, value: Any = 1) -> Tensor:
    return torch.addcdiv(x, a, b, value=value)


def _norm(x: Tensor, ord: Any = 2, dtype: torch.dtype | None = None) -> Tensor:
    return torch.linalg.vector_norm(x, ord, dtype=dtype)


_SINGLE: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in _POINTWISE},
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "norm": _norm,
    "zero": torch.zeros_like,
}


def _per_tensor(op: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """``op`` over lists: what is a list is taken element by element, what is not is the same for all."""

    def rule(*args: Any, **kwargs: Any) -> list[Tensor]:
        count = next(len(arg) for arg in args if isinstance(arg, list | tuple))
        columns = [arg if isinstance(arg, list | tuple) else [arg] * count for arg in args]
        return [op(*row, **kwargs) for row in zip(*columns, strict=True)]

    return rule


def _table() -> dict[Any, Callable[..., Any]]:
    found = {}
    for name, op in _SINGLE.items():
        packet = getattr(aten, f"_foreach_{name}", None)
        for overload in packet.overloads() if packet is not None else ():
            # Given as a tensor, the scalars of a list are known when the graph runs; no optimizer does that here.
            if not overload.endswith("out") and not (name.startswith("addc") and overload == "Tensor"):
                found[getattr(packet, overload)] = _per_tensor(op)
    return found


TABLE = _table()
