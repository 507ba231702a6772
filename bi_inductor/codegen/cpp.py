"""C++ kernels for the CPU whose sums and elementary functions do not depend on how loops are cut.

Inductor's C++ code generator with four changes:
    reductions   float sums and products go through the accumulators of ``runtime/cpp/ordered.h``; elements are
                 pushed in ascending logical order, one by one, a vector at a time or a column of vectors at a time
    tiling       the reduced axis is vectorised only along its innermost logical dimension
    parallelism  only loops over outputs are shared between threads
    functions    one implementation for vector bodies, tails and scalar kernels (``cpp_elementary.py``)

Tiling, vector width, tails, outer-loop fusion and the number of threads are free: none of them can change a bit.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sympy
import torch
from torch._inductor.codegen import cpp
from torch._inductor.codegen.common import CSEVariable, DeferredLine
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP, cexpr_index
from torch._inductor.virtualized import V

from .. import contract
from ..errors import BatchInvarianceError
from .cpp_elementary import LaneOverrides, TileLaneOverrides, VectorLaneOverrides, converted_in_lane
from .cpp_nan import NARROW_FLOATS, Value, settled

_RUNTIME = Path(__file__).parent.parent / "runtime" / "cpp"
_OPERATOR = {"sum": "batchinv::Add", "prod": "batchinv::Multiply"}
_LOW_PRECISION = (torch.bfloat16, torch.float16)


class OrderedKernelMixin:
    """What the scalar, the vector and the tiled kernel share: ordered reductions and rounding that stays."""

    def create_cse_var(self, *args: Any, **kwargs: Any) -> Value:
        return Value(*args, **kwargs)

    def cache_dtype_convert(self, *args: Any) -> None:
        """Forget nothing: Inductor would let a value that was rounded be read back unrounded."""

    def get_to_dtype_expr(
        self, src: CSEVariable, dtype: torch.dtype, src_dtype: torch.dtype, *args: Any, **kwargs: Any
    ) -> str:
        if dtype in NARROW_FLOATS:
            src = settled(src)
        scalar = None if src.is_vec else converted_in_lane(src, dtype, src_dtype)
        return scalar or super().get_to_dtype_expr(src, dtype, src_dtype, *args, **kwargs)  # type: ignore[misc]

    def store(self, name: str, index: sympy.Expr, value: CSEVariable, mode: Any = None) -> None:
        if mode == "atomic_add" and V.graph.get_dtype(name).is_floating_point:
            raise BatchInvarianceError(
                "an atomic addition",
                "threads arrive in any order",
                "gather instead of scattering, or sort the indices and sum their values",
            )
        super().store(name, index, settled(value), mode)  # type: ignore[misc]

    def reduction(
        self, dtype: torch.dtype, src_dtype: torch.dtype, reduction_type: str, value: CSEVariable
    ) -> Any:
        contract.reduction_form(reduction_type, 1, src_dtype)  # Welford and the like have none
        if contract.is_ordered(reduction_type, src_dtype):
            return self._ordered_reduction(dtype, src_dtype, reduction_type, value)
        return super().reduction(dtype, src_dtype, reduction_type, value)  # type: ignore[misc]

    def _ordered_reduction(
        self, dtype: torch.dtype, src_dtype: torch.dtype, reduction_type: str, value: CSEVariable
    ) -> CSEVariable:
        value = self._as_pushed(value)
        key = src_dtype, reduction_type, value
        if key in self.reduction_cse.reduction_cache:
            return self.reduction_cse.reduction_cache[key]
        accumulated = self.reduction_cse.generate(self.loads, f"reduction {key}", write=False, dtype=dtype)
        result = self._result_of(accumulated)
        accumulator = f"{result}_ordered"
        self.is_reduction = True
        self.reduction_var_names.append(accumulator)
        result.nan_is_settled = True
        kind = self._accumulator_type(dtype, _OPERATOR[reduction_type])
        self.reduction_prefix_generators.append(_declaration(kind, accumulator))
        self.stores.writeline(f"{accumulator}.push({', '.join([str(value), *self._tail_length()])});")
        self.reduction_suffix.writeline(f"auto {result} = {accumulator}.total();")
        self.reduction_cse.reduction_cache[key] = result
        return result

    def store_reduction(self, name: str, index: sympy.Expr, value: CSEVariable) -> None:
        """A bf16 or fp16 result is rounded first, and what is fused behind it reads the rounded value."""
        dtype = V.graph.get_dtype(name)
        if dtype in _LOW_PRECISION:
            value = self._rounded_result(value, dtype)
            self.cse.store_cache[name] = value
            return self._store_rounded(name, index, value)
        return super().store_reduction(name, index, value)  # type: ignore[misc]

    def _as_pushed(self, value: CSEVariable) -> CSEVariable:
        return value

    def _result_of(self, accumulated: CSEVariable) -> CSEVariable:
        return accumulated

    def _accumulator_type(self, dtype: torch.dtype, operator: str) -> str:
        return f"batchinv::Stream<{DTYPE_TO_CPP[dtype]}, {operator}>"

    def _tail_length(self) -> list[str]:
        return []

    def _rounded_result(self, value: Any, dtype: torch.dtype) -> CSEVariable:
        result = self.cse.newvar(dtype=dtype)
        expression = converted_in_lane(value, dtype, torch.float) or f"{DTYPE_TO_CPP[dtype]}({value})"
        self.reduction_suffix.writeline(f"auto {result} = {expression};")
        return result

    def _store_rounded(self, name: str, index: sympy.Expr, value: CSEVariable) -> None:
        pointer = f"{self.args.output(name)}[{cexpr_index(self.rename_indexing(index))}]"
        self.reduction_suffix.writeline(DeferredLine(name, f"{pointer} = {value};"))


def _declaration(kind: str, accumulator: str) -> Callable[[int | None], str]:
    """Lines that declare an accumulator, or an array of them for a scalar tail under a vector loop."""

    def lines(size: int | None = None) -> str:
        blocks = f"{accumulator}_blocks"
        if size is None:
            return f"{kind}::Blocks {blocks};\n{kind} {accumulator}({blocks});"
        array = f"{accumulator}_arr"
        each = f"for (int i = 0; i < {size}; i++) {array}[i] = {kind}({blocks}[i]);"
        return f"{kind}::Blocks {blocks}[{size}];\n{kind} {array}[{size}];\n{each}"

    return lines


class OrderedKernel(OrderedKernelMixin, cpp.CppKernel):
    """A scalar loop nest."""

    overrides = LaneOverrides

    def codegen_conditions(
        self, code: Any, prefix: str | None = None, var: sympy.Symbol | None = None
    ) -> bool:
        """Run the body once where it loops over a whole tiled axis itself (Inductor asks for its own class)."""
        active = self.active_ranges
        self.active_ranges = {
            axis: (start, 1) if self._spans(axis, start, end) else (start, end)
            for axis, (start, end) in active.items()
        }
        try:
            return super().codegen_conditions(code, prefix, var)
        finally:
            self.active_ranges = active

    def _spans(self, axis: sympy.Symbol, start: Any, end: Any) -> bool:
        position = self.itervars.index(axis)
        return position > 0 and start == 0 and end == self.ranges[position]


class OrderedVecKernel(OrderedKernelMixin, cpp.CppVecKernel):
    """A loop nest with one vectorised axis: along the reduction (Stream) or across outputs (Lanes)."""

    overrides = VectorLaneOverrides

    @property
    def _is_along_reduction(self) -> bool:
        return self.tiling_idx >= self.reduction_depth

    def _as_pushed(self, value: CSEVariable) -> CSEVariable:
        return value if value.is_vec else self.broadcast(value)

    def _result_of(self, accumulated: CSEVariable) -> CSEVariable:
        if self._is_along_reduction:
            if self.tiling_idx != len(self.itervars) - 1:
                raise AssertionError("a vector along the reduction must hold consecutive elements of it")
            return accumulated
        result = self.reduction_cse.namedvar(f"{accumulated}_vec", dtype=accumulated.dtype)
        result.is_vec = True
        return result

    def _accumulator_type(self, dtype: torch.dtype, operator: str) -> str:
        if self._is_along_reduction:
            return super()._accumulator_type(dtype, operator)
        return f"batchinv::Lanes<{self._get_vec_type(dtype)}, {operator}>"

    def _tail_length(self) -> list[str]:
        return [cexpr_index(self.tail_size)] if self._is_along_reduction and self.tail_size else []

    def _rounded_result(self, value: Any, dtype: torch.dtype) -> CSEVariable:
        if self._is_along_reduction:
            return super()._rounded_result(value, dtype)
        result = self.cse.newvar(dtype=dtype)
        result.is_vec = True
        n_from, n_to = self._get_num_vectors(torch.float), self._get_num_vectors(dtype)
        convert = f"at::vec::convert<{DTYPE_TO_CPP[dtype]}, {n_to}, float, {n_from}>"
        self.reduction_suffix.writeline(f"auto {result} = {convert}({value});")
        return result

    def _store_rounded(self, name: str, index: sympy.Expr, value: CSEVariable) -> None:
        if self._is_along_reduction:
            return super()._store_rounded(name, index, value)
        dtype = V.graph.get_dtype(name)
        code = self._get_store_line(value, self.args.output(name), self.rename_indexing(index), dtype)
        self.reduction_suffix.splice(code.map(lambda line: DeferredLine(name, line)))
        return None


class OrderedTile2DKernel(OrderedVecKernel, cpp.CppTile2DKernel):
    """Tiles that are transposed on the way; a reduction in one is always across outputs."""

    overrides = TileLaneOverrides


class OrderedTilingSelect(cpp.TilingSelect):
    """Inductor's choice of vectorised axes, kept to those along which elements stay in order."""

    def _select_tiling_indices(self, fn_list: Any, var_sizes_list: Any, tiling_factor: int) -> list[int]:
        indices = super()._select_tiling_indices(fn_list, var_sizes_list, tiling_factor)
        group, reduction_group = max(var_sizes_list, key=lambda sizes: len(sizes[1]))
        last = len(group) + len(reduction_group) - 1
        in_order = all(index < len(group) or index == last for index in indices)
        return indices if in_order else [last]


