"""Emitted attention kernels: a program's rows, and one call of ``runtime/attention.py`` for all that is added.

What may be passed is written out here. Only sizes and strides differ from kernel to kernel, and the constants of the
form, which are compared with the certificate's.
"""

from __future__ import annotations

import ast
import re

from ..attention_tiles import GRANULE
from . import triton_attention_backward as backward
from .lengths import Forms, Names, Values, is_constant
from .syntax import KernelSyntax, assigned, dotted

#: A size or a stride: arithmetic on integers and arguments of the kernel.
_SIZE = r"[\w\s()*+/<>=-]+"
#: A number among sizes that are int64, as torch 2.14 writes it.
_CONSTANT = re.compile(r"tl\.full\(\[\], -?\d+, dtype=INDEX_DTYPE\)")
_CORES = {
    "all_chunks": "q, k_and_v, mask_and_rows, full, end, KEYS, SHAPE, SCORES, CHUNKS, STAGES",
    "one_chunk": "q, k_and_v, mask_and_rows, low, full, high, KEYS, SHAPE, SCORES, STAGES",
    "fold_chunks": "PARTIAL, MAXIMA, SUMS, row, ROWS, CHUNK_TOTAL, DV, BLOCK_DV",
    "pairwise_row": (
        "row, captured, idx_b, group * HEADS, granule * GRANULE, QUERIES, KEYS, SCORES, HEADS, BLOCK_N, GRANULE"
    ),
    "bounded_rows": (
        "tiles, captured, idx_b, group * HEADS, part * HEIGHT, granules, QUERIES, KEYS, SCORES[0], HEADS, BLOCK_N, "
        "GRANULE, HEIGHT"
    ),
}
#: The call of ``runtime/attention_specialised.py``, ``#`` for a size.
_ATTEND = (
    "attention_specialised.attend(Q, K, V, OUT, LSE, (#, #, #, D), (#, #, #, D), (#, #, #, DV), (#, #, #), (#, #, #), "
    "(#, #, #), (#, #, #), PAIRS_A_SECTION, BLOCK_D, BLOCK_DV, BLOCK_N, BUFFERED_TILES, CAUSAL, SCALE, NEAR_CHUNK, "
    "NEAR_CHUNKS, FAR_CHUNK)"
)
#: The functions that compute a mask and a score (``triton_computed.py``), where there are any.
MASKS = ("0", "computed_mask")
_SCORES = ("False, 0", "True, computed_score")
#: Of these, what makes a map.
_MAPS = ("pairwise_row", "bounded_rows")
_BORDERS = "NEAR_CHUNK, NEAR_CHUNKS, FAR_CHUNK"
#: What a name that reaches a sum may be bound to, ``#`` for a size.
_BOUND = {
    "GROUP": ["# // KEY_HEADS"],
    "ROWS": ["# * GROUP", "# * HEADS * QUERIES"],
    "row_tiles": ["tl.cdiv(ROWS, BLOCK_M)"],
    "program": ["tl.program_id(0).to(INDEX_DTYPE)"],
    "tile": ["row_tiles - 1 - program % row_tiles"],
    "idx_b": [
        "program // row_tiles // KEY_HEADS",
        "row // (HEADS * QUERIES)",
        "program // (#) // (#)",
        "program // parts // (#)",
    ],
    "granule": ["program % (#)"],
    "group": ["program // (#) % (#)", "program // parts % (#)"],
    "parts": ["tl.cdiv(granules, HEIGHT)"],
    "part": ["program % parts"],
    "key_head": ["program // row_tiles % KEY_HEADS"],
    "rows": ["tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]"],
    "exists": ["rows < ROWS"],
    "idx_m": ["rows // GROUP", "row % QUERIES"],
    "idx_h": ["key_head * GROUP + rows % GROUP", "row // QUERIES % HEADS"],
    "q_base": ["Q + idx_b * (#) + idx_h * (#)"],
    "k_base": ["K + idx_b * (#) + key_head * (#)"],
    "v_base": ["V + idx_b * (#) + key_head * (#)"],
    "q": ["attention.load_query(q_base, idx_m, #, #, exists, SHAPE)"],
    "k_and_v": ["(k_base, #, #, v_base, #, #)"],
    "mask_base": ["MASKS + idx_b * (#) + idx_h * (#)", "(captured, idx_b, idx_h, tl.minimum(idx_m, # - 1))"],
    "mask_and_rows": ["(mask_base, #, idx_m, exists, tiles, scored)", "(0, 0, idx_m, exists, tiles, scored)"],
    "first_position": ["tile * BLOCK_M // GROUP"],
    "last_position": ["(tl.minimum(tile * BLOCK_M + BLOCK_M, ROWS) - 1) // GROUP"],
    "end": ["tl.minimum(KEYS, last_position + 1)", "KEYS"],
    "full": ["tl.minimum(KEYS, first_position + 1) // BLOCK_N * BLOCK_N", "KEYS // BLOCK_N * BLOCK_N"],
    "SHAPE": ["(BLOCK_N, D, BLOCK_D, DV, BLOCK_DV, INDEX_DTYPE, BLOCK_REST)"],
    "tiles_base": ["TILES + idx_b * (#) + key_head * (#)"],
    "granules": ["(first_position // GRANULE, last_position // GRANULE)", "#"],
    "tiles": ["(tiles_base, #, #, granules[0], granules[1])", "0", "MAP + program // parts * granules * (#)"],
    "SCORES": [
        "(False, 1, 1.0, None, None, True, computed_mask)",
        "(computed_bounds,)",
        *(
            f"(CAUSAL, MASK, SCALE, INPUT_PRECISION, NARROW, COMPUTED, {mask}, SCALE_FIRST, {score})"
            for mask in MASKS
            for score in _SCORES
        ),
    ],
    "scored": ["(captured_by_score, idx_b, idx_h, tl.minimum(idx_m, # - 1))", "0"],
    "CHUNKS": [f"({_BORDERS})"],
    "STAGES": ["(FULL_STAGES, EDGE_STAGES)"],
    "idx_c": [f"attention.chunk_count(KEYS, {_BORDERS}) - 1 - tl.program_id(1).to(INDEX_DTYPE)"],
    "low": [f"attention.chunk_start(idx_c, {_BORDERS})"],
    "high": [f"tl.minimum(attention.chunk_start(idx_c + 1, {_BORDERS}), end)"],
    "row": ["tl.program_id(0).to(INDEX_DTYPE)", "MAP + program * (#)"],
    "last": [
        *(f"attention_map.{core}({_CORES[core]})" for core in _MAPS),
        "last + tl.zeros((1,), tl.int32)",
    ],
    "out": [
        "attention.finish(m, sums, acc)",
        "out.to(Q.dtype.element_ty).to(tl.float32)",
        "out.to(OUT_TYPE).to(tl.float32)",
    ],
    "lse": ["attention.finish(m, sums, acc)"],
    **{
        state: [f"attention.{core}({what})" for core, what in _CORES.items() if core not in _MAPS]
        for state in ("m", "sums", "acc")
    },
}


