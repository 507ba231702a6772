"""What Triton's GPU IR (TTGIR) says of the order in which a compiled kernel adds products.

    steps           which k one step of a matrix instruction adds
    accumulators    what the chain of a dot starts from

Both are read from its text. Every kernel with a dot is checked when it is compiled (``runtime/checked.py``): source
that keeps the contract may be rewritten by a compiler pass into code that does not, and has been, twice.
"""

from __future__ import annotations

from .accumulators import wrong_starts
from .steps import steps_of


def wrong_sums(ttgir: str) -> list[str]:
    """Why products of a kernel are not added in ascending k from zero, one line per reason; of no reason, none."""
    return [*steps_of(ttgir).wrong, *wrong_starts(ttgir)]
