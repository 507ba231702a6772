"""What copies at one size and not at another, copies at every size, where autograd could tell.

Of one row a column is contiguous, too: there ``contiguous()`` returns its operand, and autograd adds the gradients of
both in one sum, where at other sizes it adds those of the copy first. It is a copy here. A copy that changes nothing is
dropped once the graph is differentiated. In a graph that writes into tensors, where operand and result may have to be
one, the result is a view of the operand where ATen returns it: its gradients are added first as well.

``reshape`` and its relatives return views where they can. Inside a graph their gradients are added first either way.
What is returned as a view of an input, or of what else is returned, is made outside of the graph, and its gradient is
added last; so it is a copy where a gradient may be asked for. So is what is returned of ``expand`` and other views that
show an element more than once: their gradients are sums, which autograd would leave to a kernel of ATen, in its order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bi_inductor.passes.retarget import Retarget

_TARGETS = frozenset({"contiguous", torch.Tensor.contiguous, torch.ops.aten.contiguous.default})
_RESHAPES = ("reshape", "reshape_as", "flatten", "ravel")
#: Views of several places that are one element, as methods and as functions.
_REPEATS = ("expand", "expand_as", "broadcast_to", "unfold", "as_strided", "broadcast_tensors", "meshgrid")
_IN_PLACE = "iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem"
_WRITES = frozenset(getattr(operator, name) for name in _IN_PLACE.split())


def _copied(self: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return self.clone(memory_format=memory_format)


def _set_apart(self: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    result = self.contiguous(memory_format=memory_format)
    return result.view_as(result) if self.is_contiguous(memory_format=memory_format) else result


def _copying(view: Callable[..., Any]) -> Callable[..., Any]:
    """``view``, or a copy of its results where they may have a gradient."""

    def copied(*args: Any, **kwargs: Any) -> Any:
        return pytree.tree_map(
            lambda x: x.clone() if _unwrapped(x).requires_grad else x, view(*args, **kwargs)
        )

    return copied


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


def _is_kept(node: Node) -> bool:
    """True unless ``node``, or a view of it, is returned by a graph that writes into no tensor."""
    return not _is_returned(node) or _writes(node.graph)


def _is_returned(node: Node) -> bool:
    memory = _memory(node)
    return any(
        user.op == "output" or (bool(memory & _memory(user)) and _is_returned(user)) for user in node.users
    )


def _memory(node: Node) -> set[int]:
    """The storages of the tensors that ``node`` returns, as far as they have one."""
    values = map(_unwrapped, pytree.tree_leaves(node.meta.get("example_value", node.meta.get("val"))))
    plain = (
        value for value in values if isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value)
    )
    return {value.untyped_storage()._cdata for value in plain if torch._C._has_storage(value)}


def _unwrapped(value: Any) -> Any:
    """The tensor inside those of ``torch.func.vmap`` and its like, which have no storage."""
    while isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def _operand_first(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call whose operand may have a name: ``input`` in torch's functions, ``self`` in ATen's."""
    named = {name: value for name, value in node.kwargs.items() if name in ("input", "self")}
    others = {name: value for name, value in node.kwargs.items() if name not in named}
    return (*named.values(), *node.args), others


def _returned(name: str, **how: Any) -> Retarget:
    """A copy of what ``name``, a view, returns, where that leaves the graph."""
    function = getattr(Tensor, name, None) or getattr(torch, name)
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    targets = frozenset({name, function, getattr(torch, name, function), *overloads})
    return Retarget(f"{name}, returned", targets, _copying(function), _is_kept, **how)


COPIES = (
    Retarget("contiguous", _TARGETS, _copied, leave=lambda node: _writes(node.graph)),
    Retarget("contiguous, in place", _TARGETS, _set_apart),
    *(_returned(name, arguments=_operand_first) for name in _RESHAPES),
    *map(_returned, _REPEATS),
)
