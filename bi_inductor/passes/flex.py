"""``flex_attention`` from canonical ops: its mask is what ``mask_mod`` says, and blocks are nobody's business.

    t[j] = score_mod(s[j], b, h, i, j)  with s[j] = scale * sum_e q[e] * k[j, e] in fp32 (fp64 for fp64), -inf where
    mask_mod(b, h, i, j) is false       and a softmax and a product as in ``attention.py``

Stock visits partial blocks before full ones and splits keys by the number of SMs; which keys are in which block changes
no bit here. On a GPU this is the ATTENTION form, and its gradients, with a ``mask_mod`` for a mask of bools, a function
of indices that kernels compute (``templates/computed.py``), and a ``score_mod`` for a program (``score_programs.py``).
They leave out the tiles of keys of which no query of theirs sees anything; which those are is read off the mask
(``attention_tiles.py``), not off the BlockMask, which may be anybody's. Without a kernel or a program both functions
are mapped over grids of indices, so their results are those of pointwise ops, with all scores in memory.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node

from bi_inductor.attention_op import LOG2_E, attention
from bi_inductor.certificate import source_line
from bi_inductor.errors import BatchInvarianceError
from bi_inductor.ops import bmm_rounding, bmm_wide
from bi_inductor.passes.attention import autocast_applied, grouped_product, has_kernel, tiles_of
from bi_inductor.passes.retarget import Retarget
from bi_inductor.score_programs import programs_of


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: GraphModule,
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
    score_mod_other_buffers: tuple[Any, ...] = (),
    mask_mod_other_buffers: tuple[Any, ...] = (),
    programs: tuple[str, str] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``query [B, H, L, E]``, ``key [B or 1, Hk, S, E]``, ``value [B or 1, Hk, S, Ev]``; arguments of the HOP.

    Returns the output ``[B, H, L, Ev]``, and in log2 units the logsumexp and the largest score, ``[B, H, L]`` in fp32.
    ``kernel_options`` are about schedules, and are not read. ``programs``: those of ``score_mod``, if it has any.
    """
    with autocast_applied(query, key, value) as (query, key, value):
        key, value = (x.expand(query.shape[0], *x.shape[1:]) for x in (key, value))
        torch._check(
            int(query.shape[1]) % int(key.shape[1]) == 0, lambda: "key heads do not divide query heads"
        )
        scores = grouped_product(query, key.transpose(-2, -1), bmm_wide) * scale
        indices = [torch.arange(size, device=query.device) for size in scores.shape]
        visible = None
        if not _hides_nothing(block_mask[-1]):
            places = [x if read else x[:1] for x, read in zip(indices, _reads(block_mask[-1]), strict=True)]
            visible = _mapped(block_mask[-1], places, mask_mod_other_buffers)
        is_plain = _returns_its_score(score_mod)
        if not is_plain:
            scores = _mapped(score_mod, indices, score_mod_other_buffers, scores).to(scores.dtype)
        modified = scores if visible is None else torch.where(visible, scores, -math.inf)
        largest = modified.detach().amax(-1) * LOG2_E
        if has_kernel(query, key, value) and (is_plain or programs is not None):
            is_causal = _is_causal(block_mask[-1])
            mask = None if is_causal else visible
            tiles = None if mask is None else tiles_of(mask, query, key, value)
            modified_by = () if is_plain or programs is None else (*programs, list(score_mod_other_buffers))
            output, logsumexp = attention(query, key, value, mask, is_causal, scale, tiles, *modified_by)
            return output, logsumexp, largest
        probabilities = torch.ops.aten._safe_softmax.default(modified, -1)
        output = grouped_product(probabilities, value, bmm_rounding)
        return output, modified.logsumexp(-1) * LOG2_E, largest


