"""``contiguous()`` is a copy at every size.

Of one row a column is contiguous, too: there ATen returns its operand, and autograd adds the gradients of both in one
sum, where at other sizes it adds those of the copy first. A copy that changes nothing is dropped once the graph is
differentiated. In a graph that writes into tensors, where operand and result may have to be one, the result is a view
of the operand where ATen returns it: its gradients are added first as well.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from bi_inductor.passes.retarget import Retarget

_TARGETS = frozenset({"contiguous", torch.Tensor.contiguous, torch.ops.aten.contiguous.default})
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


COPIES = (
    Retarget("contiguous", _TARGETS, _copied, leave=lambda node: _writes(node.graph)),
    Retarget("contiguous, in place", _TARGETS, _set_apart),
)
