"""``torch.nn.attention.varlen``: packed sequences, each of them attention as in ``attention.py``.

    o[t] = attention of query t - first_q(n) over keys 0 ... length_k(n) - 1 of its own sequence n

Sequences are laid side by side in rows as long as the longest, [N, heads, max, D], and what is past a sequence's end is
hidden. A query's keys stand at the positions they have in their sequence, not in the pack, so its bits are those of
``scaled_dot_product_attention`` on that sequence alone: whatever is packed beside it, in which order, and however far
the rows are padded; from pages of a cache as from keys side by side. Stock calls flash attention, which splits keys by
the longest sequence of the pack unless ``num_splits=1``; ``num_splits`` is about schedules and is not read here.

Rows move by indices: a gradient moves back by the inverse map, so nothing is added where a sequence is laid out.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.attention import varlen as _stock_ops  # noqa: F401  (registers the ops that are replaced)

from bi_inductor.attention_op import attention
from bi_inductor.ops import composite, moved_rows
from bi_inductor.passes.attention import attend, has_kernel, tiles_of
from bi_inductor.passes.retarget import Retarget

_PARAMETERS = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor? cu_seq_k, SymInt max_q, SymInt max_k, "
    "bool is_causal=False, float? scale=None, SymInt[]? window_size=None, bool enable_gqa=False, "
    "Tensor? seqused_k=None, Tensor? block_table=None, SymInt? num_splits=None, bool one_length=False"
)


@composite(f"varlen_attention({_PARAMETERS}) -> (Tensor, Tensor, Tensor)")
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    one_length: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``query [T, H, D]``, ``key [Tk, Hk, D]`` or pages ``[P, page, Hk, D]``, ``cu_seq [N + 1]`` -> ``[T, H, Dv]``,
    logsumexp ``[H, T]`` in fp32 and nats, and the state of a random number generator that nothing draws from.

    Arguments of ``torch.nn.attention.varlen``'s own op, and ``one_length``: queries and keys have the same lengths.
    """
    queries = _layout(cu_seq_q, max_q, query.shape[0])
    rows = queries.laid_out(query)
    if block_table is None:
        assert cu_seq_k is not None, "only pages have no places in a pack"
        keys = queries if one_length else _layout(cu_seq_k, max_k, key.shape[0])
        laid, lengths = [keys.laid_out(x) for x in (key, value)], keys.lengths
    else:
        assert seqused_k is not None, "pages are filled up to seqused_k"
        laid, lengths = [_from_pages(x, block_table, max_k) for x in (key, value)], seqused_k
    if seqused_k is not None:  # a cache is not initialised past it, and zero times NaN would be met
        lengths = seqused_k
        used = torch.arange(max_k, device=key.device) < lengths[:, None]
        laid = [torch.where(used[:, None, :, None], x, 0) for x in laid]
    left, right = window_size or (-1, -1)
    right = 0 if is_causal else right
    causal_alone = one_length and right == 0 and left < 0 and seqused_k is None
    visible = None if causal_alone else _visible(queries.lengths, lengths, max_q, max_k, left, right)
    output, logsumexp = _attend(rows, laid[0], laid[1], visible, causal_alone, scale)
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return queries.packed(output), queries.packed(logsumexp.unsqueeze(-1)).squeeze(-1).t(), state


