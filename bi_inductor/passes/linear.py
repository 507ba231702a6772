"""``F.linear`` as one matrix product, whatever the number of dims or the strides of its input.

Stock ``linear`` becomes ``addmm`` (one rounding) or ``matmul`` + ``add_`` (two), depending on ndim and
contiguity, and a batch of one makes strides look contiguous. Here it is always::

    out[m, n] = round(sum_k x[m, k] * w[n, k] + bias[n])        k ascending, one accumulator, one rounding
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bi_inductor.ops import composite
from bi_inductor.passes.retarget import Retarget, argument


@composite("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input [..., K]``, ``weight [N, K]`` or ``[K]`` -> ``[..., N]`` or ``[...]``, with bias."""
    out_shape = (*input.shape[:-1], *weight.shape[:-1])
    # An explicit product of sizes: a -1 would be ambiguous for an empty batch.
    rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    columns = (weight if weight.dim() == 2 else weight.unsqueeze(0)).t()
    if bias is None:
        return torch.mm(rows, columns).reshape(out_shape)
    return torch.addmm(_bias_per_row(bias, weight, out_shape), rows, columns).reshape(out_shape)


def _bias_per_row(bias: Tensor, weight: Tensor, out_shape: tuple[int, ...]) -> Tensor:
    """A bias as ``addmm`` wants it: [N] as it is, one with leading dims spelled out per row."""
    if bias.dim() < weight.dim():
        return bias
    width = weight.shape[0] if weight.dim() == 2 else 1
    return bias.expand(out_shape).reshape(math.prod(out_shape[: len(out_shape) - weight.dim() + 1]), width)


def _is_jagged(node: Node) -> bool:
    """A nested tensor applies ``linear`` to its flat values [rows, K] by itself: the canonical shape."""
    value = argument(node, 0, "input")
    return isinstance(value, Tensor) and value.is_nested


LINEAR = Retarget(
    name="linear",
    targets=frozenset({torch.nn.functional.linear, torch._C._nn.linear, torch.ops.aten.linear.default}),
    replacement=linear,
    leave=_is_jagged,
)


def inline_module(body: GraphModule, node: Node) -> Node:
    """Replace the call of an ``nn.Linear`` submodule by ``F.linear`` on its parameters; returns the new node.

    Dynamo inlines modules, but graphs from ``torch.fx.symbolic_trace`` still call them.
    """
    module = body.get_submodule(str(node.target))
    with body.graph.inserting_before(node):
        weight = body.graph.get_attr(f"{node.target}.weight")
        bias = None if module.bias is None else body.graph.get_attr(f"{node.target}.bias")
        call = body.graph.call_function(torch.nn.functional.linear, (*node.args, weight, bias))
    call.meta.update(node.meta)
    node.replace_all_uses_with(call)
    body.graph.erase_node(node)
    return call
