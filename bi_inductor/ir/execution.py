"""One program of a kernel executed on terms: sizes and addresses are numbers, what is loaded are terms.

Whatever the IR says about order is then in the terms: which two values an addition adds, in which chain a dot stands.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .terms import DOT, PAIR, Terms
from .text import Block, Operation


class UnsupportedError(ValueError):
    """Something that terms do not describe; the kernel is not looked into."""


@dataclasses.dataclass
class Pointer:
    """Addresses: elements of ``memory`` (numbers of terms) at ``offsets``."""

    memory: np.ndarray
    offsets: np.ndarray


@dataclasses.dataclass
class Descriptor:
    """A tensor in memory that is loaded block by block; what lies outside its shape is 0."""

    base: Pointer
    shape: list[int]
    strides: list[int]

    def addresses(self, starts: list[int], block: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(offsets, whether they are inside) of the block that starts at ``starts``."""
        offsets, inside = np.asarray(self.base.offsets), np.asarray(True)
        for axis, (start, extent) in enumerate(zip(starts, block, strict=True)):
            index = (start + np.arange(extent)).reshape([-1 if d == axis else 1 for d in range(len(block))])
            offsets = offsets + index * self.strides[axis]
            inside = inside & (index >= 0) & (index < self.shape[axis])
        return np.broadcast_to(offsets, block), np.broadcast_to(inside, block)


@dataclasses.dataclass
class Term:
    """An array of numbers of terms, told apart from an array of known integers."""

    numbers: np.ndarray


_INTEGERS: dict[str, Callable[[Any, Any], Any]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
    "arith.xori": operator.xor,
    "arith.shli": operator.lshift,
    "arith.shrsi": operator.rshift,
    "arith.minsi": np.minimum,
    "arith.maxsi": np.maximum,
    "arith.divsi": lambda a, b: np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)),
    "arith.remsi": lambda a, b: np.sign(a) * (np.abs(a) % np.abs(b)),
}
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "slt": operator.lt,
    "sle": operator.le,
    "sgt": operator.gt,
    "sge": operator.ge,
    "ult": operator.lt,
    "ule": operator.le,
}
#: Values that are the operand's, whatever is said about them.
_SAME = frozenset("arith.extsi arith.trunci arith.index_cast arith.extui".split())
_NOTHING = frozenset("tt.return scf.yield gpu.barrier llvm.intr.assume tt.assert tt.reduce.return".split())