@composite(f"varlen_attention_out(Tensor(a!) out, {_PARAMETERS}) -> Tensor")
def varlen_attention_out(out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The same into ``out``; returns the logsumexp."""
    output, logsumexp, _ = varlen_attention(*args, **kwargs)
    out.copy_(output)
    return logsumexp


def _attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """[N, H, L, Dv], and the logsumexp [N, H, L] in nats: -inf where no key is visible."""
    scale = 1.0 / math.sqrt(int(query.shape[-1])) if scale is None else scale
    if has_kernel(query, key, value):
        tiles = None
        if visible is not None:
            visible = visible.expand(-1, -1, query.shape[2], -1)
            tiles = tiles_of(visible, query, key, value)
        output, logsumexp = attention(query, key, value, visible, is_causal, scale, tiles)
        return output, logsumexp * math.log(2)
    totals: list[Tensor] = []

    def softmax(scores: Tensor, dim: int) -> Tensor:
        totals.append(scores.logsumexp(dim))
        return torch.ops.aten._safe_softmax.default(scores, dim)

    output, _ = attend(query, key, value, visible, is_causal, scale, True, softmax)
    return output, totals[0].float()


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where rows of a pack [T, ...] are in [N, longest, ...], and the way back. ``lengths`` [N]."""

    lengths: Tensor
    longest: int
    index: Tensor
    exists: Tensor
    inverse: Tensor
    has_place: Tensor

    def laid_out(self, x: Tensor) -> Tensor:
        """[T, heads, D] -> [N, heads, longest, D]."""
        rows = moved_rows(x, self.index, self.exists, self.inverse, self.has_place)
        return rows.unflatten(0, (-1, self.longest)).transpose(1, 2)

    def packed(self, x: Tensor) -> Tensor:
        """[N, heads, longest, D] -> [T, heads, D], zeros in rows of no sequence."""
        rows = x.transpose(1, 2).flatten(0, 1)
        return moved_rows(rows, self.inverse, self.has_place, self.index, self.exists)


def _layout(borders: Tensor, longest: int, total: int) -> _Layout:
    """Of sequences that begin and end at ``borders`` [N + 1] in a pack of ``total`` rows."""
    borders = borders.long()
    starts, lengths = borders[:-1], borders.diff()
    places = torch.arange(longest, device=borders.device)
    rows = torch.arange(total, device=borders.device)
    sequence = torch.searchsorted(borders, rows, right=True) - 1
    is_in_one = (sequence >= 0) & (sequence < len(starts))
    sequence = sequence.clamp(0, len(starts) - 1)
    place = rows - starts[sequence]
    return _Layout(
        lengths,
        longest,
        index=(starts[:, None] + places).flatten(),
        exists=(places < lengths[:, None]).flatten(),
        inverse=sequence * longest + place,
        has_place=is_in_one & (place < longest),
    )


def _from_pages(pages: Tensor, block_table: Tensor, longest: int) -> Tensor:
    """``pages [P, page, heads, D]``, ``block_table [N, most]`` -> [N, heads, longest, D]; past the table zeros."""
    places = torch.arange(longest, device=pages.device)
    number, place = places // pages.shape[1], places % pages.shape[1]
    exists = number < block_table.shape[1]
    page = block_table[:, number.clamp(max=block_table.shape[1] - 1)].long()
    rows = pages[page.clamp(0, pages.shape[0] - 1), place]
    return torch.where(exists[:, None, None], rows, 0).transpose(1, 2)


def _visible(
    query_lengths: Tensor, key_lengths: Tensor, max_q: int, max_k: int, left: int, right: int
) -> Tensor:
    """[N, 1, max_q, max_k]: keys that exist, at most ``left`` before and ``right`` after a query (-1: any number).

    The last query of a sequence stands at its last key.
    """
    keys = torch.arange(max_k, device=key_lengths.device)
    visible = (keys < key_lengths[:, None])[:, None]
    places = torch.arange(max_q, device=key_lengths.device) + (key_lengths - query_lengths)[:, None]
    if left >= 0:
        visible = visible & (keys >= places[:, :, None] - left)
    if right >= 0:
        visible = visible & (keys <= places[:, :, None] + right)
    return visible.unsqueeze(1)


def _arguments(first: int) -> Any:
    """The call's own, and whether the lengths of queries and keys are one tensor; ``first``: position of the query."""

    def arguments(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = dict(zip(("cu_seq_q", "cu_seq_k", "max_q", "max_k"), node.args[first + 3 :], strict=False))
        values |= node.kwargs
        same = values["cu_seq_q"] is values["cu_seq_k"] and values["max_q"] == values["max_k"]
        return node.args, {**node.kwargs, "one_length": same}

    return arguments


def _targets(name: str) -> frozenset[Any]:
    packet = getattr(torch.ops.torch_attn, name, None)
    return frozenset() if packet is None else frozenset({packet, packet.default})


VARLEN = (
    Retarget(
        name="varlen",
        targets=_targets("_varlen_attn"),
        replacement=varlen_attention,
        arguments=_arguments(0),
    ),
    Retarget(
        name="varlen out",
        targets=_targets("_varlen_attn_out"),
        replacement=varlen_attention_out,
        arguments=_arguments(1),
    ),
)
