"""Two versions of generated kernels beside each other, where they differ."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bi_inductor.inspection import Inspection

_WIDTH = 78
_CONTEXT = 2
_METADATA = re.compile(r"\s*(?:triton_meta|inductor_meta|filename)=")


def side_by_side(a: Inspection, b: Inspection, titles: tuple[str, str]) -> str:
    """The kernels of two inspections in two columns: differing lines with two lines around them, ``|`` between them.

    Kernels are paired by their order. What is only said to the launcher (metadata, hashes, paths) is left out.
    """
    parts = []
    for ours, theirs in zip_longest(a.kernels.items(), b.kernels.items(), fillvalue=("(no kernel)", "")):
        rows = list(_rows(_lines(ours[1]), _lines(theirs[1])))
        if rows:
            parts += ["", _row(f"{titles[0]}: {ours[0]}", " ", f"{titles[1]}: {theirs[0]}"), *rows]
    if not parts:
        return f"{titles[0]} and {titles[1]}: the same code"
    return "\n".join([f"{titles[0]} and {titles[1]}: the code differs in", *parts])


def _lines(source: str) -> list[str]:
    lines = (line.rstrip() for line in source.splitlines() if line.strip())
    return [line for line in lines if not _METADATA.match(line)]


def _rows(a: list[str], b: list[str]) -> Iterator[str]:
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    for number, group in enumerate(matcher.get_grouped_opcodes(_CONTEXT)):
        if number:
            yield "  ..."
        for tag, i, j, k, m in group:
            sign = " " if tag == "equal" else "|"
            for left, right in zip_longest(a[i:j], b[k:m], fillvalue=""):
                yield from _wrapped(left, sign, right)


def _wrapped(left: str, sign: str, right: str) -> Iterator[str]:
    """A row, in as many lines as the longer side needs; long equal lines are cut."""
    if sign == " ":
        yield _row(left[:_WIDTH], sign, right[:_WIDTH])
        return
    start = _first_difference(left, right) if max(len(left), len(right)) > _WIDTH else 0
    yield _row(_window(left, start), sign, _window(right, start))


def _first_difference(left: str, right: str) -> int:
    same = next((k for k, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), 0)
    return max(0, same - _WIDTH // 3)


def _window(text: str, start: int) -> str:
    return ("..." if start else "") + text[start : start + _WIDTH - (3 if start else 0)]


def _row(left: str, sign: str, right: str) -> str:
    return f"{left:{_WIDTH}} {sign} {right}".rstrip()
