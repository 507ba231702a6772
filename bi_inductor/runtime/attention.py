"""What emitted attention kernels are made of: the ATTENTION form of ``contract.py``, for one tile of query rows.

    o[c] = round(acc[c] * (1 / sums))    after the chunks of keys 0, 1, 2, ... have been joined from left to right

Within a chunk tiles of BLOCK_N keys are visited in ascending order. With scores t in log2 units a row's state is

    m     the running maximum of t, tile by tile
    sums  [4] of p_j = exp2(t_j - m): in a tile keys 8 g + 2 i and 8 g + 2 i + 1 are added first, then the tree of
          adjacent pairs over g, and the result to sums[i]; at the end of a chunk (sums0 + sums1) + (sums2 + sums3)
    acc   [DV] sum of round(p_j) * v_j: one chain, j ascending in the steps of the hardware's MMA

    joining two chunks:  a = exp2(m - max), b = exp2(m' - max), sums = sums a + sums' b, acc = acc a + acc' b

The maximum depends on which keys share a tile, and the tile is the form's. A tile or chunk without a visible key
multiplies by exp2(0) and adds 0: it changes nothing, so it may be visited or not. The p of a row's highest score is 1,
which no rounding changes: a row that sees one key returns its value. (With the maximum rounded up, so that all scaling
is by powers of two, that p was off by up to half a bf16 ulp: 7 to 13 % of the elements of first tokens' outputs were
another value's, and what cancels in the gradients of their queries was left over at bf16's precision. Adding up the
rounded p instead took 2 to 40 % longer: attention_row_sum.csv.) A thread of an MMA's accumulator holds columns 8 g + 2
i and 8 g + 2 i + 1 of a row for one i: no row sum crosses threads inside the loop. (H100, bf16, 8192 causal, D = 128,
TFLOP/s without chunks: this sum 495, ``tl.sum`` 491, adjacent pairs 436, ``p @ ones`` 371.) Chunks exist for decoding,
where they run side by side. The state of the chunks before is kept in registers while the next one is computed:
parking it in memory was slower at every size (435 and 387 at 1024 keys).

A head dim is one chain; where a power of two does not hold it well, it is loaded in two pieces (576 = 512 + 64).
Rows, warps, how rows are packed into a tile, and whether one program or several compute the chunks are free.
"""

import triton
import triton.language as tl

#: The running maximum of no key: finite, so that a hidden score (-inf) minus it is -inf and not NaN.
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
#: Threads of a warp. What all of them reduce by one instruction (REDUX) the compiler knows to be the same in each: it
#: keeps loops up to it in uniform registers. Granules of a map are loaded so many at a time, though few are wanted.
LANES: tl.constexpr = tl.constexpr(32)


@triton.jit
def _tree_of_groups(x):
    """[M, n, 4] -> [M, 4]: the tree of adjacent pairs over the middle axis."""
    if x.shape[1] > 2:
        result = _tree_of_groups(tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2, 4]), 2))
    else:
        result = tl.sum(x, 1)
    return result


@triton.jit
def lane_sums(p):
    """[M, N] -> [M, 4]: p[8 g + 2 i] + p[8 g + 2 i + 1], then the tree over g."""
    return _tree_of_groups(tl.sum(tl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2]), 3))


@triton.jit
def total(sums):
    """[M, 4] -> [M]: (l0 + l1) + (l2 + l3)."""
    return tl.sum(tl.sum(tl.reshape(sums, [sums.shape[0], 2, 2]), 2), 1)


@triton.jit
def join(m, sums, acc, next_m, next_sums, next_acc):
    """The state (m [M], sums [M], acc [M, DV]) of the chunks so far joined with that of the next one."""
    highest = tl.maximum(m, next_m)
    old, new = tl.exp2(m - highest), tl.exp2(next_m - highest)
    sums = tl.fma(sums, old, next_sums * new)
    acc = tl.fma(acc, tl.expand_dims(old, 1), next_acc * tl.expand_dims(new, 1))
    return highest, sums, acc


