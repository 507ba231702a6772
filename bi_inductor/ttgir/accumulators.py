"""What the accumulators of dots start from, read from TTGIR.

A chain of products starts at zero: whatever else is added to it is added afterwards. Triton may move an addition into
the accumulator of a dot (``dot(a, b, 0) + c`` becomes ``dot(a, b, c)``), which is another order of additions. So every
accumulator is followed back, through loops and layouts, and through the products that rescale attention's, to where it
comes from: a zero, or another dot. On Blackwell it is in tensor memory, and what is stored there is followed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

_RESULT = re.compile(r"^(%[\w$.-]+)(?::(\d+))? = (\S+) ?(.*)$")
_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_CARRIED = re.compile(r"iter_args\((.*?)\)")
_PAIR = re.compile(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)")
_ZERO = re.compile(r"^dense<(?:0\.0+e\+00|0)>")
_DOTS = ("tt.dot", "ttng.warp_group_dot")
#: The result of a dot of integers, whose sums are exact in every order.
_INTEGERS = re.compile(r"-> tensor<(?:\d+x)+i\d+[,>]")
#: Operations that hand on the value of the operand in the place of the result.
_SAME = frozenset(
    """ttg.convert_layout ttng.warp_group_dot_wait tt.broadcast tt.splat tt.expand_dims tt.reshape tt.trans""".split()
)
#: Operations on tensor memory that give a part of the memory of their first operand.
_SAME_MEMORY = frozenset(
    "ttg.memdesc_index ttg.memdesc_subslice ttg.memdesc_reinterpret ttng.tmem_subslice".split()
)
_ONE_OF = "one of"


@dataclasses.dataclass
class _Value:
    """How a value is made: ``operation`` of ``operands``; for what a loop carries or a branch yields, one of them."""

    operation: str
    operands: list[_Value]
    text: str = ""


def wrong_starts(ttgir: str) -> list[str]:
    """For every dot whose accumulator may be something else than zero or the result of a dot: what it may be."""
    reader = _Reader()
    for line in ttgir.splitlines():
        reader.read(line.strip())
    memory = {id(place) for accumulator in reader.memory for place in _places(accumulator)}
    stored = [value for value, at in reader.stores if any(id(place) in memory for place in _places(at))]
    accumulators = [*(dot.operands[2] for dot in reader.dots), *stored]
    found = [start for accumulator in accumulators for start in _starts(accumulator)]
    return [f"a dot whose accumulator starts as {start}, not as zero" for start in dict.fromkeys(found)]


def _starts(value: _Value, rescaled: frozenset[int] = frozenset()) -> Iterator[str]:
    """The operations that ``value`` may come from, other than zeros and dots.

    Of a product one side is the sum that is rescaled: either, since a constant zero moves to the right. ``rescaled``:
    products that are being looked at.
    """
    pending, seen = [value], set(rescaled)
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if value.operation in (_ONE_OF, *_SAME):
            pending += value.operands
        elif value.operation == "arith.select":
            pending += value.operands[1:]
        elif value.operation == "arith.mulf":
            inside = rescaled | {id(value)}
            left, right = ([*_starts(operand, inside)] for operand in value.operands)
            yield from left if right else ()
        elif value.operation not in (*_DOTS, "ttng.tmem_load") and not _is_zero(value):
            yield value.operation


def _places(memory: _Value) -> Iterator[_Value]:
    """The allocations that ``memory`` may be a part of."""
    pending, seen = [memory], set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if value.operation == _ONE_OF:
            pending += value.operands
        elif value.operation in _SAME_MEMORY:
            pending += value.operands[:1]
        else:
            yield value


def _is_zero(value: _Value) -> bool:
    return value.operation == "arith.constant" and _ZERO.match(value.text) is not None


@dataclasses.dataclass
class _Region:
    """A block inside an operation: the names that are known in it alone, and who receives what it yields."""

    names: dict[str, _Value] = dataclasses.field(default_factory=dict)
    results: list[_Value] = dataclasses.field(default_factory=list)
    carried: list[_Value] = dataclasses.field(default_factory=list)


class _Reader:
    """Reads a function line by line. A name means what the innermost region that knows it says: others reuse it."""

    def __init__(self) -> None:
        self.dots: list[_Value] = []
        #: Accumulators in tensor memory; (what is stored, where).
        self.memory: list[_Value] = []
        self.stores: list[tuple[_Value, _Value]] = []
        self._regions = [_Region()]

    def read(self, line: str) -> None:
        made = _RESULT.match(line)
        name, count, operation, rest = made.groups() if made else ("", None, *_parted(line))
        operands = [self._value(operand) for operand in _NAME.findall(rest.split(" : ")[0])]
        if line.startswith("}"):
            closed = self._regions.pop()
            if line.endswith("{"):  # another branch, for the same results
                self._regions.append(_Region(results=closed.results))
        elif operation == "scf.yield":
            region = self._regions[-1]
            for receivers in (region.results, region.carried):
                for receiver, operand in zip(receivers, operands, strict=False):
                    receiver.operands.append(operand)
        elif line.endswith("{"):
            self._open(name, count, operation, rest)
        elif operation in _SAME:
            self._name(name, count, [_Value(operation, [operand]) for operand in operands])
        else:
            value = _Value(operation, operands, rest)
            self._name(name, count, [value])
            self._note(value, operands)

    def _note(self, value: _Value, operands: list[_Value]) -> None:
        """Remember a dot, or a store to tensor memory."""
        if value.operation in _DOTS:
            self.dots += [] if _INTEGERS.search(value.text) else [value]
        elif value.operation == "ttng.tc_gen5_mma":
            self.memory.append(operands[2])
        elif value.operation == "ttng.tmem_store":
            self.stores.append((operands[0], operands[1]))
        elif value.operation == "ttng.tmem_alloc" and operands:
            self.stores.append((operands[0], value))

    def _open(self, name: str, count: str | None, operation: str, rest: str) -> None:
        carried = _CARRIED.search(rest) if operation == "scf.for" else None
        pairs = _PAIR.findall(carried[1]) if carried else []
        starts = [[self._value(start)] for _, start in pairs] or [[] for _ in range(int(count or 1))]
        made = _ONE_OF if operation in ("scf.for", "scf.if") else operation
        results = [_Value(made, [*start]) for start in starts] if name else []
        inside = [_Value(_ONE_OF, [*start]) for start in starts] if pairs else []
        self._name(name, count, results)
        names = {inner: value for (inner, _), value in zip(pairs, inside, strict=True)}
        self._regions.append(_Region(names, results, inside))

    def _name(self, name: str, count: str | None, values: list[_Value]) -> None:
        names = [name] if count is None else [f"{name}#{k}" for k in range(int(count))]
        self._regions[-1].names.update(zip(names, values, strict=False) if name else ())

    def _value(self, name: str) -> _Value:
        for region in reversed(self._regions):
            if name in region.names:
                return region.names[name]
        return _Value("an argument", [])


def _parted(line: str) -> tuple[str, str]:
    operation, _, rest = line.partition(" ")
    return operation, rest
