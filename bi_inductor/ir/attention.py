"""Attention found in terms: one output element, rebuilt from its scores in the order of the ATTENTION form.

From the term of an element its scores t_j and values v_j are read off, key by key. From these alone the state (m, sums,
acc) is computed once more, as ``runtime/attention.py`` states it: tile after tile, chunk after chunk, in every single
operation: what is rounded when, where a rescaling is applied, in which lane a probability is added. Both are simplified
by the rules of ``State``, and have to be one term.

The rules change no bit for finite scores and values. A hidden key has the score -inf and the probability 0; a tile or
chunk without a visible key multiplies by exp2(0) and adds 0. Running maxima are sets of scores, since a maximum, also
times a positive number, has no order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .terms import ADD, CONSTANT, DOT, INPUT, MULTIPLY, PAIR, Terms

_MINUS_INFINITY = ("-inf", "'0xFF800000'")
_LOWEST = -3.4e38
_EXP2, _FMA, _SUBTRACT, _ROUND = "math.exp2", "math.fma", "arith.subf", "arith.truncf"
#: (tile, near chunk, near keys, far chunk), as in ``contract.Attention``.
Shape = tuple[int, int, int, int]
Maximum = frozenset[int]


class OtherOrderError(ValueError):
    """The term is not built as attention is."""


@dataclasses.dataclass(frozen=True)
class Element:
    """One output element. Of its visible keys: ``products``, the dots in the scores, and ``values``."""

    sums: int
    maximum: Maximum
    products: tuple[int, ...]
    values: tuple[int, ...]


class State:
    """(m, sums, acc) as simplified terms, from the terms of a kernel or from scores and values.

    ``self.made`` holds the simplified terms; scores and values are numbers in the kernel's own table.
    """

    def __init__(self, terms: Terms) -> None:
        self.nodes = terms.nodes
        self.made = Terms()
        self.zero, self.one = self.made.constant(0.0), self.made.constant(1.0)
        self._simplified: dict[int, int] = {}

    # What the operations come to.

    def scale(self, before: Maximum, after: Maximum) -> int:
        """exp2(m - m')."""
        return self.one if before == after else self.made.one("scale", before, after)

    def probability(self, score: int, factor: int, maximum: Maximum) -> int:
        return self.zero if self.is_hidden(score) else self.made.one("p", score, factor, maximum)

    def plus(self, a: int, b: int) -> int:
        """Of sums of probabilities, which are not negative: 0 changes none."""
        return b if a == self.zero else a if b == self.zero else self.made.one("+", a, b)

    def times(self, a: int, scale: int) -> int:
        return a if a == self.zero or scale == self.one else self.made.one("*", a, scale)

    def joined(self, a: int, scale: int, b: int) -> int:
        """fma(a, scale, b)."""
        if a == self.zero:
            return b
        return a if scale == self.one and b == self.zero else self.made.one("fma", a, scale, b)

    def chain(self, kind: str, start: int, rounded: Sequence[tuple[str, int]], values: Sequence[int]) -> int:
        """A dot that goes on from ``start``; keys of probability 0 at its end add nothing."""
        steps = list(zip(rounded, values, strict=True))
        while steps and steps[-1][0][1] == self.zero:
            steps.pop()
        return self.made.one(kind, start, *steps) if steps else start

    # From the terms of a kernel.

    def is_hidden(self, number: int) -> bool:
        node = self.nodes[number]
        return node[0] == CONSTANT and node[1] in _MINUS_INFINITY

    def maximum(self, number: int) -> Maximum:
        """The scores whose maximum, times the factor, is the running maximum ``number``."""
        node = self.nodes[number]
        if node[0] in ("arith.maxnumf", "arith.maximumf"):
            return self.maximum(node[1]) | self.maximum(node[2])
        if node[0] == CONSTANT and float(node[1]) < _LOWEST:
            return frozenset()
        if node[0] == MULTIPLY:
            highest, factor = node[1:]
            kind, *scores = self.nodes[highest]
            if kind.startswith(("reduce:arith.maxnumf:", "reduce:arith.maximumf:")) and self._is_positive(
                factor
            ):
                return frozenset(score for score in scores if not self.is_hidden(score))
        raise OtherOrderError(f"a running maximum by {node[0]}")

    def scaled(self, a: int, b: int) -> tuple[int, int]:
        """(what is rescaled, the factor exp2(...)) of the two factors of a product, which Triton may exchange."""
        return (b, a) if self.nodes[a][0] == _EXP2 and self.nodes[b][0] != _EXP2 else (a, b)

    def simplified(self, number: int) -> int:
        """The sums or the accumulator ``number``."""
        if number not in self._simplified:
            self._simplified[number] = self._simplify(self.nodes[number])
        return self._simplified[number]

    def _simplify(self, node: tuple[Any, ...]) -> int:
        kind = node[0]
        if kind == CONSTANT and float(node[1]) == 0.0:
            return self.zero
        if kind in (ADD, PAIR + ADD):
            return self.plus(self.simplified(node[1]), self.simplified(node[2]))
        if kind == MULTIPLY:
            return self.times(*map(self.simplified, self.scaled(*node[1:])))
        if kind == _FMA:
            return self.joined(*map(self.simplified, (*self.scaled(*node[1:3]), node[3])))
        if kind == _EXP2:
            return self._simplify_exponential(self.nodes[node[1]])
        if kind.startswith(DOT):
            rounded = [self._rounded(p) for p in self.nodes[node[2]][1:]]
            return self.chain(kind, self.simplified(node[1]), rounded, self.nodes[node[3]][1:])
        raise OtherOrderError(f"{kind} in the sums of attention")

    def _simplify_exponential(self, exponent: tuple[Any, ...]) -> int:
        if exponent[0] == _SUBTRACT:
            return self.scale(self.maximum(exponent[1]), self.maximum(exponent[2]))
        if exponent[0] == _FMA:
            score, factor, negated = exponent[1:]
            kind, *operands = self.nodes[negated]
            is_negated = kind == "arith.negf" or (kind == _SUBTRACT and self._is_zero(operands[0]))
            if is_negated and self._is_positive(factor):
                return self.probability(score, factor, self.maximum(operands[-1]))
        raise OtherOrderError(f"exp2 of {exponent[0]}")

    def _rounded(self, number: int) -> tuple[str, int]:
        """(how it is rounded, probability) of an element of round(p)."""
        node = self.nodes[number]
        if node[0].startswith(_ROUND):
            return node[0], self.simplified(node[1])
        return "", self.simplified(number)

    def _is_zero(self, number: int) -> bool:
        node = self.nodes[number]
        return node[0] == CONSTANT and node[1] in ("0.0", "-0.0")

    def _is_positive(self, number: int) -> bool:
        node = self.nodes[number]
        return node[0] == CONSTANT and 0.0 < float(node[1]) < float("inf")

    # From scores and values.

    def stated(self, element: _Read, shape: Shape) -> tuple[int, int]:
        """(sums, acc) of the form for these scores and values."""
        joined, sums, acc = frozenset[int](), self.zero, self.zero
        for first, last in _stretches(len(element.scores), shape):
            highest, next_sums, next_acc = self._chunk(element, first, last, shape[0])
            both = joined | highest
            old, new = self.scale(joined, both), self.scale(highest, both)
            sums = self.joined(sums, old, self.times(next_sums, new))
            acc = self.joined(acc, old, self.times(next_acc, new))
            joined = both
        return sums, acc

    def _chunk(self, element: _Read, first: int, last: int, tile: int) -> tuple[Maximum, int, int]:
        m, lanes, acc = frozenset[int](), [self.zero] * 4, self.zero
        for start in range(first, last, tile):
            end = min(start + tile, last)
            highest = m | frozenset(element.scores[start:end])
            rescale = self.scale(m, highest)
            p = [self.probability(t, element.factor, highest) for t in element.scores[start:end]]
            rounded = [(element.rounding, each) for each in p]
            added = self._lane_sums(p + [self.zero] * (tile - len(p)))
            lanes = [
                self.plus(self.times(lane, rescale), new) for lane, new in zip(lanes, added, strict=True)
            ]
            acc = self.chain(element.dot, self.times(acc, rescale), rounded, element.values[start:end])
            m = highest
        return m, self.plus(self.plus(lanes[0], lanes[1]), self.plus(lanes[2], lanes[3])), acc

    def _lane_sums(self, p: list[int]) -> list[int]:
        """Of p[8 g + 2 i] + p[8 g + 2 i + 1] the tree over g, for i = 0, 1, 2, 3."""
        return [
            self._tree([self.plus(p[g + 2 * i], p[g + 2 * i + 1]) for g in range(0, len(p), 8)])
            for i in range(4)
        ]

    def _tree(self, terms: list[int]) -> int:
        while len(terms) > 1:
            terms = [self.plus(a, b) for a, b in zip(terms[::2], terms[1::2], strict=True)]
        return terms[0]


def _stretches(keys: int, shape: Shape) -> list[tuple[int, int]]:
    """(first key, last key + 1) of each chunk."""
    _, near_chunk, near_keys, far_chunk = shape
    starts = [*range(0, min(keys, near_keys), near_chunk), *range(near_keys, keys, far_chunk)]
    return list(zip(starts, [*starts[1:], keys], strict=True))


@dataclasses.dataclass(frozen=True)
class _Read:
    """What is read off an accumulator: scores and values of its visible keys, and how they are combined."""

    scores: tuple[int, ...]
    values: tuple[int, ...]
    factor: int
    rounding: str
    dot: str


class Attentions:
    """The attention in ``terms``. ``shapes``: of the forms of the graph."""

    def __init__(self, terms: Terms, shapes: frozenset[Shape]) -> None:
        self.nodes, self.shapes = terms.nodes, shapes
        self.state = State(terms)
        self._known: dict[int, tuple[Shape, Element] | None] = {}

    def parts(self, number: int) -> tuple[int, int] | None:
        """(acc, sums) if ``number`` is acc * (1 / sums, or 0 where the sums are 0)."""
        node = self.nodes[number]
        if node[0] != MULTIPLY or self.nodes[node[2]][0] != "arith.select":
            return None
        inverse = self.nodes[self.nodes[node[2]][3]]
        return (node[1], inverse[2]) if inverse[0] == "tt.precise_divf" else None

    def found(self, number: int) -> tuple[Shape, Element] | None:
        """The shape of the form whose order the output element ``number`` has, and the element; None if it has none."""
        if number not in self._known:
            parts = self.parts(number)
            try:
                self._known[number] = self._compared(*parts) if parts else None
            except OtherOrderError:
                self._known[number] = None
        return self._known[number]

    def _compared(self, acc: int, sums: int) -> tuple[Shape, Element] | None:
        read = self._read(acc)
        actual = self.state.simplified(sums), self.state.simplified(acc)
        for shape in self.shapes:
            if read.scores and self.state.stated(read, shape) == actual:
                products = tuple(map(self._product, read.scores))
                return shape, Element(sums, frozenset(read.scores), products, read.values)
        return None

    def _product(self, score: int) -> int:
        """The dot that a score is made of, beside a mask."""
        dots, pending = [], [score]
        while pending:
            number = pending.pop()
            node = self.nodes[number]
            if node[0].startswith(DOT):
                dots.append(number)
            elif node[0] not in (INPUT, CONSTANT, "unknown", "undefined"):
                pending += node[1:]
        if len(set(dots)) != 1:
            raise OtherOrderError(f"a score of {len(set(dots))} products")
        return dots[0]

    def _read(self, acc: int) -> _Read:
        scores: list[int] = []
        values: list[int] = []
        ways = set()
        for tile in [tile for chunk in self._chunks(acc) for tile in self._tiles(chunk)]:
            kind, _, row, column = self.nodes[tile]
            for p, v in zip(self.nodes[row][1:], self.nodes[column][1:], strict=True):
                rounding, exponential = self._exponential(p)
                score, factor, _ = self.nodes[exponential][1:]
                if not self.state.is_hidden(score):
                    ways.add((factor, rounding, kind))
                    scores.append(score)
                    values.append(v)
        if len(ways) > 1:
            raise OtherOrderError("keys of one row in several ways")
        return _Read(tuple(scores), tuple(values), *(ways.pop() if ways else (0, "", "")))

    def _chunks(self, acc: int) -> list[int]:
        """Accumulators of the chunks that were joined, from left to right."""
        found = []
        while self.nodes[acc][0] == _FMA:
            _, a, b, scaled = self.nodes[acc]
            acc = self.state.scaled(a, b)[0]
            found.append(self._unscaled(scaled))
        return [
            *([acc] if not self._is_nothing(acc) else []),
            *(k for k in reversed(found) if not self._is_nothing(k)),
        ]

    def _tiles(self, chunk: int) -> list[int]:
        """The dots of one chunk, from left to right."""
        found = []
        while self.nodes[chunk][0].startswith(DOT):
            found.append(chunk)
            chunk = self._unscaled(self.nodes[chunk][1])
        if not self._is_nothing(chunk):
            raise OtherOrderError("an accumulator that does not start at 0")
        return found[::-1]

    def _unscaled(self, number: int) -> int:
        node = self.nodes[number]
        return self.state.scaled(*node[1:])[0] if node[0] == MULTIPLY else number

    def _is_nothing(self, number: int) -> bool:
        node = self.nodes[number]
        return node[0] == CONSTANT and node[1] == "0.0"

    def _exponential(self, p: int) -> tuple[str, int]:
        """(how it is rounded, the fma inside exp2) of an element of round(p)."""
        node, rounding = self.nodes[p], ""
        if node[0].startswith(_ROUND):
            rounding, node = node[0], self.nodes[node[1]]
        if node[0] != _EXP2 or self.nodes[node[1]][0] != _FMA:
            raise OtherOrderError(f"a probability by {node[0]}")
        return rounding, node[1]
