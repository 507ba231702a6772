"""Schedule choices where ours differ from Inductor's. None of them can change a bit."""

from __future__ import annotations

from typing import Any

from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

#: Rows up to this many elements stay in the registers of one program, so they are read once.
PERSISTENT_LENGTH = 16384


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
