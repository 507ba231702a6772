"""The matrix product of the CPU target: one chain of fused multiply-adds per output element.

    out[b, m, n] = round(alpha * chain + beta * bias[b, m, n])
    chain        = fma(a[b, m, K-1], b[b, K-1, n], ... fma(a[b, m, 0], b[b, 0, n], +0))

in fp32 (fp64 for fp64), k ascending, one rounding to the output dtype. The order of additions mentions K
alone, so M, N, the batch, strides, tiles and threads cannot change a bit. The C++ (``runtime/cpp/gemm.h``)
is inlined into the emitted source: Inductor's graph cache then holds all of it. Sizes and strides are
run-time arguments, so every product with the same dtypes and scales shares one compiled kernel, for static
and dynamic shapes alike.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import sympy
import torch
from torch._inductor import config, ir, lowering  # lowering first: cpp_template_kernel imports it in a circle
from torch._inductor.codegen.common import KernelArgs
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.utils import Placeholder
from torch._inductor.virtualized import V
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols
from torch.utils._ordered_set import OrderedSet

SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_SOURCES = Path(__file__).parent.parent / "runtime" / "cpp"
_HEADERS = ("gemm_vector.h", "gemm_pack.h", "gemm_product.h", "gemm_row.h", "gemm.h", "gemm_groups.h")

# Every operand is passed as a pointer and four integers; batch, M, N and K follow.
_LAYOUT_ARGUMENTS = ("offset", "batch", "row", "col")
_SIZE_ARGUMENTS = ("batches", "m", "n", "k")


def chain_matmul(
    a: ir.TensorBox,
    b: ir.TensorBox,
    *,
    bias: ir.TensorBox | None = None,
    alpha: float = 1,
    beta: float = 1,
    start: ir.TensorBox | None = None,
    out_dtype: torch.dtype,
) -> ir.TensorBox:
    """``round(alpha * (a @ b) + beta * bias)`` in the canonical order, as a C++ kernel.

    ``start``: [M, N] in the accumulator's dtype, without a bias: what the chains go on from, instead of 0.

    ``a``: [M, K] or [B, M, K]; ``b``: [K, N] or [B, K, N]; one floating dtype, any strides; ``bias``
    broadcasts to the output. Returns a contiguous [M, N] or [B, M, N] of ``out_dtype``. A ``beta`` of 0 drops
    the bias, NaNs included. Raises NotImplementedError for other dtypes.
    """
    _check_dtypes(a, b, bias, out_dtype)
    size = _output_size(a, b)
    operands = {"a": _strided(a), "b": _strided(b)}
    if bias is not None and beta != 0:
        operands["bias"] = _strided(lowering.expand(bias, size))
    if start is not None:
        operands["bias"] = _strided(start)
    layout = ir.FixedLayout(a.get_device(), out_dtype, size, ir.FlexibleLayout.contiguous_strides(size))
    return ir.TensorBox.create(
        ChainMatmulBuffer(layout, operands, float(alpha), float(beta), start is not None)
    )


def _check_dtypes(
    a: ir.TensorBox, b: ir.TensorBox, bias: ir.TensorBox | None, out_dtype: torch.dtype
) -> None:
    dtypes = [x.get_dtype() for x in (a, b, bias) if x is not None] + [out_dtype]
    if a.get_dtype() != b.get_dtype() or any(dtype not in SUPPORTED_DTYPES for dtype in dtypes):
        raise NotImplementedError(
            f"C++ matmul of {dtypes}: operands of one dtype out of {SUPPORTED_DTYPES} are needed"
        )


def _output_size(a: ir.TensorBox, b: ir.TensorBox) -> list[sympy.Expr]:
    """[M, N], or [B, M, N] as soon as one operand has a batch."""
    batch = [*a.get_size()[:-2]] or [*b.get_size()[:-2]]
    return [*batch, a.get_size()[-2], b.get_size()[-1]]


def _strided(x: ir.TensorBox) -> ir.IRNode:
    """``x`` as a buffer or a strided view of one, its layout frozen; a view that is not strided is copied."""
    realized = ir.ExternKernel.realize_input(x)
    ir.as_storage_and_layout(realized, freeze=True)
    if realized.get_dtype() != V.graph.get_dtype(realized.get_name()):
        realized = ir.ExternKernel.copy_input(
            realized
        )  # a view under another dtype: pointers are typed by buffer
        ir.as_storage_and_layout(realized, freeze=True)
    return realized


class ChainMatmulBuffer(ir.CppTemplateBuffer):
    """The IR node. ``operands`` maps "a", "b" and perhaps "bias" to strided inputs; ``layout``: the output's."""

    def __init__(
        self,
        layout: ir.Layout,
        operands: dict[str, ir.IRNode],
        alpha: float,
        beta: float,
        bias_is_start: bool = False,
    ) -> None:
        super().__init__(layout, [*operands.values()], self._kernel_and_render, template=None, choice=None)
        self.operands = dict(zip(operands, self.inputs, strict=True))
        self.alpha, self.beta, self.bias_is_start = alpha, beta, bias_is_start
        # An epilogue fused by Inductor would replace the kernel's own store.
        V.graph.no_fuse_buffer_names.add(self.get_name())

    def get_free_symbol_uses(self, unbacked_only: bool = False) -> OrderedSet[sympy.Symbol]:
        """Symbols of the inputs' layouts too: their sizes and strides are arguments of the call."""
        find_symbols = free_unbacked_symbols if unbacked_only else free_symbols
        symbols = super().get_free_symbol_uses(unbacked_only)
        for node in (*self.inputs, self):
            layout = node.get_layout()
            for expression in (*layout.size, *layout.stride, layout.offset):
                symbols = symbols | find_symbols(expression)
        return symbols

    def _kernel_and_render(
        self, template_node: ir.CppTemplateBuffer, epilogue_nodes: Any = None, **_: Any
    ) -> Any:
        if epilogue_nodes:
            raise AssertionError("a chain matmul was fused with an epilogue, which would read unrounded sums")
        kernel = ChainMatmulKernel(self)
        return kernel, kernel.source

    def layout_arguments(self) -> list[sympy.Expr]:
        """Offset and (batch, row, col) strides per operand, then sizes: the order of the C++ parameters."""
        values: list[sympy.Expr] = []
        for operand in self.operands.values():
            layout = operand.get_layout()
            values += [layout.offset, *_three_dimensional(layout.stride, 0)]
        rows_and_depth = self.operands["a"].get_size()[-2:]
        batch, _, cols = _three_dimensional(self.get_size(), 1)
        return [*values, batch, rows_and_depth[0], cols, rows_and_depth[1]]


