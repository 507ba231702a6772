"""A tensor that no memory holds: the kernel that needs an element computes it, by a function in the kernel's own file.

A mask made of positions (causal, windows, documents, ALiBi) is a few operations on four indices; in memory it has as
many elements as there are scores. Lowering such a mask gives a pointwise node that nothing has realized: its operations
are written out here as a Triton function of the indices and of what they read, and a template calls it for tiles.
The operations are those of the node, rounded as in a kernel of its own, so a mask has the same bits either way.
A ``score_mod`` is a function of the kernel's file in the same way, and so is its derivative.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import sympy
import torch
from torch._inductor import dependencies, ir
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.loop_body import LoopBody
from torch._inductor.utils import sympy_index_symbol
from torch._inductor.virtualized import V

from bi_inductor.errors import BatchInvarianceError
from bi_inductor.score_programs import run
from bi_inductor.templates.bounds import BoundsHandler
from bi_inductor.templates.emission import TemplateKernel, realized

#: Parameters of the functions: an element's indices, and a tuple of what they read.
INDICES = ("idx_b", "idx_h", "idx_m", "idx_n")
CAPTURED = "captured"
#: Buffers that stand for what functions are given.
_PLACEHOLDERS = {"batchinv_score": "score", "batchinv_gradient": "gradient"}


@dataclasses.dataclass(frozen=True)
class Computed:
    """An element from its four indices: the operations, and what they read."""

    size: tuple[Any, ...]
    body: LoopBody
    read_writes: dependencies.ReadWrites

    def get_read_writes(self) -> dependencies.ReadWrites:
        """What decides about the width of addresses (torch 2.14)."""
        return self.read_writes


@dataclasses.dataclass(frozen=True)
class Functions:
    """What the kernels of one attention compute where they need it; None: nothing, or memory has it."""

    mask: Computed | None = None
    score: Computed | None = None
    derivative: Computed | None = None

    @property
    def subgraphs(self) -> list[Computed | None] | None:
        """What ``ComputingKernel`` is given."""
        found = [self.mask, self.score, self.derivative]
        return None if found == [None] * 3 else found

    def constants(self, dtype: torch.dtype) -> dict[str, bool]:
        """What the sources ask about them; ``dtype``: of the values. NARROW: the mask reads narrower elements."""
        reads = (
            [] if self.mask is None else [V.graph.get_dtype(dep.name) for dep in self.mask.read_writes.reads]
        )
        return {
            "NARROW": any(read.itemsize < dtype.itemsize for read in reads),
            "COMPUTED": self.mask is not None,
            "SCORED": self.score is not None,
            "DERIVED": self.derivative is not None,
        }


def computed(x: ir.TensorBox) -> Computed | None:
    """What computes an element of ``x`` (four dims), or None where memory holds it, or should.

    It should where the operations read more elements than ``x`` has (an expanded dim counts once), or one of them has
    two results.
    """
    node, count = _unrealized(x)
    if node is None:
        return None
    with mock.patch.object(ir.FlexibleLayout, "allow_indexing", True):
        made = _function_of(x)
    if "frexp" in made.body.op_counts:
        return None
    buffers = [V.graph.try_get_buffer(dep.name) for dep in made.read_writes.reads]
    if not all(isinstance(b, ir.IRNode) and b.get_device() == x.get_device() for b in buffers):
        return None
    hints = V.graph.sizevars.optimization_hints([count, *(b.get_numel() for b in buffers)])  # type: ignore[union-attr]
    if sum(hints[1:]) > hints[0] or not TritonScheduling.can_use_32bit_indexing(sympy.S.One, buffers):
        return None
    for buffer in buffers:
        if isinstance(buffer.get_layout(), ir.FlexibleLayout):  # type: ignore[union-attr]
            buffer.freeze_layout()  # type: ignore[union-attr]
    return _function_of(x)


def loaded(x: ir.TensorBox) -> Computed:
    """The function that reads an element of ``x`` (four dims) where memory holds it."""
    return _function_of(realized(x))


def _function_of(x: Any) -> Computed:
    loader, size = x.make_loader(), x.get_size()
    read_writes = dependencies.extract_read_writes(loader, size)
    (indices,), ranges = dependencies.index_vars_no_squeeze(size, prefix="d")
    return Computed(tuple(size), LoopBody(loader, [indices], ranges, indices, []), read_writes)


def programmed(
    program: str, size: Sequence[Any], device: torch.device, captured: Sequence[Any], *, is_derivative: bool
) -> Computed:
    """What ``program`` (``score_programs.py``) makes of a score of ``size``, [B, H, L, S].

    Raises BatchInvarianceError for a program with a result that Inductor puts into memory.
    """
    from torch._inductor.lowering import expand, iota, view

    size = list(size)
    layout = ir.FixedLayout(device, torch.float32, size, ir.FlexibleLayout.contiguous_strides(size))
    score, gradient = (
        ir.TensorBox.create(ir.InputBuffer(name=name, layout=layout)) for name in _PLACEHOLDERS
    )
    options = {"start": 0, "step": 1, "dtype": torch.int64, "device": device, "requires_grad": False}
    places = [
        view(iota(length, **options), [length if dim == other else 1 for other in range(4)])
        for dim, length in enumerate(size)
    ]
    inputs = [score, *places, *([gradient] if is_derivative else []), *map(realized, captured)]
    before = len(V.graph.operations)
    result = run(program, inputs, V.graph.call_function)
    if len(V.graph.operations) != before:
        raise BatchInvarianceError(
            "flex_attention",
            "its score_mod has so many operations that some of them would be kernels of their own",
            "write it with fewer operations, or as a float mask for scaled_dot_product_attention",
        )
    return _function_of(expand(result, size))


def _unrealized(x: ir.TensorBox) -> tuple[ir.Pointwise | None, Any]:
    """The pointwise node behind views, if nothing has realized it, and how many elements it has."""
    node: Any = x
    while isinstance(node, (ir.MutableBox, ir.BaseView)):
        node = node.data
    return (node, sympy.prod(node.get_size())) if isinstance(node, ir.Pointwise) else (None, 0)


def _names(line: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", line))


class _Elements(V.WrapperHandler):  # type: ignore[name-defined,misc]
    """Writes operations as lines of the function; remembers which arguments of the kernel they need."""

    def __init__(self, kernel: TemplateKernel) -> None:
        super().__init__(V.get_ops_handler())
        self.kernel = kernel
        self.needed: dict[str, None] = {}

    def load(self, name: str, index: sympy.Expr) -> Any:
        if name in _PLACEHOLDERS:
            return self._generated(f"({_PLACEHOLDERS[name]})", torch.float32)
        pointer = self.kernel.args.input(name)
        self.needed[pointer] = None
        dtype = V.graph.get_dtype(name)
        at = f"{pointer} + ({self._printed(index)})"
        mask = self.kernel._load_mask
        line = f"tl.load({at}, {mask}, other=0)" if mask else f"tl.load({at})"
        if dtype == torch.bool:
            line += ".to(tl.int1)"
        elif dtype in (torch.float16, torch.bfloat16):
            line, dtype = f"{line}.to(tl.float32)", torch.float32
        return self._generated(line, dtype)

    def index_expr(self, expression: sympy.Expr, dtype: torch.dtype) -> Any:
        """In the dtype of indices, as Inductor's kernels have them; floats are of the dtype that is asked for."""
        found = self._generated(f"({self._printed(expression)})", torch.int64)
        return self.to_dtype(found, dtype) if dtype.is_floating_point else found

    def indirect_indexing(
        self, index: Any, size: Any, check: bool = True, wrap_neg: bool = True
    ) -> sympy.Symbol:
        if wrap_neg:
            length = self._printed(sympy.sympify(size))
            index = self._generated(f"tl.where({index} < 0, {index} + ({length}), {index})", torch.int64)
        return sympy_index_symbol(str(index))

    def check_bounds(self, index: sympy.Expr, size: sympy.Expr, lower: bool, upper: bool) -> None:
        mask = self.kernel._load_mask
        place = self._printed(index)
        tests = ([f"({place} >= 0)"] if lower else []) + (
            [f"({place} < {self._printed(size)})"] if upper else []
        )
        inside = " & ".join(tests) + (f" | ~({mask})" if mask else "")
        if tests:
            self.kernel.compute.writeline(f'tl.device_assert({inside}, "index out of bounds: {place}")')

    def _generated(self, line: str, dtype: torch.dtype) -> Any:
        return self.kernel.cse.generate(self.kernel.compute, line, dtype=dtype, shape=())

    def _printed(self, expression: sympy.Expr) -> str:
        renamed = self.kernel.rename_indexing(expression)
        sizes = set(self.kernel.args.sizevars.values())
        self.needed.update(
            dict.fromkeys(str(s) for s in sorted(renamed.free_symbols, key=str) if str(s) in sizes)
        )
        return self.kernel.kexpr(renamed)  # type: ignore[no-any-return]