#: Functions of Inductor's that sizes are made with, beside operators, and what their arguments may be made of.
_QUOTIENTS = ("triton_helpers.div_floor_integer", "triton_helpers.remainder_integer")
_ARITHMETIC = (
    ast.Name,
    ast.Constant,
    ast.BinOp,
    ast.UnaryOp,
    ast.operator,
    ast.unaryop,
    ast.Attribute,
    ast.Load,
)


def _is_quotient(call: ast.AST) -> bool:
    return isinstance(call, ast.Call) and all(
        isinstance(part, _ARITHMETIC) or (isinstance(part, ast.Call) and dotted(part.func) in _QUOTIENTS)
        for part in ast.walk(call)
    )


def _pattern(texts: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text).replace(r"\#", _SIZE) for text in texts))


_PATTERNS = {
    name: _pattern([*_BOUND.get(name, []), *backward.BOUND.get(name, [])]) for name in _BOUND | backward.BOUND
}
_CALL = _pattern([_ATTEND])
_ALL_CORES = {*_CORES, *backward.CORES, "attend"}
#: What calls of ``runtime/attention.py`` an emitted kernel may make.
CALLS = frozenset(["chunk_count", "chunk_start", "finish", "load_query", *_CORES]) - frozenset(_MAPS)
MAP_CALLS = frozenset(_MAPS)