class Program:
    """The execution of one block of operations with the values that are known so far."""

    def __init__(
        self, terms: Terms, program_id: tuple[int, int, int], grid: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        self.terms, self.program_id, self.grid = terms, program_id, grid
        self.values: dict[str, Any] = {}

    def run(self, block: Block) -> list[Any]:
        """Execute ``block``; returns what its last operation yields."""
        for operation in block.operations:
            if operation.name in _NOTHING:
                continue
            results = self._execute(operation)
            for name, value in zip(operation.results, results, strict=True):
                self.values[name] = value
        last = block.operations[-1] if block.operations else None
        return [self.values[name] for name in last.operands] if last and last.name in _NOTHING else []

    def _execute(self, op: Operation) -> list[Any]:
        method = getattr(self, "_" + op.name.replace(".", "_"), None)
        if method is not None:
            return method(op)
        operands = [self.values[name] for name in op.operands]
        if op.name in _INTEGERS and not any(isinstance(value, Term) for value in operands):
            return [_INTEGERS[op.name](*operands)]
        if op.name in _SAME and not isinstance(operands[0], Term):
            return [operands[0]]
        if op.name.startswith(
            (
                "arith.",
                "math.",
                "tt.precise_",
                "tt.extern_elementwise",
                "tt.fp_to_fp",
                "tt.clampf",
                "tt.bitcast",
            )
        ):
            return [self._term(self._spelled(op), operands)]
        raise UnsupportedError(op.name)

    def _spelled(self, op: Operation) -> str:
        """The name of an elementwise operation with what tells it from others: function, predicate, types."""
        symbol = re.search(r'symbol = "(\w+)"', op.text)
        predicate = re.match(r"arith\.cmp[if] (\w+),", op.text)
        parts = [op.name, symbol[1] if symbol else "", predicate[1] if predicate else ""]
        if op.name in (
            "arith.extf",
            "arith.truncf",
            "arith.sitofp",
            "arith.fptosi",
            "arith.bitcast",
            "tt.bitcast",
            "tt.fp_to_fp",
        ):
            parts.append(op.element)
        return ":".join(part for part in parts if part)

    def _term(self, name: str, operands: list[Any]) -> Term:
        return Term(self.terms.each(name, *(self.numbers(value) for value in operands)))

    def numbers(self, value: Any) -> np.ndarray:
        """``value`` as numbers of terms; known integers become constants."""
        if isinstance(value, Term):
            return value.numbers
        if isinstance(value, Pointer):
            raise UnsupportedError("a pointer as a value")
        array = np.asarray(value)
        unique, inverse = np.unique(array, return_inverse=True)
        made = np.array([self.terms.constant(v) for v in unique.tolist()], dtype=np.int64)
        return made[inverse.reshape(-1)].reshape(array.shape)

    # Values.

    def _arith_constant(self, op: Operation) -> list[Any]:
        match = re.match(r"arith\.constant (?:dense<(.*?)>|(\S+))", op.text)
        text = (match[1] or match[2]) if match else "?"
        if op.element.startswith(("f", "bf")):
            number = self.terms.constant(text if text.startswith("0x") else float(text))
            return [Term(np.full(op.shape, number, dtype=np.int64))]
        value = {"true": 1, "false": 0}.get(text)
        dtype = np.bool_ if op.element == "i1" or value is not None else np.int64
        return [np.full(op.shape, int(text) if value is None else value, dtype=dtype)]

    def _tt_get_program_id(self, op: Operation) -> list[Any]:
        return [np.int64(self.program_id["xyz".index(op.text.split()[1])])]

    def _tt_get_num_programs(self, op: Operation) -> list[Any]:
        return [np.int64(self.grid["xyz".index(op.text.split()[1])])]

    def _tt_make_range(self, op: Operation) -> list[Any]:
        start, end = (int(re.search(rf"{name} = (\d+)", op.text)[1]) for name in ("start", "end"))  # type: ignore
        return [np.arange(start, end, dtype=np.int64)]

    def _arith_cmpi(self, op: Operation) -> list[Any]:
        operands = [self.values[name] for name in op.operands]
        predicate = op.text.split()[1].rstrip(",")
        if any(isinstance(value, Term) for value in operands) or predicate not in _COMPARISONS:
            return [self._term(self._spelled(op), operands)]
        return [_COMPARISONS[predicate](*operands)]

    def _arith_select(self, op: Operation) -> list[Any]:
        condition, left, right = (self.values[name] for name in op.operands)
        if isinstance(condition, Term):
            return [self._chosen(op.name, condition, left, right)]
        if isinstance(left, Term) or isinstance(right, Term):
            return [Term(np.where(condition, self.numbers(left), self.numbers(right)))]
        if isinstance(left, Pointer):
            raise UnsupportedError("a choice between pointers")
        return [np.where(condition, left, right)]

    def _arith_andi(self, op: Operation) -> list[Any]:
        """Of a bool that is known and one that was loaded: false where the first is, else the second."""
        left, right = (self.values[name] for name in op.operands)
        if isinstance(left, Term) == isinstance(right, Term):
            return [
                self._term(op.name, [left, right]) if isinstance(left, Term) else operator.and_(left, right)
            ]
        known, loaded = (right, left) if isinstance(left, Term) else (left, right)
        if op.element != "i1":
            return [self._term(op.name, [left, right])]
        return [Term(np.where(known, loaded.numbers, self.terms.constant(False)))]

    def _chosen(self, name: str, condition: Term, left: Any, right: Any) -> Term:
        """A choice by what was loaded; the second where the condition is known to be false."""
        chosen = self._term(name, [condition, left, right]).numbers
        return Term(np.where(condition.numbers == self.terms.constant(False), self.numbers(right), chosen))

    # Shapes.

    def _shaped(self, op: Operation, change: Callable[[np.ndarray], np.ndarray]) -> list[Any]:
        value = self.values[op.operands[0]]
        if isinstance(value, Term):
            return [Term(change(value.numbers))]
        if isinstance(value, Pointer):
            return [Pointer(value.memory, change(value.offsets))]
        return [change(np.asarray(value))]

    def _tt_splat(self, op: Operation) -> list[Any]:
        return self._shaped(op, lambda x: np.broadcast_to(x, op.shape))

    def _tt_broadcast(self, op: Operation) -> list[Any]:
        return self._shaped(op, lambda x: np.broadcast_to(x, op.shape))

    def _tt_expand_dims(self, op: Operation) -> list[Any]:
        return self._shaped(op, lambda x: x.reshape(op.shape))

    def _tt_reshape(self, op: Operation) -> list[Any]:
        if "allow_reorder" in op.text:
            raise UnsupportedError("a reshape that may reorder")
        return self._shaped(op, lambda x: x.reshape(op.shape))

    def _tt_trans(self, op: Operation) -> list[Any]:
        order = re.search(r"order = array<i32: ([\d, ]+)>", op.text)
        if order is None:
            raise UnsupportedError(op.text)
        return self._shaped(op, lambda x: x.transpose([int(k) for k in order[1].split(",")]))

    # Memory.

    def _tt_addptr(self, op: Operation) -> list[Any]:
        pointer, offsets = (self.values[name] for name in op.operands)
        if isinstance(offsets, Term):
            raise UnsupportedError("an address that was loaded")
        return [Pointer(pointer.memory, pointer.offsets + offsets)]

    def _tt_bitcast(self, op: Operation) -> list[Any]:
        """Of a pointer to bools, which are loaded as bytes; of values it is an operation like others."""
        value = self.values[op.operands[0]]
        return [value if isinstance(value, Pointer) else self._term(self._spelled(op), [value])]

    def _tt_load(self, op: Operation) -> list[Any]:
        pointer, *rest = (self.values[name] for name in op.operands)
        mask = rest[0] if rest else np.True_
        if isinstance(mask, Term) or not isinstance(pointer, Pointer):
            raise UnsupportedError("a load under a condition that was loaded")
        inside = np.broadcast_to(mask, pointer.offsets.shape)
        if np.any(inside & ((pointer.offsets < 0) | (pointer.offsets >= len(pointer.memory)))):
            raise UnsupportedError("an address outside its buffer")
        loaded = (
            pointer.memory[np.where(inside, pointer.offsets, 0)] if len(pointer.memory) else pointer.offsets
        )
        other = self.numbers(rest[1]) if len(rest) > 1 else np.int64(self.terms.one("undefined"))
        return [Term(np.where(inside, loaded, other))]

    def _tt_store(self, op: Operation) -> list[Any]:
        pointer, value, *rest = (self.values[name] for name in op.operands)
        mask = rest[0] if rest else np.True_
        if isinstance(mask, Term) or not isinstance(pointer, Pointer):
            raise UnsupportedError("a store under a condition that was loaded")
        inside = np.broadcast_to(mask, pointer.offsets.shape)
        values = np.broadcast_to(self.numbers(value), pointer.offsets.shape)
        pointer.memory[pointer.offsets[inside]] = values[inside]
        return []

    def _tt_make_tensor_descriptor(self, op: Operation) -> list[Any]:
        pointer, *sizes = (self.values[name] for name in op.operands)
        numbers = [int(size) for size in sizes]
        rank = len(numbers) // 2
        return [Descriptor(pointer, numbers[:rank], numbers[rank:])]

    def _tt_descriptor_load(self, op: Operation) -> list[Any]:
        descriptor, *starts = (self.values[name] for name in op.operands)
        offsets, inside = descriptor.addresses([int(start) for start in starts], op.shape)
        loaded = descriptor.base.memory[np.where(inside, offsets, 0)]
        return [Term(np.where(inside, loaded, self.terms.constant(0.0)))]

    def _tt_descriptor_store(self, op: Operation) -> list[Any]:
        descriptor, *starts, value = (self.values[name] for name in op.operands)
        values = self.numbers(value)
        offsets, inside = descriptor.addresses([int(start) for start in starts], values.shape)
        descriptor.base.memory[offsets[inside]] = values[inside]
        return []

    # Sums.

    def _tt_reduce(self, op: Operation) -> list[Any]:
        axis = int(re.search(r"axis = (\d+)", op.text)[1])  # type: ignore[index]
        operands = [self.numbers(self.values[name]) for name in op.operands]
        body = op.regions[0]
        if operands[0].shape[axis] == 1:
            return [Term(np.squeeze(x, axis)) for x in operands]
        if operands[0].shape[axis] == 2:
            return self._pairs(body, [np.moveaxis(x, axis, -1) for x in operands])
        # More than two at once: the compiler's order. One term says so.
        names = "+".join(operation.name for operation in body.operations[:-1])
        columns = [c for x in operands for c in np.moveaxis(x, axis, 0)]
        return [Term(self.terms.each(f"reduce:{names}:{k}", *columns)) for k in range(len(op.results))]

    def _pairs(self, body: Block, operands: list[np.ndarray]) -> list[Any]:
        inner = Program(self.terms, self.program_id, self.grid)
        inner.values = dict(self.values)
        halves = [Term(x[..., side]) for side in (0, 1) for x in operands]
        inner.values.update(zip(body.arguments, halves, strict=True))
        if [op.name for op in body.operations[:-1]] in (["arith.addf"], ["arith.mulf"]):
            return [Term(self.terms.each(PAIR + body.operations[0].name, *(half.numbers for half in halves)))]
        return inner.run(body)

    def _tt_dot(self, op: Operation) -> list[Any]:
        a, b, total = (self.numbers(self.values[name]) for name in op.operands[:3])
        if a.ndim != 2:
            raise UnsupportedError("a dot of three dimensions")
        precision = re.search(r"inputPrecision = (\w+)", op.text)
        rows, columns = self.terms.rows(a), self.terms.rows(b.T)
        name = DOT + (precision[1] if precision else "ieee")
        return [Term(self.terms.each(name, total, rows[:, None], columns[None, :]))]

    # Control.

    def _scf_for(self, op: Operation) -> list[Any]:
        start, end, step, *carried = (self.values[name] for name in op.operands)
        if isinstance(start, Term) or isinstance(end, Term):
            raise UnsupportedError("a loop whose bounds were loaded")
        block = op.regions[0]
        for position in range(int(start), int(end), int(step)):
            self.values[block.arguments[0]] = np.int64(position)
            self.values.update(zip(block.arguments[1:], carried, strict=True))
            carried = self.run(block)
        return carried[: len(op.results)]

    def _scf_if(self, op: Operation) -> list[Any]:
        condition = self.values[op.operands[0]]
        if isinstance(condition, Term):
            raise UnsupportedError("a branch on what was loaded")
        taken = 0 if bool(condition) else 1
        return self.run(op.regions[taken])[: len(op.results)] if taken < len(op.regions) else []