class ComputingKernel(TemplateKernel):
    """A template kernel whose source may say ``{{computed("mask")}}``: the arguments its function is called with.

    ``subgraphs`` has a Computed for each of KINDS, or None.
    """

    KINDS = ("mask", "score", "derivative")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._functions: dict[str, str] = {}
        self._register_extra_template_env_fns(self.computed, self.bounded, self.scored, self.computed_size)

    def _computed(self, kind: str) -> Computed:
        found: Any = self.subgraphs[self.KINDS.index(kind)]  # type: ignore[index]
        return found  # type: ignore[no-any-return]

    def computed(self, kind: str) -> str:
        """A tuple of the kernel's arguments that the function of this kind unpacks, in their order."""
        (result,), needed, lines = self._body(lambda: [self._element(kind)])
        given = ["score"] if kind == "score" else []
        return self._written(kind, [*given, *INDICES], needed, [*lines, f"return {result}"])

    def bounded(self) -> str:
        """As ``computed("mask")``, of the function that gives the mask's bounds (``bounds.py``)."""

        def bounds() -> list[Any]:
            elements: Any = V.get_ops_handler()
            found = BoundsHandler(elements, elements._generated).of(
                self._computed("mask").body, list(INDICES)
            )
            return [found.low, found.high]

        (low, high), needed, lines = self._body(bounds)
        return self._written("bounds", list(INDICES), needed, [*lines, f"return {low}, {high}"])

    def scored(self) -> str:
        """As ``computed``, of the score and of its derivative, which is given what the score's function has for it.

        Of the lines of both, those that the gradient does not reach are the score's; none is computed twice.
        """
        (score, result), needed, lines = self._body(
            lambda: [self._element("score"), self._element("derivative")]
        )
        late, before, after = {"gradient"}, [], []
        for line in lines:
            name, _, value = line.partition(" = ")
            if late.isdisjoint(_names(value or line)):
                before.append(line)
            else:
                late.add(name)
                after.append(line)
        wanted = set().union(*map(_names, after), {str(result)})
        kept = [name for line in before if (name := line.partition(" = ")[0]) in wanted] or [str(score)]
        before.append(f"return {score}, ({', '.join(kept)},)")
        after = [*(f"{name} = kept[{place}]" for place, name in enumerate(kept)), *after, f"return {result}"]
        self._written("score", ["score", *INDICES], needed, before)
        return self._written("derivative", ["kept", "gradient", *INDICES], needed, after)

    def _element(self, kind: str) -> Any:
        return self._computed(kind).body([sympy_index_symbol(name) for name in INDICES])

    def _body(self, written: Callable[[], list[Any]]) -> tuple[list[Any], list[str], list[str]]:
        """(results, arguments of the kernel that they need, lines) of what ``written`` writes."""
        with self.create_subgraph_body(f"<COMPUTED_{len(self._functions)}>"):
            handler = _Elements(self)
            with V.set_ops_handler(handler):
                results = written()
            self.codegen_body()
            lines = [line for line in self.body.getvalue().splitlines() if line.strip()]
            self.cse.invalidate(set())
        return results, list(handler.needed), lines

    def _written(self, kind: str, parameters: list[str], needed: list[str], lines: list[str]) -> str:
        """Keeps the function; returns the tuple that it is given for what it reads."""
        unpacked = [f"{name} = {CAPTURED}[{place}]" for place, name in enumerate(needed)]
        head = f"@triton.jit\ndef computed_{kind}({', '.join((*parameters, CAPTURED))}):"
        self._functions[kind] = "\n    ".join((head, *unpacked, *lines)) + "\n\n\n"
        return f"({', '.join(needed)}{',' if needed else ''})"

    def computed_size(self, kind: str, dim: int) -> str:
        """A size of the tensor that is computed."""
        return self.kexpr(self.rename_indexing(self._computed(kind).size[dim]))  # type: ignore[no-any-return]

    def jit_lines(self) -> str:
        """The functions stand before the kernel and its decorators."""
        return "".join(self._functions.values()) + textwrap.dedent(super().jit_lines())
