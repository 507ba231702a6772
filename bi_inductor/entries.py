"""What one op of a lowered graph contributes to its certificate, and the check that its form knows no batch size."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from . import contract, verdicts
from .attention_tiles import maps_of
from .certificate import Entry, Level, source_line
from .declared_ops import declarable_name
from .errors import BatchInvarianceError
from .numerics import VIEWS
from .verdicts import Ruling, Verdict

#: Integer arguments of ops that compute nothing which say where elements come from. The others are sizes.
_PLACEMENT = frozenset(
    "diagonal dim dim0 dim1 dim2 dims fill_value index offset pad shifts split_dim start step value".split()
)
_UNCHECKED = (Verdict.UNPROVEN, Verdict.DECLARED)
#: A length at the sizes of the example; an expression that holds a size without a known value stays as it is.
AtExample = Callable[[contract.Length], contract.Length]


@dataclasses.dataclass(frozen=True)
class Example:
    """What is known about the symbols of a graph: lengths ``simplified`` by guards, and as they are ``at_example``.

    ``floats``: inputs that hold one Python float each, as a dynamic graph passes them, with their values.
    """

    simplified: AtExample
    at_example: AtExample
    floats: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Reduced:
    """The shape of an operand, and which of its dimensions an op reduces."""

    shape: Sequence[Any]
    dims: tuple[int, ...]

    @property
    def sizes(self) -> list[contract.Length]:
        sizes = [self.shape[dim] for dim in self.dims]
        return [size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes]


def tensor_inputs(graph: torch.fx.Graph, example: Example) -> tuple[str, ...]:
    """Names of the graph's tensor inputs, in order."""
    return tuple(
        node.name
        for node in graph.nodes
        if node.op == "get_attr"
        or (node.op == "placeholder" and _is_tensor(node) and node.name not in example.floats)
    )


def outputs(graph: torch.fx.Graph) -> tuple[str, ...]:
    """Names of the tensors that are returned to the user; all outputs where nothing says which these are."""
    (node,) = [node for node in graph.nodes if node.op == "output"]
    returned = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
    visible = node.meta.get("user_visible_output_idxs", range(len(returned)))
    return tuple(
        returned[k].name for k in visible if isinstance(returned[k], Node) and _is_tensor(returned[k])
    )


def float_inputs(graph: torch.fx.Graph, values: Mapping[int, float]) -> dict[str, float]:
    """Names of inputs that hold one Python float each; ``values``: by position in the graph that Dynamo made."""
    found = {}
    for node in graph.nodes:
        position = getattr(node.meta.get("desc"), "idx", -1) if node.op == "placeholder" else -1
        if position in values:
            found[node.name] = values[position]
    return found


def dynamo_floats(gm: torch.fx.GraphModule) -> dict[int, float]:
    """Positions of the inputs of Dynamo's graph that hold one Python float each, with the example's values."""
    found = {}
    for position, node in enumerate(node for node in gm.graph.nodes if node.op == "placeholder"):
        held = getattr(node.meta.get("example_value"), "item_memo", None)
        if isinstance(held, torch.SymFloat):
            value = held.node.expr.xreplace(held.node.shape_env.backed_var_to_val)
            if value.is_number:
                found[position] = float(value)
    return found


def entry_of(node: Node, ruling: Ruling, example: Example) -> Entry:
    """The entry of one call_function node. Raises BatchInvarianceError if its form depends on a kept size."""
    form = ruling.form
    if form is not None:
        check_form(node, form, example)
    return Entry(
        name=node.name,
        op=declarable_name(node) or str(node.target),
        verdict=ruling.verdict.value,
        form=str(form or ""),
        dtype=str(_dtype(node) or "").removeprefix("torch."),
        constants=_constants(node, example),
        source=source_line(node),
        reason=ruling.reason,
        example=_example(form, example),
        inputs=tuple(
            n.name
            for n in _nodes_in((node.args, node.kwargs))
            if _is_tensor(n) and _float(n, example) is None and n not in maps_of(node)
        ),
        moves=_moves(node, example) if ruling.verdict is Verdict.INVARIANT else "",
        level=(Level.NONE if ruling.verdict in _UNCHECKED else Level.CONSTRUCTION).value,
    )


def unproven_entry(error: BatchInvarianceError) -> Entry:
    """The entry of a composite that was taken apart before it could be ruled on."""
    return Entry(
        "",
        error.op,
        Verdict.UNPROVEN.value,
        "",
        "",
        (),
        error.source or "",
        error.reason,
        level=Level.NONE.value,
    )


def check_form(node: Node, form: contract.Form, example: Example) -> None:
    """The length of ``form`` is that of the dimensions ``node`` reduces: their symbols, their product.

    Both are read from the operands' shapes here, once more. Raises BatchInvarianceError for a symbol of any other
    dimension (a batch size, above all) and for another number.
    """
    length = getattr(form, "length", None)
    reduced = _reduced(node)
    if length is None or reduced is None:
        return
    sizes = [example.simplified(size) for size in reduced.sizes]
    allowed = {symbol for size in sizes for symbol in sympy.sympify(size).free_symbols}
    strangers = sorted(map(str, form.free_symbols - allowed))
    if strangers:
        raise _wrong(node, form, f"depends on {', '.join(strangers)}, which is no length it reduces")
    product = math.prod(sympy.sympify(example.at_example(size)) for size in sizes)
    if sympy.sympify(example.at_example(length)) != product:
        raise _wrong(node, form, f"has another length than the {product} elements it reduces")