def _three_dimensional(values: Any, missing: int) -> list[sympy.Expr]:
    return [sympy.Integer(missing)] * (3 - len(values)) + [*values]


class _ArgumentsWithLayout(KernelArgs):
    """Inductor's buffer arguments, followed by integers that are expressions in the graph's symbols."""

    def __init__(self, expressions: list[sympy.Expr], names: list[str]) -> None:
        super().__init__()
        self.expressions, self.names = expressions, names

    def cpp_argdefs(self, *args: Any, **kwargs: Any) -> tuple[list[str], list[str], list[str]]:
        definitions, calls, types = super().cpp_argdefs(*args, **kwargs)
        return (
            definitions + [f"int64_t {name}" for name in self.names],
            calls + [V.graph.wrapper_code.codegen_sizevar(expression) for expression in self.expressions],
            types + ["int64_t"] * len(self.names),
        )


class ChainMatmulKernel(CppTemplateKernel):
    """Emits the C++ entry point of one :class:`ChainMatmulBuffer`."""

    def __init__(self, buffer: ChainMatmulBuffer) -> None:
        super().__init__(str(Placeholder.KERNEL_NAME), config.cpp.threads)
        self.buffer = buffer
        self.args = _ArgumentsWithLayout(buffer.layout_arguments(), _integer_names(buffer.operands))
        for position, operand in enumerate(buffer.operands.values()):
            # An operand that appears twice (x @ x.T) is passed once.
            self.args.input_buffers.setdefault(operand.get_name(), f"input{position}")
        self.args.output_buffers[buffer.get_name()] = "output"

    def source(self) -> str:
        definitions, _, _ = self.args.cpp_argdefs()
        return "\n".join(
            [
                header_text(),
                f'extern "C" void {self.kernel_name}({", ".join(definitions)})',
                "{",
                *(f"    {line}" for line in self._spec()),
                f"    {self._call()}",
                "}",
                "",
            ]
        )

    def _call(self) -> str:
        operands = self.buffer.operands
        matrices = [self._matrix(name, operand) for name, operand in operands.items()]
        if "bias" not in operands:
            matrices.append("{nullptr, 0, 0, 0}")
        matrices.append("{output, m * n, n, 1}")
        return f"bi_gemm::run<Spec>({{{', '.join(matrices)}, batches, m, n, k}}, {config.cpp.threads});"

    def _matrix(self, name: str, operand: ir.IRNode) -> str:
        pointer = self.args.input_buffers[operand.get_name()]
        return f"{{{pointer} + {name}_offset, {name}_batch, {name}_row, {name}_col}}"

    def _spec(self) -> list[str]:
        """Types and scales of the product; a local struct, so that kernels can share a translation unit."""
        buffer = self.buffer
        bias = buffer.operands.get("bias")
        operand, accumulator = buffer.operands["a"].get_dtype(), torch.float32
        if operand == torch.float64:
            accumulator = torch.float64
        types = {"In": operand, "Acc": accumulator, "Out": buffer.get_dtype()}
        types["Bias"] = accumulator if bias is None else bias.get_dtype()
        scales = [
            ("bool", "has_bias", bias is not None),
            ("bool", "bias_is_start", buffer.bias_is_start),
            ("bool", "scale_product", buffer.alpha != 1),
            ("bool", "scale_bias", buffer.beta != 1),
            ("double", "alpha", buffer.alpha),
            ("double", "beta", buffer.beta),
        ]
        return [
            "struct Spec {",
            *(f"    using {name} = {DTYPE_TO_CPP[dtype]};" for name, dtype in types.items()),
            *(
                f"    static constexpr {kind} {name}() {{ return {_literal(value)}; }}"
                for kind, name, value in scales
            ),
            "};",
        ]


def _integer_names(operands: dict[str, ir.IRNode]) -> list[str]:
    return [f"{name}_{part}" for name in operands for part in _LAYOUT_ARGUMENTS] + [*_SIZE_ARGUMENTS]


def _literal(value: bool | float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if math.isfinite(value):
        return value.hex()  # exact
    return '__builtin_nan("")' if math.isnan(value) else f"{'-' if value < 0 else ''}__builtin_inf()"


@functools.lru_cache(maxsize=1)
def header_text() -> str:
    """The C++ every kernel inlines: the headers in the order of their use, without their own includes."""
    text = "\n".join((_SOURCES / name).read_text() for name in _HEADERS)
    return re.sub(r'^#include "gemm(?:_\w+)?\.h"\n', "", text, flags=re.MULTILINE)
