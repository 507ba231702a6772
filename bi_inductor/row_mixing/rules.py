"""How each op moves rows. An op without a rule mixes them, unless nothing that enters it has any.

A rule gets a ``Step`` and returns the place of the result. Rules are asked only when no operand is mixed already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from ..attention_tiles import maps_of
from ..certificate import source_line
from ..verdicts import is_pointwise
from .place import INDEPENDENT, Cause, Mixed, Place, Rows, batches, joined, merged, reshaped

Rule = Callable[["Step"], Place]


@dataclasses.dataclass(frozen=True)
class Step:
    """One node, the places of all before it, and the symbol of the batch size."""

    node: Node
    places: dict[Node, Place]
    batch: sympy.Symbol

    def argument(self, name: str) -> Any:
        """The value of the schema's argument ``name``."""
        for position, argument in enumerate(self.node.target._schema.arguments):  # type: ignore[union-attr]
            if argument.name == name:
                if name in self.node.kwargs:
                    return self.node.kwargs[name]
                return self.node.args[position] if position < len(self.node.args) else argument.default_value
        raise KeyError(name)

    def place(self, argument: Any) -> Place:
        return self.places[argument] if isinstance(argument, Node) else INDEPENDENT

    @property
    def first(self) -> Place:
        return self.place(self.node.args[0])

    @property
    def rank(self) -> int:
        """Dims of the result."""
        return len(shape_of(self.node))

    @property
    def first_rank(self) -> int:
        return len(shape_of(self.node.args[0]))

    def cause(self, reason: str) -> Cause:
        return Cause(str(self.node.target), source_line(self.node), reason, self.node.name)

    def mixed(self, reason: str) -> Mixed:
        return Mixed((self.cause(reason),))

    def dims(self, name: str = "dim") -> list[int]:
        """A dim, or a list of them, as positive numbers; all of them for None or an empty list."""
        value = self.argument(name)
        if value is None or value == []:
            return list(range(self.first_rank))
        values = [value] if isinstance(value, int) else value
        return [dim % max(1, self.first_rank) for dim in values]


def shape_of(argument: Any) -> Sequence[Any]:
    value = argument.meta.get("val") if isinstance(argument, Node) else argument
    if isinstance(value, tuple | list):
        value = value[0]
    return value.shape if isinstance(value, torch.Tensor) else ()


def place_of(step: Step) -> Place:
    """The place of one call_function node."""
    operands = [step.places[node] for node in step.node.all_input_nodes]
    already = merged(operands)
    if already is not None:
        return already
    target = step.node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return step.mixed("nothing is known about it") if operands else INDEPENDENT
    if not isinstance(target, torch._ops.OpOverload):
        return step.first if target.__name__ == "getitem" else INDEPENDENT  # type: ignore[union-attr]
    name = target._schema.name.split("::")[1]
    if name.startswith("sym_"):  # a size; what takes one as a value is found below
        return INDEPENDENT
    if name in _DRAWN:
        return _drawn(step)
    if _takes_the_batch_size(step, name):
        return step.mixed("its result follows the batch size")
    if not any(isinstance(place, Rows) for place in operands):
        return _without_rows(step, name)
    if name in RULES:
        return RULES[name](step)
    return _elementwise(step) if is_pointwise(target) else step.mixed("nothing is known about it")


#: Ops whose results follow the row-major position of an element.
_DRAWN = frozenset("rand randn randint inductor_random inductor_randint".split())


def _drawn(step: Step) -> Place:
    """Rows of numbers that follow their slots alone, if no dimension before the batch has several elements."""
    sizes = list(shape_of(step.node))
    following = [dim for dim, size in enumerate(sizes) if _follows(size, step.batch)]
    if not following:
        return INDEPENDENT
    count = batches(sizes[following[0]], step.batch)
    if len(following) > 1 or count is None or any(size != 1 for size in sizes[: following[0]]):
        return step.mixed("it draws by position, which follows the size of a batch that is not outermost")
    return Rows(following[0], 1, count)


