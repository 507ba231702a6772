"""A violating graph cut down: lines, outputs and inputs are left out for as long as it still fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from .program import Program, Step, Value, inferred


def shrunk(program: Program, fails: Callable[[Program], bool], attempts: int = 40) -> Program:
    """The smallest graph found for which ``fails`` is still true, after at most ``attempts`` compiles."""
    while attempts > 0:
        for candidate in _smaller(program):
            attempts -= 1
            if attempts < 0:
                return program
            if _still_fails(candidate, fails):
                program = candidate
                break
        else:
            return program
    return program


def _still_fails(program: Program, fails: Callable[[Program], bool]) -> bool:
    try:
        return fails(program)
    except Exception:  # another error than the one that is being cut down
        return False


def _smaller(program: Program) -> Iterator[Program]:
    """One output of several, an earlier value as the output, a line left out: the large cuts first."""
    if len(program.outputs) > 1:
        for name in program.outputs:
            yield dataclasses.replace(program, outputs=(name,)).live()
    for step in program.steps[:-1]:
        yield dataclasses.replace(program, outputs=(step.result.name,)).live()
    for place in range(len(program.steps)):
        without = _without(program, place)
        if without is not None:
            yield without


def _without(program: Program, place: int) -> Program | None:
    """The graph in which one line's operand stands for its result, if the lines after it still have shapes."""
    gone = program.steps[place]
    operand = gone.reads[0]
    known = {value.name: value for value in program.arguments}
    steps: list[Step] = []
    for step in program.steps[:place]:
        known[step.result.name] = step.result
        steps.append(step)
    renamed = {gone.result.name: operand}
    for step in program.steps[place + 1 :]:
        again = _renamed(step, renamed, known)
        if again is None:
            return None
        known[again.result.name] = again.result
        steps.append(again)
    outputs = tuple(dict.fromkeys(renamed.get(name, name) for name in program.outputs))
    outputs = tuple(name for name in outputs if any(step.result.name == name for step in steps))
    return dataclasses.replace(program, steps=tuple(steps), outputs=outputs).live() if outputs else None


def _renamed(step: Step, renamed: dict[str, str], known: dict[str, Value]) -> Step | None:
    import re

    names = "|".join(renamed)
    expression = re.sub(rf"\b({names})\b", lambda found: renamed[found[1]], step.expression)
    reads = tuple(renamed.get(name, name) for name in step.reads)
    result = inferred(step.result.name, expression, [known[name] for name in reads])
    return None if result is None else Step(result, expression, reads)
