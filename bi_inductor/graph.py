"""Lowering of one FX graph under the contract: rule on every op, lower it canonically, round its result.

A GraphLowering of ours differs from Inductor's in four places:
    run             every node gets a ruling first; a refused one stops the compile by name
    call_function   our lowerings come before Inductor's
    its result      a bf16 or fp16 result is rounded at the op, whatever it is fused into
    codegen         the verifier reads the generated source before anybody gets it; the certificate travels
                    inside it, so every cache carries it
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.graph import GraphLowering, SubgraphLowering
from torch._inductor.lowering import to_dtype
from torch.fx import Node

from . import _compat, certificate, lowerings, verdicts
from .attest import attest
from .declared_ops import declarations, triton_name
from .errors import BatchInvarianceError
from .lowerings.reductions import rounded
from .options import Options
from .verdicts import Ruling, Verdict

log = logging.getLogger("bi_inductor")
_LOW_PRECISION = (torch.bfloat16, torch.float16)


class BatchInvariantGraphLowering(GraphLowering):
    """A GraphLowering that admits only what the contract covers."""

    options = Options()
    #: What the passes on Dynamo's graph could not rewrite, where the user let them go on.
    unproven: tuple[BatchInvarianceError, ...] = ()
    #: Inductor's settings as the user asked for them.
    patches: Mapping[str, Any] = MappingProxyType({})
    #: Positions of the inputs of Dynamo's graph that hold a Python float, with their values.
    floats: Mapping[int, float] = MappingProxyType({})

    def run(self, *args: Any) -> Any:
        self.rulings = self._rule_on_every_op()
        #: Bodies of higher-order ops, lowered under the same contract.
        self.bodies: list[BatchInvariantBody] = []
        #: Kernel name -> names of the ops in it, as code generators of ours record them.
        self.kernel_ops: dict[str, set[str]] = {}
        result = super().run(*args)
        self._check_no_unknown_kernel()
        return result

    def _rule_on_every_op(self) -> dict[Node, Ruling]:
        rulings = {}
        for node in self.module.graph.nodes:
            if node.op == "call_function":
                ruling = verdicts.rule(node)
                if ruling.verdict is Verdict.REFUSED:
                    ruling = self._refuse(node, ruling)
                rulings[node] = ruling
        return rulings

    def _settle_lengths(self) -> None:
        """Lowering may have found that a dynamic length has one value; then the forms say so too."""
        for node, ruling in self.rulings.items():
            length = getattr(ruling.form, "length", None)
            if isinstance(length, sympy.Expr):
                form = dataclasses.replace(ruling.form, length=self.sizevars.simplify(length))  # type: ignore
                self.rulings[node] = dataclasses.replace(ruling, form=form)

    def _refuse(self, node: Node, ruling: Ruling) -> Ruling:
        source = certificate.source_line(node) or None
        error = BatchInvarianceError(str(node.target), ruling.reason, ruling.remedy, source)
        refuse_or_warn(error, self.options)
        return Ruling(Verdict.UNPROVEN, reason=ruling.reason)

    def call_function(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        lowering = lowerings.table().get(target)
        if lowering is None:
            args, dtype = _with_exact_sizes(target, args)
            result = super().call_function(target, args, kwargs)
            if dtype is not None and result.get_dtype() == torch.float32:
                result = to_dtype(result, dtype)
        else:
            result = lowering(*args, **kwargs)
        return torch.utils._pytree.tree_map_only(ir.TensorBox, _rounded_at_op, result)

    @property
    def has_unproven(self) -> bool:
        """True if stock lowerings are in the graph, because the user asked for them."""
        own = any(r.verdict is Verdict.UNPROVEN for r in self.rulings.values())
        return bool(self.unproven) or own or any(body.has_unproven for body in self.bodies)

    def make_subgraph(self, *args: Any, **kwargs: Any) -> SubgraphLowering:
        body = super().make_subgraph(*args, **kwargs)
        body.__class__ = BatchInvariantBody
        body.options, body.unproven, body.patches = self.options, self.unproven, self.patches
        self.bodies.append(body)  # type: ignore[arg-type]
        return body

    def _check_no_unknown_kernel(self) -> None:
        """A second look, at the lowered operations: no library kernel unless the user asked for it."""
        if self.has_unproven:
            return
        for operation in self.operations:
            if isinstance(operation, ir.ExternKernel) and not _is_harmless(operation):
                raise BatchInvarianceError(
                    f"the library kernel {getattr(operation, 'op_overload', None) or type(operation).__name__}",
                    "its order of additions is unknown",
                    "please report the graph: an op was admitted whose lowering calls a library",
                )

    def codegen(self) -> Any:
        wrapper, kernels = super().codegen()
        self._settle_lengths()
        source = _without_unused_library_import(wrapper.value)
        return dataclasses.replace(wrapper, value=certificate.embed(source, attest(self, source))), kernels


class BatchInvariantBody(BatchInvariantGraphLowering, SubgraphLowering):
    """The body of a higher-order op: a branch of cond, the step of a loop, a region compiled once."""

    def run(self, *args: Any) -> Any:
        for node in self.module.graph.nodes:
            if node.op == "call_function":  # so that names are unique in the certificate
                node._rename(f"{self.name}_{node.name}")
        return super().run(*args)


def _without_unused_library_import(source: str) -> str:
    """Inductor's wrapper imports the library kernels always; ours only where one is called."""
    line = "from torch._inductor.select_algorithm import extern_kernels"
    return source if "extern_kernels." in source else source.replace(line, "")


