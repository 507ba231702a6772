"""Grouped products: one kernel on either target, which finds the groups' rows when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor.ir import TensorBox

from ..product_ops import grouped_depth, grouped_rows


def _grouped_rows(a: TensorBox, b: TensorBox, ends: TensorBox) -> TensorBox:
    return _templates(a).grouped_rows(a, b, ends)


def _grouped_depth(a: TensorBox, b: TensorBox, ends: TensorBox) -> TensorBox:
    return _templates(a).grouped_depth(a, b, ends)


def _templates(a: TensorBox) -> Any:
    if a.get_device().type == "cpu":
        from ..templates import cpp_grouped

        return cpp_grouped
    from ..templates import triton_grouped

    return triton_grouped


LOWERINGS: dict[Any, Callable[..., Any]] = {grouped_rows: _grouped_rows, grouped_depth: _grouped_depth}