class OrderedLoopNest(cpp.LoopNest):
    """A loop nest whose threads share outputs, never one reduction."""

    @staticmethod
    def build(kernel: cpp.CppKernel) -> OrderedLoopNest:
        return OrderedLoopNest(cpp.LoopNest.build(kernel).loops)

    def max_parallel_depth(self) -> cpp.ParallelDepth:
        loops = self.loops or []
        depth = next((i for i, loop in enumerate(loops) if loop.is_reduction), len(loops))
        return cpp.ParallelDepth(parallel_depth=depth, start_depth=0)


def _with_globals(function: Callable[..., Any], **replacements: Any) -> Callable[..., Any]:
    """``function`` reading some of its module's names from here, so that nothing in the module is replaced."""
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **replacements},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class OrderedKernelProxy(cpp.CppKernelProxy):
    """Chooses the loops of a kernel and fills them with the kernels above."""

    kernel_cls = OrderedKernel
    vec_kernel_cls = OrderedVecKernel
    tile2d_kernel_cls = OrderedTile2DKernel
    codegen_functions = _with_globals(
        cpp.CppKernelProxy.codegen_functions, TilingSelect=OrderedTilingSelect, LoopNest=OrderedLoopNest
    )

    def cache_dtype_convert(self, *args: Any) -> None:
        """See OrderedKernelMixin."""


