"""Orders of summation measured from outside: inputs in, one sum out, and the tree of its additions is known.

The idea is that of FPRev (arXiv 2411.00442). Let x_i = M, x_j = -M and all others be units so small that M + units
rounds to M. A unit is lost if it meets M or -M before they cancel, so it survives exactly if it lies outside the
smallest subtree that holds both i and j: the result counts the terms outside. Those counts, for enough pairs, are
the tree. For one term i they sort all others into the subtrees that its partial sums meet one after the other;
each of these is then looked into by itself. A chain or a balanced tree takes O(n log n) sums, a hostile one O(n^2).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import OrderError
from .order_probe import MAGNITUDES, Calls, Probe, Question, is_power_of_two
from .sum_tree import SumTree

_CHECKED_PAIRS = 64  # answers predicted after the tree is known; a wrong subtree is met by most of them
_REPLAYED_SUMS = 16


def reveal_order(
    fn: Callable[[Tensor], Tensor],
    n: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    probes_per_call: int = 1,
    replay: bool = True,
) -> SumTree:
    """The tree in which ``fn`` adds its ``n`` inputs, found by calling it.

    ``fn`` takes a tensor [n] of ``dtype`` (float64, float32, bfloat16 or float16) on ``device`` and returns a tensor
    of one element, of any float dtype. With ``probes_per_call=p`` it takes [p, n] and returns p elements, each the
    sum of one row; all rows must be added in one order, so leave it at 1 where that is the question.
    ``row_sum``, ``column_sum``, ``matmul_element``, ``dot_product`` and ``attention_row`` make such an ``fn``, for one
    probe per call.

    For the answer to mean anything ``fn`` must be

    - a sum: linear, of every input once, all with one and the same factor (a mean, a product with ones, attention
      with equal scores), and fn(0) = 0;
    - of one order, whatever the values are;
    - of one accumulator, in which large values absorb small ones.

    This is checked. Every input's factor is measured; answers that fit no tree raise; the tree must predict 64
    further answers; and if it is binary and the factor a power of two, it is executed on random values in the
    dtype of the input, fp32 and fp64, and one of them must give the bits of ``fn``: the narrowest is the tree's
    ``accumulator`` (``replay=False`` leaves that out). A node of several terms cannot be replayed: there a fused
    adder looks like a sum that sorts its inputs first.

    Raises OrderError if ``fn`` is no such sum, ValueError for other mistakes in the arguments.
    """
    if n < 1:
        raise ValueError(f"a sum needs at least one term, not {n}")
    if dtype not in MAGNITUDES:
        raise ValueError(f"{dtype} cannot be probed: take one of {', '.join(map(str, MAGNITUDES))}")
    if probes_per_call < 1:
        raise ValueError(f"probes_per_call must be positive, not {probes_per_call}")
    probe = Probe(Calls(fn, n, dtype, device, probes_per_call))
    tree = _rebuild(probe, n)
    _check_predictions(probe, tree)
    if replay and tree.is_binary and is_power_of_two(probe.factor):
        tree = dataclasses.replace(tree, accumulator=_replayed_accumulator(probe.calls, tree, probe.factor))
    return tree


def row_sum(fn: Callable[[Tensor], Tensor], *, batch: int = 1, row: int = 0) -> Callable[[Tensor], Tensor]:
    """The sum of row ``row`` by ``fn``: [batch, n] -> [batch] (or [batch, 1]); the other rows are ones."""

    def one_row(x: Tensor) -> Tensor:
        rows = x.new_ones(batch, x.numel())
        rows[row] = x
        return fn(rows)[row]

    return one_row


def column_sum(
    fn: Callable[[Tensor], Tensor], *, batch: int = 1, column: int = 0
) -> Callable[[Tensor], Tensor]:
    """The sum of column ``column`` by ``fn``: [n, batch] -> [batch]; the other columns are ones."""

    def one_column(x: Tensor) -> Tensor:
        columns = x.new_ones(x.numel(), batch)
        columns[:, column] = x
        return fn(columns).reshape(batch)[column]

    return one_column


def matmul_element(
    fn: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
    *,
    rows: int = 1,
    columns: int = 1,
    row: int = 0,
    column: int = 0,
) -> Callable[[Tensor], Tensor]:
    """Element [row, column] of ``fn(a, b)``: [rows, n] x [n, columns] -> [rows, columns].

    The probe is that row of ``a``; everything else is ones, so every product is exact.
    """

    def one_element(x: Tensor) -> Tensor:
        a = x.new_ones(rows, x.numel())
        a[row] = x
        return fn(a, x.new_ones(x.numel(), columns))[row, column]

    return one_element


def dot_product(fn: Callable[[Tensor, Tensor], Tensor] = torch.dot) -> Callable[[Tensor], Tensor]:
    """``fn(a, b)``: [n], [n] -> one element; ``b`` is ones."""
    return lambda x: fn(x, torch.ones_like(x))


def attention_row(
    fn: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention,
    *,
    batch: int = 1,
    queries: int = 1,
    head_dim: int = 16,
    row: int = 0,
    query: int = 0,
) -> Callable[[Tensor], Tensor]:
    """The weighted sum of ``n`` values in one query's attention, by ``fn(q, k, v)`` -> [batch, 1, queries, head_dim].

    q is zero, so that all scores are equal and every weight is 1/n; the probe is one column of v.
    """

    def one_row(x: Tensor) -> Tensor:
        q = x.new_zeros(batch, 1, queries, head_dim)
        k, v = x.new_ones(batch, 1, x.numel(), head_dim), x.new_ones(batch, 1, x.numel(), head_dim)
        v[row, 0, :, 0] = x
        return fn(q, k, v)[row, 0, query, 0]

    return one_row


@dataclasses.dataclass
class _Part:
    """Terms that are looked into by themselves; ``ceiling`` is the size of the subtree they are added in.

    ``groups``: the others by the size of the smallest subtree that holds them and ``pivot``, ascending.
    """

    members: list[int]
    ceiling: int
    groups: list[_Part] = dataclasses.field(default_factory=list)
    roots: list[int] = dataclasses.field(default_factory=list)

    @property
    def pivot(self) -> int:
        """The middle: of a chain, half is then done at once."""
        return self.members[len(self.members) // 2]

    @property
    def others(self) -> list[int]:
        pivot = self.pivot
        return [k for k in self.members if k != pivot]

    def split(self, spans: Sequence[int]) -> None:
        """Group the others by their ``spans``; raises OrderError if no tree has these."""
        members: dict[int, list[int]] = {}
        for k, span in zip(self.others, spans, strict=True):
            members.setdefault(span, []).append(k)
        count = 1
        for span in sorted(members):
            count += len(members[span])
            if span > self.ceiling or (span < self.ceiling and span != count):
                raise OrderError(_no_tree(span, count, self.pivot))
            self.groups.append(_Part(members[span], span))


def _no_tree(span: int, count: int, pivot: int) -> str:
    if span <= 2:
        return (
            "large values absorb nothing: the sum is exact, compensated, or in a wider accumulator than such "
            "inputs can fill"
        )
    return (
        f"the answers fit no tree: x{pivot} should share a subtree of {span} terms with {count - 1} others. "
        "The order depends on the values or changes from call to call, or fn is not a plain sum"
    )


def _rebuild(probe: Probe, n: int) -> SumTree:
    everything = torch.arange(n)
    pending = [_Part(list(range(n)), n + 1)]
    parts = [*pending]
    while pending:
        questions = [(part.pivot, k, everything) for part in pending for k in part.others]
        answers = iter(probe.survivors(questions)) if questions else iter(())
        for part in pending:
            part.split([n - next(answers) for _ in part.others])
        pending = [group for part in pending for group in part.groups]
        parts += pending
    nodes: list[tuple[int, ...]] = []
    for part in reversed(parts):  # groups come after their part, so their nodes are made before its own
        part.roots = [part.pivot]
        for group in part.groups:
            part.roots = [*part.roots, *group.roots]
            if group.ceiling < part.ceiling:
                nodes.append(tuple(part.roots))
                part.roots = [n + len(nodes) - 1]
    return SumTree(n, tuple(nodes))


def _check_predictions(probe: Probe, tree: SumTree) -> None:
    """Ask about random pairs and units, in both signs, what the tree already tells."""
    if tree.terms < 2:
        return
    generator = random.Random(0)
    subtrees = _Subtrees(tree)
    questions: list[Question] = []
    expected = []
    for _ in range(_CHECKED_PAIRS):
        i, j = generator.sample(range(tree.terms), 2)
        units = [k for k in range(tree.terms) if generator.random() < 0.75] or [i]
        questions.append((i, j, torch.tensor(units)))
        inside = subtrees.smallest_with(i, j)
        expected.append(sum(k not in inside for k in units))
    for (i, j, _), answer, prediction in zip(questions, probe.survivors(questions), expected, strict=True):
        if answer != prediction:
            raise OrderError(
                f"with M at x{i} and -M at x{j}, {answer} units survive where the tree found says {prediction}: "
                "the order depends on the values or changes from call to call"
            )


class _Subtrees:
    """The terms of the smallest subtree over two terms."""

    def __init__(self, tree: SumTree) -> None:
        self._tree = tree
        self._parent = {child: tree.terms + k for k, nodes in enumerate(tree.nodes) for child in nodes}

    def _ancestors(self, node: int) -> Iterator[int]:
        while node in self._parent:
            node = self._parent[node]
            yield node

    def smallest_with(self, i: int, j: int) -> set[int]:
        above_i = set(self._ancestors(i))
        pending, terms = [next(node for node in self._ancestors(j) if node in above_i)], set()
        while pending:
            node = pending.pop()
            pending += self._tree.children(node)
            if node < self._tree.terms:
                terms.add(node)
        return terms


def _replayed_accumulator(calls: Calls, tree: SumTree, factor: float) -> str:
    """The narrowest dtype in which the tree, executed on random values, gives the bits of ``fn``."""
    generator = random.Random(1)
    inputs = torch.stack([_random_terms(generator, tree.terms, calls.dtype) for _ in range(_REPLAYED_SUMS)])
    actual = calls(inputs)
    candidates = [d for d in (torch.float32, torch.float64) if d.itemsize > calls.dtype.itemsize]
    for accumulator in (calls.dtype, *candidates):
        expected = tree.add(inputs, accumulator).double() * factor
        if torch.equal(expected.to(actual.dtype), actual):
            return str(accumulator).removeprefix("torch.")
    raise OrderError(
        "the tree tells which terms absorb which, but executed on random values it does not give fn's bits in "
        "any dtype: the sum is compensated, rounds in between, or its order depends on the values"
    )


def _random_terms(generator: random.Random, n: int, dtype: torch.dtype) -> Tensor:
    """Values that cancel, so that the sum is what was rounded away: another order gives other bits.

    Full significands round at every addition. Those of bf16 and fp16 are short for an fp32 accumulator, so their
    exponents are spread.
    """
    bits = round(1 - math.log2(torch.finfo(dtype).eps))
    spread = 20 if dtype.itemsize == 2 else 4
    values: list[float] = []
    for _ in range(n // 2):
        value = generator.randrange(1 << (bits - 1), 1 << bits) * 2.0 ** (
            generator.randrange(spread) - spread - bits
        )
        values += [value, -value]
    values += [2.0**-spread] * (n % 2)
    generator.shuffle(values)
    return torch.tensor(values, dtype=torch.float64).to(dtype)
