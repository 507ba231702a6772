"""What emitted kernels of the map of a mask's tiles (``attention_tiles.py``) are made of. No bit of a result is theirs.

A word has 32 tiles of BLOCK_N keys, a row of the map GRANULE queries. Whether a query sees a key is asked of all pairs
(``pairwise_row``), or of tiles where the mask is made of comparisons of integers (``bounded_rows``): of what depends on
queries alone, or on keys alone, the lowest and the highest value of a granule, or of a tile, are enough.
"""

import triton
import triton.language as tl

from .attention import either, mask_of


@triton.jit
def lowest_of_rows(x):
    """[R, GRANULE] -> [R, 1]; bools are 0 and 1."""
    return tl.min(x.to(tl.int32) if x.dtype == tl.int1 else x, 1)[:, None]


@triton.jit
def highest_of_rows(x):
    """As ``lowest_of_rows``."""
    return tl.max(x.to(tl.int32) if x.dtype == tl.int1 else x, 1)[:, None]


@triton.jit
def lowest_of_keys(x):
    """[T, BLOCK_N] -> [1, T]; bools are 0 and 1."""
    return tl.min(x.to(tl.int32) if x.dtype == tl.int1 else x, 1)[None, :]


@triton.jit
def highest_of_keys(x):
    """As ``lowest_of_keys``."""
    return tl.max(x.to(tl.int32) if x.dtype == tl.int1 else x, 1)[None, :]


@triton.jit
def pairwise_row(
    row,
    captured,
    idx_b,
    first_head,
    first_query,
    queries,
    key_count,
    SCORES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GRANULE: tl.constexpr,
):
    """Writes the map's row (``attention_tiles.py``) of GRANULE queries of HEADS heads; returns its last tile + 1."""
    positions = first_query + tl.arange(0, GRANULE)[:, None]
    rows_exist = positions < queries
    positions = tl.minimum(positions, queries - 1)
    word_count = tl.cdiv(tl.cast(key_count, tl.int32), 32 * BLOCK_N)
    none = word_count * 32
    first = none
    last = none * 0
    for word in tl.range(0, word_count, num_stages=1):
        seen = none * 0
        holes = none * 0
        for place in tl.range(0, 32, 8, num_stages=1):
            columns = (word * 32 + place) * BLOCK_N + tl.arange(0, 8 * BLOCK_N)[None, :]
            exists = (columns < key_count) & rows_exist
            pairs = tl.zeros((GRANULE, 8 * BLOCK_N), tl.int32)
            for head in tl.range(0, HEADS, num_stages=1):
                at = (captured, idx_b, first_head + head, positions)
                given = mask_of(at, 0, columns, key_count, exists, 0, SCORES, 0)
                pairs = pairs | tl.where(given != 0, 1, 2)
            pairs = tl.where(columns < key_count, tl.where(rows_exist, pairs, 0), 2)
            pairs = tl.reduce(tl.reshape(tl.reduce(pairs, 0, either), [8, BLOCK_N]), 1, either)
            bits = place + tl.arange(0, 8)
            seen = seen | tl.reduce((pairs & 1) << bits, 0, either)
            holes = holes | tl.reduce((pairs >> 1) << bits, 0, either)
            tiles = word * 32 + bits
            first = tl.minimum(first, tl.min(tl.where((pairs & 1) != 0, tiles, none), 0))
            last = tl.maximum(last, tl.max(tl.where((pairs & 1) != 0, tiles + 1, 0), 0))
        tl.store(row + 2 * word, seen)
        tl.store(row + 2 * word + 1, holes)
    spans = row + 2 * word_count
    tl.store(spans, first)
    tl.store(spans + 1, last)
    return last


@triton.jit
def packed(bits):
    """Bools [R, 128] as words [R, 4]."""
    ones = tl.where(bits, 1, 0) << (tl.arange(0, 128) % 32)[None, :]
    return tl.reduce(tl.reshape(ones, [bits.shape[0], 4, 32]), 2, either)


@triton.jit
def bounded_rows(
    tiles,
    captured,
    idx_b,
    first_head,
    first_granule,
    granule_count,
    queries,
    key_count,
    FUNCTION: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GRANULE: tl.constexpr,
    HEIGHT: tl.constexpr,
):
    """Writes HEIGHT rows of the map at ``tiles``, of HEADS heads; returns the last tile + 1 of each, [HEIGHT].

    FUNCTION (idx_b, idx_h, queries [HEIGHT, GRANULE], keys [T, BLOCK_N], captured) -> whether all queries of a granule
    are sure to see all keys of a tile, and whether one may see one: two [HEIGHT, T]. T: the tiles of four words.
    """
    granules = first_granule + tl.arange(0, HEIGHT)
    exist = granules < granule_count
    positions = tl.minimum(granules[:, None] * GRANULE + tl.arange(0, GRANULE)[None, :], queries - 1)
    word_count = tl.cdiv(tl.cast(key_count, tl.int32), 32 * BLOCK_N)
    places = tl.arange(0, 128)
    rows = tiles + granules * (2 * word_count + 2)
    first = tl.full((HEIGHT, 128), 0, tl.int32) + word_count * 32
    last = tl.zeros((HEIGHT, 128), tl.int32)
    for word in tl.range(0, word_count, 4, num_stages=1):
        numbers = word * 32 + places
        keys = numbers[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        keys = tl.minimum(keys, key_count - 1)
        is_whole = ((numbers + 1) * BLOCK_N <= key_count)[None, :] & exist[:, None]
        is_seen = tl.zeros((HEIGHT, 128), tl.int1)
        for head in tl.range(0, HEADS, num_stages=1):
            every, some = FUNCTION(idx_b, first_head + head, positions, keys, captured)
            is_whole = is_whole & every
            is_seen = is_seen | some
        is_seen = is_seen & (numbers * BLOCK_N < key_count)[None, :]
        words = word + tl.arange(0, 4)[None, :]
        at = rows[:, None] + 2 * words
        inside = exist[:, None] & (words < word_count)
        tl.store(at, packed(is_seen), mask=inside)
        tl.store(at + 1, packed(is_whole == 0), mask=inside)
        first = tl.minimum(first, tl.where(is_seen, numbers[None, :], word_count * 32))
        last = tl.maximum(last, tl.where(is_seen, numbers[None, :] + 1, 0))
    first = tl.min(first, 1)
    last = tl.max(last, 1)
    tl.store(rows + 2 * word_count, first, mask=exist)
    tl.store(rows + 2 * word_count + 1, last, mask=exist)
    return last
