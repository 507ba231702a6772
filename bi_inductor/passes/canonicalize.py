"""Rewrite a Dynamo graph, before AOTAutograd decomposes it by sizes and strides, to canonical ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn
from torch.fx import GraphModule, Node

from bi_inductor.errors import BatchInvarianceError
from bi_inductor.passes.attention import ATTENTION
from bi_inductor.passes.contractions import CONTRACTIONS
from bi_inductor.passes.copies import COPIES, copy_returned_views
from bi_inductor.passes.flex import FLEX
from bi_inductor.passes.linear import LINEAR, inline_module
from bi_inductor.passes.matmul import MATMUL
from bi_inductor.passes.multihead import ENCODER_LAYER, MULTIHEAD
from bi_inductor.passes.recurrent import RECURRENT
from bi_inductor.passes.retarget import Retarget
from bi_inductor.passes.sampling import SAMPLING
from bi_inductor.passes.varlen import VARLEN

REWRITES: tuple[Retarget, ...] = (
    LINEAR,
    MATMUL,
    ATTENTION,
    FLEX,
    MULTIHEAD,
    ENCODER_LAYER,
    *SAMPLING,
    *CONTRACTIONS,
    *RECURRENT,
    *VARLEN,
    *COPIES,
)


def _raise(error: BatchInvarianceError) -> None:
    raise error


def canonicalize(gm: GraphModule, refuse: Callable[[BatchInvarianceError], None] = _raise) -> GraphModule:
    """Apply every rewrite to ``gm`` and to the bodies it holds (checkpoint, cond, scan ...), in place;
    returns ``gm``.

    ``refuse(error)`` is called for a node without a canonical form. It raises by default; when it returns,
    the node keeps its stock target.
    """
    for body in _bodies(gm):
        for node in list(body.graph.nodes):
            _rewrite(body, node, refuse)
    copy_returned_views(gm.graph)
    for body in _bodies(gm):
        body.recompile()
    return gm


def _bodies(gm: GraphModule) -> Iterator[GraphModule]:
    return (module for module in gm.modules() if isinstance(module, GraphModule))


def _rewrite(body: GraphModule, node: Node, refuse: Callable[[BatchInvarianceError], None]) -> None:
    if node.op == "call_module" and type(body.get_submodule(str(node.target))) is nn.Linear:
        node = inline_module(body, node)
    rewrite = next((rewrite for rewrite in REWRITES if rewrite.matches(node)), None)
    if rewrite is None:
        return
    error = rewrite.refuse(node)
    if error is None:
        rewrite.apply(node)
    else:
        refuse(error)
