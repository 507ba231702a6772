"""One way to run a function, and all values it computes on the way: Dynamo's graph compiled with every result exposed.

The graph is the one that Dynamo hands to a backend; each of its ops is an op of the user's code, with its line. Every
tensor that an op makes becomes an output of the graph, and the backend compiles that. What this shows is what the
compiled graph computes with its intermediate results kept:

- under batchinv that is what it computes without: results are rounded where they are made, and neither fusion nor saved
  values can change a bit (contract C3, C5);
- stock Inductor rounds and fuses by what is kept, so its kept graph may differ from its plain one. ``is_faithful`` says
  whether the outputs of both have the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .capture import captured
from .certificate import source_line
from .testing import same_bits

BACKENDS = {"eager": "eager", "inductor": "stock Inductor", "batchinv": "batchinv"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """How to run ``fn``: by ``backend`` ("batchinv", "inductor" or "eager"), on ``rows`` of the inputs' dimension 0
    (all of them if None), recording gradients or not, with static or ``dynamic`` shapes, and the backend's ``options``.
    """

    fn: Callable[..., Any]
    backend: str = "batchinv"
    rows: slice | None = None
    grad: bool = False
    dynamic: bool | None = False
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}: take one of {', '.join(BACKENDS)}")
        if hasattr(self.fn, "_torchdynamo_orig_callable") or hasattr(self.fn, "dynamo_ctx"):
            raise ValueError(
                "give the function itself, not what torch.compile made of it; backend= says how to run it"
            )


@dataclasses.dataclass(frozen=True)
class Value:
    """What one op of Dynamo's graph computed: its node, its op, the user's line and the tensor."""

    node: str
    op: str
    source: str
    tensor: Tensor


@dataclasses.dataclass(frozen=True)
class Run:
    """The values of a variant in the order of its graphs, its outputs, and whether keeping values changed these."""

    values: tuple[Value, ...]
    outputs: tuple[Tensor, ...]
    is_faithful: bool


def run(variant: Variant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
    """Run ``variant`` twice, as it is and with every value kept. Raises what compiling and calling raise."""
    if variant.grad:
        args, kwargs = pytree.tree_map_only(Tensor, _asking_for_gradients, (args, kwargs))
    plain = _call(variant, _compiler(variant), args, kwargs)
    values: list[Value] = []
    kept = _call(variant, _keeping(_compiler(variant), values), args, kwargs)
    faithful = len(plain) == len(kept) and all(map(same_bits, plain, kept))
    return Run(tuple(values), tuple(kept), faithful)


def _asking_for_gradients(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() else x


def _call(
    variant: Variant, backend: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    torch._dynamo.reset()
    backend = captured(backend) if variant.backend == "batchinv" else backend
    compiled = torch.compile(variant.fn, backend=backend, dynamic=variant.dynamic)
    rng = torch.get_rng_state()
    with torch.enable_grad() if variant.grad else torch.no_grad(), _rng_restored(rng):
        result = compiled(*args, **kwargs)
    return [leaf.detach() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _rng_restored(state: Tensor) -> Iterator[None]:
    """Both calls draw the same random numbers."""
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _compiler(variant: Variant) -> Callable[..., Any]:
    options = variant.options

    def compile_graph(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if variant.backend == "eager":
            return gm.forward
        if variant.backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(gm, inputs, config_patches=options)
        from .backend import batchinv

        return batchinv(gm, inputs, options=options)

    return compile_graph


def _keeping(compiler: Callable[..., Any], values: list[Value]) -> Callable[..., Any]:
    """A backend that compiles by ``compiler`` and appends to ``values`` what every op computes, at each call."""

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nodes, count = _expose(gm)
        made_by = [(node.name, _op(node), source_line(node)) for node in nodes]  # a compiler may rewrite them
        call = compiler(gm, inputs)

        def keeping(*args: Any) -> Any:
            results = call(*args)
            for made, result in zip(made_by, results[count:], strict=True):
                values.append(Value(*made, result.detach().clone()))
            return tuple(results[:count])

        return keeping

    return backend


def _expose(gm: GraphModule) -> tuple[list[Node], int]:
    """Make every tensor of the graph an output. Returns the nodes that were added, and how many outputs there were."""
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    outputs = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    nodes = [
        node
        for node in gm.graph.nodes
        if node.op not in ("placeholder", "output", "get_attr")
        and isinstance(node.meta.get("example_value"), Tensor)
    ]
    output.args = ((*outputs, *nodes),)
    gm.recompile()
    return nodes, len(outputs)


def _op(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
