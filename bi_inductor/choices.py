"""Schedule choices where ours differ from Inductor's. None of them can change a bit."""

from __future__ import annotations

from typing import Any

from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import DeviceProperties, ReductionHint
from torch._inductor.virtualized import V

#: Rows up to this many elements stay in the registers of one program, so they are read once.
PERSISTENT_LENGTH = 16384
#: With this many rows for each multiprocessor, a longer row is left to one program, which loops over it: what it
#: reads a second time, as a softmax does, may still be in L2, and every pass over the row shares a kernel
#: (benchmarks/results/reduction_sweep_long_rows.csv: logsumexp of 256 rows of 128256, 65 us; cut in chunks, 84 us).
LOOPED_ROWS_PER_SM = 1


def rows_fill_the_device(rows: int, device: Any) -> bool:
    """True if ``rows`` (a size or a hint) contiguous sums keep ``device`` busy with one program each."""
    return rows >= LOOPED_ROWS_PER_SM * DeviceProperties.create(device).multi_processor_count


class BatchInvariantChoices(InductorChoices):
    """Keep longer rows in registers: a tree over a looped row would wait for all warps in every block."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        return (
            config.triton.persistent_reductions
            and features.get_reduction_hint() == ReductionHint.INNER
            and V.graph.sizevars.statically_known_leq(features.reduction_numel, PERSISTENT_LENGTH)
        )

    def reduction_split_factor(
        self, device: Any, reduction_numel_hint: int, numel_hint: int, inner_reduction: bool
    ) -> int:
        """Exact reductions, a maximum say, split where sums do, so that one kernel can hold both."""
        if inner_reduction and rows_fill_the_device(numel_hint, device):
            return 1
        return super().reduction_split_factor(device, reduction_numel_hint, numel_hint, inner_reduction)
