"""The ATTENTION form on Hopper with warps of two kinds, in Gluon: one warp loads, two groups of four compute.

The formula and its order of additions are those of ``attention.py``, which holds without a mask for heads of 33 to 128
bf16 or fp16 elements here too; only who does what differs:

    one warp    loads 128 queries, then tile after tile of keys and values, by TMA, into buffers that have been left
    two groups  have 64 queries each. While the products of p and values of one tile run, a group has begun those of
                queries and the next keys and computes their p, so that tensor cores need not wait for exponentials

Programs stay on their processor and take one tile of queries after the other: descriptors of TMA are made once, and
while one tile's rows are stored the next one's keys are loaded. Tiles with many keys come first, to and fro over the
programs, so that all end together; heads whose keys fit into the L2 cache at once make up a section.

(H200, bf16, D = 128, GQA 4, causal, 4096 keys: 0.61 times flash's time and 1.16 times cuDNN's; warps of one kind: 0.81
and 1.53.)
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

#: As in ``attention.py``.
LOWEST = gl.constexpr(-3.4028234663852886e38)
LOG2_E = gl.constexpr(1.4426950408889634)
#: Queries of a group, and of the program's two.
GROUP_ROWS = gl.constexpr(64)
ROWS = gl.constexpr(128)


@gluon.jit
def _tree_of_groups(x):
    """[M, n, 4] -> [M, 4]: the tree of adjacent pairs over the middle axis."""
    if x.shape[1] > 2:
        result = _tree_of_groups(gl.sum(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2, 4]), 2))
    else:
        result = gl.sum(x, 1)
    return result


@gluon.jit
def lane_sums(p):
    """[M, N] -> [M, 4]: p[8 g + 2 i] + p[8 g + 2 i + 1], then the tree over g."""
    return _tree_of_groups(gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2]), 3))


@gluon.jit
def total(sums):
    """[M, 4] -> [M]: (l0 + l1) + (l2 + l3)."""
    return gl.sum(gl.sum(gl.reshape(sums, [sums.shape[0], 2, 2]), 2), 1)


@gluon.jit
def join(m, sums, acc, next_m, next_sums, next_acc):
    """The state (m [M], sums [M], acc [M, DV]) of the chunks so far joined with that of the next one."""
    highest = gl.maximum(m, next_m)
    old, new = gl.exp2(m - highest), gl.exp2(next_m - highest)
    by_row: gl.constexpr = sums.type.layout
    sums = gl.fma(sums, gl.convert_layout(old, by_row), next_sums * gl.convert_layout(new, by_row))
    by_column: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    old, new = gl.convert_layout(old, by_column), gl.convert_layout(new, by_column)
    acc = gl.fma(acc, old[:, None] + gl.zeros_like(acc), next_acc * new[:, None])
    return highest, sums, acc


@gluon.jit
def work_of(step, work, sizes, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """(first query, batch, head) of what this program does as its ``step``-th, and how many tiles of keys that has."""
    heads, _, queries, keys, pairs_a_section = sizes
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    if step % 2 == 1:
        place = programs - 1 - place
    item = step * programs + place
    row_tiles = gl.cdiv(queries, ROWS)
    section = item // (pairs_a_section * row_tiles)
    first_pair = section * pairs_a_section
    pairs = gl.minimum(pairs_a_section, work // row_tiles - first_pair)
    rest = item - first_pair * row_tiles
    pair = first_pair + rest % pairs
    first_query = (row_tiles - 1 - rest // pairs) * ROWS
    seen = keys
    if CAUSAL:
        seen = gl.minimum(keys, first_query + ROWS)
    return first_query, pair // heads, pair % heads, gl.cdiv(seen, BLOCK_N)


@gluon.jit
def steps_of(work):
    """How many tiles of queries this program has."""
    programs = gl.num_programs(0)
    whole = work // programs
    place = gl.program_id(0)
    if whole % 2 == 1:
        place = programs - 1 - place
    return whole + (place < work - whole * programs).to(gl.int32)


@gluon.jit
def produce(tiles, buffers, barriers, work, sizes, STAGES: gl.constexpr, CAUSAL: gl.constexpr):
    """Load the queries of each tile once, then its keys and values into buffers that both groups have left."""
    tiles_q, tiles_k, tiles_v = tiles
    q_buffer, k_buffer, v_buffer = buffers
    q_full, q_empty, k_full, v_full, k_empty, v_empty = barriers
    group = sizes[1]
    BLOCK_N: gl.constexpr = k_buffer.shape[3]
    loaded = 0
    for step in range(steps_of(work)):
        first_query, batch, head, count = work_of(step, work, sizes, BLOCK_N, CAUSAL)
        mbarrier.wait(q_empty, (step + 1) & 1)
        mbarrier.expect(q_full, tiles_q.block_type.nbytes)
        tma.async_copy_global_to_shared(tiles_q, [batch, head, first_query, 0], q_full, q_buffer)
        key_head = head // group
        for tile in range(count):
            stage, phase = loaded % STAGES, (loaded // STAGES + 1) & 1
            place = [batch, key_head, tile * BLOCK_N, 0]
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), tiles_k.block_type.nbytes)
            tma.async_copy_global_to_shared(tiles_k, place, k_full.index(stage), k_buffer.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), tiles_v.block_type.nbytes)
            tma.async_copy_global_to_shared(tiles_v, place, v_full.index(stage), v_buffer.index(stage))
            loaded += 1


@gluon.jit
def scores_of(q, k_buffer, k_full, tile, zeros, STAGES: gl.constexpr):
    """The product of queries and the keys of a tile, begun."""
    stage = tile % STAGES
    mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
    k = k_buffer.index(stage).reshape([k_buffer.shape[3], k_buffer.shape[4]])
    return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def hidden(t, queries, first_key, keys, CAUSAL: gl.constexpr):
    """The scores ``t``, -inf where a key does not exist or comes after the query."""
    at = first_key + gl.arange(0, t.shape[1], gl.SliceLayout(0, t.type.layout))
    visible = (at < keys)[None, :]
    if CAUSAL:
        visible = visible & (at[None, :] <= queries[:, None])
    return gl.where(visible, t, float("-inf"))


@gluon.jit
def softmax(t, m, sums, factor, DTYPE: gl.constexpr):
    """(m, sums, what acc is multiplied by, p rounded) after the scores ``t`` of one more tile."""
    highest = gl.maximum(m, gl.max(t, 1) * factor)
    rescale = gl.exp2(m - highest)
    p = gl.exp2(gl.fma(t, factor + gl.zeros_like(t), gl.zeros_like(t) - highest[:, None]))
    sums = sums * gl.convert_layout(rescale, gl.SliceLayout(1, sums.type.layout))[:, None] + lane_sums(p)
    return highest, sums, rescale, p.to(DTYPE)


@gluon.jit
def weighted(p, rescale, acc, v_buffer, v_full, tile, STAGES: gl.constexpr):
    """acc * rescale, and p as an operand, ready for the values of ``tile``, which have come."""
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    p = gl.convert_layout(p, gl.DotOperandLayout(0, acc.type.layout, 2))
    stage = tile % STAGES
    mbarrier.wait(v_full.index(stage), (tile // STAGES) & 1)
    v = v_buffer.index(stage).reshape([v_buffer.shape[3], v_buffer.shape[4]])
    return acc, p, v


@gluon.jit
def consume(
    GROUP: gl.constexpr, common, STAGES: gl.constexpr, CAUSAL: gl.constexpr, SCALE: gl.constexpr,
    NEAR_CHUNK: gl.constexpr, NEAR_CHUNKS: gl.constexpr, FAR_CHUNK: gl.constexpr,
):  # fmt: skip
    """64 queries of each tile over all their keys, in ascending order."""
    out, lse, out_strides, buffers, barriers, work, sizes, value_dim = common
    q_buffer, k_buffer, v_buffer = buffers
    q_full, q_empty, k_full, v_full, k_empty, v_empty = barriers
    heads, _, queries, keys, _ = sizes
    NEAR_KEYS: gl.constexpr = NEAR_CHUNK * NEAR_CHUNKS
    BLOCK_N: gl.constexpr = k_buffer.shape[3]
    BLOCK_D: gl.constexpr = q_buffer.shape[3]
    BLOCK_DV: gl.constexpr = v_buffer.shape[4]
    DTYPE: gl.constexpr = q_buffer.dtype
    over_keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    over_values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, over_keys)
    by_column: gl.constexpr = gl.SliceLayout(1, over_values)
    zeros = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, over_keys)
    lowest = gl.full([GROUP_ROWS], LOWEST, gl.float32, by_row)
    no_sums = lane_sums(zeros)
    no_acc = gl.zeros([GROUP_ROWS, BLOCK_DV], gl.float32, over_values)
    factor = gl.to_tensor(SCALE * LOG2_E)
    done = 0
    for step in range(steps_of(work)):
        first_query, batch, head, loaded = work_of(step, work, sizes, BLOCK_N, CAUSAL)
        first_query += GROUP * GROUP_ROWS
        positions = first_query + gl.arange(0, GROUP_ROWS, by_row)
        count = loaded
        if CAUSAL:
            count = gl.minimum(loaded, (first_query + GROUP_ROWS) // BLOCK_N)
        mbarrier.wait(q_full, step & 1)
        q = q_buffer.reshape([ROWS, BLOCK_D]).slice(GROUP * GROUP_ROWS, GROUP_ROWS)
        q = q.load(gl.DotOperandLayout(0, over_keys, 2))
        t = warpgroup_mma_wait(0, [scores_of(q, k_buffer, k_full, done, zeros, STAGES)])
        # TMA may write where these registers came from: a read that is begun can come after an arrival.
        fence_async_shared()
        mbarrier.arrive(q_empty)
        mbarrier.arrive(k_empty.index(done % STAGES))
        if count == 1:
            t = hidden(t, positions, 0, keys, CAUSAL)
        m, sums, rescale, p = softmax(t, lowest, no_sums, factor, DTYPE)
        acc = no_acc
        old_m, old_sums, old_acc = lowest, total(no_sums), no_acc
        for tile in range(count - 1):
            acc, operand, v = weighted(p, rescale, acc, v_buffer, v_full, done + tile, STAGES)
            begun = scores_of(q, k_buffer, k_full, done + tile + 1, zeros, STAGES)
            adding = warpgroup_mma(operand, v, acc, is_async=True)
            t = warpgroup_mma_wait(1, [begun])
            mbarrier.arrive(k_empty.index((done + tile + 1) % STAGES))
            end = (tile + 1) * BLOCK_N
            if tile + 2 == count:
                t = hidden(t, positions, end, keys, CAUSAL)
            is_end = end % gl.where(end > NEAR_KEYS, FAR_CHUNK, NEAR_CHUNK) == 0
            chunk_m, chunk_sums = m, sums
            m, sums = gl.where(is_end, lowest, m), gl.where(is_end, no_sums, sums)
            m, sums, rescale, p = softmax(t, m, sums, factor, DTYPE)
            # All of it before the products are waited for: what is not needed yet would be computed after them.
            acc, p, sums, rescale = warpgroup_mma_wait(0, [adding, p, sums, rescale])
            mbarrier.arrive(v_empty.index((done + tile) % STAGES))
            if is_end:
                old_m, old_sums, old_acc = join(old_m, old_sums, old_acc, chunk_m, total(chunk_sums), acc)
                acc = no_acc
        last = done + count - 1
        acc, operand, v = weighted(p, rescale, acc, v_buffer, v_full, last, STAGES)
        acc = warpgroup_mma_wait(0, [warpgroup_mma(operand, v, acc, is_async=True)])
        mbarrier.arrive(v_empty.index(last % STAGES))
        for tile in range(count, loaded):  # which the other group sees
            stage, phase = (done + tile) % STAGES, ((done + tile) // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            mbarrier.arrive(k_empty.index(stage))
            mbarrier.wait(v_full.index(stage), phase)
            mbarrier.arrive(v_empty.index(stage))
        done += loaded
        m, sums, acc = join(old_m, old_sums, old_acc, m, total(sums), acc)
        sums = gl.convert_layout(sums, by_row)
        inverse = gl.where(sums == 0.0, 0.0, gl.div_rn(gl.full([GROUP_ROWS], 1.0, gl.float32, by_row), sums))
        inverse = gl.convert_layout(inverse, by_column)
        rows = first_query + gl.arange(0, GROUP_ROWS, by_column)
        columns = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, over_values))
        result = (acc * inverse[:, None] + 0.0).to(DTYPE)
        at = out + batch.to(gl.int64) * out_strides[0] + head.to(gl.int64) * out_strides[1]
        places = at + rows.to(gl.int64)[:, None] * out_strides[2] + columns[None, :]
        gl.store(places, result, mask=(rows < queries)[:, None] & (columns < value_dim)[None, :])
        lse_row = (batch * heads + head).to(gl.int64) * queries
        logsumexp = gl.where(sums == 0.0, -float("inf"), m + gl.log2(sums))
        gl.store(lse + lse_row + positions, logsumexp, mask=positions < queries)


@gluon.jit
def tiles_of(base, sizes, strides, ROWS_A_TILE: gl.constexpr, BLOCK_D: gl.constexpr):
    """The descriptor of tiles of a tensor [B, H, S, D] whose elements of a row follow each other."""
    DTYPE: gl.constexpr = base.dtype.element_ty
    block: gl.constexpr = [1, 1, ROWS_A_TILE, BLOCK_D]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(block, DTYPE)
    return tma.make_tensor_descriptor(base, sizes, (strides[0], strides[1], strides[2], 1), block, layout)


@gluon.jit
def attend(
    q, k, v, out, lse, q_sizes, k_sizes, v_sizes, q_strides, k_strides, v_strides, out_strides, pairs_a_section,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, SCALE: gl.constexpr,
    NEAR_CHUNK: gl.constexpr, NEAR_CHUNKS: gl.constexpr, FAR_CHUNK: gl.constexpr,
):  # fmt: skip
    """out [B, H, L, DV] and lse [B, H, L], by as many programs as there are, of any number."""
    tiles = (
        tiles_of(q, q_sizes, q_strides, ROWS, BLOCK_D),
        tiles_of(k, k_sizes, k_strides, BLOCK_N, BLOCK_D),
        tiles_of(v, v_sizes, v_strides, BLOCK_N, BLOCK_DV),
    )
    DTYPE: gl.constexpr = q.dtype.element_ty
    q_buffer = gl.allocate_shared_memory(DTYPE, [1, 1, ROWS, BLOCK_D], tiles[0].layout)
    k_buffer = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, BLOCK_D], tiles[1].layout)
    v_buffer = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, BLOCK_DV], tiles[2].layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    buffers = (q_buffer, k_buffer, v_buffer)
    barriers = (q_full, q_empty, k_full, v_full, k_empty, v_empty)
    sizes = (q_sizes[1], q_sizes[1] // k_sizes[1], q_sizes[2], k_sizes[2], pairs_a_section)
    work = q_sizes[0] * q_sizes[1] * gl.cdiv(q_sizes[2], ROWS)
    common = (out, lse, out_strides, buffers, barriers, work, sizes, v_sizes[3])
    gl.warp_specialize(
        [
            (consume, (0, common, STAGES, CAUSAL, SCALE, NEAR_CHUNK, NEAR_CHUNKS, FAR_CHUNK)),
            (consume, (1, common, STAGES, CAUSAL, SCALE, NEAR_CHUNK, NEAR_CHUNKS, FAR_CHUNK)),
            (produce, (tiles, buffers, barriers, work, sizes, STAGES, CAUSAL)),
        ],
        [4, 1],
        [240, 24],
    )
