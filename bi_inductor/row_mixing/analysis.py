"""The dataflow over one graph, and over the graphs of a function with the batch size as a symbol."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from ..dry_run import DryRun
from .place import INDEPENDENT, Cause, Mixed, Place, Rows
from .rules import Step, input_place, place_of, shape_of

ROW_MIXING = "ROW-MIXING"


@dataclasses.dataclass(frozen=True)
class OutputRows:
    """One output of a graph: where its rows are (None: no row is in it), and how rows mix in it.

    ``dim`` holds outer * batch * inner elements, mostly 1 * batch * 1.
    """

    name: str
    dim: int | None
    mixing: tuple[Cause, ...] = ()
    outer: int = 1
    inner: int = 1

    def __str__(self) -> str:
        if self.mixing:
            return f"{self.name}: {ROW_MIXING} through {'; '.join(dict.fromkeys(map(str, self.mixing)))}"
        return f"{self.name}: " + (
            "no rows" if self.dim is None else f"rows apart along dimension {self.dim}"
        )


@dataclasses.dataclass(frozen=True)
class RowMixing:
    """The outputs of all graphs of a function, graph by graph; ``bool()`` is True if any row can see another."""

    graphs: tuple[tuple[OutputRows, ...], ...]

    @property
    def causes(self) -> tuple[Cause, ...]:
        """Every op through which rows mix, once."""
        found = (cause for outputs in self.graphs for output in outputs for cause in output.mixing)
        return tuple(dict.fromkeys(found))

    def __bool__(self) -> bool:
        return bool(self.causes)

    def __str__(self) -> str:
        return "\n".join(str(output) for outputs in self.graphs for output in outputs)


def analyse(gm: GraphModule, batch: sympy.Symbol | None = None) -> tuple[OutputRows, ...]:
    """The outputs of an ATen graph whose inputs have the symbol ``batch`` where their rows are.

    ``batch``: the only symbol of the inputs' sizes if None. Raises ValueError if there are several. Without any, the
    batch is a constant, which nothing can be told about: every output is mixed.
    """
    places = _places(gm, batch or _only_symbol(gm), {})
    return tuple(_output(node, places[node]) for node in gm.graph.output_node().all_input_nodes)


@dataclasses.dataclass(frozen=True)
class _Saved:
    """A tensor that a forward graph returns for its backward."""

    shape: str
    place: Place

    def is_like(self, node: Node) -> bool:
        return self.shape == str(tuple(shape_of(node)))


def _places(gm: GraphModule, batch: sympy.Symbol | None, saved: dict[str, _Saved]) -> dict[Node, Place]:
    """Of every node. ``saved``: what an earlier graph returned, by the name that it has in both."""
    places: dict[Node, Place] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            places[node] = _unknown(node) if batch is None else _input(node, batch, saved)
        elif node.op == "call_function":
            places[node] = place_of(Step(node, places, batch or sympy.Symbol("batch")))
        else:
            places[node] = INDEPENDENT
    return places


def _input(node: Node, batch: sympy.Symbol, saved: dict[str, _Saved]) -> Place:
    """What a backward reads that is neither an input of the function nor a gradient has to be known from its forward:
    rows may have been mixed in it before."""
    known = saved.get(node.name)
    if known is not None and known.is_like(node):
        return known.place
    is_given = node.name.startswith(("primals_", "tangents_"))
    is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
    if saved and is_tensor and not is_given:
        return Mixed((Cause(node.name, "", "a saved tensor that was not found in the forward", node.name),))
    return input_place(node, batch)


def _only_symbol(gm: GraphModule) -> sympy.Symbol | None:
    values = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    symbols = {s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}
    if len(symbols) > 1:
        raise ValueError(f"sizes of inputs have several symbols, {symbols}; name that of the batch")
    return symbols.pop() if symbols else None


def _unknown(node: Node) -> Place:
    return Mixed((Cause(node.name, "", "an input without a symbol for the batch size", node.name),))


def _output(node: Node, place: Place) -> OutputRows:
    if isinstance(place, Mixed):
        return OutputRows(node.name, None, place.causes)
    if isinstance(place, Rows):
        return OutputRows(node.name, place.dim, (), place.outer, place.inner)
    return OutputRows(node.name, None)


@dataclasses.dataclass(frozen=True)
class FollowedRun(DryRun):
    """A dry run whose graphs are analysed as they are lowered. ``outputs``: of each graph, in the order of compilation.

    Needs a ``batch_dim``. Where several sizes of a graph are symbols, no row of it is told apart.
    """

    outputs: list[tuple[OutputRows, ...]] = dataclasses.field(default_factory=list)
    saved: dict[str, _Saved] = dataclasses.field(default_factory=dict)

    def _look_at(self, graph: Any) -> None:
        """A backward takes from the graph before it what that saved; any other graph begins anew."""
        nodes = graph.module.graph.output_node().all_input_nodes
        try:
            places = _places(
                graph.module, _only_symbol(graph.module), self.saved if graph.is_backward else {}
            )
        except ValueError as error:
            places = dict.fromkeys(nodes, Mixed((Cause("its inputs", "", str(error)),)))
        self.outputs.append(tuple(_output(node, places[node]) for node in nodes))
        self.saved.clear()
        self.saved.update({node.name: _Saved(str(tuple(shape_of(node))), places[node]) for node in nodes})


@dataclasses.dataclass(frozen=True)
class _Capture(DryRun):
    """Keeps the ATen graphs that the backend would lower, and lowers nothing."""

    graphs: list[GraphModule] = dataclasses.field(default_factory=list)

    def _backend(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.aot_autograd import make_boxed_func
        from torch.nn.attention import SDPBackend, sdpa_kernel

        from ..decompositions import decompositions
        from ..passes.canonicalize import canonicalize
        from ..recurrence import recurrence

        def keep(graph: GraphModule, _: Any) -> Any:
            self.graphs.append(graph)
            return make_boxed_func(graph)

        # As one op a recurrence has a rule; the loop that it becomes has none.
        table = {op: rule for op, rule in decompositions().items() if op is not recurrence}
        stage = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=table)
        with sdpa_kernel(SDPBackend.MATH):
            return stage(canonicalize(gm), inputs)

    @contextlib.contextmanager
    def _recording(self, originals: dict[int, Any]) -> Iterator[list[str]]:
        yield []


def row_mixing(fn: Callable[..., Any], *args: Any, batch_dim: int = 0, **kwargs: Any) -> RowMixing:
    """For each output of ``fn(*args, **kwargs)``: can one row see another, and through which op?

    Dimension ``batch_dim`` of every tensor argument that has the size of the first one's there is the batch. Nothing
    is compiled or run. A row that cannot see another has bits of its own under this backend; the other way round, a
    ROW-MIXING output may still be free of it: what no rule speaks about counts as mixing. Raises
    SpecializedBatchError for a function that takes the batch size for a constant.

    >>> print(row_mixing(model, torch.randn(8, 512)))
    """
    run = _Capture("cpu", batch_dim=batch_dim)
    run(fn, args, kwargs)
    return RowMixing(tuple(analyse(graph) for graph in run.graphs))