#: Ops that take sizes for values beside those that are only the extents of their results.
_VALUES = {"full": "fill_value", "full_like": "fill_value", "new_full": "fill_value", "scalar_tensor": "s"}


def _takes_the_batch_size(step: Step, name: str) -> bool:
    """True if the batch size is a number that the op computes with."""
    if name in _VALUES:
        return _follows(step.argument(_VALUES[name]), step.batch)
    return is_pointwise(step.node.target) and any(
        _follows(node, step.batch) for node in step.node.all_input_nodes
    )


def _follows(argument: Any, batch: sympy.Symbol) -> bool:
    value = argument.meta.get("val") if isinstance(argument, Node) else argument
    return isinstance(value, torch.SymInt | torch.SymFloat) and batch in value.node.expr.free_symbols


def _without_rows(step: Step, name: str) -> Place:
    """Nothing that enters has rows; but what adds up as many ones as there are rows follows their number."""
    if name not in _READS_A_DIMENSION:
        return INDEPENDENT
    extents = {node: _row_shaped(node, step.batch) for node in step.node.all_input_nodes}
    if isinstance(RULES[name](dataclasses.replace(step, places=extents)), Mixed):
        return step.mixed("its result follows the batch size")
    return INDEPENDENT


def _row_shaped(node: Node, batch: sympy.Symbol) -> Place:
    dims = [dim for dim, size in enumerate(shape_of(node)) if batches(size, batch) is not None]
    return Rows(dims[0]) if dims else INDEPENDENT


def _elementwise(step: Step) -> Place:
    operands = [(step.places[node], len(shape_of(node))) for node in step.node.all_input_nodes]
    cause = step.cause("rows meet across dimensions")
    return joined(operands, step.rank, cause)


def _same(step: Step) -> Place:
    return step.first


def _view(step: Step) -> Place:
    rows = step.first
    if not isinstance(rows, Rows):
        return INDEPENDENT
    after = reshaped(rows, shape_of(step.node.args[0]), shape_of(step.node), step.batch)
    return after or step.mixed("rows cannot be followed through this view")


def _moved(step: Step, order: Sequence[int]) -> Place:
    rows = step.first
    return dataclasses.replace(rows, dim=list(order).index(rows.dim)) if isinstance(rows, Rows) else rows


def _permute(step: Step) -> Place:
    return _moved(step, step.dims("dims"))


def _transpose(step: Step) -> Place:
    order = list(range(step.first_rank))
    a, b = (step.argument(name) % step.first_rank for name in ("dim0", "dim1"))
    order[a], order[b] = order[b], order[a]
    return _moved(step, order)


def _expand(step: Step) -> Place:
    rows = step.first
    return (
        dataclasses.replace(rows, dim=rows.dim + step.rank - step.first_rank)
        if isinstance(rows, Rows)
        else rows
    )


def _along(reason: str, name: str = "dim") -> Rule:
    """Ops that read a whole dim and keep it: fine along any but the rows' own."""

    def rule(step: Step) -> Place:
        rows = step.first
        if isinstance(rows, Rows) and rows.dim in step.dims(name):
            return step.mixed(reason)
        return rows

    return rule


def _reduction(step: Step) -> Place:
    rows = step.first
    names = {argument.name for argument in step.node.target._schema.arguments}  # type: ignore[union-attr]
    dims = step.dims("dim") if "dim" in names else list(range(step.first_rank))
    if not isinstance(rows, Rows):
        return rows
    if rows.dim in dims:
        return step.mixed("it reduces over the batch")
    if step.rank == step.first_rank:
        return rows
    return dataclasses.replace(rows, dim=rows.dim - sum(dim < rows.dim for dim in dims))


def _slice(step: Step) -> Place:
    rows = step.first
    if not isinstance(rows, Rows) or step.dims("dim") != [rows.dim]:
        return rows
    same = shape_of(step.node)[rows.dim] == shape_of(step.node.args[0])[rows.dim]
    return rows if same else step.mixed("it moves rows to other places")


