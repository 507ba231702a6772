"""What copies at one size and not at another, copies at every size, where autograd could tell.

Of one row a column is contiguous, too: there ``contiguous()`` returns its operand, and autograd adds the gradients of
both in one sum, where at other sizes it adds those of the copy first. It is a copy here. A copy that changes nothing is
dropped once the graph is differentiated. In a graph that writes into tensors, where operand and result may have to be
one, the result is a view of the operand where ATen returns it: its gradients are added first as well.

What a graph returns as a view of an input, or of what else it returns, is made outside of the graph, and so is its
gradient: by a kernel of ATen, and added last. ``reshape`` and its relatives return views at some sizes only, and the
gradients of ``expand`` and other views that show an element more than once are sums, in ATen's order. Where a gradient
may be asked for, a copy of such a view is returned, made at the end of the graph, after everything that writes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bi_inductor.passes.retarget import Retarget

_TARGETS = frozenset({"contiguous", torch.Tensor.contiguous, torch.ops.aten.contiguous.default})
#: Views whose gradient is not autograd's to make, as methods and as functions.
_RESHAPES = ("reshape", "reshape_as", "flatten", "ravel")
_REPEATS = ("expand", "expand_as", "broadcast_to", "unfold", "as_strided", "broadcast_tensors", "meshgrid")
_IN_PLACE = "iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem"
_WRITES = frozenset(getattr(operator, name) for name in _IN_PLACE.split())


def _copied(self: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return self.clone(memory_format=memory_format)


def _set_apart(self: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    result = self.contiguous(memory_format=memory_format)
    return result.view_as(result) if self.is_contiguous(memory_format=memory_format) else result


def _writes(graph: Graph) -> bool:
    """True if any op of ``graph`` may write into a tensor."""
    return any(map(_is_a_write, graph.nodes))


def _is_a_write(node: Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = name.split(".")[0]  # add_.Tensor
    in_place = name.endswith("_") and not name.endswith("__")
    asked_for = node.kwargs.get("out") is not None or bool(node.kwargs.get("inplace"))
    return in_place or asked_for or name == "__setitem__" or node.target in _WRITES


def copy_returned_views(graph: Graph) -> None:
    """Let ``graph`` return copies of the views named above, and of views of them, as far as they have a gradient."""
    output = graph.output_node()
    copies: dict[Node, Node] = {}

    def copied(node: Node) -> Node:
        if node not in copies:
            copies[node] = node
            if _is_seen_through(node, set()):
                with graph.inserting_before(output):
                    copies[node] = graph.call_function(_copied_for_a_gradient, (node,))
                copies[node].meta = dict(node.meta)
        return copies[node]

    output.args = map_arg(output.args, copied)


def _copied_for_a_gradient(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.requires_grad else value


def _is_seen_through(node: Node, seen: set[Node]) -> bool:
    """True if ``node`` shares its memory with one of the views, and got it from there."""
    if node in seen:
        return False
    seen.add(node)
    operands = node.all_input_nodes
    has_bodies = isinstance(node.target, HigherOrderOperator)
    if _is_a_view(node) or (has_bodies and any(map(_holds_a_view, operands))):
        return True
    memory = _memory(node)
    return any(bool(memory & _memory(operand)) and _is_seen_through(operand, seen) for operand in operands)


def _is_a_view(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _VIEWS


def _holds_a_view(body: Node) -> bool:
    """True if ``body`` names a graph, of a checkpoint or the like, that has one of the views."""
    if body.op != "get_attr":
        return False
    module = operator.attrgetter(str(body.target))(body.graph.owning_module)
    inner = module.modules() if isinstance(module, GraphModule) else ()
    return any(
        _is_a_view(node) for each in inner if isinstance(each, GraphModule) for node in each.graph.nodes
    )


def _memory(node: Node) -> set[int]:
    """The storages of the tensors that ``node`` returns, as far as they have one."""
    values = map(_unwrapped, pytree.tree_leaves(_value(node)))
    plain = (
        value for value in values if isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value)
    )
    return {value.untyped_storage()._cdata for value in plain if torch._C._has_storage(value)}


def _value(node: Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _unwrapped(value: Any) -> Any:
    """The tensor inside those of ``torch.func.vmap`` and its like, which have no storage."""
    while isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def _targets(name: str) -> set[Any]:
    """All that a node may call ``name`` by: a method, functions of torch, ATen's overloads."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    functions = [getattr(module, name) for module in (Tensor, torch) if hasattr(module, name)]
    return {name, *functions, *overloads}


_VIEWS = frozenset({_set_apart}).union(*map(_targets, (*_RESHAPES, *_REPEATS)))
COPIES = (
    Retarget("contiguous", _TARGETS, _copied, leave=lambda node: _writes(node.graph)),
    Retarget("contiguous, in place", _TARGETS, _set_apart),
)
