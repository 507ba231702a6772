"""What the Triton kernels of graphs compute, asked of Triton's interpreter where there is no GPU.

Slower than a GPU by far, so of few rows; without gradients. The kernels of any batch, on ROWS rows, are compared with
those for a fixed size, with sizes that are all symbols and with fusion off, each in another configuration.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bi_inductor.dry_run import DryRun
from bi_inductor.interpreter import run_module

from .comparison import UNFUSED, Case, History, Results, Tally

#: Batch of the reference: no other dim of a graph has it.
ROWS = 11
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 10)
#: How kernels are made besides: arguments of DryRun.
HISTORIES: dict[str, dict[str, Any]] = {
    "dynamic": {"dynamic": True},
    "unfused": {"options": UNFUSED, "batch_dim": 0},
}


def compare_interpreted(case: Case, pieces: Sequence[int], histories: Sequence[str]) -> Tally:
    """All rows of all results: ``pieces`` of the batch compiled for that size alone, and ``histories``."""
    tally, rows = Tally(), torch.arange(ROWS)
    expected = _results(case, rows, 0, batch_dim=0)
    for size in pieces:
        last = rows[ROWS - size :]
        tally.add(f"static {size}", expected.at(last), _results(case, last, 1))
    for number, name in enumerate(histories, 2):
        tally.add(name, expected, _results(case, rows, number, **HISTORIES[name]))
    return tally


def _results(case: Case, rows: Tensor, configuration: int, **how: Any) -> Results:
    """Of ``rows``, by kernels for sm_90 in one of their configurations."""
    torch._dynamo.reset()
    run = DryRun("sm_90", runner=functools.partial(run_module, config_number=configuration), **how)
    return case.run(
        lambda *arguments: run(case.function, arguments, {})[1], rows, History({}, gradients=False)
    )