def _select(step: Step) -> Place:
    rows = step.first
    if not isinstance(rows, Rows):
        return rows
    (dim,) = step.dims("dim")
    if dim == rows.dim:
        return step.mixed("it shows one row to all")
    return dataclasses.replace(rows, dim=rows.dim - (dim < rows.dim))


def _concatenated(step: Step) -> Place:
    tensors = step.node.args[0]
    dim = (step.argument("dim") or 0) % step.rank
    places = [(step.place(x), step.rank) for x in tensors]  # type: ignore[union-attr]
    cause = step.cause("it moves rows to other places")
    place = joined(places, step.rank, cause)
    return Mixed((cause,)) if isinstance(place, Rows) and place.dim == dim else place


def _padded(step: Step) -> Place:
    rows = step.first
    grown = isinstance(rows, Rows) and rows.dim >= step.rank - len(step.argument("pad")) // 2
    if grown and shape_of(step.node)[rows.dim] != shape_of(step.node.args[0])[rows.dim]:  # type: ignore[union-attr]
        return step.mixed("it moves rows to other places")
    return rows


def _product(step: Step) -> Place:
    """[.., M, K] @ [.., K, N]: rows as rows, as columns, or as the batch of both."""
    names = [argument.name for argument in step.node.target._schema.arguments]  # type: ignore[union-attr]
    is_added = names[:3] in (["self", "mat1", "mat2"], ["self", "batch1", "batch2"])
    left, right = (step.argument(name) for name in (names[1:3] if is_added else names[:2]))
    product = _product_of(step.place(left), step.place(right), step.rank)
    if product is None:
        return step.mixed("it multiplies rows with one another")
    added = step.argument("self") if is_added else None
    if added is None:
        return product
    cause = step.cause("rows meet across dimensions")
    return joined([(product, step.rank), (step.place(added), len(shape_of(added)))], step.rank, cause)


def _product_of(left: Place, right: Place, rank: int) -> Place | None:
    if isinstance(left, Rows) and isinstance(right, Rows):
        return left if left == right and left.dim < rank - 2 else None
    if isinstance(left, Rows):
        return None if left.dim == rank - 1 else left
    if isinstance(right, Rows):
        return None if right.dim == rank - 2 else right
    return INDEPENDENT


def _scaled_product(step: Step) -> Place:
    """A product whose scales may be of rows, too."""
    product = _product(step)
    others = [step.argument(name) for name in ("scale_a", "scale_b", "bias")]
    places = [(step.place(other), len(shape_of(other))) for other in others if other is not None]
    cause = step.cause("rows meet across dimensions")
    return product if isinstance(product, Mixed) else joined([(product, 2), *places], 2, cause)


def _gather(step: Step) -> Place:
    x, index = step.first, step.place(step.argument("index"))
    if isinstance(x, Rows) and step.dims("dim") == [x.dim]:
        return step.mixed("it looks up rows")
    return joined([(x, step.rank), (index, step.rank)], step.rank, step.cause("rows meet across dimensions"))


def _indexed(step: Step) -> Place:
    """x[i, :, j]: a table looked up by rows, or rows looked up along another dim by fixed indices."""
    x, indices = step.first, step.node.args[1]
    used = [(dim, index) for dim, index in enumerate(indices) if index is not None]  # type: ignore[arg-type]
    first, count = used[0][0], len(used)
    if [dim for dim, _ in used] != list(range(first, first + count)):
        return step.mixed("its indices are not side by side")
    width = max(len(shape_of(index)) for _, index in used)
    cause = step.cause("rows meet across dimensions")
    found = joined([(step.place(index), len(shape_of(index))) for _, index in used], width, cause)
    if isinstance(x, Rows):
        if isinstance(found, Rows) or first <= x.dim < first + count:
            return step.mixed("it looks up rows")
        return dataclasses.replace(x, dim=x.dim + (width - count if x.dim > first else 0))
    return dataclasses.replace(found, dim=found.dim + first) if isinstance(found, Rows) else found


def _embedding(step: Step) -> Place:
    table, index = step.place(step.argument("weight")), step.place(step.argument("indices"))
    return step.mixed("it looks up rows") if isinstance(table, Rows) else index


