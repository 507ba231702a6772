"""What ``reveal_order`` asks a function: which of the small units survive a large value and its negative."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .errors import OrderError

#: For each input dtype M, and the most that all units together may be: far less than half a unit in the last
#: place of M in any accumulator up to fp64 (fp16: up to fp32 with the guard bits of tensor cores; its range ends).
MAGNITUDES = {
    torch.float64: (2.0**500, 2.0**40),
    torch.float32: (2.0**100, 2.0**40),
    torch.bfloat16: (2.0**100, 2.0**40),
    torch.float16: (2.0**15, 2.0**-14),
}
#: M at the first index, -M at the second, units at the indices in the tensor (less the first two).
Question: TypeAlias = tuple[int, int, Tensor]


@dataclasses.dataclass(frozen=True)
class Calls:
    """``fn`` as a function from many inputs to as many numbers."""

    fn: Callable[[Tensor], Tensor]
    terms: int
    dtype: torch.dtype
    device: torch.device | str
    per_call: int

    def __call__(self, inputs: Iterable[Tensor]) -> Tensor:
        """One result for each of ``inputs`` ([n], on the CPU), in the dtype of ``fn``'s output, on the CPU."""
        inputs, results = iter(inputs), []
        while chunk := list(itertools.islice(inputs, self.per_call)):
            results.append(self._call(chunk)[: len(chunk)])
        return torch.cat(results)

    def _call(self, chunk: list[Tensor]) -> Tensor:
        if self.per_call == 1:
            x = chunk[0].clone()  # fn may write to it
        else:
            x = torch.zeros(self.per_call, self.terms, dtype=self.dtype)
            x[: len(chunk)] = torch.stack(chunk)
        result = self.fn(x.to(self.device))
        if not isinstance(result, Tensor) or result.numel() != self.per_call:
            got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"fn must return {self.per_call} element(s) for {list(x.shape)}, not {got}")
        if not result.is_floating_point():
            raise ValueError(f"fn must return floats, not {result.dtype}")
        return result.detach().reshape(-1).cpu()


class Probe:
    """Counts which units survive; ``factor`` is what ``fn`` multiplies every input with."""

    def __init__(self, calls: Calls) -> None:
        self.calls, self.terms = calls, calls.terms
        self.large, total = MAGNITUDES[calls.dtype]
        self.factor, output = self._measure_factor()
        self.units_at_once = self._most_units(total, torch.finfo(output))
        self.unit = total / (1 << (self.units_at_once - 1).bit_length())

    def _measure_factor(self) -> tuple[float, torch.dtype]:
        zeros = torch.zeros(self.terms, dtype=self.calls.dtype)
        alone = (zeros.index_fill(0, torch.tensor(k), 1) for k in range(self.terms))
        results = self.calls(itertools.chain([zeros], alone))
        at_zero, *factors = results.tolist()
        if at_zero != 0:
            raise OrderError(f"fn(0) is {at_zero:g}, not 0: it is not the sum of its inputs alone")
        for k, factor in enumerate(factors):
            if not 0 < factor < math.inf:
                raise OrderError(
                    f"x{k} has the factor {factor:g} in the sum; every input needs a positive one"
                )
            if factor != factors[0]:
                raise OrderError(
                    f"x0 has the factor {factors[0]:g} in the sum and x{k} {factor:g}; all need one and the same"
                )
        return factors[0], results.dtype

    def _most_units(self, total: float, output: torch.finfo) -> int:
        """How many units one output can count: rounding may move a count by a quarter at most."""
        count = min(self.terms, int(0.25 / output.eps))
        if not is_power_of_two(self.factor):
            count = min(count, 1024)  # every addition rounds: 1024 * 1024 * 2**-24 is below a quarter
        if self.calls.dtype == torch.float16:
            # A unit must be a float16, and its share of the output four times the output's resolution near 0.
            resolution = output.smallest_normal * output.eps
            count = min(count, int(total / 2.0**-24), int(total * self.factor / (4 * resolution)))
        if count < 1:
            raise OrderError(
                f"the range of {self.calls.dtype} is too small for {self.terms} terms with factors of "
                f"{self.factor:g}; probe in bfloat16 or float32"
            )
        return count if count == self.terms else 1 << (count.bit_length() - 1)

    def survivors(self, questions: Sequence[Question]) -> list[int]:
        """For each (i, j, units): how many of the ``units`` survive M at i and -M at j."""
        parts = [
            (i, j, units[start : start + self.units_at_once])
            for i, j, units in questions
            for start in range(0, len(units), self.units_at_once)
        ]
        answers = iter(self.calls(self._input(*part) for part in parts).double().tolist())
        return [
            sum(self._count(next(answers)) for _ in range(0, len(units), self.units_at_once))
            for _, _, units in questions
        ]

    def _input(self, i: int, j: int, units: Tensor) -> Tensor:
        x = torch.zeros(self.terms, dtype=self.calls.dtype)
        x[units] = self.unit
        x[i], x[j] = self.large, -self.large
        return x

    def _count(self, answer: float) -> int:
        count = answer / (self.unit * self.factor)
        if not (-0.25 <= count <= self.units_at_once + 0.25 and abs(count - round(count)) <= 0.25):
            raise OrderError(
                f"M and -M leave {count:g} units of at most {self.units_at_once}: large values do not cancel, "
                "or small ones are not kept exactly"
            )
        return round(count)


def is_power_of_two(value: float) -> bool:
    return math.frexp(value)[0] == 0.5
