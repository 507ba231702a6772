"""The backward graph in which sums over rows begin with what was there: ``continued(start, gradient)`` moves down.

Through views and the widening of a rounded gradient it reaches the product or the sum over rows that made the
gradient, and becomes its start::

    continued(s, permute(g, p))        ->  permute(continued(permute(s, p^-1), g), p)
    continued(s, view(g, size))        ->  view(continued(view(s, g's size), g), size)
    continued(s, g.to(float32))        ->  continued(s, g)                  nothing is rounded on the way
    continued(s, mm(a, b))             ->  mm_from(s, a, b)
    continued(s, sum(x, dim))          ->  sum_from(s, x, dim, block)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..certificate import source_line
from ..errors import BatchInvarianceError
from .ops import BLOCK, continued, mm_from, sum_from

aten, prims = torch.ops.aten, torch.ops.prims

_VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.squeeze.dims,
        aten.unsqueeze.default,
    }
)
_WIDENINGS = frozenset({prims.convert_element_type.default, aten._to_copy.default})


def continue_sums(gm: GraphModule) -> GraphModule:
    """Resolve every ``continued`` of a backward graph, in place; returns ``gm``.

    Raises BatchInvarianceError for a gradient that is not one product or one sum over rows.
    """
    marks = gm.graph.find_nodes(op="call_function", target=continued)
    for mark in marks:
        start, gradient = mark.args
        with gm.graph.inserting_before(mark):
            total = _from(gm.graph, start, gradient)
        mark.replace_all_uses_with(total)
        gm.graph.erase_node(mark)
    if marks:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return gm


def _from(graph: Graph, start: Node, gradient: Node) -> Node:
    """``gradient`` with its sum begun by ``start``, in fp32 and in the shape of ``start``."""
    target, value = gradient.target, gradient.meta.get("val")
    if target in _WIDENINGS:
        return _from(graph, start, gradient.args[0])  # type: ignore[arg-type]
    if target in _VIEWS:
        source = gradient.args[0]
        inner = _view(graph, start, source.meta["val"].shape)  # type: ignore[union-attr]
        return _view(graph, _from(graph, inner, source), value.shape)  # type: ignore[arg-type, union-attr]
    if target == aten.permute.default:
        source, order = gradient.args
        inverse = sorted(range(len(order)), key=lambda dim: order[dim])  # type: ignore[arg-type, index]
        inner = _called(graph, aten.permute.default, start, inverse)
        return _called(graph, aten.permute.default, _from(graph, inner, source), order)  # type: ignore[arg-type]
    if target == aten.mm.default:
        return _called(graph, mm_from, start, *gradient.args)
    if target == aten.sum.dim_IntList:
        return _sum(graph, start, gradient)
    raise _cannot_continue(gradient)


def _sum(graph: Graph, start: Node, gradient: Node) -> Node:
    x, dims = gradient.args[:2]
    shape = x.meta["val"].shape  # type: ignore[union-attr]
    rank = len(shape)
    dims = sorted(dim % rank for dim in dims)  # type: ignore[union-attr]
    if dims[0] != 0:  # the rows that are cut into micro-batches stand outermost
        raise _cannot_continue(gradient)
    # One row of three dims or more is wide enough to be added by itself: no row waits for a block to fill.
    block = 1 if len(dims) == 1 and rank > 2 else BLOCK
    kept = _view(graph, start, [length for dim, length in enumerate(shape) if dim not in dims])
    total = _called(graph, sum_from, kept, x, dims, block)
    return _view(graph, total, gradient.meta["val"].shape)


def _view(graph: Graph, x: Node, shape: Any) -> Node:
    if tuple(x.meta["val"].shape) == tuple(shape):
        return x
    if not all(isinstance(length, int) for length in shape):
        raise _cannot_continue(x)
    return _called(graph, aten.reshape.default, x, list(shape))


def _called(graph: Graph, target: Any, *arguments: Any) -> Node:
    node = graph.call_function(target, arguments)
    values = torch.fx.node.map_arg(arguments, lambda argument: argument.meta["val"])
    with arguments[0].meta["val"].fake_mode:
        node.meta["val"] = target(*values)
    return node


def _cannot_continue(node: Node) -> BatchInvarianceError:
    return BatchInvarianceError(
        f"the continued gradient of a parameter, made by {node.target}",
        "it is not one product or one sum from the first dimension on, so no order of rows can be continued",
        "freeze the parameter, compute its part outside the compiled function, or compile without "
        "batchinv.continue_gradients: gradients are then added up as autograd does",
        source_line(node) or None,
    )
