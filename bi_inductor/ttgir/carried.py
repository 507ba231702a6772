"""Whether a kernel's loops still carry along what they carried before Triton's passes.

Attention's kernels find runs of tiles in a word of the mask's map, and the loop over runs, around the loop over a run's
tiles, carries what is left of it, an int64. Triton 3.6 and 3.7 take what only the borders of an inner loop are made of
for unused, and would let such a loop find the same run again and again. In the interpreter, which has no passes,
nothing of it is to be seen. Loops without a loop inside do not count: pipelining lets them carry addresses too.
"""

from __future__ import annotations

import re

_LOOP = re.compile(r"^( *)\S+ = scf\.for .*? -> \((.*)\)\s*: ")


def lost_words(ttir: str, ttgir: str) -> list[str]:
    """Why a word that a loop carries in TTIR is carried by none in TTGIR: one line, or none."""
    if _carries_a_word(ttir) and not _carries_a_word(ttgir):
        return ["no loop that carries what is left of a word of the map of tiles"]
    return []


def _carries_a_word(ir: str) -> bool:
    """True if a loop around another one carries an int64."""
    waiting: list[
        tuple[int, bool]
    ] = []  # the loops that a line is in: their indentation, and whether they carry one
    for line in ir.splitlines():
        if not (loop := _LOOP.match(line)):
            continue
        indent = len(loop[1])
        waiting = [outer for outer in waiting if outer[0] < indent]
        if waiting and waiting[-1][1]:
            return True
        waiting.append((indent, "i64" in loop[2].split(", ")))
    return False