#: Operations that move, assert or seed; none of them adds anything.
_HARMLESS_KERNELS = (
    ir.DeviceCopy,
    ir.DynamicScalar,
    ir.DynamicSelectStorageOffset,
    ir.DynamicSliceSize,
    ir.AssertScalar,
    ir.InplaceCopyFallback,
    ir.RandomSeeds,
    ir.ConcatKernel,
    ir.TemplateBuffer,
    _compat.branching_kernel(),
    ir.WhileLoop,
    ir.InvokeSubgraph,
)


#: Library kernels with one possible answer; ``verdicts`` has ruled on the dtypes they are called with.
_EXACT_KERNELS = frozenset("aten.sort.stable aten.searchsorted.Tensor aten.bucketize.Tensor".split())


def _is_harmless(operation: ir.ExternKernel) -> bool:
    if isinstance(operation, (*_HARMLESS_KERNELS, ir.MultiOutput)):
        return True
    overload = getattr(operation, "op_overload", None)
    declared = declarations()
    if isinstance(operation, ir.UserDefinedTritonKernel):
        return triton_name(operation.kernel_idx) in declared
    if isinstance(overload, torch._ops.OpOverload) and overload._schema.name in declared:
        return True
    return str(overload) in _EXACT_KERNELS or verdicts.is_movement(overload)


def _with_exact_sizes(target: Any, args: Any) -> tuple[Any, torch.dtype | None]:
    """A size that stands beside bf16 or fp16 values, as in the gradient of a mean, is not rounded to their dtype.

    A static size is a constant, which Inductor keeps in fp32; a dynamic one it would round. Both are computed in
    fp32 here. Returns the arguments and the dtype that the result is to be rounded to, if they were widened.
    """
    tensors = [arg for arg in args if isinstance(arg, ir.TensorBox)]
    dtypes = {tensor.get_dtype() for tensor in tensors}
    has_size = any(isinstance(arg, sympy.Expr) and not arg.is_number for arg in args)
    if (
        not has_size
        or len(dtypes) != 1
        or not dtypes <= set(_LOW_PRECISION)
        or not verdicts.is_pointwise(target)
    ):
        return args, None
    widened = tuple(to_dtype(arg, torch.float32) if isinstance(arg, ir.TensorBox) else arg for arg in args)
    return widened, dtypes.pop()


def _rounded_at_op(box: ir.TensorBox) -> ir.TensorBox:
    """``box``, with a lazily computed bf16/fp16 value rounded where its op ends."""
    storage = box.data
    if not isinstance(storage, ir.StorageBox) or type(storage.data) is not ir.Pointwise:
        return box
    pointwise = storage.data
    if pointwise.dtype not in _LOW_PRECISION or getattr(pointwise.inner_fn, "rounds", False):
        return box

    def inner_fn(index: Any) -> Any:
        return rounded(pointwise.inner_fn(index), pointwise.dtype)

    inner_fn.rounds = True  # type: ignore[attr-defined]
    return ir.Pointwise.create(
        device=pointwise.device, dtype=pointwise.dtype, inner_fn=inner_fn, ranges=list(pointwise.ranges)
    )


def refuse_or_warn(error: BatchInvarianceError, options: Options) -> None:
    """Raise ``error``, or warn once where the user asked for stock lowerings."""
    if options.unproven == "refuse":
        raise error
    _warn_once(str(error))


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"UNPROVEN: {message}", stacklevel=2)
