"""Where the rows of a tensor are: nowhere, along one dimension, or no longer apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import sympy
import torch


@dataclasses.dataclass(frozen=True)
class Cause:
    """An op through which one row can see another, with the user's source line; ``node``: its name in the graph."""

    op: str
    source: str
    reason: str
    node: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, [self.op, f"({self.reason})", self.source]))


@dataclasses.dataclass(frozen=True)
class Independent:
    """No row is in it: parameters, constants."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Row r is where ``index[dim] // inner % batch == r``: the dim has outer * batch * inner elements."""

    dim: int
    outer: int = 1
    inner: int = 1


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Elements may depend on several rows, because of ``causes``."""

    causes: tuple[Cause, ...]


Place: TypeAlias = Independent | Rows | Mixed
INDEPENDENT = Independent()


def expression(size: Any) -> Any:
    """A size as an int or a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def batches(size: Any, batch: sympy.Symbol) -> int | None:
    """k for a size of k * batch; None for one without the batch, and for what is no multiple of it."""
    quotient = sympy.sympify(expression(size)) / batch
    return int(quotient) if quotient.is_Integer and quotient != 0 else None


def reshaped(rows: Rows, before: Sequence[Any], after: Sequence[Any], batch: sympy.Symbol) -> Rows | None:
    """Where the rows are after a row-major view, or None if that cannot be told."""
    around = [size for dim, size in enumerate(before) if dim != rows.dim]
    if any(batches(size, batch) is not None for size in around):
        return None
    outer = math.prod(before[: rows.dim]) * rows.outer
    inner = math.prod(before[rows.dim + 1 :]) * rows.inner
    for dim, size in enumerate(after):
        count = batches(size, batch)
        if count is None:
            continue
        left, right = math.prod(after[:dim]), math.prod(after[dim + 1 :])
        if outer % left == 0 and inner % right == 0 and (outer // left) * (inner // right) == count:
            return Rows(dim, outer // left, inner // right)
        return None
    return None


def joined(places: Sequence[tuple[Place, int]], rank: int, cause: Cause) -> Place:
    """Of an elementwise op over operands with (place, rank), aligned from the right, and a result of ``rank``."""
    mixed = merged([place for place, _ in places])
    if mixed is not None:
        return mixed
    found = {
        dataclasses.replace(place, dim=place.dim + rank - own)
        for place, own in places
        if isinstance(place, Rows)
    }
    if len(found) > 1:
        return Mixed((cause,))
    return found.pop() if found else INDEPENDENT


def merged(places: Sequence[Place]) -> Mixed | None:
    """The causes of all mixed places, or None if none is mixed."""
    causes = [cause for place in places if isinstance(place, Mixed) for cause in place.causes]
    return Mixed(tuple(dict.fromkeys(causes))) if causes else None
