"""Which tiles of queries and keys a boolean mask leaves anything of, so that attention's kernels visit no other.

A tile that is hidden from every query adds nothing to any sum, and one that hides nothing needs no mask to be read:
what is said here saves time and changes no bit. It is read off the mask itself, not off anybody's blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

#: Queries that share a word of the map; keys that share a span.
GRANULE = 16
#: Tiles of keys in a word: its bits.
WORD = 32


def tile_map(visible: Tensor, groups: int, tile: int) -> Tensor:
    """``visible [b, h, L, S]`` (bool; b and h may be 1 for all) -> int32 [b, 1 or ``groups``, granules, 2 * words].

    For each 16 queries and each 32 tiles of ``tile`` keys two words: bit t of the first says that a query, of any head
    of its group, sees a key of tile t, and of the second that one does not see all of them, of those that exist.
    """
    batch, heads, queries, keys = visible.shape
    words = -(-keys // (WORD * tile))
    granules = -(-queries // GRANULE)
    padding = (0, words * WORD * tile - keys, 0, granules * GRANULE - queries)
    group = (1, 1) if heads == 1 else (groups, heads // groups)
    size = (batch, *group, granules, GRANULE, words, WORD, tile)
    # How many pairs of a tile see each other, and how many there are: one pass over the mask.
    counts = F.pad(visible, padding, value=False).reshape(size).sum((2, 4, 7), dtype=torch.int32)
    rows, columns = (
        torch.where(left < size, left, size)
        for left, size in (
            (queries - torch.arange(granules, device=visible.device) * GRANULE, GRANULE),
            (keys - torch.arange(words * WORD, device=visible.device) * tile, tile),
        )
    )
    pairs = (rows[:, None] * columns * group[1]).reshape(granules, words, WORD)
    bits = torch.stack([counts > 0, counts < pairs], -2).long() << torch.arange(WORD, device=visible.device)
    return bits.sum(-1).to(torch.int32).reshape(batch, group[0], granules, 2 * words)


def maps_of(node: Node) -> tuple[Any, ...]:
    """The operands of a call of attention, or of its gradients, that are maps of tiles, and so reach no bit."""
    name = str(node.target)
    if not name.startswith("bi_inductor.attention"):
        return ()
    return node.args[9 if "backward" in name else 6 :]


def query_spans(visible: Tensor, groups: int) -> Tensor:
    """``visible`` as above -> int32 [b, 1 or ``groups``, granules, 4].

    For each 16 keys the first query that sees one of them, of any head of the group, and the one after the last ((L, 0)
    where none does); then, if the queries that see all of them have no other between them, those in the same way.
    """
    batch, heads, queries, keys = visible.shape
    granules = -(-keys // GRANULE)
    group = (1, 1) if heads == 1 else (groups, heads // groups)
    padding = (0, granules * GRANULE - keys)
    size = (batch, *group, queries, granules, GRANULE)
    counts = F.pad(visible, padding, value=False).reshape(size).sum((2, 5), dtype=torch.int32)
    left = keys - torch.arange(granules, device=visible.device) * GRANULE
    places = torch.arange(queries, device=visible.device, dtype=torch.int32)[:, None]
    seen, whole = counts > 0, counts == torch.where(left < GRANULE, left, GRANULE) * group[1]
    (first, last), (start, end) = (
        (torch.where(x, places, queries).amin(-2), torch.where(x, places + 1, 0).amax(-2))
        for x in (seen, whole)
    )
    end = torch.where(whole.sum(-2, dtype=torch.int32) == end - start, end, 0)
    return torch.stack([first, last, start, end], -1).to(torch.int32)