def _attention(step: Step) -> Place:
    """query, key, value of [batch, heads, length, width]: each batch entry and head by itself."""
    nodes = [node for node in step.node.all_input_nodes if node not in maps_of(step.node)]
    operands = [(step.places[node], len(shape_of(node))) for node in nodes]
    cause = step.cause("rows meet across dimensions")
    place = joined(operands, 4, cause)
    return (
        step.mixed("its rows attend to one another") if isinstance(place, Rows) and place.dim >= 2 else place
    )


def _map(step: Step) -> Place:
    """A mask of [batch, heads, length, width]: the map of each batch entry by itself."""
    rows = step.first
    return step.mixed("it looks at tiles of rows") if isinstance(rows, Rows) and rows.dim != 0 else rows


def _recurrence(step: Step) -> Place:
    """steps [T, B, G] and states [B, S]: each row of B by itself, whatever T."""
    operands = [(step.places[node], len(shape_of(node))) for node in step.node.all_input_nodes]
    place = joined(operands, 3, step.mixed("rows meet across dimensions").causes[0])
    return step.mixed("its steps are rows") if isinstance(place, Rows) and place.dim != 1 else place


def _split(step: Step) -> Place:
    rows = step.first
    return (
        step.mixed("it moves rows to other places")
        if isinstance(rows, Rows) and rows.dim in step.dims()
        else rows
    )


def _unbound(step: Step) -> Place:
    return _select(step)


def _copied(step: Step) -> Place:
    return step.place(step.argument("src"))


_REDUCTIONS = "sum mean prod amax amin any all argmax argmin var var_mean std logsumexp".split()
_SELECTIONS = "_softmax _log_softmax sort topk kthvalue".split()
_PRODUCTS = "mm bmm addmm baddbmm bmm_wide _int_mm".split()
#: What reads a whole dimension. (A prefix of a scan is the same, however many rows come after it.)
_READS_A_DIMENSION = frozenset([*_REDUCTIONS, *_SELECTIONS, *_PRODUCTS])

RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "alias clone contiguous detach convert_element_type _to_copy lift_fresh_copy device_put tril triu".split(),
        _same,
    ),
    **dict.fromkeys("view _unsafe_view reshape view_copy row_major unsqueeze squeeze".split(), _view),
    "permute": _permute,
    "t": lambda step: _moved(step, [1, 0]),
    "transpose": _transpose,
    "expand": _expand,
    **dict.fromkeys("unfold".split(), _along("it reads several rows", "dimension")),
    **dict.fromkeys("cumsum cumprod block_scan".split(), _along("it runs over the batch")),
    **dict.fromkeys(_SELECTIONS, _along("it runs over the batch")),
    **dict.fromkeys("flip rev".split(), _along("it moves rows to other places", "dims")),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    "slice": _slice,
    "select": _select,
    "cat": _concatenated,
    "constant_pad_nd": _padded,
    **dict.fromkeys("split split_with_sizes".split(), _split),
    "unbind": _unbound,
    **dict.fromkeys(_PRODUCTS, _product),
    "scaled_product": _scaled_product,
    "gather": _gather,
    **dict.fromkeys("index _unsafe_index".split(), _indexed),
    "embedding": _embedding,
    **dict.fromkeys("attention attention_backward".split(), _attention),
    "attention_map": _map,
    "recurrence": _recurrence,
    "copy_": _copied,
    # New tensors of a given size: what they hold is not from any row.
    **dict.fromkeys(
        "full_like zeros_like ones_like empty_like new_zeros new_ones new_full new_empty".split(),
        lambda step: INDEPENDENT,
    ),
}


def input_place(node: Node, batch: sympy.Symbol) -> Place:
    """Of a graph input: rows along the one dimension that has the batch size."""
    counts = [batches(size, batch) for size in shape_of(node)]
    found = [dim for dim, count in enumerate(counts) if count is not None]
    if not found:
        return INDEPENDENT
    if len(found) > 1 or counts[found[0]] != 1:
        return Mixed((Cause(node.name, "", "an input whose rows cannot be told apart"),))
    return Rows(found[0])
