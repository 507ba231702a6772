"""Dynamo's graph with a start for the gradient of every parameter: one more input each, behind all others."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch._dynamo.source import GradSource
from torch._guards import TracingContext
from torch.fx import GraphModule, Node

from ..errors import BatchInvarianceError
from .ops import continuing


@dataclasses.dataclass(frozen=True)
class Marked:
    """A graph with a start for each parameter: positions of these parameters, and examples of the new inputs."""

    gm: GraphModule
    positions: tuple[int, ...] = ()
    starts: tuple[torch.Tensor, ...] = ()


def mark_parameters(gm: GraphModule) -> Marked:
    """``gm`` with its parameters routed through ``continuing``; Dynamo goes on using its own graph, which stays.

    Raises BatchInvarianceError for a parameter that is not fp32: a gradient that is rounded between two
    micro-batches cannot be continued.
    """
    gm = _copied(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    positions = [i for i, node in enumerate(placeholders) if _is_trained(node)]
    starts, last = [], placeholders[-1] if placeholders else None
    for position in positions:
        last = _insert_start(gm, placeholders[position], last)
        starts.append(last.meta["example_value"])
    gm.recompile()
    return Marked(gm, tuple(positions), tuple(starts))


def _copied(gm: GraphModule) -> GraphModule:
    copied = GraphModule(gm, copy.deepcopy(gm.graph))
    copied.meta = gm.meta
    both = zip(*(graph.find_nodes(op="placeholder") for graph in (gm.graph, copied.graph)), strict=True)
    for theirs, ours in both:  # what Dynamo hangs on a node beside its meta
        ours._dynamo_source = getattr(theirs, "_dynamo_source", None)
    return copied


def _is_trained(node: Node) -> bool:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.nn.Parameter) or not value.requires_grad:
        return False
    if value.dtype != torch.float32:
        raise BatchInvarianceError(
            f"the continued gradient of a {value.dtype} parameter",
            "it would be rounded after every micro-batch",
            "keep the parameters in float32 (autocast may compute in bfloat16), or freeze this one",
        )
    return True


def _insert_start(gm: GraphModule, parameter: Node, last: Node) -> Node:
    """A placeholder for the start of ``parameter``'s gradient, behind ``last``, and the op that takes both."""
    value = parameter.meta["example_value"]
    with gm.graph.inserting_after(last):
        start = gm.graph.placeholder(f"{parameter.name}_start")
    # Dynamo's fakes belong to the mode it traced with; AOTAutograd wants inputs of the mode it will trace with.
    with TracingContext.get().fake_mode:
        start.meta["example_value"] = torch.empty_strided(
            value.size(), value.stride(), dtype=value.dtype, device=value.device
        )
    start._dynamo_source = GradSource(parameter._dynamo_source, "grad")  # type: ignore[attr-defined]
    users = list(parameter.users)
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    with gm.graph.inserting_before(first):
        passed = gm.graph.call_function(continuing, (parameter, start))
    passed.meta["example_value"] = value
    for user in users:
        user.replace_input_with(parameter, passed)
    return start