class AttentionProgram:
    """The attention of one kernel."""

    def __init__(self, kernel: KernelSyntax) -> None:
        self.kernel = kernel
        #: ("attention", ()) or ("attention gradient", ()) if the kernel was found to have a form of the certificate.
        self.retraced: set[tuple[str, Values]] = set()
        rooms = ("attention", "attention_backward", "attention_map", "attention_specialised")
        self.calls = [call for call in kernel.calls if dotted(call.func).split(".")[0] in rooms]

    def check(self) -> None:
        """One core call; every name it is given is bound as it is written above."""
        kernel = self.kernel
        cores = [name for call in self.calls if (name := dotted(call.func).split(".")[1]) in _ALL_CORES]
        if len(cores) != 1:
            kernel.note("attention", self.calls[0], f"{len(cores)} calls for the sums of one program")
        for call in self.calls:
            if dotted(call.func).endswith(".attend") and not _CALL.fullmatch(self._plain(call)):
                kernel.note("attention", call)
        for statement in kernel.statements:
            for name, value in assigned(statement):
                if (
                    name in _PATTERNS
                    and value is not None
                    and not _PATTERNS[name].fullmatch(self._plain(value))
                ):
                    kernel.note("attention", statement)
        if kernel.text_of("MASK") == "3" and kernel.text_of("GRANULE") != str(GRANULE):
            kernel.note("attention", self.calls[0], "a map of tiles with granules of another size")
        if kernel.loops:
            kernel.note("attention", kernel.loops[0], "a loop around the sums of a program")
        if cores != ["key_gradients"]:  # whose loop finds its own borders
            self._check_borders()

    def _check_borders(self) -> None:
        """The tiles that need no mask, and all that are visited, end where the mask says."""
        kernel = self.kernel
        causal = kernel.text_of("CAUSAL") == "True"
        if kernel.text_of("end") and (kernel.text_of("end") == "KEYS") == causal:
            kernel.note("attention", kernel.assignments["end"], f"CAUSAL = {causal}")
        if kernel.text_of("full") and ("first_position" in kernel.text_of("full")) != causal:
            kernel.note("attention", kernel.assignments["full"], f"CAUSAL = {causal}")

    def _plain(self, value: ast.expr) -> str:
        """The text of ``value`` with a name for each size, or quotient of sizes, that is written as a call."""
        text = _CONSTANT.sub("size", self.kernel.text(value))
        for call in filter(_is_quotient, ast.walk(value)):  # outer ones first
            text = text.replace(_CONSTANT.sub("size", self.kernel.text(call)), "size")
        return text

    def check_lengths(self, forms: Forms, arguments: Names) -> None:
        """Tile, chunks and precision are those of a form of the certificate."""
        kernel = self.kernel
        if any(dotted(call.func).startswith("attention_backward.") for call in self.calls):
            self._check_gradient(forms)
            return
        if any(dotted(call.func).startswith("attention_map.") for call in self.calls):
            self._check_map(forms, arguments)
            return
        names = ("BLOCK_N", "NEAR_CHUNK", "NEAR_CHUNKS", "FAR_CHUNK")
        if "BLOCK_N" not in kernel.assignments or forms.is_open:
            return  # a fold takes chunks as they are stored
        values = [kernel.values(name, arguments) for name in names]
        if any(value is None or not is_constant(value) for value in values):
            kernel.note("attention", None, f"{', '.join(names)} are not constants")
            return
        tile, near, count, far = (value[0] for value in values if value)
        found = (self._accumulator(), tile, near, near * count, far)
        if found not in forms.attentions:
            kernel.note("attention", None, f"no form of this kernel is Attention{found}")
        else:
            self.retraced.add(("attention", ()))

    def _check_map(self, forms: Forms, arguments: Names) -> None:
        """Its tiles are those of the attention it is for, where that is in the graph."""
        tile = self.kernel.values("BLOCK_N", arguments)
        known = {form[1] for form in forms.attentions}
        if not tile or not is_constant(tile) or (known and tile[0] not in known):
            self.kernel.note("attention", None, "a map of tiles of another size")

    def _check_gradient(self, forms: Forms) -> None:
        found = self._accumulator()
        if forms.is_open:
            return
        if found not in forms.attention_gradients:
            self.kernel.note("attention", None, f"no form of this kernel is AttentionGradient({found})")
        else:
            self.retraced.add(("attention gradient", ()))

    def _accumulator(self) -> str:
        return "tf32/float32" if self.kernel.text_of("INPUT_PRECISION") == "'tf32'" else "float32"
