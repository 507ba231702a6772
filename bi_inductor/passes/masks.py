"""Masks made of positions: one of those that say the same is enough, and gradients compute them again.

Both are about where they cost nothing (``templates/computed.py``), and change no bit. The layers of a model write the
same mask again and again; where AOTAutograd makes a graph for inference it leaves them as they are, and each would have
a map of its own. AOTAutograd's partitioner would keep a mask from the forward, all [queries, keys] of it, because an op
that is none of Inductor's own needs it: what such an op reads, it takes for something that memory has to hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import CheckpointPolicy

from bi_inductor.attention_op import OVERLOAD
from bi_inductor.attention_tiles import attention_map

_aten, _prims = torch.ops.aten, torch.ops.prims
#: Ops that make a tensor of numbers, or look at one in another shape. With pointwise ops, what is computed again.
_SHAPES = frozenset(
    {
        _aten.arange.start_step,
        _aten.expand.default,
        _aten.full.default,
        _aten.lift_fresh_copy.default,
        _aten.permute.default,
        _aten.reshape.default,
        _aten.scalar_tensor.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.unsqueeze.default,
        _aten.view.default,
        _prims.broadcast_in_dim.default,
        _prims.convert_element_type.default,
        _prims.iota.default,
    }
)


def recompute_masks(joint: GraphModule) -> None:
    """Mark the masks of attention in the joint graph of forward and backward, unless the user's checkpointing did."""
    for node in joint.graph.nodes:
        if node.target is OVERLOAD and isinstance(node.args[3], Node):
            for made in _computation(node.args[3]):
                made.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)


def share_masks(gm: GraphModule) -> GraphModule:
    """Let maps of tiles, and what computes their masks, stand once in a graph of ATen ops; returns ``gm``."""
    maps = [node for node in gm.graph.nodes if node.target is attention_map]
    shared = {node for made in maps for node in (made, *_computation(made.args[0]))}
    first: dict[Any, Node] = {}
    for node in [node for node in gm.graph.nodes if node in shared]:
        leaves, structure = tree_flatten((node.args, node.kwargs))
        known = first.setdefault((node.target, str(structure), *((type(x), str(x)) for x in leaves)), node)
        if known is not node:
            node.replace_all_uses_with(known)
            gm.graph.erase_node(node)
    return gm


def _computation(mask: Node) -> Iterable[Node]:
    """The ops that compute ``mask``; none if they read something that is neither an input nor a vector."""
    found: dict[Node, None] = {}
    waiting = [mask]
    while waiting:
        node = waiting.pop()
        if node in found or node.op == "placeholder" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if _is_cheap(node):
            found[node] = None
            waiting += node.all_input_nodes
        elif not _is_vector(node):
            return ()
    return found


def _is_cheap(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        target in _SHAPES
        or (torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags)
    )


def _is_vector(node: Node) -> bool:
    """True if all sizes but one are known to be 1."""
    return sum(not (isinstance(size, int) and size == 1) for size in node.meta["val"].shape) <= 1
