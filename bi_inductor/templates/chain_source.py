"""The source of the chain kernel, for all tiles, and what one tile leaves of it.

    out[m, n] = chain(m, n) = (((0 + a[m, 0] b[0, n]) + a[m, 1] b[1, n]) + ...), k ascending, then + 0.0

one accumulator per output; ``step`` walks K in steps of BLOCK_K, each one ``tl.dot``. The final + 0.0 is spelled as a
choice: Triton rewrites ``dot(a, b, 0) + c``, which a chain of one step would be, as ``dot(a, b, c)``, so that the chain
started from the bias. The loop over ``number`` walks
the tiles of a program: all of one SM with TMA, a single one otherwise. With EXTRA_N a tile has two accumulators, which
share the rows of A: tile_n covers BLOCK_N + EXTRA_N columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

#: Constants of the kernel that only its tile decides; everything else in the source is the same for all tiles.
TILE_PARAMETERS = tuple("BLOCK_M BLOCK_N EXTRA_N BLOCK_K GROUP_M SWAP TMA EVEN_M EVEN_N EVEN_K".split())

SOURCE = r"""
{{def_kernel("A", "B")}}
    M = {{size("A", -2)}}
    N = {{size("B", -1)}}
    K = {{size("A", -1)}}
    stride_am = {{stride("A", -2)}}
    stride_ak = {{stride("A", -1)}}
    stride_bk = {{stride("B", -2)}}
    stride_bn = {{stride("B", -1)}}
    grid_m = tl.cdiv(M, BLOCK_M)
    grid_n = tl.cdiv(N, BLOCK_N + EXTRA_N)
    tiles = grid_m * grid_n{{ " * (" + size("A", 0) + ")" if BATCHED else "" }}
    group_tiles = GROUP_M * grid_n
    k = tl.arange(0, BLOCK_K).to(INDEX_DTYPE)
    if TMA:
{% if A_K_IS_DENSE %}
        a_tiles = tl.make_tensor_descriptor(A, [M, K], [stride_am, 1], [BLOCK_M, BLOCK_K])
{% else %}
        a_tiles = tl.make_tensor_descriptor(A, [K, M], [stride_ak, 1], [BLOCK_K, BLOCK_M])
{% endif %}
{% if B_K_IS_DENSE %}
        b_tiles = tl.make_tensor_descriptor(B, [N, K], [stride_bn, 1], [BLOCK_N, BLOCK_K])
{% else %}
        b_tiles = tl.make_tensor_descriptor(B, [K, N], [stride_bk, 1], [BLOCK_K, BLOCK_N])
{% endif %}
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=TMA):
        tile = tl.cast(number, INDEX_DTYPE)
{% if BATCHED %}
        idx_b = tile // (grid_m * grid_n)
        tile = tile % (grid_m * grid_n)
{% endif %}
        first_m = tile // group_tiles * GROUP_M
        group_m = tl.minimum(grid_m - first_m, GROUP_M)
        first_row = (first_m + tile % group_tiles % group_m) * BLOCK_M
        first_column = tile % group_tiles // group_m * (BLOCK_N + EXTRA_N)
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = first_column + tl.arange(0, BLOCK_N)
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), ACC_TYPE)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), ACC_TYPE)
        if EXTRA_N:
            extra_columns = first_column + BLOCK_N + tl.arange(0, EXTRA_N)
            extra_acc = tl.zeros((BLOCK_M, EXTRA_N), ACC_TYPE)
        if TMA:
            row = first_row.to(tl.int32)
            column = first_column.to(tl.int32)
        else:
            # Past an edge, rows and columns that exist are computed again and not stored: no mask in the loop.
            a_rows = rows
            if not EVEN_M:
                a_rows = rows % M
            b_columns = columns
            if not EVEN_N:
                b_columns = columns % N
            a_start = A{{ " + idx_b * (" + stride("A", 0) + ")" if BATCHED else "" }}
            b_start = B{{ " + idx_b * (" + stride("B", 0) + ")" if BATCHED else "" }}
            if SWAP:
                a_block = a_start + (a_rows[None, :] * stride_am + k[:, None] * stride_ak)
                b_block = b_start + (b_columns[:, None] * stride_bn + k[None, :] * stride_bk)
            else:
                a_block = a_start + (a_rows[:, None] * stride_am + k[None, :] * stride_ak)
                b_block = b_start + (b_columns[None, :] * stride_bn + k[:, None] * stride_bk)
            if EXTRA_N:
                b_columns = extra_columns
                if not EVEN_N:
                    b_columns = extra_columns % N
                extra_block = b_start + (b_columns[None, :] * stride_bn + k[:, None] * stride_bk)
        for step in tl.range(0, tl.cdiv(K, BLOCK_K)):
            if TMA:
                a = a_tiles.load({{ "[row, step * BLOCK_K]" if A_K_IS_DENSE else "[step * BLOCK_K, row]" }})
                b = b_tiles.load({{ "[column, step * BLOCK_K]" if B_K_IS_DENSE else "[step * BLOCK_K, column]" }})
                if {{ "SWAP" if A_K_IS_DENSE else "not SWAP" }}:
                    a = tl.trans(a)
                if {{ "not SWAP" if B_K_IS_DENSE else "SWAP" }}:
                    b = tl.trans(b)
            elif EVEN_K:
                a = tl.load(a_block)
                b = tl.load(b_block)
                if EXTRA_N:
                    extra = tl.load(extra_block)
            else:
                inside = k < K - step * BLOCK_K
                if SWAP:
                    a = tl.load(a_block, mask=inside[:, None], other=0.0)
                    b = tl.load(b_block, mask=inside[None, :], other=0.0)
                else:
                    a = tl.load(a_block, mask=inside[None, :], other=0.0)
                    b = tl.load(b_block, mask=inside[:, None], other=0.0)
                if EXTRA_N:
                    extra = tl.load(extra_block, mask=inside[:, None], other=0.0)
            if SWAP:
                acc = tl.dot(b, a, acc, input_precision=INPUT_PRECISION, out_dtype=ACC_TYPE)
            else:
                acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION, out_dtype=ACC_TYPE)
            if EXTRA_N:
                extra_acc = tl.dot(a, extra, extra_acc, input_precision=INPUT_PRECISION, out_dtype=ACC_TYPE)
            if not TMA:
                a_block += BLOCK_K * stride_ak
                b_block += BLOCK_K * stride_bk
                if EXTRA_N:
                    extra_block += BLOCK_K * stride_bk
        if SWAP:
            acc = tl.trans(acc)
        acc = tl.where(acc == 0.0, 0.0, acc)
        idx_m = rows[:, None]
        idx_n = columns[None, :]
        mask = (idx_m < M) & (idx_n < N)
        {{ store_output(("idx_b",) * BATCHED + ("idx_m", "idx_n"), "acc", "mask", indent_width=8,
                        val_shape=("BLOCK_M", "BLOCK_N")) }}
        if EXTRA_N:
            acc = extra_acc
            acc = tl.where(acc == 0.0, 0.0, acc)
            idx_m = rows[:, None]
            idx_n = extra_columns[None, :]
            mask = (idx_m < M) & (idx_n < N)
            {{ store_output(("idx_b",) * BATCHED + ("idx_m", "idx_n"), "acc", "mask", indent_width=12,
                            val_shape=("BLOCK_M", "EXTRA_N")) }}