def _mapped(
    function: Callable[..., Tensor],
    indices: list[Tensor],
    buffers: tuple[Any, ...],
    scores: Tensor | None = None,
) -> Tensor:
    """``function(score?, b, h, i, j, *buffers)`` at every point of the grid of ``indices``: [B, H, L, S]."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    mapped_scores = () if scores is None else (0,)
    for dim in reversed(range(4)):
        in_dims = tuple(0 if dim == other else None for other in range(4))
        function = torch.vmap(function, in_dims=(*mapped_scores, *in_dims, *(None,) * len(buffers)))
    leading = () if scores is None else (scores,)
    with TransformGetItemToIndex():
        return function(*leading, *indices, *buffers)


def _returns_its_score(score_mod: GraphModule) -> bool:
    """True for the identity, which is what no ``score_mod`` is."""
    nodes = score_mod.graph.nodes
    first = next(iter(nodes))
    (result,) = next(node for node in reversed(nodes) if node.op == "output").args
    return (result[0] if isinstance(result, (tuple, list)) else result) is first


def _reads(mask_mod: GraphModule) -> list[bool]:
    """Which of (b, h, i, j) the mask depends on; queries and keys count always."""
    batch, head = [node for node in mask_mod.graph.nodes if node.op == "placeholder"][:2]
    return [bool(batch.users), bool(head.users), True, True]


def _hides_nothing(mask_mod: GraphModule) -> bool:
    """True for a mask of ones, which is what no ``mask_mod`` is."""
    return [n.target for n in mask_mod.graph.nodes if n.op not in ("placeholder", "output")] == ["new_ones"]


def _is_causal(mask_mod: GraphModule) -> bool:
    """True if the mask is written as ``i >= j``, which kernels know without a map; an added 0 is nothing."""
    _, _, query, key, *_ = (node for node in mask_mod.graph.nodes if node.op == "placeholder")
    (result,) = next(node for node in reversed(mask_mod.graph.nodes) if node.op == "output").args
    if not isinstance(result, Node) or len(result.args) != 2:
        return False
    sides = [_without_zero(argument) for argument in result.args]
    return (result.target in (operator.ge, torch.ge) and sides == [query, key]) or (
        result.target in (operator.le, torch.le) and sides == [key, query]
    )


def _without_zero(x: Any) -> Any:
    """What 0 is added to."""
    is_sum = isinstance(x, Node) and x.target is operator.add and type(x.args[1]) is int and x.args[1] == 0
    return _without_zero(x.args[0]) if is_sum else x


def _refusal(node: Node) -> BatchInvarianceError | None:
    """A BlockMask made of block lists alone: stock hides what is in no block, and eager computes its ``mask_mod``."""
    block_mask = node.args[4]
    indices = block_mask[3].meta["example_value"]  # type: ignore[index,union-attr]
    mask_mod = getattr(node.graph.owning_module, str(block_mask[-1].target))  # type: ignore[index,union-attr]
    if not _hides_nothing(mask_mod) or tuple(indices.shape[-2:]) == (1, 1):
        return None
    reason = "this BlockMask hides keys by its block lists, without a mask_mod that says so"
    remedy = "give it a mask_mod, as create_block_mask does: the result then follows positions, not blocks"
    return BatchInvarianceError("flex_attention", reason, remedy, source_line(node))


def _with_programs(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the node, and programs of its ``score_mod``."""
    score_mod = getattr(node.graph.owning_module, str(node.args[3].target))  # type: ignore[union-attr]
    captured = node.args[7] if len(node.args) > 7 else node.kwargs.get("score_mod_other_buffers", ())
    query, *buffers = (_example(x) for x in (node.args[0], *captured))  # type: ignore[misc]
    programs = None
    if not _returns_its_score(score_mod) and isinstance(query, FakeTensor) and query.dtype != torch.float64:
        programs = programs_of(score_mod, query, buffers)
    return node.args, {**node.kwargs, "programs": programs}


def _example(x: Any) -> Any:
    return x.meta.get("example_value", x.meta.get("val")) if isinstance(x, Node) else x


FLEX = Retarget(
    name="flex",
    targets=frozenset({torch.ops.higher_order.flex_attention}),
    replacement=flex_attention,
    refuse=_refusal,
    arguments=_with_programs,
)
