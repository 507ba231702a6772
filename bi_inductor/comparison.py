"""``compare``: two variants of a function run on the same inputs, and the first op whose bits differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .testing import bits, same_bits, ulp_distance
from .variants import BACKENDS, Run, Value, Variant, run


@dataclasses.dataclass(frozen=True)
class Parting:
    """An op whose results differ: its node in Dynamo's graph, its name, the user's line, and by how much.

    ``changed`` of ``elements`` differ in bits, by up to ``ulp`` representable values and ``largest`` in value.
    """

    node: str
    op: str
    source: str
    changed: int
    elements: int
    ulp: int
    largest: float

    def __str__(self) -> str:
        where = f"  {self.source}" if self.source else ""
        return (
            f"{self.node} ({self.op}): {self.changed} of {self.elements} elements, up to {self.ulp} ulp, "
            f"{self.largest:.2g}{where}"
        )


@dataclasses.dataclass(frozen=True)
class Compared:
    """What ``compare`` found; true if no bit differs.

    ``first``: the first op whose bits differ, or None. ``compared``: how many values were compared. ``unlike``: nodes
    whose shapes do not fit, for instance because they mix rows. ``unfaithful``: variants whose outputs change if their
    values are kept; for these ``first`` may name another op than the plain graph would.
    """

    first: Parting | None
    compared: int
    reason: str = ""
    unlike: tuple[str, ...] = ()
    unfaithful: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.first is None and not self.reason

    def __str__(self) -> str:
        if self.reason:
            lines = [self.reason]
        elif self.first is None:
            lines = [f"no bit differs in {self.compared} values"]
        else:
            lines = [f"the first op whose bits differ is {self.first}"]
        if self.unlike:
            lines.append(f"not compared, since their shapes do not fit: {', '.join(self.unlike)}")
        lines += [
            f"{name} computes other outputs when its intermediate results are kept: the op may be another one without"
            for name in self.unfaithful
        ]
        return "\n".join(lines)


def compare(
    a: Variant | Callable[..., Any], b: Variant | Callable[..., Any], *args: Any, **kwargs: Any
) -> Compared:
    """Run two variants on ``args`` and ``kwargs`` and name the first op of the user's code whose bits differ.

    ``a``, ``b``: variants, or functions to be run by batchinv. A variant with ``rows`` gets those rows of every tensor
    argument whose dimension 0 is the batch, that is the size of the first tensor's; only rows that both have are
    compared. Values are compared in the order of Dynamo's graph, op by op; see ``variants.py`` for what that means for
    stock Inductor. In-place ops show the last value of a tensor.

    >>> compare(Variant(model, "inductor"), Variant(model, "batchinv"), x)  # stock against ours
    >>> compare(Variant(model, "inductor", rows=slice(0, 1)), Variant(model, "inductor"), x)  # alone against together
    >>> compare(Variant(model, grad=True), Variant(model), x)  # training against inference
    """
    a, b = (side if isinstance(side, Variant) else Variant(side) for side in (a, b))
    batch = next(
        (x.shape[0] for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim), 1
    )
    rows = [range(batch)[side.rows or slice(None)] for side in (a, b)]
    common = [row for row in rows[0] if row in rows[1]]
    if not common:
        raise ValueError(f"the variants have no row in common: {a.rows} and {b.rows} of {batch}")
    runs = [run(side, *_sliced(side.rows, batch, args, kwargs)) for side in (a, b)]
    places = [[list(own).index(row) for row in common] for own in rows]
    names = [_name(side) for side, ran in zip((a, b), runs, strict=True) if not ran.is_faithful]
    return dataclasses.replace(_first_parting(runs, rows, places), unfaithful=tuple(names))


def _name(variant: Variant) -> str:
    return BACKENDS[variant.backend] + (" with gradients" if variant.grad else "")


def _sliced(rows: slice | None, batch: int, args: Any, kwargs: Any) -> tuple[Any, Any]:
    if rows is None:
        return args, kwargs

    def part(x: Tensor) -> Tensor:
        return x[rows] if x.ndim and x.shape[0] == batch else x

    return pytree.tree_map_only(Tensor, part, (args, kwargs))


def _first_parting(runs: list[Run], rows: list[range], places: list[list[int]]) -> Compared:
    unlike: list[str] = []
    compared = 0
    for ours, theirs in zip(runs[0].values, runs[1].values, strict=False):
        if ours.op != theirs.op:
            return Compared(None, compared, f"the graphs part: {_shown(ours)} against {_shown(theirs)}")
        pair = _common_rows(ours.tensor, theirs.tensor, rows, places)
        if pair is None:
            unlike.append(ours.node)
            continue
        compared += 1
        if not same_bits(*pair):
            return Compared(_parting(ours, *pair), compared, unlike=tuple(unlike))
    if len(runs[0].values) != len(runs[1].values):
        counts = " against ".join(str(len(ran.values)) for ran in runs)
        return Compared(None, compared, f"the graphs have {counts} values; none of the common ones differs")
    return Compared(None, compared, unlike=tuple(unlike))


def _shown(value: Value) -> str:
    return f"{value.node} ({value.op}) {value.source}".rstrip()


def _common_rows(
    a: Tensor, b: Tensor, rows: list[range], places: list[list[int]]
) -> tuple[Tensor, Tensor] | None:
    """The rows that both variants have, of one value; None if it is not made of rows.

    The batch is the first dimension whose sizes are in the ratio of the batches: [batch * tokens, width] too.
    """
    if a.dtype != b.dtype or a.ndim != b.ndim:
        return None
    if rows[0] == rows[1]:
        return (a, b) if a.shape == b.shape else None
    for dim, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)):
        if n != m:
            parts = n // len(rows[0]), m // len(rows[1])
            if parts[0] != parts[1] or (n % len(rows[0])) or (m % len(rows[1])):
                return None
            chosen = tuple(
                x.unflatten(dim, (len(own), -1)).index_select(dim, torch.tensor(where, device=x.device))
                for x, own, where in zip((a, b), rows, places, strict=True)
            )
            return chosen if chosen[0].shape == chosen[1].shape else None  # type: ignore[return-value]
    if len(rows[0]) == len(rows[1]):  # as many rows, but others
        return None
    return a, b  # the same for every batch: a weight, say


def _parting(value: Value, a: Tensor, b: Tensor) -> Parting:
    changed = int((bits(a) != bits(b)).sum())
    is_float = a.dtype.is_floating_point
    largest = float((a.double() - b.double()).abs().nan_to_num(float("inf")).max()) if is_float else 0.0
    return Parting(
        value.node, value.op, value.source, changed, a.numel(), ulp_distance(a, b) if is_float else 0, largest
    )