class OrderedKernelGroup(cpp.KernelGroup):
    """The source text of a kernel, with our runtime inlined: what is cached is all that is compiled."""

    def codegen_group(self, name: str | None = None) -> str:
        code = super().codegen_group(name)
        prefix = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
        if not code:
            return code
        if prefix not in code:
            raise AssertionError("Inductor's C++ kernels no longer include cpp_prefix.h")
        return code.replace(prefix, prefix + runtime_source(), 1)


def runtime_source() -> str:
    """The C++ that emitted kernels call."""
    return "".join((_RUNTIME / name).read_text() for name in ("ordered.h", "elementary.h"))


class BatchInvariantCppScheduling(cpp.CppScheduling):
    """CppScheduling that emits the kernels above."""

    kernel_proxy_cls = OrderedKernelProxy

    def reset_kernel_group(self) -> None:
        self.kernel_group = OrderedKernelGroup()

    def define_kernel(self, src_code: str, nodes: Any, kernel_args: Any = None) -> str:
        """As Inductor's; the graph is told which ops are in the kernel, which nothing in its text says."""
        name = super().define_kernel(src_code, nodes, kernel_args)
        ops = V.graph.kernel_ops.setdefault(name, set())
        for node in (part for whole in nodes for part in whole.get_nodes()):
            ops.update(origin.name for origin in node.node.origins)
        return name
