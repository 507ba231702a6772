"""From a template to a node of the graph: what the Triton templates have in common.

Operands get an address and strides that can no longer change, since they enter the source; a kernel is compiled without
contraction of products and sums; there is one choice, so nothing is measured and no extern kernel competes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import config, ir
from torch._inductor.codegen.triton import IndexingOptions
from torch._inductor.select_algorithm import TritonTemplate, TritonTemplateKernel
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

from bi_inductor.codegen import triton_ops
from bi_inductor.codegen.triton_sizes import SizePrinter


class TemplateKernel(TritonTemplateKernel):
    """The stock template kernel, except that it is checked when it is compiled (``runtime/checked.py``), that random
    numbers of an epilogue are drawn by position, and that run-time sizes are int64 whenever addresses are (2.11: not).
    """

    _is_loading = False
    kexpr = staticmethod(SizePrinter().doprint)
    overrides = triton_ops.TritonOps  # type: ignore[assignment]

    @classmethod
    def gen_common_triton_imports(cls) -> str:
        imports: str = super().gen_common_triton_imports()
        return imports + triton_ops.IMPORT + "from bi_inductor.runtime import checked as triton_heuristics\n"

    @contextlib.contextmanager
    def set_subgraph_body(self, body_name: str) -> Iterator[None]:
        """Each store of a tile defines the indices its epilogue reads by; stock defines them in the first alone."""
        with super().set_subgraph_body(body_name):
            for entry in self.range_tree_nodes.values():
                entry.cache_clear()
            yield

    def load(self, name: str, index: sympy.Expr) -> Any:
        self._is_loading = True
        try:
            return super().load(name, index)
        finally:
            self._is_loading = False

    def indexing(self, index: sympy.Expr, *arguments: Any, **options: Any) -> Any:
        """An output of one element has the mask of its tile too, which Inductor gives to none at a constant address:
        a tile's other elements would be written there, of which an epilogue may have loaded nothing."""
        found = super().indexing(index, *arguments, **options)
        is_constant = isinstance(found, IndexingOptions) and not found.mask_vars
        if self._is_loading or not is_constant or self.template_mask in (None, "None"):
            return found
        return dataclasses.replace(found, mask_vars=OrderedSet([self.template_mask]))

    @property
    def index_dtype(self) -> str:
        is_wide = "INDEX_DTYPE : tl.constexpr = tl.int64" in getattr(self, "defines", "")
        return "tl.int64" if is_wide else super().index_dtype


class Template(TritonTemplate):
    """A template of such kernels."""

    kernel_type = TemplateKernel


#: Which of the rows [BLOCK_M, 1] and columns [1, BLOCK_N] of a tile exist.
_EXISTING = {"idx_m": "(idx_m < M)", "idx_n": "(idx_n < N)"}


class ProductKernel(TemplateKernel):
    """A kernel whose tile has the rows ``idx_m`` of M and the columns ``idx_n`` of N.

    What an epilogue reads by the column alone, or by the row, is loaded and computed once for each, not for each
    element: the 1 / sqrt(variance) of a batch norm made 320 KB of code of a tile of 64 x 256, which spilled.
    """

    def indexing(self, index: sympy.Expr, *arguments: Any, **options: Any) -> Any:
        found = super().indexing(index, *arguments, **options)
        if not (self._is_loading and isinstance(found, IndexingOptions)):
            return found
        if found.mask_vars != {self.template_mask}:
            return found
        names = [str(symbol) for symbol in found.index.free_symbols]
        if len(names) != 1 or names[0] not in _EXISTING:
            return found
        rows, columns = self.template_out_shape
        shape = (rows, "1") if names[0] == "idx_m" else ("1", columns)
        return dataclasses.replace(
            found,
            index_str=self.index_to_str(found.index),
            mask_vars=OrderedSet([_EXISTING[names[0]]]),
            expand_str=f"[{', '.join(shape)}]",
            expand_shape=shape,
        )


class ProductTemplate(Template):
    """A template of such kernels."""

    kernel_type = ProductKernel


def emit(
    template: TritonTemplate,
    operands: Sequence[Any],
    layout: ir.Layout,
    *,
    num_warps: int,
    num_stages: int,
    triton_meta: dict[str, Any] | None = None,
    may_be_idle: bool = False,
    **arguments: Any,
) -> ir.TensorBox:
    """The output of ``template`` on realized ``operands``, with ``layout``.

    ``may_be_idle``: the grid may turn out empty although the output is not, because another kernel writes it then; so
    nothing else may be computed in this one (``codegen/triton.py``).
    ``arguments``: constants of the source, and what ``maybe_append_choice`` takes besides.
    """
    numerics = {"enable_fp_fusion": False, "disable_ftz": config.eager_numerics.disable_ftz}
    choices: list[Any] = []
    error = template.maybe_append_choice(
        choices,
        input_nodes=tuple(operands),
        layout=layout,
        num_stages=num_stages,
        num_warps=num_warps,
        triton_meta=numerics | (triton_meta or {}),
        **arguments,
    )
    if error is not None:
        raise error
    output = choices[0].output_node()
    output.data.data.may_be_idle = may_be_idle
    return output


def rounded(value: Any, accumulator: torch.dtype, dtype: torch.dtype) -> Any:
    """The one rounding of ``value``, to ``dtype``, as a value of the accumulator's dtype again."""
    if dtype == accumulator:
        return value
    value = V.ops.to_dtype(value, dtype, src_dtype=accumulator, use_compute_types=False)
    return V.ops.to_dtype(value, accumulator, src_dtype=dtype)


def rounding(accumulator: torch.dtype, dtype: torch.dtype) -> Callable[[Any], Any]:
    """An epilogue that does nothing but :func:`rounded`."""
    return lambda value: rounded(value, accumulator, dtype)


def realized(x: ir.TensorBox) -> ir.IRNode:
    """x as something with an address and strides that can no longer change."""
    x = ir.ExternKernel.realize_input(x)
    storage, layout = ir.as_storage_and_layout(x, freeze=True)
    if isinstance(layout, ir.FlexibleLayout):
        storage.freeze_layout()
    return x


def is_empty(sizes: Sequence[Any]) -> bool:
    """True if one of the sizes is known to be 0."""
    return any(V.graph.sizevars.statically_known_equals(length, 0) for length in sizes)


def is_multiple(expression: Any, divisor: int) -> bool:
    """True if ``expression`` is known to be a multiple of ``divisor``."""
    return V.graph.sizevars.statically_known_multiple_of(sympy.sympify(expression), divisor)