def _wrong(node: Node, form: contract.Form, what: str) -> BatchInvarianceError:
    return BatchInvarianceError(
        str(node.target),
        f"its canonical form {form} {what}",
        "please report the graph: this is a bug of batchinv, and nothing was run",
        source_line(node) or None,
    )


def _reduced(node: Node) -> _Reduced | None:
    reduced = isinstance(node.target, torch._ops.OpOverload) and verdicts.reduced_operand(node)
    if not reduced:
        return None
    shape, dims = reduced[0].meta["val"].shape, reduced[1]
    if dims is None or dims == []:
        dims = range(len(shape))
    dims = [dims] if isinstance(dims, int) else dims
    rank = len(shape)
    return _Reduced(shape, tuple(dim % rank for dim in dims) if rank else ())


def _example(form: contract.Form | None, example: Example) -> str:
    """``form`` at the lengths of the example; empty if it has no symbols."""
    if form is None or not form.free_symbols:
        return ""
    return str(dataclasses.replace(form, length=example.at_example(form.length)))  # type: ignore


def _constants(node: Node, example: Example) -> tuple[str, ...]:
    """Scalars that reach the bits of a result, as ``argument=value``: floats, bools, dtypes, texts, and integers of
    pointwise ops, of which a size that is a symbol is what it is in the example.

    A float is what it is in the accumulator's dtype: a decomposition may have rounded it already, or not yet.
    """
    kinds: tuple[type, ...] = (float, bool, torch.dtype, str)
    if verdicts.is_pointwise(node.target):
        kinds += (int,)
    wide = any(_dtype(n) in (torch.float64, torch.complex128) for n in (node, *node.all_input_nodes))
    found = []
    for name, argument in _named_arguments(node):
        for value in pytree.tree_leaves(argument):
            value = _number(value, example)
            if isinstance(value, kinds) and value != "":
                shown = ctypes.c_float(value).value if isinstance(value, float) and not wide else value
                found.append(f"{name}={shown!r}")
    return (*_reduced_dims(node), *found)


def _reduced_dims(node: Node) -> tuple[str, ...]:
    """Which dimensions a reduction reduces, counted from the first."""
    reduced = _reduced(node)
    return (f"dims={sorted(reduced.dims)}",) if reduced else ()


def _moves(node: Node, example: Example) -> str:
    """For an op that moves elements to other places, which ones: its name and what decides it, except sizes."""
    if not verdicts.is_movement(node.target) and node.target is not operator.getitem:
        return ""
    if node.target is operator.getitem:  # of an op with several results
        return f"result {node.args[1]}"
    name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    if name in VIEWS or (name == "slice_scatter" and _replaces_all(node)):
        return ""
    places = [
        f"{key}={[_number(value, example) for value in pytree.tree_leaves(argument)]}"
        for key, argument in _named_arguments(node)
        if key in _PLACEMENT and not any(map(_is_tensor, _nodes_in(argument)))
    ]
    return " ".join([name, *places])


def _replaces_all(node: Node) -> bool:
    """A slice_scatter that keeps nothing of its first operand, which Inductor drops where strides allow it."""
    whole, part = (_shape(node.args[i]) for i in (0, 1))
    return whole == part


def _shape(operand: Any) -> list[str]:
    return [str(size) for size in operand.meta["val"].shape]


def _number(value: Any, example: Example) -> Any:
    """``value``, or for a size or float of the graph (an FX node or a SymInt) its number in the example."""
    if isinstance(value, Node):
        known = _float(value, example)
        value = value.meta.get("val") if known is None else known
    if isinstance(value, torch.SymInt):
        known = example.at_example(value.node.expr)
        return int(known) if sympy.sympify(known).is_Integer else str(known)
    return None if isinstance(value, torch.Tensor) else value


def _float(node: Node, example: Example) -> float | None:
    """The value of a float input, or of one that was converted."""
    while node.target is torch.ops.prims.convert_element_type.default and isinstance(node.args[0], Node):
        node = node.args[0]
    return example.floats.get(node.name)


def _named_arguments(node: Node) -> Iterator[tuple[str, Any]]:
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    for position, argument in enumerate(node.args):
        yield (names[position] if position < len(names) else str(position)), argument
    yield from node.kwargs.items()


def _nodes_in(argument: Any) -> list[Node]:
    return [value for value in pytree.tree_leaves(argument) if isinstance(value, Node)]


def _is_tensor(node: Node) -> bool:
    return any(isinstance(value, torch.Tensor) for value in pytree.tree_leaves(node.meta.get("val")))


def _dtype(node: Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)
