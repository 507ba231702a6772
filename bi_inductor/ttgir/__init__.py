"""What Triton's GPU IR (TTGIR) says of the order in which a compiled kernel adds products.

    steps           which k one step of a matrix instruction adds
    accumulators    what the chain of a dot starts from
    carried         whether loops carry what they did in TTIR, before Triton's passes

All are read from its text. Every kernel with a dot is checked when it is compiled (``runtime/checked.py``): source
that keeps the contract may be rewritten by a compiler pass into code that does not, and has been, three times.
"""

from __future__ import annotations

from .accumulators import wrong_starts
from .carried import lost_words
from .steps import steps_of


def wrong_sums(ttgir: str, ttir: str = "") -> list[str]:
    """Why products of a kernel are not added in ascending k from zero, or not all; one line per reason.

    ``ttir``: what ``ttgir`` was made of, as far as it is known.
    """
    return [*steps_of(ttgir).wrong, *wrong_starts(ttgir), *lost_words(ttir, ttgir)]
