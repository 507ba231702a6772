"""Where Triton's interpreter differs from a GPU in more than speed, put right; to be used inside a worker only.

libdevice    its functions are stubs that the compiler replaces and the interpreter does not: numpy's here
bf16, fp8    fp32 to bf16 and fp8 rounds to nearest even, as on a GPU; the interpreter truncates
tl.reduce    by halving whole arrays instead of element by element, adjacent pairs first
tl.dot       one rounded multiply-add after another in ascending k; the interpreter calls a library, in its
             own order, and takes bf16 for integers
patches      of Triton's language stay: they are made anew for each call of each function
tensors      of one element are integers where Python wants one; NumPy 2.4 refuses what Triton 3.6 does there
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _one_by_one(function: Callable[[float], float]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of Python's floats as one of arrays, rounded to their dtype."""
    return lambda x: np.vectorize(function, otypes=[x.dtype])(x)


def _lgamma(x: float) -> float:
    is_pole = x <= 0 and math.isfinite(x) and x == math.floor(x)
    return math.inf if is_pole else math.lgamma(x)


#: The order of a sum does not depend on whose ``exp`` feeds it.
_ELEMENTARY: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in ("exp", "exp2", "expm1", "log", "log1p", "log2", "log10")},
    **{name: getattr(np, name) for name in ("sqrt", "tanh", "sin", "cos", "floor", "ceil", "trunc")},
    **{name: getattr(np, name) for name in ("isnan", "isinf", "abs")},
    "fabs": np.abs,
    "mul_rn": np.multiply,
    "pow": np.power,
    "rsqrt": lambda x: (1 / np.sqrt(x)).astype(x.dtype),
    **{name: getattr(np, f"arc{name[1:]}") for name in ("asin", "acos", "atan", "asinh", "acosh", "atanh")},
    **{name: getattr(np, name) for name in ("tan", "sinh", "cosh", "hypot", "copysign", "nextafter", "fmod")},
    **{name: _one_by_one(getattr(math, name)) for name in ("erf", "erfc")},
    "lgamma": _one_by_one(_lgamma),
    "atan2": np.arctan2,
    "nearbyint": np.rint,
    "signbit": np.signbit,
}


def replacements() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value) of everything to be replaced in this process."""
    from torch._inductor.runtime import triton_helpers

    libdevice = [(triton_helpers.libdevice, name, _of_tensors(f)) for name, f in _ELEMENTARY.items()]
    return [
        *libdevice,
        (interpreter, "_convert_float", _convert_float),
        (interpreter.ReduceOps, "generic_reduce", _reduce),
        (interpreter.InterpreterBuilder, "create_dot", _chain_dot),
        (interpreter, "_patch_lang_tensor", _patch_lang_tensor),
        (interpreter, "_patch_lang", _patch_lang),
        (interpreter.interpreter_builder, "options", _OPTIONS),
    ]


def _block(data: np.ndarray, scalar_type: Any) -> tl.tensor:
    kind = tl.block_type(scalar_type, list(data.shape)) if data.ndim else scalar_type
    return tl.tensor(interpreter.TensorHandle(data if data.ndim else data.reshape(1), scalar_type), kind)


def _of_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of numpy arrays as one of the interpreter's tensors and of Python scalars."""

    def of_tensors(*operands: Any) -> tl.tensor:
        first = next(x for x in operands if isinstance(x, tl.tensor))
        scalar_type, number = first.dtype.scalar, first.handle.data.dtype.type
        is_block = any(isinstance(x, tl.tensor) and x.type.is_block() for x in operands)
        value = function(*(x.handle.data if isinstance(x, tl.tensor) else number(x) for x in operands))
        value = np.asarray(value)
        return _block(
            value if is_block else value.reshape(()), tl.int1 if value.dtype == bool else scalar_type
        )

    return of_tensors


#: 8-bit floats are kept as bytes.
_FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_stock_convert_float = interpreter._convert_float


def _convert_float(x: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    """The bits of ``x`` converted between float types; fp32 to bf16 rounds to nearest even."""
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(x)).view(torch.float32).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(x.shape)
    if source == tl.float32 and target in _FP8:
        rounded = torch.from_numpy(np.ascontiguousarray(x)).view(torch.float32).to(_FP8[target])
        return rounded.view(torch.uint8).numpy().reshape(x.shape)
    if source == tl.bfloat16 and target == tl.float32:
        return x.view(np.uint16).astype(np.uint32) << 16
    return _stock_convert_float(x, source, target, rounding_mode)


def _reduce(self: interpreter.ReduceOps, operands: tuple[Any, ...]) -> list[tl.tensor]:
    """``tl.reduce`` over a power of two of elements: ((x0 . x1) . (x2 . x3)) . ..., for all rows at once."""
    scalar_types = [x.dtype.scalar for x in operands]
    arrays = [x.handle.data for x in operands]
    axis = self.axis if self.axis is not None else 0
    arrays = [np.moveaxis(a if self.axis is not None else a.ravel(), axis, -1) for a in arrays]
    while arrays[0].shape[-1] > 1:
        halves = [a[..., 0::2] for a in arrays] + [a[..., 1::2] for a in arrays]
        combined = self.combine_fn.fn(*(_block(h, t) for h, t in zip(halves, scalar_types * 2, strict=True)))
        combined = combined if isinstance(combined, tuple) else (combined,)
        arrays = [x.handle.data for x in combined]
    totals = [a[..., 0] for a in arrays]
    if self.keep_dims:
        rank = len(operands[0].shape) - 1
        totals = [np.expand_dims(t, axis if self.axis is not None else tuple(range(rank))) for t in totals]
    return [_block(np.asarray(t), scalar_type) for t, scalar_type in zip(totals, scalar_types, strict=True)]


def _as_double(handle: Any) -> np.ndarray:
    """The numbers of a dot's operand; bf16 is kept as the upper 16 bits of an fp32, fp8 as bytes."""
    if handle.dtype.scalar in _FP8:
        raw = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.uint8))
        return raw.view(_FP8[handle.dtype.scalar]).double().numpy()
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return handle.data.astype(np.float64)


def _chain_dot(self: Any, a: Any, b: Any, acc: Any, input_precision: Any, imprecise: Any) -> Any:
    """acc = round(acc + a[:, k] * b[k, :]) for ascending k; products of fp32 and narrower are exact."""
    left, right, total = _as_double(a), _as_double(b), acc.data
    if total.dtype == np.int32:
        exact = left.astype(np.int64) @ right.astype(np.int64)
        return interpreter.TensorHandle((total + exact).astype(np.int32), acc.dtype.scalar)
    for k in range(left.shape[1]):
        total = (total.astype(np.float64) + left[:, k, None] * right[None, k, :]).astype(acc.data.dtype)
    return interpreter.TensorHandle(total, acc.dtype.scalar)


#: A sum of integers would be computed in int64 too, and its bounds asserted.
_OPTIONS = dataclasses.replace(interpreter.InterpreterOptions(), sanitize_overflow=False)

_stock_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, *scope: Any) -> None:
    _stock_patch_lang_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


_stock_patch_lang = interpreter._patch_lang
_patched: set[frozenset[str]] = set()


def _patch_lang(function: Any) -> Any:
    """Triton's language for what ``function`` sees of it, once and for good: nothing is compiled in this process."""
    seen = [value for value in function.__globals__.values() if isinstance(value, types.ModuleType)]
    names = frozenset(module.__name__ for module in seen if module in (tl, tl.core))
    if names not in _patched:
        _stock_patch_lang(function)
        _patched.add(names)
    return interpreter._LangPatchScope()
