"""Sums found in terms: addition trees, chains of dots and attention, compared with the canonical forms of a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ..sum_tree import SumTree, contract_tree
from .attention import Attentions, Maximum
from .terms import ADD, CONSTANT, DOT, INPUT, MULTIPLY, PAIR, Terms

#: A combine's name in forms -> (as an operation, as a two-element reduction, what changes nothing).
_COMBINES = {"sum": (ADD, PAIR + ADD, ("0.0", "-0.0")), "prod": (MULTIPLY, PAIR + MULTIPLY, ("1.0",))}


@dataclasses.dataclass
class Found:
    """What was found: sums and products that have a form's order, as (combine or "chain", length), and what has not."""

    proven: set[tuple[str, Any]] = dataclasses.field(default_factory=set)
    wrong: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """One chunk of a product, and what its sum is multiplied by before it is added."""

    starts_at_zero: bool
    products: list[tuple[int, int]]
    scales: list[int]


class Orders:
    """Looks through the terms behind ``roots``. ``forms``: (combine or "chain", length) of the graph."""

    def __init__(self, terms: Terms, forms: set[tuple[str, Any]]) -> None:
        self.nodes, self.forms = terms.nodes, forms
        self.attentions = Attentions(terms, frozenset(shape for kind, shape in forms if kind == "attention"))
        self._chunk_shapes = frozenset(shape for kind, shape in forms if kind == "chunks")
        self.found = Found()
        self._kinds: dict[int, str | None] = {}
        self._seen: set[int] = set()
        self._addresses: dict[int, tuple[tuple[Any, int], ...]] = {}

    def look(self, roots: Iterable[int]) -> Found:
        """Walk from ``roots`` down; a sum is looked at as a whole, and then its terms are walked."""
        pending = list(dict.fromkeys(roots))
        if self.attentions.shapes:
            self._leave_out_sums_of_attention(pending)
        while pending:
            number = pending.pop()
            if number in self._seen:
                continue
            self._seen.add(number)
            pending += self._below(number)
        return self.found

    def _below(self, number: int) -> Sequence[int]:
        node = self.nodes[number]
        if node[0] in (INPUT, CONSTANT, "unknown", "undefined"):
            return ()
        if node[0].startswith(DOT):
            return self._look_at_chain(number)
        if self.attentions.shapes and self.attentions.parts(number) is not None:
            return self._look_at_attention(number)
        if (chunks := self._chunks(number)) is not None:
            return self._look_at_chunks(chunks)
        kind = self._kind(number)
        if kind is not None:
            return self._look_at_sum(number, kind)
        if node[0].startswith("reduce:") and (ADD in node[0] or MULTIPLY in node[0]):
            self.found.wrong.append(f"{len(node) - 1} values reduced at once, in the compiler's order")
        return node[1:]

    # Trees.

    def _kind(self, number: int) -> str | None:
        """ "sum" or "prod" if the term is made by ordered pairs, or adds such terms."""
        if number in self._kinds:
            return self._kinds[number]
        for combine, (plain, pair, neutral) in _COMBINES.items():
            stack = [number]
            while stack:  # children before parents; sums are deep where a stack is folded
                top = stack[-1]
                node = self.nodes[top]
                if top in self._kinds and self._kinds[top] is not None:
                    stack.pop()
                    continue
                if node[0] == pair:
                    self._kinds[top] = combine
                    stack.pop()
                elif node[0] == plain and len(node) == 3:
                    below = [k for k in node[1:] if not self._is_neutral(k, neutral)]
                    unknown = [k for k in below if k not in self._kinds]
                    if unknown:
                        stack += unknown
                        continue
                    kinds = {self._kinds[k] for k in below}
                    self._kinds[top] = combine if kinds == {combine} else None
                    stack.pop()
                else:
                    self._kinds.setdefault(top, None)
                    stack.pop()
            if self._kinds.get(number) is not None:
                return self._kinds[number]
            if self.nodes[number][0] in (plain, pair):
                break
        return self._kinds.get(number)

    def _is_neutral(self, number: int, neutral: tuple[str, ...]) -> bool:
        node = self.nodes[number]
        return node[0] == CONSTANT and node[1] in neutral

    def _is_finished(self, number: int, plain: str, neutral: tuple[str, ...]) -> bool:
        node = self.nodes[number]
        return node[0] == plain and any(self._is_neutral(k, neutral) for k in node[1:])

    def _look_at_sum(self, number: int, combine: str) -> Sequence[int]:
        """A sum in chunks has partial sums as terms of its last tree; a sum of sums has finished ones (``+ 0.0``).

        A partial sum of one looped block looks finished too, so both readings are tried.
        """
        terms = 0
        for through_finished in (True, False):
            leaves, tree = self._tree(number, combine, through_finished)
            if tree is None:  # one term and zeros
                return leaves
            terms = tree.terms
            if (
                (combine, tree.terms) in self.forms
                and tree == contract_tree(tree.terms)
                and self._ascend(leaves)
            ):
                self.found.proven.add((combine, tree.terms))
                return leaves
        if self.nodes[number][0] == _COMBINES[combine][0]:  # an op of the graph may add two sums
            return self.nodes[number][1:]
        what = "in the order of a form" if (combine, terms) in self.forms else "of a form's length"
        self.found.wrong.append(f"a {combine} of {terms} terms, not {what}")
        return leaves

    def _tree(self, number: int, combine: str, through_finished: bool) -> tuple[list[int], SumTree | None]:
        """Terms of a sum from left to right, and its order; what changes nothing is left out."""
        plain, pair, neutral = _COMBINES[combine]
        leaves: list[int] = []
        ends: set[int] = set()
        nodes: list[tuple[int, ...]] = []
        results: list[int | None] = []  # positions, made final when the number of leaves is known
        pending: list[tuple[int, bool]] = [(number, False)]
        while pending:
            at, done = pending.pop()
            node = self.nodes[at]
            if done:
                right, left = results.pop(), results.pop()
                if left is None or right is None:
                    results.append(right if left is None else left)
                else:
                    nodes.append((left, right))
                    results.append(-len(nodes))
            elif at not in ends and (node[0] == pair or (node[0] == plain and self._kind(at) == combine)):
                below = [(k, False) for k in (node[2], node[1])]
                if node[0] == pair and not through_finished:
                    for k in (node[1], node[2]):
                        if self._is_finished(k, plain, neutral):
                            ends.add(k)
                pending += [(at, True), *below]
            elif self._is_neutral(at, neutral):
                results.append(None)
            else:
                results.append(len(leaves))
                leaves.append(at)
        if len(leaves) < 2:
            return leaves, None
        terms = len(leaves)
        final = tuple(tuple(k if k >= 0 else terms - 1 - k for k in children) for children in nodes)
        return leaves, SumTree(terms, final)

    # Chains.

    def _look_at_chain(self, number: int) -> Sequence[int]:
        pairs: list[tuple[int, int]] = []
        at, steps = number, []
        while self.nodes[at][0].startswith(DOT):
            steps.append(self.nodes[at])
            at = self.nodes[at][1]
        for step in reversed(steps):
            pairs += zip(self.nodes[step[2]][1:], self.nodes[step[3]][1:], strict=True)
        while pairs and all(self._is_neutral(k, ("0.0",)) for k in pairs[-1]):
            pairs.pop()
        left, right = [a for a, _ in pairs], [b for _, b in pairs]
        starts_at_zero = self._is_neutral(at, ("0.0",))
        one_kind = len({step[0] for step in steps}) == 1
        forms = self._forms_of_a_chain(len(pairs))
        if starts_at_zero and one_kind and forms and self._ascend(left) and self._ascend(right):
            self.found.proven.update(forms)
        else:
            start = "" if starts_at_zero else ", which does not start at 0"
            self.found.wrong.append(
                f"a chain of {len(pairs)} products{start}, not a form's, or not ascending"
            )
        return [at, *left, *right]

    def _forms_of_a_chain(self, length: int) -> set[tuple[str, Any]]:
        """A chain, or the only chunk of a product that has no more."""
        alone = {
            ("chunks", shape)
            for shape in self._chunk_shapes
            if shape[0] == length <= shape[1] and not shape[2]
        }
        return alone | ({("chain", length)} & self.forms)

    # Chunks.

    def _chunks(self, number: int) -> list[_Chunk] | None:
        """The chunks from left to right, if ``number`` is 0 + chunk + chunk ...; else None."""
        found: list[_Chunk] = []
        while self._chunk_shapes and self.nodes[number][0] == ADD:
            _, number, dot = self.nodes[number]
            scales: list[int] = []
            while self.nodes[dot][0] == MULTIPLY:
                _, dot, scale = self.nodes[dot]
                scales.insert(0, scale)
            if not self.nodes[dot][0].startswith(DOT):
                return None
            found.insert(
                0, _Chunk(self._is_neutral(self.nodes[dot][1], ("0.0",)), self._products(dot), scales)
            )
        return found if found and self._is_neutral(number, ("0.0",)) else None

    def _look_at_chunks(self, chunks: list[_Chunk]) -> Sequence[int]:
        """Which of two scales is a's is not seen; that each chunk has two is."""
        left, right = ([pair[side] for chunk in chunks for pair in chunk.products] for side in (0, 1))
        lengths = [len(chunk.products) for chunk in chunks]
        scales = {len(chunk.scales) for chunk in chunks}
        is_ordered = (
            all(chunk.starts_at_zero for chunk in chunks) and self._ascend(left) and self._ascend(right)
        )
        for length, chunk, scaled in self._chunk_shapes if is_ordered else ():
            if lengths == _stretches(length, chunk) and scales == {2 if scaled else 0}:
                self.found.proven.add(("chunks", (length, chunk, scaled)))
                break
        else:
            self.found.wrong.append(f"chunks of {lengths} products, not a form's, or not ascending")
        return [*left, *right, *(scale for chunk in chunks for scale in chunk.scales)]

    def _products(self, dot: int) -> list[tuple[int, int]]:
        """The pairs that one dot multiplies, without the zeros behind them."""
        _, _, row, column = self.nodes[dot]
        pairs = list(zip(self.nodes[row][1:], self.nodes[column][1:], strict=True))
        while pairs and all(self._is_neutral(k, ("0.0",)) for k in pairs[-1]):
            pairs.pop()
        return pairs

    # Attention.

    def _look_at_attention(self, number: int) -> Sequence[int]:
        """An output element: its sums and scores have been looked at with it. Goes on with queries, keys and values."""
        found = self.attentions.found(number)
        if found is None:
            self.found.wrong.append("attention in the order of no form of the graph")
            return ()
        shape, element = found
        keys = [self.nodes[self.nodes[product][3]][1] for product in element.products]
        if not all(map(self._is_chain, element.products)):
            self.found.wrong.append("a score of attention that is no chain from 0, or not ascending")
        elif not (self._ascend(list(element.values)) and self._ascend(keys)):
            self.found.wrong.append("attention to keys that do not count up")
        else:
            self.found.proven.add(("attention", shape))
        below = [
            k
            for product in element.products
            for side in self.nodes[product][2:]
            for k in self.nodes[side][1:]
        ]
        return [*dict.fromkeys(below), *element.values]

    def _is_chain(self, product: int) -> bool:
        """True for one dot that starts at 0, both of its sides counting up; zeros behind them are left out."""
        _, start, row, column = self.nodes[product]
        sides = []
        for side in (row, column):
            elements = list(self.nodes[side][1:])
            while elements and self._is_neutral(elements[-1], ("0.0",)):
                elements.pop()
            sides.append(elements)
        return self._is_neutral(start, ("0.0",)) and all(
            len(side) > 0 and self._ascend(side) for side in sides
        )

    def _leave_out_sums_of_attention(self, roots: list[int]) -> None:
        """Sums and scores that belong to an output element are looked at with that, and not by themselves.

        The logsumexp of a row, m + log2(sums), has to be that of the same state.
        """
        maxima: dict[int, Maximum] = {}
        logarithms = []
        for number in self._behind(roots):
            found = self.attentions.found(number)
            if found is not None:
                maxima[found[1].sums] = found[1].maximum
                self._seen.update((found[1].sums, *found[1].products))
            if self.nodes[number][0] == ADD and self.nodes[self.nodes[number][2]][0] == "math.log2":
                logarithms.append(number)
        for number in logarithms:
            _, highest, logarithm = self.nodes[number]
            sums = self.nodes[logarithm][1]
            if sums in maxima and self.attentions.state.maximum(highest) != maxima[sums]:
                self.found.wrong.append("a logsumexp of attention with another maximum than its sums")

    def _behind(self, roots: Iterable[int]) -> list[int]:
        """Every term that ``roots`` are made of."""
        seen = set(roots)
        pending = list(seen)
        while pending:
            node = self.nodes[pending.pop()]
            if node[0] not in (INPUT, CONSTANT, "unknown", "undefined"):
                new = set(node[1:]) - seen
                seen |= new
                pending += new
        return sorted(seen)

    # The order of the terms of a sum.

    def _ascend(self, leaves: list[int]) -> bool:
        """True if some buffer is read once by every term, at addresses that count up, in one loop or nested ones."""
        reads = [dict(self._reads(leaf)) for leaf in leaves]
        shared = set(reads[0]).intersection(*reads[1:])
        return any(_counts_up([read[buffer] for read in reads]) for buffer in shared)

    def _reads(self, number: int) -> tuple[tuple[Any, int], ...]:
        """(buffer, address) of what a term reads itself, not through a sum. Of a buffer read twice nothing is said.

        A product of matrices stands for the first elements of its row and its column, attention for those of its query
        and of its first value, in one number.
        """
        if number in self._addresses:
            return self._addresses[number]
        found: dict[Any, set[int]] = {}
        pending, seen = [number], {number}
        while pending:
            below = pending.pop()
            node = self.nodes[below]
            if node[0] in (INPUT, "unknown"):
                found.setdefault(node[:-1], set()).add(node[-1])
            elif node[0].startswith(DOT):
                for side, vector in (("row", node[2]), ("column", node[3])):
                    for buffer, at in self._reads(self.nodes[vector][1]):
                        found.setdefault((side, buffer), set()).add(at)
            elif self.attentions.shapes and self.attentions.parts(below) is not None:
                for buffer, at in self._reads_of_attention(below):
                    found.setdefault(buffer, set()).add(at)
            elif node[0].startswith(PAIR):  # a sum stands for its first term
                for buffer, at in self._reads(node[1]):
                    found.setdefault(("sum", buffer), set()).add(at)
            elif node[0] != CONSTANT and not node[0].startswith("reduce:"):
                new = [k for k in node[1:] if k not in seen]
                seen.update(new)
                pending += new
        self._addresses[number] = reads = tuple(
            (buffer, min(at)) for buffer, at in found.items() if len(at) == 1
        )
        return reads

    def _reads_of_attention(self, number: int) -> list[tuple[Any, int]]:
        found = self.attentions.found(number)
        if found is None:
            return []
        element = found[1]
        query = self.nodes[self.nodes[element.products[0]][2]][1]
        return [
            (("attention", query_buffer, value_buffer), (row << 32) + column)
            for query_buffer, row in self._reads(query)
            for value_buffer, column in self._reads(element.values[0])
        ]


def _stretches(length: int, chunk: int) -> list[int]:
    """Lengths of the chunks of ``length`` products."""
    return [min(chunk, length - start) for start in range(0, length, chunk)]


def _counts_up(addresses: list[int]) -> bool:
    """True for 0, s, 2 s, ... and for blocks of such, whose beginnings count up in the same way."""
    if len(addresses) < 2:
        return True
    step = addresses[1] - addresses[0]
    if step <= 0:
        return False
    length = next(
        (k for k in range(1, len(addresses)) if addresses[k] - addresses[k - 1] != step), len(addresses)
    )
    if length == len(addresses):
        return True
    if len(addresses) % length:
        return False
    first = [address - addresses[0] for address in addresses[:length]]
    starts = addresses[::length]
    blocks = all(
        [a - s for a in addresses[k * length : (k + 1) * length]] == first for k, s in enumerate(starts)
    )
    return blocks and _counts_up(starts)