"""

#: For the templates of other products, whose programs have one tile: from its ``a_rows`` and ``b_columns`` to pointers
#: and an accumulator. (``SOURCE`` has the same in branches between which a launch chooses.)
POINTERS = r"""
    k = tl.arange(0, BLOCK_K).to(INDEX_DTYPE)
{% if SWAP %}
    a_block = A + (a_rows[None, :] * stride_am + k[:, None] * stride_ak)
    b_block = B + (b_columns[:, None] * stride_bn + k[None, :] * stride_bk)
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC_TYPE)
{% else %}
    a_block = A + (a_rows[:, None] * stride_am + k[None, :] * stride_ak)
    b_block = B + (b_columns[None, :] * stride_bn + k[:, None] * stride_bk)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC_TYPE)
{% endif %}
"""

#: For the same: the next BLOCK_K of both operands, zeros past K, in the loop over ``step``.
OPERANDS = r"""
{% if EVEN_K %}
        a = tl.load(a_block)
        b = tl.load(b_block)
{% else %}
        inside = k < K - step * BLOCK_K
        a = tl.load(a_block, mask={{"inside[:, None]" if SWAP else "inside[None, :]"}}, other=0.0)
        b = tl.load(b_block, mask={{"inside[None, :]" if SWAP else "inside[:, None]"}}, other=0.0)
{% endif %}
"""

_BRANCH = re.compile(r"( *)(if|elif|else)(?: (not )?([A-Z_]+))?:")


def source_of_tile(constants: Mapping[str, int | bool]) -> str:
    """``SOURCE`` without the branches that the tile with ``constants`` never takes."""
    return "\n".join(_taken(SOURCE.split("\n"), constants))


def _taken(lines: list[str], constants: Mapping[str, int | bool]) -> list[str]:
    """``lines`` with one branch of every ``if``, under a condition of its own; jinja's lines are left alone."""
    kept: list[str] = []
    decided: dict[int, str] = {}  # indentation -> what was known when the chain of branches was left, or ""
    while lines:
        line, *lines = lines
        branch = _BRANCH.fullmatch(line)
        if branch is None:
            kept.append(line)
            continue
        indent, keyword, negation, name = len(branch[1]), branch[2], branch[3], branch[4]
        block = _block(lines, indent)
        lines = lines[len(block) :]
        if keyword == "if":
            decided[indent] = ""
        if decided[indent] == "taken":
            continue
        if keyword == "else" or bool(constants[name]) is not bool(negation):
            condition = decided[indent] if keyword == "else" else f"{negation or ''}{name}"
            kept += [f"{branch[1]}if {condition}:", *_taken(block, constants)]
            decided[indent] = "taken"
        else:
            decided[indent] = name if negation else f"not {name}"
    return kept


def _block(lines: list[str], indent: int) -> list[str]:
    """The lines below a branch that is indented by ``indent``."""
    for number, line in enumerate(lines):
        if line.strip() and not line.startswith("{%") and len(line) - len(line.lstrip()) <= indent:
            return lines[:number]
    return lines
