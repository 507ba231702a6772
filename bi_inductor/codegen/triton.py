"""Triton kernels whose sums follow the contract; everything else is Inductor's own code generator.

Persistent reduction:  total = tree(block)
Looped reduction:      one aligned subtree per R0_BLOCK, merged by a binary counter (``runtime/ordered.py``)
Both are the TREE form, so the heuristics that choose between them, and all their configurations, stay free.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._inductor.codegen.common import CSEVariable
from torch._inductor.codegen.simd import prefix_is_reduction
from torch._inductor.codegen.triton import TritonKernel, TritonKernelOverrides, TritonScheduling
from torch._inductor.ops_handler import ReductionType
from torch._inductor.utils import aggregate_origins
from torch._inductor.virtualized import V

from .. import _compat
from . import triton_ops
from .triton_sizes import SizePrinter

#: Upper bound of a reduced length about which nothing is known; int64 indexing does not loop further in practice.
_UNBOUNDED_LENGTH = 2**31

_LOW_PRECISION = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}


class BatchInvariantTritonKernel(TritonKernel):
    """A TritonKernel that emits ``sum`` and ``prod`` in the TREE form, numbers made from sizes in fp64, and random
    numbers by position."""

    kexpr = staticmethod(SizePrinter().doprint)
    overrides = triton_ops.TritonOps  # type: ignore[assignment]

    @classmethod
    def gen_common_triton_imports(cls) -> str:
        # Our tiles under Inductor's name: its tools find out what a kernel is by its decorator's text.
        return super().gen_common_triton_imports() + (
            triton_ops.IMPORT + "from bi_inductor.runtime import ordered\n"
            "from bi_inductor.runtime import schedules as triton_heuristics\n"
        )

    def reduction(
        self,
        dtype: torch.dtype,
        src_dtype: torch.dtype,
        reduction_type: ReductionType,
        value: CSEVariable | tuple[CSEVariable, ...],
    ) -> CSEVariable | tuple[CSEVariable, ...]:
        if reduction_type not in (
            "sum",
            "prod",
        ):  # exact in every order; lowerings/reductions.py admits no other
            return super().reduction(dtype, src_dtype, reduction_type, value)
        assert isinstance(value, CSEVariable)
        return self._tree_reduction(dtype, reduction_type, value)

    def _tree_reduction(self, dtype: torch.dtype, kind: str, value: CSEVariable) -> CSEVariable:
        """Emit ``kind`` of ``value`` over the reduced axes and return the variable that holds it."""
        assert self.inside_reduction and not self.cooperative_reduction and self.num_reduction_dims == 1
        shape = tuple(self.dense_size_list())
        value = self._accumulated(value, shape)
        cache_key = (dtype, f"tree_{kind}", value)
        if cache_key in self.cse.reduction_cache:
            return self.cse.reduction_cache[cache_key]

        identity = "0" if kind == "sum" else "1"
        masked = self._masked(value, identity, shape)
        result = self.cse.newvar(dtype=value.dtype, shape=(*shape[:-1], "1"))
        result.mask_vars = {mask for mask in self._mask_names() if not prefix_is_reduction(mask[0])}
        if self.persistent_reduction:
            total = self.reduction_resize(f"ordered.tree_{kind}({masked})")
            self.compute.writeline(f"{result} = {self._finished(total, kind, dtype, value.dtype)}")
        else:
            self._loop_over_blocks(result, masked, kind, identity, dtype)

        self.cse.reduction_cache[cache_key] = result
        self.outside_loop_vars.add(result)
        return result

    def _accumulated(self, value: CSEVariable, shape: tuple[str, ...]) -> CSEVariable:
        """``value`` in its accumulator dtype and broadcast to the whole block."""
        if value.dtype in _LOW_PRECISION:
            value = V.ops.to_dtype(value, torch.float32).value
        return self.cse.generate(
            self.compute,
            f"tl.broadcast_to({value}, [{', '.join(shape)}])",
            dtype=value.dtype,
            shape=shape,
        )

    def _mask_names(self) -> list[str]:
        masks = {_compat.mask_name(tree) for tree in self.range_trees}
        self.filter_masks(masks)
        return sorted(masks) + ([str(self._load_mask)] if self._load_mask else [])

    def _masked(self, value: CSEVariable, identity: str, shape: tuple[str, ...]) -> CSEVariable:
        masks = self._mask_names()
        if not masks:
            return value
        where = TritonKernelOverrides.where(" & ".join(masks), value, identity)
        return self.cse.generate(self.compute, where, dtype=value.dtype, shape=shape)

    def _loop_over_blocks(
        self, result: CSEVariable, masked: CSEVariable, kind: str, identity: str, dtype: torch.dtype
    ) -> None:
        (tree,) = (tree for tree in self.range_trees if tree.is_reduction)
        kept = ", ".join(self.dense_size_list()[:-1])
        block, offset, numel = _compat.block_size_name(tree), f"{tree.prefix}offset", f"{tree.prefix}numel"
        stack, empty = f"_{result}", f"_{result}_identity"
        type_name = self.dtype_to_str(masked.dtype)
        bound = _upper_bound(tree.numel)
        self.body.writeline(f"{empty} = tl.full([{kept}], {identity}, {type_name})")
        self.body.writeline(f"{stack} = ordered.new_stack({empty}, ({bound} + {block} - 1) // {block})")
        self.compute.writeline(
            f"{stack} = ordered.push_{kind}({stack}, ordered.tree_{kind}({masked}), {offset} // {block})"
        )
        total = f"ordered.total_{kind}({stack}, {empty}, ({numel} + {block} - 1) // {block})"
        total = self._finished(self.reduction_resize(total), kind, dtype, masked.dtype)
        self.post_loop_combine.writeline(f"{result} = {total}")

    def _finished(self, total: str, kind: str, dtype: torch.dtype, accumulator: torch.dtype) -> str:
        """``total`` with the sign of a zero sum made positive, rounded to the dtype the op returns."""
        if kind == "sum" and accumulator.is_floating_point:
            total = f"({total} + 0.0)"
        if dtype in _LOW_PRECISION:
            total = f"{total}.to({_LOW_PRECISION[dtype]}).to(tl.float32)"
        return total


def _upper_bound(length: sympy.Expr) -> int:
    """Largest value ``length`` can take, as far as shape analysis knows."""
    upper = V.graph.sizevars.shape_env.bound_sympy(length).upper
    return (
        min(int(upper), _UNBOUNDED_LENGTH) if isinstance(upper, (int, sympy.Integer)) else _UNBOUNDED_LENGTH
    )


class BatchInvariantTritonScheduling(TritonScheduling):
    """Chosen for CUDA devices by ``scope.py``, only inside our own compiles."""

    kernel_type = BatchInvariantTritonKernel

    def can_fuse_vertical(self, node1: Any, node2: Any) -> bool:
        return not _may_be_idle(node1, node2) and bool(super().can_fuse_vertical(node1, node2))

    def can_fuse_horizontal(self, node1: Any, node2: Any) -> bool:
        return not _may_be_idle(node1, node2) and bool(super().can_fuse_horizontal(node1, node2))

    def define_kernel(self, src_code: str, node_schedule: Any, kernel: Any) -> str:
        """As Inductor's; the graph is told which ops are in a kernel that is used again, above which no comment is."""
        name = super().define_kernel(src_code, node_schedule, kernel)
        origins = aggregate_origins(node_schedule)
        V.graph.kernel_ops.setdefault(name, set()).update(origin.name for origin in origins)
        return name


def _may_be_idle(*nodes: Any) -> bool:
    """True if one of the nodes is a template that may be launched without a program (``templates/emission.py``)."""
    return any(getattr(node.get_template_node(), "may_be_idle", False) for node in nodes)
