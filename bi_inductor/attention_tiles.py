"""Which tiles of queries and keys a boolean mask leaves anything of, so that attention's kernels visit no other.

A tile that is hidden from every query adds nothing to any sum, and one that hides nothing needs no mask to be read:
what is said here saves time and changes no bit. It is read off the mask itself, not off anybody's blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from .ops import _LIBRARY

#: Queries that share a word of the map; keys that share a span.
GRANULE = 16
#: Tiles of keys in a word: its bits.
WORD = 32


_LIBRARY.define("attention_map(Tensor visible, int groups, int tile) -> Tensor")
attention_map = torch.ops.bi_inductor.attention_map.default
"""``attention_map(visible [b, h, L, S], groups, tile)``, b and h of a mask of bools may be 1 for all ->
int32 [b, 1 or ``groups``, granules, 2 * words + 2].

For each 16 queries and each 32 tiles of ``tile`` keys two words: bit t of the first says that a query, of any head of
its group, sees a key of tile t, and of the second that one does not see ``tile`` keys there. Then the first tile of
which something is seen and the one after the last ((32 * words, 0) if there is none). A kernel that goes by the bounds
of a mask (``templates/bounds.py``) may say so of more tiles, never of fewer.
"""


def map_size(
    visible: Any, groups: int, tile: int, rounded_up: Callable[[Any, int], Any] = lambda a, b: -(-a // b)
) -> list[Any]:
    """The sizes of the map of a mask of sizes ``visible``; ``rounded_up(a, b)``: a / b."""
    batch, heads, queries, keys = visible
    group_count = 1 if heads == 1 else groups
    return [batch, group_count, rounded_up(queries, GRANULE), rounded_up(keys, WORD * tile) * 2 + 2]


@torch.library.impl(_LIBRARY, "attention_map", "CompositeExplicitAutograd")
def _map_eager(visible: Tensor, groups: int, tile: int) -> Tensor:
    """Reference: the same in plain torch."""
    batch, heads, queries, keys = visible.shape
    *_, granules, width = shape = map_size(visible.shape, groups, tile)
    words = (width - 2) // 2
    padding = (0, words * WORD * tile - keys, 0, granules * GRANULE - queries)
    size = (batch, shape[1], heads // shape[1], granules, GRANULE, words * WORD, tile)
    counts = F.pad(visible, padding, value=False).reshape(size).sum((2, 4, 6), dtype=torch.int32)
    places = torch.arange(words * WORD, device=visible.device)
    rows = (queries - torch.arange(granules, device=visible.device)[:, None] * GRANULE).clamp(max=GRANULE)
    seen, holes = counts > 0, counts < rows * tile * (heads // shape[1])
    bits = torch.stack([seen, holes], -2).unflatten(-1, (words, WORD)).long() << places[:WORD]
    first = torch.where(seen, places, words * WORD).amin(-1, keepdim=True)
    last = torch.where(seen, places + 1, 0).amax(-1, keepdim=True)
    return torch.cat([bits.sum(-1).transpose(-1, -2).flatten(-2), first, last], -1).to(torch.int32)


@torch.library.register_fake("bi_inductor::attention_map", lib=_LIBRARY)
def _map_fake(visible: Tensor, groups: int, tile: int) -> Tensor:
    return visible.new_empty(map_size(visible.shape, groups, tile), dtype=torch.int32)


@torch.library.register_vmap("bi_inductor::attention_map", lib=_LIBRARY)
def _map_vmap(
    info: Any, in_dims: tuple[int | None, ...], visible: Tensor, *options: int
) -> tuple[Tensor, int]:
    """The mapped dim becomes part of the batch."""
    flat = visible.movedim(in_dims[0], 0).flatten(0, 1)  # type: ignore[arg-type]
    return attention_map(flat, *options).unflatten(0, (info.batch_size, -1)), 0


def maps_of(node: Node) -> tuple[Any, ...]:
    """The operands of a call of attention, or of its gradients, that are maps of tiles, and so reach no bit."""
    first, count = _MAPS.get(str(node.target), (None, 0))
    return () if first is None else node.args[first : first + count]


#: Op -> (position of its first map, how many it takes).
_MAPS = {"bi_inductor.attention.default": (6, 1), "bi_inductor.attention_backward.default": (9, 2)}


def query_spans(tiles: Tensor, queries: int) -> Tensor:
    """``tiles``, a map of ``queries`` -> int32 [b, 1 or ``groups``, 32 * words, 4].

    For each tile of keys the first query that may see one of them, of any head of the group, and the one after the last
    ((L, 0) where none does); then, if the queries that see all of them have no other between them, those in the same
    way. All are multiples of GRANULE, or L.
    """
    bits = torch.arange(WORD, dtype=torch.int32, device=tiles.device)
    words = tiles[..., :-2].unflatten(-1, (-1, 2)).unsqueeze(-1)
    seen, holes = (((words[..., kind, :] >> bits) & 1 != 0).flatten(-2) for kind in range(2))
    places = torch.arange(seen.shape[-2], dtype=torch.int32, device=tiles.device)[:, None]
    whole, none = seen & ~holes, int(seen.shape[-2])
    (first, last), (start, end) = (
        (torch.where(x, places, none).amin(-2), torch.where(x, places + 1, 0).amax(-2)) for x in (seen, whole)
    )
    end = torch.where(whole.sum(-2, dtype=torch.int32) == end - start, end, 0)
    return (torch.stack([first, last, start, end], -1) * GRANULE).clamp(max=queries).to(torch.int32)
