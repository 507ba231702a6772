"""Which bits a NaN has in C++ kernels.

An addition of two NaNs keeps the payload of one of them, and the compiler chooses which. So arithmetic gives one
quiet NaN, put in where its bits can be seen: at stores, at narrowing casts and at ops that look at the sign. Data
that is only moved keeps its bits: a copy may be a kernel, a library call or nothing at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.codegen.cpp_utils import CppCSEVariable
from torch._inductor.virtualized import V

WIDE_FLOATS = (torch.float32, torch.float64)
NARROW_FLOATS = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


class Value(CppCSEVariable):
    """A value in a kernel that knows whether its NaN bits are settled: moved data, or the one quiet NaN."""

    nan_is_settled = False
    is_constant = False

    def update_on_args(self, name: str, args: Any, kwargs: Any) -> None:
        super().update_on_args(name, args, kwargs)
        if name in ("load", "constant", "index_expr", "value_expr"):
            self.nan_is_settled = True
            self.is_constant = name == "constant"
        elif name == "to_dtype":
            self.nan_is_settled = _is_settled(args[0]) or args[1] in NARROW_FLOATS
        elif name == "where":
            self.nan_is_settled = all(map(_is_settled, args[1:])) or any(map(_is_moved, args[1:]))
        elif name == "masked" and len(args) > 3:
            self.nan_is_settled = _is_settled(args[3])


def _is_settled(value: Any) -> bool:
    return getattr(value, "nan_is_settled", True)


def _is_moved(value: Any) -> bool:
    return _is_settled(value) and not getattr(value, "is_constant", False)


def settled(value: Any) -> Any:
    """``value``, with a NaN that arithmetic made replaced by the one quiet NaN."""
    if _is_settled(value) or value.dtype not in WIDE_FLOATS:
        return value
    result = V.kernel.cse.generate(V.kernel.compute, f"batchinv::one_nan({value})", dtype=value.dtype)
    result.is_vec = value.is_vec
    result.dependent_itervars = value.dependent_itervars
    result.nan_is_settled = True
    return result


def settled_branches(a: Any, b: Any) -> tuple[Any, Any]:
    """The branches of a ``where``: what one of them moves must stay, so the other is settled now."""
    if _is_moved(a) or _is_moved(b):
        return settled(a), settled(b)
    return a, b
