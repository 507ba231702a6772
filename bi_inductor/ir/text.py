"""TTIR read from its text: blocks of operations. Only what emitted kernels contain is understood."""

from __future__ import annotations

import dataclasses
import re

_LOCATION = re.compile(r" loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
_RESULTS = re.compile(r"^(%[\w$.-]+)(?::(\d+))? = (.*)$")
_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_TENSOR = re.compile(r"tensor<((?:\d+x)*)(!tt\.ptr<\w+>|\w+)>")
_ARGUMENT = re.compile(r"(%[\w$.-]+): (!tt\.ptr<\w+>|\w+)")


class UnreadableError(ValueError):
    """Text that is not TTIR as emitted kernels have it."""


@dataclasses.dataclass
class Operation:
    """``results = name operands``: ``text`` is the rest of the line, ``shape`` and ``element`` are of the result.

    ``regions``: blocks inside, as (names of the arguments, operations).
    """

    name: str
    results: tuple[str, ...]
    operands: tuple[str, ...]
    text: str
    shape: tuple[int, ...]
    element: str
    regions: list[Block] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Block:
    """Arguments and operations of a region."""

    arguments: tuple[str, ...]
    operations: list[Operation]


def parse(text: str) -> Block:
    """The body of the one function in the module ``text``; its arguments are the kernel's."""
    lines = [_LOCATION.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("#", "module", "//"))]
    start = next((k for k, line in enumerate(lines) if line.startswith("tt.func public")), None)
    if start is None:
        raise UnreadableError("no public function")
    if sum(line.startswith("tt.func") for line in lines) > 1:
        raise UnreadableError("functions that were not inlined")
    arguments = tuple(match[1] for match in _ARGUMENT.finditer(lines[start]))
    operations, _ = _operations(lines, start + 1)
    return Block(arguments, operations)


def _operations(lines: list[str], at: int) -> tuple[list[Operation], int]:
    """Operations from line ``at`` to the line that closes the block, and the number of that line."""
    found = []
    while not lines[at].startswith("}"):
        operation, at = _operation(lines, at)
        found.append(operation)
    return found, at


def _operation(lines: list[str], at: int) -> tuple[Operation, int]:
    line = lines[at]
    match = _RESULTS.match(line)
    results: tuple[str, ...] = (match[1],) if match else ()
    rest = match[3] if match else line
    if match and match[2]:
        results = tuple(f"{match[1]}#{k}" for k in range(int(match[2])))
    name = re.split(r"[\s(]", rest, maxsplit=1)[0].strip('"')
    if name == "tt.reduce" or (rest.endswith("({") and rest.startswith('"')):
        return _generic(lines, at, name, results, rest)
    if name in ("scf.for", "scf.if"):
        return _structured(lines, at, name, results, rest)
    if rest.endswith("{"):
        raise UnreadableError(f"a region of {name}")
    shape, element = _type(rest)
    return Operation(name, results, _operands(rest), rest, shape, element), at + 1


def _generic(
    lines: list[str], at: int, name: str, results: tuple[str, ...], rest: str
) -> tuple[Operation, int]:
    """``"op"(operands) <{attributes}> ({ ^bb0(arguments): ... }) : types``"""
    header = lines[at + 1]
    arguments = tuple(match[1] for match in _ARGUMENT.finditer(header))
    body, end = _operations(lines, at + 2)
    shape, element = _type(lines[end])
    operation = Operation(name, results, _operands(rest), rest, shape, element, [Block(arguments, body)])
    return operation, end + 1


def _structured(
    lines: list[str], at: int, name: str, results: tuple[str, ...], rest: str
) -> tuple[Operation, int]:
    body, end = _operations(lines, at + 1)
    regions = [Block(_loop_arguments(rest) if name == "scf.for" else (), body)]
    while lines[end].startswith("} else"):
        body, end = _operations(lines, end + 1)
        regions.append(Block((), body))
    return Operation(name, results, _operands(rest), rest, (), "", regions), end + 1


def _loop_arguments(rest: str) -> tuple[str, ...]:
    """The induction variable and the names that are carried."""
    variable = re.match(r"scf\.for (%[\w$.-]+) = ", rest)
    if variable is None:
        raise UnreadableError(rest)
    carried = re.search(r"iter_args\((.*?)\)", rest)
    pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)", carried[1]) if carried else []
    return (variable[1], *(name for name, _ in pairs))


def _operands(rest: str) -> tuple[str, ...]:
    head = rest.split(" : ", 1)[0] if not rest.startswith("scf.for") else rest
    if rest.startswith("scf.for"):
        bounds = re.match(r"scf\.for %[\w$.-]+ = (\S+) to (\S+) step (\S+)", rest)
        if bounds is None:
            raise UnreadableError(rest)
        carried = re.search(r"iter_args\((.*?)\)", rest)
        pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)", carried[1]) if carried else []
        return (*bounds.groups(), *(start for _, start in pairs))
    return tuple(_NAME.findall(head))


def _type(rest: str) -> tuple[tuple[int, ...], str]:
    """Shape and element type of the result: the last type of the line."""
    tensors = _TENSOR.findall(rest)
    last = rest.rsplit(" : ", 1)[-1].rsplit("->", 1)[-1].strip()
    last = last.rsplit(" to ", 1)[-1].strip().strip("()")
    if last.startswith("tensor<") or (tensors and last.rsplit(", ", 1)[-1].startswith("tensor<")):
        dims, element = tensors[-1]
        return tuple(int(n) for n in dims.split("x") if n), element
    return (), last.rsplit(", ", 1)[-1]
