"""Grouped matrix products of the CPU target: for each group, in turn, the product of ``cpp_matmul.py``.

    rows    out[t, n] = round(chain over k of a[t, k] b[g, k, n])                g: the group of row t
    depth   out[g, m, n] = round(chain over the rows t of group g of a[m, t] b[t, n])

Which rows are a group's is read from ``ends`` when the kernel runs (``runtime/cpp/gemm_groups.h``).
"""

from __future__ import annotations

from typing import Any

import sympy
from torch._inductor import config, ir

from bi_inductor.templates.cpp_matmul import ChainMatmulBuffer, ChainMatmulKernel, _check_dtypes, _strided


def grouped_rows(a: ir.TensorBox, b: ir.TensorBox, ends: ir.TensorBox) -> ir.TensorBox:
    """a [T, K], b [G, K, N], ends [G] int32 -> [T, N] of a's dtype, contiguous; rows of no group are 0."""
    return _grouped(a, b, ends, [a.get_size()[0], b.get_size()[2]], "run_row_groups")


def grouped_depth(a: ir.TensorBox, b: ir.TensorBox, ends: ir.TensorBox) -> ir.TensorBox:
    """a [M, T], b [T, N], ends [G] int32 -> [G, M, N] of a's dtype, contiguous."""
    size = [ends.get_size()[0], a.get_size()[0], b.get_size()[1]]
    return _grouped(a, b, ends, size, "run_depth_groups")


def _grouped(
    a: ir.TensorBox, b: ir.TensorBox, ends: ir.TensorBox, size: list[sympy.Expr], entry: str
) -> ir.TensorBox:
    _check_dtypes(a, b, None, a.get_dtype())
    operands = {"a": _strided(a), "b": _strided(b), "ends": _strided(ends)}
    layout = ir.FixedLayout(a.get_device(), a.get_dtype(), size, ir.FlexibleLayout.contiguous_strides(size))
    return ir.TensorBox.create(GroupedMatmulBuffer(layout, operands, entry))


class GroupedMatmulBuffer(ChainMatmulBuffer):
    """The IR node. ``operands``: "a", "b" and "ends"; ``entry``: what the kernel calls."""

    def __init__(self, layout: ir.Layout, operands: dict[str, ir.IRNode], entry: str) -> None:
        super().__init__(layout, operands, 1.0, 1.0)
        self.entry = entry

    def _kernel_and_render(self, template_node: Any, epilogue_nodes: Any = None, **_: Any) -> Any:
        if epilogue_nodes:
            raise AssertionError(
                "a grouped product was fused with an epilogue, which would read unrounded sums"
            )
        kernel = GroupedMatmulKernel(self)
        return kernel, kernel.source

    def layout_arguments(self) -> list[sympy.Expr]:
        """As for one product, the number of groups standing for that of batches."""
        *values, _, m, n, k = super().layout_arguments()
        return [*values, self.operands["ends"].get_size()[0], m, n, k]


class GroupedMatmulKernel(ChainMatmulKernel):
    """Emits the C++ entry point of one :class:`GroupedMatmulBuffer`."""

    buffer: GroupedMatmulBuffer

    def _call(self) -> str:
        a, b, ends = (self._matrix(name, operand) for name, operand in self.buffer.operands.items())
        product = ", ".join([a, b, "{nullptr, 0, 0, 0}", "{output, m * n, n, 1}", "batches, m, n, k"])
        return f"bi_gemm::{self.buffer.entry}<Spec>({{{product}}}, {ends}, {config.cpp.threads});"
