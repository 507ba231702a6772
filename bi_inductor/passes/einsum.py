"""``einsum`` whose products follow the equation alone, contracted from left to right.

ATen's looks at which sizes are 1: a batch of one is then another graph than a batch of two. Here every pair is::

    both operands and the result have the label     batch of the product
    both have it, the result has not                contracted, in the order of the left operand
    one operand and the result have it              a row or a column
    only one operand has it                         summed before

so each output is one chain over the contracted labels (a product of elements, if there are none).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from bi_inductor.ops import composite

#: A letter of the equation, or a dim that an ellipsis stands for, numbered from its right.
Label = str


@composite("einsum(str equation, Tensor[] operands) -> Tensor")
def einsum(equation: str, operands: Sequence[Tensor]) -> Tensor:
    """Same results and shapes as ``torch.einsum(equation, *operands)``, whose checks it leaves to ATen."""
    parsed = _parsed(equation, operands)
    if parsed is None:
        return torch.ops.aten.einsum.default(equation, list(operands))
    inputs, output = parsed
    total, labels = operands[0], inputs[0]
    for place, (operand, own) in enumerate(zip(operands[1:], inputs[1:], strict=True), start=2):
        later = [label for other in inputs[place:] for label in other] + output
        kept = [label for label in dict.fromkeys(labels + own) if label in later]
        total, labels = _pair(total, labels, operand, own, kept if place < len(operands) else output)
    return total


def _parsed(equation: str, operands: Sequence[Tensor]) -> tuple[list[list[Label]], list[Label]] | None:
    """Labels of each operand and of the result; None where ATen is to judge: errors, diagonals, one operand."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands) or len(operands) < 2 or not re.fullmatch(r"[A-Za-z.,]*", left + right):
        return None
    ranks = [x.dim() - len(term.replace("...", "")) for term, x in zip(terms, operands, strict=True)]
    if any(rank < 0 or ("..." not in term and rank) for rank, term in zip(ranks, terms, strict=True)):
        return None
    inputs = [_labels(term, rank) for term, rank in zip(terms, ranks, strict=True)]
    spread = max(ranks)
    if not arrow:
        named = left.replace(",", "").replace(".", "")
        right = "..." + "".join(label for label in sorted(set(named)) if named.count(label) == 1)
    output = _labels(right, spread)
    known = {label for term in inputs for label in term}
    if any(len(set(term)) < len(term) for term in [*inputs, output]) or not set(output) <= known:
        return None
    return inputs, output


def _labels(term: str, spread: int) -> list[Label]:
    before, dots, after = term.partition("...")
    return [*before, *(f"{number}" for number in range(spread - 1, -1, -1) if dots), *after]


def _pair(
    a: Tensor, a_labels: list[Label], b: Tensor, b_labels: list[Label], output: list[Label]
) -> tuple[Tensor, list[Label]]:
    """The product of two operands, with the labels of ``output``."""
    a, a_labels = _summed(a, a_labels, {*b_labels, *output})
    b, b_labels = _summed(b, b_labels, {*a_labels, *output})
    both = [label for label in a_labels if label in b_labels]
    a, b = _spread(a, a_labels, b, b_labels, both), _spread(b, b_labels, a, a_labels, both)
    batch, contracted = ([x for x in both if (x in output) == kept] for kept in (True, False))
    rows, columns = ([x for x in labels if x not in both] for labels in (a_labels, b_labels))
    size = dict(zip(a_labels + b_labels, [*a.shape, *b.shape], strict=True))
    left = _grouped(a, a_labels, [batch, rows, contracted], size)
    right = _grouped(b, b_labels, [batch, contracted, columns], size)
    if not contracted:
        product = left * right
    elif batch:
        product = torch.bmm(left, right)
    else:
        product = torch.mm(left.squeeze(0), right.squeeze(0))
    made = [*batch, *rows, *columns]
    product = product.reshape([size[label] for label in made])
    return product.permute([made.index(label) for label in output]), output


def _summed(x: Tensor, labels: list[Label], needed: set[Label]) -> tuple[Tensor, list[Label]]:
    dims = [dim for dim, label in enumerate(labels) if label not in needed]
    return (x.sum(dims) if dims else x), [label for label in labels if label in needed]


def _spread(x: Tensor, labels: list[Label], other: Tensor, theirs: list[Label], both: list[Label]) -> Tensor:
    """``x`` with its dims of size 1 as long as those of ``other`` with the same label."""
    shape = [
        torch.broadcast_shapes((size,), (other.shape[theirs.index(label)],))[0] if label in both else size
        for size, label in zip(x.shape, labels, strict=True)
    ]
    return x.expand(shape)


def _grouped(x: Tensor, labels: list[Label], groups: list[list[Label]], size: dict[Label, int]) -> Tensor:
    """``x`` with one dim for each group of labels."""
    order = [labels.index(label) for group in groups for label in group]
    return x.permute(order).reshape([math.prod(size[label] for label in group) for group in groups])
