"""Numbers that Python computes for a static graph and a kernel for a dynamic one: two libraries, two roundings.

A size, or a Python float that Dynamo made an input, is a symbol of a dynamic graph, and what is computed from symbols
(``x * x.shape[-1] ** 0.3``) is carried out by kernels; in a static graph it is a constant that Python computed. Sums,
products, quotients and square roots are correctly rounded by both. Powers, sines and logarithms are not: some differ in
the last of 53 bits (tests/test_host_numbers.py). A tensor that meets such a number would follow the compile history
(C3), so it is refused.

Two may stay where they only meet tensors of fp32 or less, ``n ** -0.5`` and ``n ** 0.5`` of integers: rounded to fp32
none of them differs below n = 2**22 (tests/test_triton_sizes.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._sympy import functions

from .certificate import source_line
from .errors import BatchInvarianceError

_REMEDY = (
    "use math.sqrt for roots, compute it outside the compiled function and pass a tensor, or keep what it is "
    "made of static (torch._dynamo.mark_static)"
)


def refusals(gm: GraphModule) -> Iterator[BatchInvarianceError]:
    """One error for each op of Dynamo's graph ``gm``, and of the graphs in it, that computes such a number."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            yield from (_refusal(node) for node in module.graph.nodes if _is_refused(node))


def _refusal(node: Node) -> BatchInvarianceError:
    number = node.meta["example_value"].node.expr
    reason = "no two libraries round it alike: a static graph has Python's number, a dynamic one the kernel's"
    return BatchInvarianceError(f"the number {number}", reason, _REMEDY, source_line(node) or None)


def _is_refused(node: Node) -> bool:
    if not _is_float(node) or not _is_rounded_by_library(_expression(node)):
        return False
    met = [tensor.dtype for user in node.users for tensor in _tensors_that_meet(user)]
    if _is_root_of_an_integer(node) and not any(_is_float(user) for user in node.users):
        return any(dtype.itemsize > 4 for dtype in met)
    return bool(met)


def _is_rounded_by_library(expression: Any) -> bool:
    name = type(expression).__name__
    return name == "FloatPow" or (name.startswith("OpaqueUnaryFn_") and name != "OpaqueUnaryFn_sqrt")


def _tensors_that_meet(user: Node) -> list[Tensor]:
    """What ``user`` computes, or what is computed from the number that it is."""
    if _is_float(user):
        return [tensor for each in user.users for tensor in _tensors_that_meet(each)]
    values = torch.utils._pytree.tree_leaves(user.meta.get("example_value"))
    return [value for value in values if isinstance(value, Tensor)]


def _is_root_of_an_integer(node: Node) -> bool:
    expression = _expression(node)
    if not isinstance(expression, functions.FloatPow) or expression.args[1] not in (0.5, -0.5):
        return False
    base = expression.args[0]
    if isinstance(base, functions.ToFloat):
        (base,) = base.args
    return bool(base.is_integer)


def _is_float(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.SymFloat)


def _expression(node: Node) -> Any:
    return node.meta["example_value"].node.expr
