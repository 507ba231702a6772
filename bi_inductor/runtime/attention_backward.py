"""What emitted kernels of attention's gradients are made of: the ATTENTION GRADIENT form of ``contract.py``.

    t  = (q k^T) * scale * log2(e)      one chain over the head dim, from 0; with a mask of floats (q k^T * scale +
         mask) * log2(e); -inf where a key is hidden
    p  = exp2(t - logsumexp)            dp = g v^T, one chain over the head dim of the values
    ds = p * (dp - delta)               every operation rounded to fp32, none contracted; with a score_mod t is what
         it makes of q k^T * scale, times log2(e), and its derivative at that is applied to ds
    dq = (sum over keys of round(ds) k) * scale                      one chain, keys ascending
    dk = (sum over heads and queries of round(ds) q) * scale         one chain, head after head, queries ascending
    dv = sum over heads and queries of round(p) g                    the same chain

``round``: to the dtype of the inputs; results are rounded once, at the end. A chain adds in the steps of the hardware's
MMA, aligned at key 0 and at the first query of the first head of a group. A row that sees no key has logsumexp -inf and
p 0. A hidden score adds exact zeros, so a tile without a visible one may be visited or not.

Sizes of tiles, warps, stages and how rows are packed into a tile of dq are free.
"""

import triton
import triton.language as tl

from .attention import (
    LANES,
    LOG2_E,
    bits_of,
    everywhere,
    load_rows,
    load_words,
    map_span,
    mask_of,
    next_run,
    run_count,
)


@triton.jit
def load_statistics(logsumexp, delta, exists):
    """(logsumexp, delta) at pointers of any shape; where nothing can be seen +inf, so that p is exp2(-inf) = 0."""
    if exists is None:
        seen = tl.load(logsumexp)
        correction = tl.load(delta)
    else:
        seen = tl.load(logsumexp, mask=exists, other=float("inf"))
        correction = tl.load(delta, mask=exists, other=0.0)
    return tl.where(seen == -float("inf"), float("inf"), seen), correction


@triton.jit
def _visible(given, positions, keys, exists, SCORES: tl.constexpr):
    """Which of the pairs that exist see each other; [M, N] or [N, M] like ``exists``. ``given``: their mask, if any."""
    visible = exists
    if SCORES[0]:
        visible = visible & (keys <= positions)
    if SCORES[1] == 1 or SCORES[1] == 3:
        visible = visible & (given != 0)
    return visible


@triton.jit
def _probabilities(
    t, logsumexp, given, visible, keys, key_count, scored, EDGE: tl.constexpr, SCORES: tl.constexpr
):
    """(p of the products ``t``, what a ``score_mod``'s derivative is given of it); all of one shape, or ``logsumexp``
    broadcast to it."""
    MASK: tl.constexpr = SCORES[1]
    SCALE: tl.constexpr = SCORES[2]
    kept = 0
    if SCORES[7] or MASK == 2:
        if SCALE == 1.0:  # a choice that is none: Triton would start the dot from what is added to it next
            t = tl.where(t == 0.0, 0.0, t)
        t = t * tl.full((), SCALE, tl.float32)
        if SCORES[7]:
            SCORE: tl.constexpr = SCORES[8]
            captured, idx_b, idx_h, positions = scored
            score, kept = SCORE(t, idx_b, idx_h, positions, tl.minimum(keys, key_count - 1), captured)
            t = everywhere(score, t)
        if MASK == 2:
            t = t + given.to(tl.float32)
        t = t * LOG2_E
    else:
        t = t * tl.full((), SCALE * LOG2_E, tl.float32)
    if EDGE:
        t = tl.where(visible, t, -float("inf"))
    return tl.exp2(t - logsumexp), kept


@triton.jit
def _of_product(ds, kept, keys, key_count, scored, SCORES: tl.constexpr):
    """The gradient of the scaled scores from that of what a ``score_mod`` makes of them."""
    if SCORES[7]:
        DERIVATIVE: tl.constexpr = SCORES[9]
        captured, idx_b, idx_h, positions = scored
        result = DERIVATIVE(kept, ds, idx_b, idx_h, positions, tl.minimum(keys, key_count - 1), captured)
        ds = everywhere(result, ds)
    return ds