@triton.jit
def chunk_start(chunk, NEAR_CHUNK: tl.constexpr, NEAR_CHUNKS: tl.constexpr, FAR_CHUNK: tl.constexpr):
    """The first key of a chunk: NEAR_CHUNKS chunks of NEAR_CHUNK keys, then chunks of FAR_CHUNK keys."""
    return tl.minimum(chunk, NEAR_CHUNKS) * NEAR_CHUNK + tl.maximum(chunk - NEAR_CHUNKS, 0) * FAR_CHUNK


@triton.jit
def chunk_count(keys, NEAR_CHUNK: tl.constexpr, NEAR_CHUNKS: tl.constexpr, FAR_CHUNK: tl.constexpr):
    """How many chunks ``keys`` keys have."""
    near = tl.cdiv(tl.minimum(keys, NEAR_CHUNK * NEAR_CHUNKS), NEAR_CHUNK)
    return near + tl.cdiv(tl.maximum(keys - NEAR_CHUNK * NEAR_CHUNKS, 0), FAR_CHUNK)


@triton.jit
def chunk_of(key, NEAR_CHUNK: tl.constexpr, NEAR_CHUNKS: tl.constexpr, FAR_CHUNK: tl.constexpr):
    """The chunk that has ``key``."""
    far = tl.maximum(key - NEAR_CHUNK * NEAR_CHUNKS, 0)
    return tl.minimum(key // NEAR_CHUNK, NEAR_CHUNKS) + far // FAR_CHUNK


@triton.jit
def load_rows(base, rows, columns, stride_row, stride_column, row_mask, LENGTH: tl.constexpr):
    """base[rows, columns] with zeros where ``row_mask`` is false or a column is past LENGTH.

    ``rows`` and ``columns`` are [M, 1] and [1, N] or the other way round; ``row_mask`` is like ``rows`` or None.
    """
    pointers = base + (rows * stride_row + columns * stride_column)
    WIDTH: tl.constexpr = columns.numel
    if WIDTH <= LENGTH:
        if row_mask is None:
            values = tl.load(pointers)
        else:
            values = tl.load(pointers, mask=row_mask, other=0.0)
    else:
        inside = columns < LENGTH
        if row_mask is not None:
            inside = inside & row_mask
        values = tl.load(pointers, mask=inside, other=0.0)
    return values


@triton.jit
def load_query(base, rows, stride_row, stride_column, row_mask, SHAPE: tl.constexpr):
    """Rows [M, BLOCK_D] of queries, and what is left of them [M, BLOCK_REST] where a head has two pieces."""
    D: tl.constexpr = SHAPE[1]
    BLOCK_D: tl.constexpr = SHAPE[2]
    BLOCK_REST: tl.constexpr = SHAPE[6]
    q = load_rows(base, rows, tl.arange(0, BLOCK_D)[None, :], stride_row, stride_column, row_mask, D)
    if BLOCK_REST:
        rest = base + BLOCK_D * stride_column
        columns = tl.arange(0, BLOCK_REST)[None, :]
        pieces = (q, load_rows(rest, rows, columns, stride_row, stride_column, row_mask, D - BLOCK_D))
    else:
        pieces = (q, q)
    return pieces


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def load_mask(pointers, exists, other, WIDTH: tl.constexpr):
    """The mask at [M, N] ``pointers``; ``other`` where nothing exists. WIDTH: bits of an element of the values.

    A mask of narrower elements goes through a maximum over one element, which changes no value but ends Triton's
    search for the narrowest load behind an operand of a dot. It would otherwise let a thread hold as many neighbouring
    keys of round(p) as fill a register as bytes, and the first step of an ``mma.sync`` of bf16 would add keys 0, 1, 4,
    5, ..., 28, 29, where ``wgmma``, and every step without a mask, adds keys 0 ... 15: other bits.
    """
    if pointers.dtype.element_ty.primitive_bitwidth < WIDTH:
        one = tl.load(tl.expand_dims(pointers, 2), mask=tl.expand_dims(exists, 2), other=other)
        values = tl.reduce(one, 2, _larger)
    else:
        values = tl.load(pointers, mask=exists, other=other)
    return values


@triton.jit
def mask_of(mask_base, stride_mn, keys, key_count, exists, other, SCORES: tl.constexpr, WIDTH: tl.constexpr):
    """The mask of a program's rows and ``keys`` [1, N]: [M, N], read, or computed by a function of the kernel's file.

    A computed one that read narrower elements than the values' goes through a maximum over one as well (``load_mask``).
    """
    if SCORES[5]:
        captured, idx_b, idx_h, positions = mask_base
        FUNCTION: tl.constexpr = SCORES[6]
        values = FUNCTION(idx_b, idx_h, positions, tl.minimum(keys, key_count - 1), captured)
        values = everywhere(values, exists)
        if SCORES[4]:
            values = through_reduction(values)
    else:
        values = load_mask(mask_base + keys * stride_mn, exists, other, WIDTH)
    return values


@triton.jit
def everywhere(values, x):
    """What a function of the kernel's file returned, in the shape [M, N] of ``x``; constants are [1]."""
    if len(values.shape) == 1:
        values = tl.expand_dims(values, 0)
    return tl.broadcast_to(values, x.shape)


@triton.jit
def modified(t, keys, key_count, scored, FUNCTION: tl.constexpr):
    """The scores ``t`` [M, N] of ``keys`` [1, N] after a ``score_mod``, a function of the kernel's file."""
    captured, idx_b, idx_h, positions = scored
    result = FUNCTION(t, idx_b, idx_h, positions, tl.minimum(keys, key_count - 1), captured)
    return everywhere(result, t)


@triton.jit
def through_reduction(values):
    """The same values, bools as bytes."""
    if values.dtype == tl.int1:
        values = values.to(tl.int8)
    return tl.reduce(tl.expand_dims(values, 2), 2, _larger)


@triton.jit
def lowest_one(word):
    """The place of the lowest bit that is 1 in an int64 ``word``, which is not 0."""
    return (((word & -word).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def map_span(tiles, key_count, BLOCK_N: tl.constexpr):
    """Two keys: no row of the program sees one before the first, nor from the second."""
    base, stride_granule, stride_word, first_granule, last_granule = tiles
    granules = first_granule + tl.arange(0, LANES)
    exists = granules <= last_granule
    at = base + granules * stride_granule + 2 * tl.cdiv(key_count, 32 * BLOCK_N) * stride_word
    first = tl.min(tl.load(at, mask=exists, other=2147483647), 0)
    last = tl.max(tl.load(at + stride_word, mask=exists, other=0), 0)
    return first * BLOCK_N, last * BLOCK_N


@triton.jit
def load_words(tiles, key, key_count, BLOCK_N: tl.constexpr):
    """Both words of the map for each granule of the program: the 32 tiles among which ``key`` is."""
    base, stride_granule, stride_word, first_granule, last_granule = tiles
    granules = first_granule + tl.arange(0, LANES)
    at = base + granules * stride_granule + (key // (32 * BLOCK_N)) * 2 * stride_word
    exists = (granules <= last_granule) & (key < key_count)
    return tl.load(at, mask=exists, other=0), tl.load(at + stride_word, mask=exists, other=0)


@triton.jit
def bits_of(words, low, high, BLOCK_N: tl.constexpr):
    """(tiles of which a row of the program sees something, those of which one does not see all): bits of an int64.

    Bit 0 is the tile at key ``low``; the last one ends at ``high``, or where its word of the map does.
    """
    place = low // BLOCK_N % 32
    count = tl.minimum(tl.cdiv(high - low, BLOCK_N), 32 - place)
    inside = (tl.full((), 1, tl.int64) << count) - 1
    seen = ((tl.reduce(words[0], 0, either).to(tl.int64) & 0xFFFFFFFF) >> place) & inside
    return seen, (tl.reduce(words[1], 0, either).to(tl.int64) & 0xFFFFFFFF) >> place


@triton.jit
def run_count(seen):
    """How many runs of ones the bits ``seen``, fewer than 2**32, have."""
    ends = seen & ~(seen << 1)
    ends = ends - ((ends >> 1) & 0x55555555)
    ends = (ends & 0x33333333) + ((ends >> 2) & 0x33333333)
    ends = (ends + (ends >> 4)) & 0x0F0F0F0F
    return (((ends * 0x01010101) >> 24) & 0xFF).to(tl.int32)


@triton.jit
def next_run(seen):
    """(first tile, how many follow on each other, what is left) of the bits ``seen``, not 0.

    Loops over the run count from 0: Triton 3.6 and 3.7 take a value that only borders of loops are made of for one that
    nobody uses, and a loop that should carry ``seen`` along would find the first run again and again.
    """
    place = lowest_one(seen)
    count = lowest_one(~(seen >> place))
    return place, count, (seen >> (place + count)) << (place + count)


@triton.jit
def _tile(
    state,
    q,
    keys_and_values,
    mask_and_rows,
    start,
    key_count,
    is_edge,
    EDGE: tl.constexpr,
    SHAPE: tl.constexpr,
    SCORES: tl.constexpr,
):
    """One tile of keys: (m, sums, acc) -> (m, sums, acc).

    EDGE: some of its keys may be hidden or not exist: 0 no, 1 yes, 2 if ``is_edge``.
    """
    m, sums, acc = state
    k_base, stride_kn, stride_kd, v_base, stride_vn, stride_vd = keys_and_values
    scored = mask_and_rows[5]
    BLOCK_N: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[1]
    BLOCK_D: tl.constexpr = SHAPE[2]
    DV: tl.constexpr = SHAPE[3]
    BLOCK_DV: tl.constexpr = SHAPE[4]
    INDEX: tl.constexpr = SHAPE[5]
    BLOCK_REST: tl.constexpr = SHAPE[6]
    SCALE: tl.constexpr = SCORES[2]
    PRECISION: tl.constexpr = SCORES[3]
    SCALE_FIRST: tl.constexpr = SCORES[7]
    WIDTH: tl.constexpr = v_base.dtype.element_ty.primitive_bitwidth
    keys = start + tl.arange(0, BLOCK_N)
    exists = None
    if EDGE:
        exists = (keys < key_count)[None, :]
    dims = tl.arange(0, BLOCK_D)[:, None]
    k = load_rows(k_base, keys.to(INDEX)[None, :], dims, stride_kn, stride_kd, exists, D)
    t = tl.dot(q[0], k, input_precision=PRECISION)
    if BLOCK_REST:  # the chain goes on
        dims = tl.arange(0, BLOCK_REST)[:, None]
        rest = k_base + BLOCK_D * stride_kd
        k = load_rows(rest, keys.to(INDEX)[None, :], dims, stride_kn, stride_kd, exists, D - BLOCK_D)
        t = tl.dot(q[1], k, t, input_precision=PRECISION)
    if SCALE_FIRST:
        if SCALE == 1.0:  # a choice that is none: Triton would start the dot from what is added to it next
            t = tl.where(t == 0.0, 0.0, t)
        t = t * SCALE
        if SCORES[8]:
            SCORE: tl.constexpr = SCORES[9]
            t = modified(t, keys.to(INDEX)[None, :], key_count, scored, SCORE)
        factor = tl.full((), LOG2_E, tl.float32)
    else:
        factor = tl.full((), SCALE * LOG2_E, tl.float32)
    if EDGE == 1:
        t = _hidden(t, keys, key_count, mask_and_rows, SCORES, INDEX, WIDTH)
    elif EDGE == 2:
        if is_edge:
            t = _hidden(t, keys, key_count, mask_and_rows, SCORES, INDEX, WIDTH)
    highest = tl.maximum(m, tl.max(t, 1) * factor)
    rescale = tl.exp2(m - highest)
    p = tl.exp2(tl.fma(t, factor, -highest[:, None]))
    sums = sums * rescale[:, None] + lane_sums(p)
    exists = None
    if EDGE:
        exists = (keys < key_count)[:, None]
    columns = tl.arange(0, BLOCK_DV)[None, :]
    v = load_rows(v_base, keys.to(INDEX)[:, None], columns, stride_vn, stride_vd, exists, DV)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return highest, sums, acc


@triton.jit
def _hidden(
    t, keys, key_count, mask_and_rows, SCORES: tl.constexpr, INDEX: tl.constexpr, WIDTH: tl.constexpr
):
    """The scores ``t`` [M, N], -inf where a key is hidden or does not exist."""
    mask_base, stride_mn, positions, rows_exist, _, _ = mask_and_rows
    visible = (keys < key_count)[None, :]
    if SCORES[0]:
        visible = visible & (keys[None, :] <= positions)
    if SCORES[1]:
        exists = (keys < key_count)[None, :] & rows_exist
        given = mask_of(mask_base, stride_mn, keys.to(INDEX)[None, :], key_count, exists, 0, SCORES, WIDTH)
        if SCORES[1] == 2:
            t += given.to(tl.float32)
        else:
            visible = visible & (given != 0)
    return tl.where(visible, t, -float("inf"))


@triton.jit
def one_chunk(
    q,
    keys_and_values,
    mask_and_rows,
    low,
    full,
    high,
    key_count,
    SHAPE: tl.constexpr,
    SCORES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(m [M], sums [M], acc [M, DV]) of keys low ... high - 1; those before ``full`` are visible to every row."""
    words = 0
    if SCORES[1] == 3:
        words = load_words(mask_and_rows[4], low, key_count, SHAPE[0])
    return _chunk(q, keys_and_values, mask_and_rows, low, full, high, words, key_count, SHAPE, SCORES, STAGES)


@triton.jit
def _chunk(
    q,
    keys_and_values,
    mask_and_rows,
    low,
    full,
    high,
    words,
    key_count,
    SHAPE: tl.constexpr,
    SCORES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As ``one_chunk``. With a map of tiles (MASK = 3, ``attention_tiles.py``) ``words`` are those of the chunk.

    Then tiles that every row of the program is hidden from are left out, and of those that hide nothing the mask is not
    asked; else tile follows on tile.
    """
    BLOCK_N: tl.constexpr = SHAPE[0]
    m = tl.full((q[0].shape[0],), LOWEST, tl.float32)
    sums = tl.zeros((q[0].shape[0], 4), tl.float32)
    acc = tl.zeros((q[0].shape[0], SHAPE[4]), tl.float32)
    if SCORES[1] == 3:
        seen, holes = bits_of(words, low, high, BLOCK_N)
        for _ in tl.range(0, run_count(seen), num_stages=1):
            place, count, seen = next_run(seen)
            for step in tl.range(0, count, num_stages=STAGES[0]):
                tile = place + step
                has_holes = ((holes >> tile) & 1) != 0
                start = low + tile * BLOCK_N
                state = (m, sums, acc)
                m, sums, acc = _tile(
                    state, q, keys_and_values, mask_and_rows, start, key_count, has_holes, 2, SHAPE, SCORES
                )
    else:
        edge = low
        if SCORES[1] == 0:
            edge = tl.maximum(tl.minimum(high, full), low)
            for start in tl.range(low, edge, BLOCK_N, num_stages=STAGES[0]):
                state = (m, sums, acc)
                m, sums, acc = _tile(
                    state, q, keys_and_values, mask_and_rows, start, key_count, 0, 0, SHAPE, SCORES
                )
        for start in tl.range(edge, high, BLOCK_N, num_stages=STAGES[1]):
            state = (m, sums, acc)
            m, sums, acc = _tile(
                state, q, keys_and_values, mask_and_rows, start, key_count, 1, 1, SHAPE, SCORES
            )
    return m, total(sums), acc


@triton.jit
def all_chunks(
    q,
    keys_and_values,
    mask_and_rows,
    full,
    end,
    key_count,
    SHAPE: tl.constexpr,
    SCORES: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(m, sums, acc) of keys 0 ... end - 1, chunk after chunk; what the map says of the next one is read ahead."""
    m = tl.full((q[0].shape[0],), LOWEST, tl.float32)
    sums = tl.zeros((q[0].shape[0],), tl.float32)
    acc = tl.zeros((q[0].shape[0], SHAPE[4]), tl.float32)
    tiles = mask_and_rows[4]
    first = end * 0
    words = 0
    if SCORES[1] == 3:  # what is left out is the state of no key
        span = map_span(tiles, key_count, SHAPE[0])
        first = chunk_of(span[0], CHUNKS[0], CHUNKS[1], CHUNKS[2])
        end = tl.minimum(span[1], end)
        low = chunk_start(first, CHUNKS[0], CHUNKS[1], CHUNKS[2])
        words = load_words(tiles, low, end, SHAPE[0])
    for chunk in tl.range(first, chunk_count(end, CHUNKS[0], CHUNKS[1], CHUNKS[2]), num_stages=1):
        low = chunk_start(chunk, CHUNKS[0], CHUNKS[1], CHUNKS[2])
        next_low = chunk_start(chunk + 1, CHUNKS[0], CHUNKS[1], CHUNKS[2])
        high = tl.minimum(next_low, end)
        next_words = 0
        if SCORES[1] == 3:
            next_words = load_words(tiles, next_low, end, SHAPE[0])
        next_m, next_sums, next_acc = _chunk(
            q, keys_and_values, mask_and_rows, low, full, high, words, key_count, SHAPE, SCORES, STAGES
        )
        m, sums, acc = join(m, sums, acc, next_m, next_sums, next_acc)
        words = next_words
    return m, sums, acc


@triton.jit
def finish(m, sums, acc):
    """(acc / sums [M, DV], log2 of the sum of exp2(t) [M]); 0 and -inf for a row without a visible key."""
    inverse = tl.where(sums == 0.0, 0.0, tl.math.div_rn(1.0, sums))
    return acc * inverse[:, None] + 0.0, tl.where(sums == 0.0, -float("inf"), m + tl.log2(sums))


@triton.jit
def fold_chunks(
    partial, stored_maxima, stored_sums, row, row_count, chunk_total, DV: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """The state of one row after joining the chunks stored by several programs, left to right.

    partial [chunks, rows, DV], stored_maxima and stored_sums [chunks, rows]. Eight chunks are loaded at a time;
    those past the last one are the state of no key. Returns (m [1], sums [1], acc [1, BLOCK_DV]).
    """
    columns = tl.arange(0, BLOCK_DV)[None, :]
    one = tl.zeros((1,), tl.int32)
    m = tl.full((1,), LOWEST, tl.float32)
    sums = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, BLOCK_DV), tl.float32)
    for first in tl.range(0, chunk_total, 8):
        for step in tl.static_range(8):
            exists = first + step < chunk_total
            at = (first + step) * row_count + row + one
            next_m = tl.load(stored_maxima + at, mask=exists, other=LOWEST)
            next_sums = tl.load(stored_sums + at, mask=exists, other=0.0)
            inside = (columns < DV) & exists
            next_acc = tl.load(partial + at[:, None] * DV + columns, mask=inside, other=0.0)
            m, sums, acc = join(m, sums, acc, next_m, next_sums, next_acc)
    return m, sums, acc
