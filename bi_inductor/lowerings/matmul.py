"""Matrix products: every op of the family becomes ``chain_matmul`` of the device's template.

``chain_matmul(a, b, *, bias, alpha, beta, out_dtype)``: a [M, K] or [B, M, K], b [K, N] or [B, K, N];
round(alpha * sum_k a[m, k] b[k, n] + beta * bias) with one fp32 (fp64) accumulator and k ascending.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.ir import TensorBox

aten = torch.ops.aten


def _chain(a: TensorBox, b: TensorBox, **how: Any) -> TensorBox:
    if a.get_device().type == "cpu":
        from ..templates.cpp_matmul import chain_matmul
    else:
        from ..templates.triton_matmul import chain_matmul  # type: ignore[assignment]  # it takes no start
    how.setdefault("out_dtype", a.get_dtype())
    return chain_matmul(a, b, **how)


def _mm(a: TensorBox, b: TensorBox, out_dtype: torch.dtype | None = None) -> TensorBox:
    return _chain(a, b, out_dtype=out_dtype or a.get_dtype())


def _addmm(bias: TensorBox, a: TensorBox, b: TensorBox, *, beta: float = 1, alpha: float = 1) -> TensorBox:
    if beta == 0:  # as eager: the bias is not read, so its NaNs do not count
        return _chain(a, b, alpha=alpha)
    return _chain(a, b, bias=bias, alpha=alpha, beta=beta)


def _bmm_wide(a: TensorBox, b: TensorBox) -> TensorBox:
    low = a.get_dtype() in (torch.bfloat16, torch.float16)
    return _chain(a, b, out_dtype=torch.float32 if low else a.get_dtype())


def _lowerings() -> dict[Any, Callable[..., Any]]:
    found: dict[Any, Callable[..., Any]] = {
        aten.mm.default: _mm,
        aten.bmm.default: _mm,
        aten.addmm.default: _addmm,
        aten.baddbmm.default: _addmm,
    }
    for packet in (aten.mm, aten.bmm):
        if "dtype" in packet.overloads():
            found[packet.dtype] = _mm
    from .. import ops

    found[ops.bmm_wide] = _bmm_wide
    return found


LOWERINGS = _lowerings()