@triton.jit
def _query_tile(
    acc,
    q,
    g,
    statistics,
    keys_and_values,
    mask_and_rows,
    start,
    key_count,
    is_edge,
    EDGE: tl.constexpr,
    SHAPE: tl.constexpr,
    SCORES: tl.constexpr,
):
    """dq [M, D] after one more tile of keys; EDGE as in ``attention._tile``."""
    logsumexp, delta = statistics
    k_base, stride_kn, stride_kd, v_base, stride_vn, stride_vd = keys_and_values
    mask_base, stride_mn, positions, rows_exist, _, scored = mask_and_rows
    BLOCK_N: tl.constexpr = SHAPE[1]
    D: tl.constexpr = SHAPE[2]
    BLOCK_D: tl.constexpr = SHAPE[3]
    DV: tl.constexpr = SHAPE[4]
    BLOCK_DV: tl.constexpr = SHAPE[5]
    INDEX: tl.constexpr = SHAPE[6]
    PRECISION: tl.constexpr = SCORES[3]
    WIDTH: tl.constexpr = k_base.dtype.element_ty.primitive_bitwidth
    keys = start + tl.arange(0, BLOCK_N)
    column = keys.to(INDEX)[:, None]
    exists = None
    if EDGE:
        exists = (keys < key_count)[:, None]
    k = load_rows(k_base, column, tl.arange(0, BLOCK_D)[None, :], stride_kn, stride_kd, exists, D)
    v = load_rows(v_base, column, tl.arange(0, BLOCK_DV)[None, :], stride_vn, stride_vd, exists, DV)
    row = keys.to(INDEX)[None, :]
    visible = None
    given = None
    if EDGE == 1:
        pairs = (keys < key_count)[None, :] & rows_exist
        if SCORES[1]:
            given = mask_of(mask_base, stride_mn, row, key_count, pairs, 0, SCORES, WIDTH)
        visible = _visible(given, positions, keys[None, :], pairs, SCORES)
    t = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p, kept = _probabilities(t, logsumexp, given, visible, row, key_count, scored, EDGE == 1, SCORES)
    if EDGE == 2:
        if is_edge:
            pairs = (keys < key_count)[None, :] & rows_exist
            given = mask_of(mask_base, stride_mn, row, key_count, pairs, 0, SCORES, WIDTH)
            p = tl.where(_visible(given, positions, keys[None, :], pairs, SCORES), p, 0.0)
    ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta)
    ds = _of_product(ds, kept, row, key_count, scored, SCORES)
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def query_gradients(
    q,
    g,
    statistics,
    keys_and_values,
    mask_and_rows,
    full,
    end,
    key_count,
    SHAPE: tl.constexpr,
    SCORES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dq / scale [M, D] from keys 0 ... end - 1; those before ``full`` are visible to every row.

    With a map of tiles those that are hidden are left out, as in ``attention.one_chunk``.
    """
    BLOCK_N: tl.constexpr = SHAPE[1]
    EDGE_STAGES: tl.constexpr = STAGES[1]
    acc = tl.zeros((q.shape[0], SHAPE[3]), tl.float32)
    if SCORES[1] == 3:
        WORD: tl.constexpr = 32 * BLOCK_N
        tiles = mask_and_rows[4]
        span = map_span(tiles, key_count, BLOCK_N)
        end = tl.minimum(end, span[1])
        words = load_words(tiles, span[0], end, BLOCK_N)
        for word in tl.range(span[0] // WORD, tl.cdiv(end, WORD), num_stages=1):
            low = word * WORD
            next_words = load_words(tiles, low + WORD, end, BLOCK_N)
            seen, holes = bits_of(words, low, end, BLOCK_N)
            for _ in tl.range(0, run_count(seen), num_stages=1):
                place, count, seen = next_run(seen)
                for step in tl.range(0, count, num_stages=STAGES[0]):
                    tile = place + step
                    has_holes = ((holes >> tile) & 1) != 0
                    acc = _query_tile(
                        acc,
                        q,
                        g,
                        statistics,
                        keys_and_values,
                        mask_and_rows,
                        low + tile * BLOCK_N,
                        key_count,
                        has_holes,
                        2,
                        SHAPE,
                        SCORES,
                    )
            words = next_words
    else:
        edge = full * 0
        if SCORES[1] == 0:
            edge = full
            for start in tl.range(0, full, BLOCK_N, num_stages=STAGES[0]):
                acc = _query_tile(
                    acc,
                    q,
                    g,
                    statistics,
                    keys_and_values,
                    mask_and_rows,
                    start,
                    key_count,
                    0,
                    0,
                    SHAPE,
                    SCORES,
                )
        for start in tl.range(edge, end, BLOCK_N, num_stages=EDGE_STAGES):
            acc = _query_tile(
                acc, q, g, statistics, keys_and_values, mask_and_rows, start, key_count, 1, 1, SHAPE, SCORES
            )
    return acc


@triton.jit
def _key_tile(
    state,
    k,
    v,
    queries,
    mask_and_keys,
    head,
    tile,
    sizes,
    EDGE: tl.constexpr,
    SHAPE: tl.constexpr,
    SCORES: tl.constexpr,
):
    """(dk [N, D], dv [N, DV]) after one more tile of the group's rows, computed as [N, M].

    EDGE: the tile may hold rows of several heads, rows that do not exist, and hidden scores; else it is of ``head``.
    """
    dk, dv = state
    q_base, stride_qh, stride_qm, stride_qd = queries[0]
    g_base, stride_gh, stride_gm, stride_gd = queries[1]
    mask_base, mask_strides, keys, keys_exist, key_count, scored = mask_and_keys
    stride_mh, stride_mm, stride_mn = mask_strides
    group, length = sizes
    BLOCK_M: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[2]
    BLOCK_D: tl.constexpr = SHAPE[3]
    DV: tl.constexpr = SHAPE[4]
    BLOCK_DV: tl.constexpr = SHAPE[5]
    INDEX: tl.constexpr = SHAPE[6]
    PRECISION: tl.constexpr = SCORES[3]
    WIDTH: tl.constexpr = q_base.dtype.element_ty.primitive_bitwidth
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = None
    column_exists = None
    if EDGE:
        exists = rows < group * length
        column_exists = exists[:, None]
        heads = (rows // length).to(INDEX)
        positions = (rows % length).to(INDEX)
    else:
        heads = tl.cast(head, INDEX) + tl.zeros((BLOCK_M,), INDEX)
        positions = (rows - head * length).to(INDEX)
    q_rows = q_base + heads[:, None] * stride_qh
    g_rows = g_base + heads[:, None] * stride_gh
    position = positions[:, None]
    q = load_rows(q_rows, position, tl.arange(0, BLOCK_D)[None, :], stride_qm, stride_qd, column_exists, D)
    g = load_rows(g_rows, position, tl.arange(0, BLOCK_DV)[None, :], stride_gm, stride_gd, column_exists, DV)
    logsumexp, delta = load_statistics(queries[2] + rows, queries[3] + rows, exists)
    visible = None
    given = None
    if EDGE:
        pairs = (rows < group * length)[None, :] & keys_exist
        if SCORES[1]:
            if SCORES[5]:
                captured, idx_b, first_head = mask_base
                head_of = first_head + tl.minimum(heads, tl.cast(group, INDEX) - 1)[None, :]
                at = (captured, idx_b, head_of, positions[None, :])
            else:
                at = mask_base + (heads[None, :] * stride_mh + positions[None, :] * stride_mm)
            given = mask_of(at, stride_mn, keys, key_count, pairs, 0, SCORES, WIDTH)
        visible = _visible(given, positions[None, :], keys, pairs, SCORES)
    if SCORES[7]:
        captured, idx_b, first_head = scored
        head_of = first_head + tl.minimum(heads, tl.cast(group, INDEX) - 1)[None, :]
        scored = (captured, idx_b, head_of, positions[None, :])
    t = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p, kept = _probabilities(t, logsumexp[None, :], given, visible, keys, key_count, scored, EDGE, SCORES)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :])
    ds = _of_product(ds, kept, keys, key_count, scored, SCORES)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def span_of(base, stride_tile, stride_end, first_key, keys, SPAN: tl.constexpr, BLOCK_N: tl.constexpr):
    """Four queries: of ``attention_tiles.query_spans``, for tiles of SPAN keys, what holds for all BLOCK_N keys."""
    lanes = tl.arange(0, LANES)
    tiles = first_key // SPAN + lanes
    exists = (lanes * SPAN < BLOCK_N) & (tiles * SPAN < keys)
    at = base + tiles * stride_tile
    first = tl.load(at, mask=exists, other=2147483647)
    last = tl.load(at + stride_end, mask=exists, other=0)
    whole = tl.load(at + 2 * stride_end, mask=exists, other=0)
    until = tl.load(at + 3 * stride_end, mask=exists, other=2147483647)
    # Keys that do not exist are seen by nobody.
    until = tl.where(first_key + BLOCK_N <= keys, tl.min(until, 0), 0)
    return tl.min(first, 0), tl.max(last, 0), tl.max(whole, 0), until


@triton.jit
def key_gradients(
    k,
    v,
    queries,
    mask_and_keys,
    span,
    first_key,
    group,
    length,
    SHAPE: tl.constexpr,
    SCORES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(dk / scale [N, D], dv [N, DV]) of keys ``first_key`` ..., from ``group`` heads of ``length`` queries each.

    The rows of a group, head after head, are cut into tiles of BLOCK_M. For each head come the tiles that only some of
    its pairs need (under a causal mask those around the diagonal), then those inside the head that need no mask. The
    tile that a head shares with the next one stands at the beginning of the next one's. Tiles ascend, each comes once.
    ``span``: with a map (MASK = 3) no query of a head before the first sees one of the keys, nor one from the second,
    and from the third up to the fourth each sees all of them.
    """
    BLOCK_M: tl.constexpr = SHAPE[0]
    EDGE_STAGES: tl.constexpr = STAGES[1]
    dk = tl.zeros((SHAPE[1], SHAPE[3]), tl.float32)
    dv = tl.zeros((SHAPE[1], SHAPE[5]), tl.float32)
    group = tl.cast(group, tl.int32)
    length = tl.cast(length, tl.int32)
    first_key = tl.cast(first_key, tl.int32)
    sizes = (group, length)
    tiles = tl.cdiv(group * length, BLOCK_M)
    # Queries of a head before the first that sees one of the keys; before the first of those that see all of them.
    none = length * 0
    some = none
    # The last of those that see all of them, and of those that see one.
    all_until = length
    until = length
    heads = group + 1
    if SCORES[1] == 3:
        none = tl.minimum(span[0], length)
        until = tl.minimum(span[1], length)
        some = tl.minimum(span[2], length)
        all_until = tl.minimum(span[3], length)
    if SCORES[0]:
        none = tl.minimum(first_key, length)
        some = tl.minimum(first_key + (SHAPE[1] - 1), length)
        heads = tl.where(none == length, 0, heads)
    done = none * 0
    shared = none * 0
    for head in tl.range(0, heads, num_stages=1):
        start = head * length
        first = tl.minimum(tl.maximum((start + none) // BLOCK_M, done), tiles)
        last = tl.maximum(tl.minimum(tl.cdiv(start + until, BLOCK_M), tiles), first)
        full = last
        inside = last
        if SCORES[1] == 0 or SCORES[1] == 3:
            full = tl.minimum(tl.maximum(tl.cdiv(start + some, BLOCK_M), first), last)
            inside = tl.maximum(tl.minimum(start + all_until, group * length) // BLOCK_M, full)
        extra = tl.where(first > done, shared, none * 0)
        for step in tl.range(0, full - first + extra, num_stages=EDGE_STAGES):
            tile = tl.where(step < extra, done, first + step - extra)
            dk, dv = _key_tile((dk, dv), k, v, queries, mask_and_keys, head, tile, sizes, True, SHAPE, SCORES)
        if SCORES[1] == 0 or SCORES[1] == 3:
            for tile in tl.range(full, inside, num_stages=STAGES[0]):
                dk, dv = _key_tile(
                    (dk, dv), k, v, queries, mask_and_keys, head, tile, sizes, False, SHAPE, SCORES
                )
        if SCORES[1] == 3:
            for tile in tl.range(inside, last, num_stages=EDGE_STAGES):
                dk, dv = _key_tile(
                    (dk, dv), k, v, queries, mask_and_keys, head, tile, sizes, True, SHAPE, SCORES
                )
            inside = tl.maximum(inside, last)
        done = inside
        shared = tl.where(last > inside, none * 0 + 1, none * 0)
    return dk, dv


@triton.jit
def finish(acc):
    """The end of a chain: a sum that underflowed to -0.0 is 0.0, as that of a product (``chain_source.py``)."""
    return tl.where(acc == 0.0, 0.0, acc)
