"""Whether a kernel's loops still carry along what they carried before Triton's passes.

Attention's kernels find runs of tiles in a word of the mask's map, and the loop over runs carries what is left of it:
the only int64 number that a loop of ours carries. Triton 3.6 and 3.7 take what only the borders of an inner loop are
made of for unused, and would let such a loop find the same run again and again. In the interpreter, which has no
passes, nothing of it is to be seen.
"""

from __future__ import annotations

import re

_LOOP = re.compile(r"= scf\.for .*? -> \((.*)\)\s*: ")


def lost_words(ttir: str, ttgir: str) -> list[str]:
    """Why a word that a loop carries in TTIR is carried by none in TTGIR: one line, or none."""
    if _carries_a_word(ttir) and not _carries_a_word(ttgir):
        return ["no loop that carries what is left of a word of the map of tiles"]
    return []


def _carries_a_word(ir: str) -> bool:
    return any("i64" in re.split(r", ", types) for types in _LOOP.findall(ir))
