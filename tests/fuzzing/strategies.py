"""Random graphs as Hypothesis strategies: every choice is drawn, so every graph shrinks."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from .operations import OPERATIONS, Expression
from .program import BATCH, Program, Step, Value, inferred

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Sizes of the dims that are not the batch: 1, powers of two and their neighbours, tails of vectors.
MIDDLES = (1, 3, 5, 8, 17)
WIDTHS = (1, 2, 7, 16, 24, 33, 130)
#: A row of the long ones is reduced in loops and vectors, and is what stock splits.
LONG_WIDTHS = (1025, 4097)
LARGEST_ROW = 20_000
_WEIGHTED = tuple(name for name, (_, weight) in OPERATIONS.items() for _ in range(weight))


@st.composite
def inputs(draw: Any, number: int) -> Value:
    """An input: [batch, width] or [batch, middle, width]."""
    width = draw(st.sampled_from(WIDTHS * 3 + LONG_WIDTHS))
    middle = draw(st.sampled_from([None, *MIDDLES]))
    shape = (BATCH, width) if middle is None or width in LONG_WIDTHS else (BATCH, middle, width)
    return Value(f"x{number}", shape, draw(st.sampled_from(DTYPES)))


class _Growing:
    """A graph while it is drawn."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.inputs = [draw(inputs(number)) for number in range(draw(st.integers(1, 2)))]
        self.parameters: list[Value] = []
        self.steps: list[Step] = []

    @property
    def values(self) -> list[Value]:
        return self.inputs + [step.result for step in self.steps]

    def choose(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def grow(self) -> None:
        """Add one line, mostly over a recent value; what does not apply is drawn again a few times."""
        for _ in range(4):
            values = [value for value in self.values if value.is_float]
            operand = self.choose([values[-1]] * 3 + values)
            expression = OPERATIONS[self.choose(_WEIGHTED)][0](self.choose, operand, values)
            if expression is not None and self._added(expression, operand):
                return

    def _added(self, expression: Expression, operand: Value) -> bool:
        new = [
            Value(f"w{len(self.parameters) + i}", shape, operand.dtype)
            for i, shape in enumerate(expression.parameters)
        ]
        named = {"a": operand.name, **{f"p{i}": value.name for i, value in enumerate(new)}}
        reads = [operand, *new]
        if expression.second is not None:
            named["b"] = expression.second.name
            reads.append(expression.second)
        text = expression.template.format(**named)
        result = inferred(f"v{len(self.steps)}", text, reads)
        if result is None or _row_size(result) not in range(1, LARGEST_ROW) or not result.is_float:
            return False
        self.parameters += new
        self.steps.append(Step(result, text, tuple(value.name for value in reads)))
        return True


def _row_size(value: Value) -> int:
    size = 1
    for dim in value.free_dims:
        size *= value.shape[dim]
    return size


@st.composite
def programs(draw: Any, longest: int = 12) -> Program:
    """A graph of 2 to ``longest`` lines that returns what no line reads, and up to two values on the way there."""
    growing = _Growing(draw)
    for _ in range(draw(st.integers(2, longest))):
        growing.grow()
    while not growing.steps:
        growing.grow()
    names = [step.result.name for step in growing.steps]
    read = {name for step in growing.steps for name in step.reads}
    others = draw(st.lists(st.sampled_from(names), max_size=2))
    outputs = tuple(dict.fromkeys([name for name in names if name not in read] + others))
    return Program(tuple(growing.inputs), tuple(growing.parameters), tuple(growing.steps), outputs).live()
