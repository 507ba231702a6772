"""A graph as a value: lines of Python over inputs with a batch dimension, and parameters without one."""

from __future__ import annotations

import dataclasses
import linecache
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from devices import random_rows
from torch import Tensor

#: Stands for the batch size in a shape.
BATCH = -1
#: Two batch sizes that no other dimension has: where the shapes of a result differ, there the batch is.
_PROBES = (53, 59)


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of a graph: its name, its shape with BATCH in one place or none (a parameter), its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def batch_dim(self) -> int:
        return self.shape.index(BATCH)

    @property
    def free_dims(self) -> list[int]:
        """All dimensions but the batch."""
        return [dim for dim, size in enumerate(self.shape) if size != BATCH]

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point

    def tensor(self, batch: int, device: str, seed: int) -> Tensor:
        """Random contents for an input or a parameter."""
        size = [batch if length == BATCH else length for length in self.shape]
        scale = 1.0 if BATCH in self.shape else 0.3
        return random_rows(*size, dtype=self.dtype, device=device, seed=seed, scale=scale)

    def declaration(self, batch: int, seed: int) -> str:
        size = ", ".join(str(batch if length == BATCH else length) for length in self.shape)
        scale = "" if BATCH in self.shape else ", scale=0.3"
        return f"{self.name} = random_rows({size}, dtype={self.dtype}, seed={seed}{scale})"


@dataclasses.dataclass(frozen=True)
class Step:
    """One line, ``result = expression``, and the names it reads."""

    result: Value
    expression: str
    reads: tuple[str, ...]

    @property
    def line(self) -> str:
        return f"{self.result.name} = {self.expression}"


@dataclasses.dataclass(frozen=True)
class Program:
    """A graph: inputs with a batch, parameters, lines, and which values it returns."""

    inputs: tuple[Value, ...]
    parameters: tuple[Value, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]

    @property
    def arguments(self) -> tuple[Value, ...]:
        return self.inputs + self.parameters

    @property
    def results(self) -> tuple[Value, ...]:
        """The returned values."""
        made = {step.result.name: step.result for step in self.steps}
        return tuple(made[name] for name in self.outputs)

    @property
    def scatters(self) -> bool:
        """True if a gradient adds at positions that it reads: its code is for one power of two of the batch."""
        picks = ("gather(", "sort(", "index_select(", "repeat_interleave(", ".long()")
        return any(pick in step.expression for step in self.steps for pick in picks)

    def source(self, name: str = "graph") -> str:
        lines = [step.line for step in self.steps] + [f"return {', '.join(self.outputs)},"]
        arguments = ", ".join(argument.name for argument in self.arguments)
        return f"def {name}({arguments}):\n" + "".join(f"    {line}\n" for line in lines)

    def function(self, name: str = "graph") -> Callable[..., tuple[Tensor, ...]]:
        return _executed(self.source(name), name)

    def live(self) -> Program:
        """Without lines, inputs and parameters that no output needs."""
        needed, steps = set(self.outputs), []
        for step in reversed(self.steps):
            if step.result.name in needed:
                needed |= {*step.reads}
                steps.append(step)
        return Program(
            tuple(value for value in self.inputs if value.name in needed),
            tuple(value for value in self.parameters if value.name in needed),
            tuple(reversed(steps)),
            self.outputs,
        )

    def snippet(self, batch: int, seed: int, failing: str) -> str:
        """A runnable script that shows the graph; ``failing`` says which comparison failed."""
        declared = [v.declaration(batch, seed + i) for i, v in enumerate(self.arguments)]
        names = [value.name for value in self.inputs]
        rows = ", ".join(f"{name}.requires_grad_()" for name in names)
        return "\n".join(
            [
                f"# {failing}",
                "import torch",
                "import torch.nn.functional as F",
                "from devices import random_rows",
                "",
                self.source(),
                *declared,
                f'run = torch.compile(graph, backend="batchinv", dynamic=True)  # rows: {rows}',
                f"run({', '.join(v.name for v in self.arguments)})",
                "",
            ]
        )


def _executed(source: str, name: str) -> Callable[..., tuple[Tensor, ...]]:
    """The function, with its lines where tracebacks and refusals look for them."""
    path = f"<{name} {abs(hash(source)):x}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    namespace = {"torch": torch, "F": F}
    exec(compile(source, path, "exec"), namespace)
    return namespace[name]  # type: ignore[return-value]


def bundled(programs: Sequence[Program]) -> Callable[..., tuple[Tensor, ...]]:
    """One function of all arguments in order that runs several graphs: one compile instead of many."""
    functions = [program.function(f"graph{i}") for i, program in enumerate(programs)]
    counts = [len(program.arguments) for program in programs]

    def bundle(*arguments: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        for function, count in zip(functions, counts, strict=True):
            outputs += function(*arguments[:count])
            arguments = arguments[count:]
        return tuple(outputs)

    return bundle


def inferred(name: str, expression: str, operands: Sequence[Value]) -> Value | None:
    """The value of ``expression`` over ``operands``, from running it on shapes alone; None if it cannot be one."""
    shapes, dtype = [], torch.float32
    for batch in _PROBES:
        environment = {
            value.name: torch.empty(
                [batch if size == BATCH else size for size in value.shape], dtype=value.dtype, device="meta"
            )
            for value in operands
        }
        try:
            result = eval(expression, {"torch": torch, "F": F}, environment)
        except (RuntimeError, IndexError, ValueError):
            return None
        shapes.append(tuple(result.shape))
        dtype = result.dtype
    if len(shapes[0]) != len(shapes[1]):
        return None
    shape = tuple(BATCH if (a, b) == _PROBES else a for a, b in zip(*shapes, strict=True))
    grown = sum(a != b for a, b in zip(*shapes, strict=True))
    return Value(name, shape, dtype) if grown == 1 and shape.count(BATCH) == 1 else None
