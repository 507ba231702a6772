"""What an emitted kernel of attention's gradients is made of, beyond what it shares with attention's.

Bindings as in ``triton_attention.py``, which reads both kinds of kernels.
"""

from __future__ import annotations

CORES = {
    "query_gradients": "q, g, statistics, k_and_v, mask_and_rows, full, end, KEYS, SHAPE, SCORES, STAGES",
    "key_gradients": (
        "k, v, queries, mask_and_keys, span, key_tile * BLOCK_N, GROUP, QUERIES, SHAPE, SCORES, STAGES"
    ),
}
#: What calls of ``runtime/attention_backward.py`` an emitted kernel may make.
CALLS = frozenset(["finish", "load_rows", "load_statistics", "span_of", *CORES])
_ROOM = "attention_backward"
_SCALED = "tl.full((), SCALE, tl.float32)"
BOUND = {
    "key_tiles": ["tl.cdiv(KEYS, BLOCK_N)"],
    "key_tile": ["program % key_tiles"],
    "idx_b": ["program // key_tiles // KEY_HEADS"],
    "key_head": ["program // key_tiles % KEY_HEADS"],
    "first_head": ["key_head * GROUP"],
    "idx_n": ["key_tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]"],
    "idx_d": ["tl.arange(0, BLOCK_DV)[None, :]"],
    "exists": ["idx_n < KEYS"],
    "q_base": ["Q + idx_b * (#) + first_head * (#)"],
    "g_base": ["G + idx_b * (#) + idx_h * (#)", "G + idx_b * (#) + first_head * (#)"],
    "dims": ["tl.arange(0, BLOCK_D)[None, :]"],
    "q": [f"{_ROOM}.load_rows(q_base, idx_m, dims, #, #, exists, D)"],
    "g": [f"{_ROOM}.load_rows(g_base, idx_m, idx_d, #, #, exists, DV)"],
    "k": [f"{_ROOM}.load_rows(k_base, idx_n, dims, #, #, exists, D)"],
    "v": [f"{_ROOM}.load_rows(v_base, idx_n, idx_d, #, #, exists, DV)"],
    "row": ["(idx_b * # + idx_h) * # + idx_m"],
    "statistics": [f"{_ROOM}.load_statistics(LSE + row, DELTA + row, exists)"],
    "first_row": ["(idx_b * # + first_head) * QUERIES"],
    "q_rows": ["(q_base, #, #, #)"],
    "g_rows": ["(g_base, #, #, #)"],
    "queries": ["(q_rows, g_rows, LSE + first_row, DELTA + first_row)"],
    "mask_base": ["MASKS + idx_b * (#) + first_head * (#)", "(captured, idx_b, first_head)"],
    "mask_strides": ["(#, #, #)"],
    "mask_and_keys": [
        "(mask_base, mask_strides, idx_n, exists, KEYS, scored)",
        "(mask_base, (0, 0, 0), idx_n, exists, KEYS, scored)",
        "(0, (0, 0, 0), idx_n, exists, KEYS, scored)",
    ],
    "SHAPE": ["(BLOCK_M, BLOCK_N, D, BLOCK_D, DV, BLOCK_DV, INDEX_DTYPE)"],
    "SCORES": [
        f"(CAUSAL, MASK, SCALE, INPUT_PRECISION, NARROW, COMPUTED, {mask}, {score})"
        for mask in ("0", "computed_mask")
        for score in ("False, 0, 0", "True, computed_score, computed_derivative")
    ],
    "scored": ["(captured_by_score, idx_b, first_head)"],
    "spans_base": ["SPANS + idx_b * (#) + key_head * (#)"],
    "span": [
        f"{_ROOM}.span_of(spans_base, #, #, key_tile * BLOCK_N, KEYS, SPAN, BLOCK_N)",
        "(0, QUERIES, 0, QUERIES)",
    ],
    "acc": [f"{_ROOM}.query_gradients({CORES['query_gradients']})"],
    "dk": [f"{_ROOM}.key_gradients({CORES['key_gradients']})"],
    "dv": [f"{_ROOM}.key_gradients({CORES['key_gradients']})", f"{_ROOM}.finish(dv).to(V.dtype.element_ty)"],
    "dv_row": ["(idx_b * KEYS + idx_n) * KEY_HEADS + key_head"],
    "out": [
        f"{_ROOM}.finish(acc) * {_SCALED}",
        f"{_ROOM}.finish(dk) * {_SCALED}",
        "out.to(K.dtype.element_ty).to(tl.float32)",
    ],
}
