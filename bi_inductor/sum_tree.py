"""``SumTree``: an order of additions as a value that can be compared, drawn and executed.

Only what bits can show is in it. Addition commutes, so the children of a node have no order; adding a zero
changes nothing, so an accumulator that starts from 0, padding with 0 and a final ``+ 0.0`` leave no trace: a chain
from 0 over x0, x1, x2 and the tree (x0 + x1) + x2 are one value. A node with more than two children stands for
terms that one instruction adds together, as the multi-term adders of tensor cores do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import contract


@dataclasses.dataclass(frozen=True)
class SumTree:
    """The order in which ``terms`` numbers x0, x1, ... are added.

    ``nodes``: for each addition the ids of what it adds; ids below ``terms`` are the numbers themselves, id
    ``terms + k`` is the result of ``nodes[k]``. Nodes may be given in any order that puts children first; they
    are kept in a canonical one, so trees are equal exactly if their orders are. ``accumulator`` is the dtype in which
    the tree was seen to reproduce the function's bits, or None; it takes no part in comparisons.

    Raises ValueError if this is not one tree over all terms.
    """

    terms: int
    nodes: tuple[tuple[int, ...], ...]
    accumulator: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", _canonical(self.terms, self.nodes))

    def __str__(self) -> str:
        from .drawing import draw_text

        return draw_text(self)

    def svg(self, title: str = "") -> str:
        """The tree as the text of an SVG picture; ``drawing.draw_svg`` puts several beside each other."""
        from .drawing import draw_svg

        return draw_svg([(title, self)])

    def to_json(self) -> dict[str, object]:
        """Plain values: ``terms``, ``depth``, ``accumulator`` and ``nodes`` (lists of ids, as above)."""
        nodes = [list(children) for children in self.nodes]
        return {"terms": self.terms, "depth": self.depth, "accumulator": self.accumulator, "nodes": nodes}

    @property
    def root(self) -> int:
        """The id of the result."""
        return self.terms + len(self.nodes) - 1

    @property
    def depth(self) -> int:
        """The most additions that any term passes through."""
        return self.heights()[-1]

    @property
    def is_binary(self) -> bool:
        """True if every addition adds two numbers, so that the tree determines every bit."""
        return all(len(children) == 2 for children in self.nodes)

    def children(self, node: int) -> tuple[int, ...]:
        """What ``node`` adds; empty for a term."""
        return self.nodes[node - self.terms] if node >= self.terms else ()

    def heights(self) -> list[int]:
        """For each id the longest way down to a term."""
        heights = [0] * self.terms
        for children in self.nodes:
            heights.append(1 + max(heights[child] for child in children))
        return heights

    def sizes(self) -> list[int]:
        """For each id the number of terms below it."""
        sizes = [1] * self.terms
        for children in self.nodes:
            sizes.append(sum(sizes[child] for child in children))
        return sizes

    def add(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """``values`` [..., terms] added in this order, each addition rounded to ``dtype``; [...] of ``dtype``.

        Raises ValueError for a tree that is not binary: how a multi-term adder rounds is not in the tree.
        """
        if not self.is_binary:
            raise ValueError("a node of three or more terms does not say how their sum is rounded")
        results = list(values.to(dtype).unbind(-1))
        for left, right in self.nodes:
            results.append(results[left] + results[right])
        return results[-1]


def _canonical(terms: int, nodes: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """``nodes`` ordered by (size, lowest term), children by lowest term: one spelling for each tree."""
    if terms < 1:
        raise ValueError(f"a sum needs at least one term, not {terms}")
    nodes = [tuple(children) for children in nodes]
    sizes, lowest, used = [1] * terms, list(range(terms)), [False] * terms
    for children in nodes:
        if len(children) < 2 or not all(0 <= child < len(used) and not used[child] for child in children):
            raise ValueError(f"{children} does not add two or more results that are still to be added")
        for child in children:
            if used[child]:
                raise ValueError(f"{children} adds one result twice")
            used[child] = True
        sizes.append(sum(sizes[child] for child in children))
        lowest.append(min(lowest[child] for child in children))
        used.append(False)
    if used.count(False) != 1:
        raise ValueError(f"{used.count(False)} results are left over; one tree leaves one")
    order = sorted(range(len(nodes)), key=lambda k: (sizes[terms + k], lowest[terms + k]))
    new_id = {terms + k: terms + position for position, k in enumerate(order)}
    return tuple(
        tuple(new_id.get(child, child) for child in sorted(nodes[k], key=lowest.__getitem__)) for k in order
    )


def contract_tree(terms: int) -> SumTree:
    """The contract's order of sums: aligned pairs, ``((x0 + x1) + (x2 + x3)) + ...``, padded with zeros."""
    nodes: list[tuple[int, ...]] = []
    level = list(range(terms))
    while len(level) > 1:
        pairs = [tuple(level[k : k + 2]) for k in range(0, len(level), 2)]
        level = []
        for pair in pairs:  # a last one without a partner meets only zeros
            level.append(pair[0] if len(pair) == 1 else terms + len(nodes))
            nodes += [pair] if len(pair) == 2 else []
    return SumTree(terms, tuple(nodes))


def chain(terms: int) -> SumTree:
    """The contract's order of matrix products: one accumulator, ascending, ``((x0 + x1) + x2) + ...``."""
    return SumTree(terms, tuple((0 if k == 1 else terms + k - 2, k) for k in range(1, terms)))


def tree_of(form: contract.Form) -> SumTree:
    """What a sum in the canonical ``form`` (a ``contract.Tree`` or ``contract.Chain``) looks like from outside.

    Raises ValueError for a form without an order or with a symbolic length.
    """
    maker = {contract.Tree: contract_tree, contract.Chain: chain}.get(type(form))
    length = getattr(form, "length", None)
    if maker is None or length is None or not str(length).isdigit():
        raise ValueError(f"{form} is not an order over a known number of terms")
    return dataclasses.replace(maker(int(length)), accumulator=form.accumulator)
