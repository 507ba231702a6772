"""Functions with a batch, made from PyTorch's own operator database: what the coverage table is counted over.

Each sample of an op becomes up to two cases with ``ROWS`` rows:
    rows    the op as it is, where its result's rows are those of its inputs (tried out in eager mode)
    vmap    the op for one sample, lifted over a batch by ``torch.func.vmap``
A sample that can be neither is kept ``as it is``: lowered, and compared with itself from compile to compile.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bi_inductor.errors import MissingDependencyError

#: Batch sizes, the largest first: it is what the code is compiled for.
BATCHES = (7, 3, 2)
ROWS = BATCHES[0]
#: Samples looked at per op; some ops have thousands.
_SAMPLES_SEEN = 64
#: Below this, eager's rows count as equal: its own sums follow the batch.
_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of ``inputs``, of which those in ``mapped`` have the batch as dimension 0."""

    sample: int
    lift: str
    call: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    mapped: frozenset[int]

    def arguments(self, first: int, past: int) -> list[Tensor]:
        """Fresh copies of the inputs, of the rows first ... past - 1."""
        return [x[first:past].clone() if i in self.mapped else x.clone() for i, x in enumerate(self.inputs)]

    def on(self, device: str) -> Case:
        """The same with its inputs on ``device``."""
        return dataclasses.replace(self, inputs=tuple(x.to(device) for x in self.inputs))


def joined(cases: Sequence[Case]) -> Case:
    """One case that calls each of ``cases`` with its own inputs, and returns all results."""
    counts = [len(case.inputs) for case in cases]

    def call(*tensors: Tensor) -> list[Any]:
        results = []
        for case, count in zip(cases, counts, strict=True):
            results.append(case.call(*tensors[:count]))
            tensors = tensors[count:]
        return results

    starts = itertools.accumulate(counts, initial=0)
    mapped = frozenset(first + i for case, first in zip(cases, starts, strict=False) for i in case.mapped)
    lift = "+".join(case.lift for case in cases)
    return Case(cases[0].sample, lift, call, sum((case.inputs for case in cases), ()), mapped)


def entries(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Name -> entry of ``op_db``, for all entries that support ``dtype`` on a CPU.

    Raises MissingDependencyError without what torch's own test machinery imports.
    """
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the operator database of torch needs {error.name}: pip install {error.name}"
        ) from None
    named = ((".".join(filter(None, (op.name, op.variant_test_name))), op) for op in op_db)
    return {name: op for name, op in named if dtype in op.dtypes}


def cases_of(op: Any, count: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[Case]:
    """Cases from ``count`` samples of an entry, spread over those the database draws with one seed.

    They are found on the CPU: an index out of bounds, tried out on a GPU, would end all that the process does there.
    """
    torch.manual_seed(0)
    samples = list(itertools.islice(op.sample_inputs("cpu", dtype), _SAMPLES_SEEN))
    first = len(samples) // 2 if count == 1 else 0  # the first one is often empty or of one element
    chosen = sorted({first + number * len(samples) // count for number in range(count)}) if samples else []
    for number in chosen:
        sample = samples[number]
        for case in _cases(number, _written(op), (sample.input, sample.args, sample.kwargs)):
            yield case.on(device)


def _written(op: Any) -> Any:
    """The op; zeros are written into what it leaves as it found it in memory."""
    function = _outside_torch(op.op)
    if not op.name.startswith(("empty", "new_empty")):
        return function

    def zeroed(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs).zero_()

    return zeroed


def _outside_torch(function: Any) -> Any:
    """``function`` as if a user had written it: Dynamo does not trace what stands in ``torch.testing``.

    Random ops are wrapped there in a call that sets the seed, which cannot be traced either; here the caller does.
    """
    if not isinstance(function, types.FunctionType) or "testing" not in function.__code__.co_filename:
        return function
    code = function.__code__.replace(co_filename=__file__)
    scope = {**function.__globals__, "wrapper_set_seed": _called}
    copied = types.FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _cases(number: int, function: Callable[..., Any], arguments: Any) -> Iterator[Case]:
    leaves, structure = pytree.tree_flatten(arguments)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def single(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for position, tensor in zip(where, tensors, strict=True):
            filled[position] = tensor
        given, args, kwargs = pytree.tree_unflatten(filled, structure)
        return function(given, *args, **kwargs)

    def lifted(*tensors: Tensor) -> Any:
        return torch.func.vmap(single, randomness="different")(*tensors)

    if any(leaves[i].layout != torch.strided for i in where):
        return  # nothing is promised about sparse tensors, which no backend compiles
    tensors = tuple(leaves[i].detach() for i in where)
    found = [*_by_rows(number, single, tensors), *_by_vmap(number, lifted, tensors)]
    yield from found or [Case(number, "as it is", single, tensors, frozenset())]


def _by_vmap(number: int, lifted: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Iterator[Case]:
    inputs = tuple(_varied(torch.stack([x] * ROWS)) for x in tensors)
    case = Case(number, "vmap", lifted, inputs, frozenset(range(len(inputs))))
    if tensors and _runs(case):
        yield case


def _runs(case: Case) -> bool:
    try:
        case.call(*case.arguments(0, 2))
    except Exception:  # whatever a batching rule or its absence raises
        return False
    return True


def _by_rows(number: int, single: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Iterator[Case]:
    leading = next((x.shape[0] for x in tensors if x.dim()), 0)
    alike = [i for i, x in enumerate(tensors) if x.dim() and x.shape[0] == leading]
    for mapped in (alike, alike[:1]) if leading else ():
        inputs = tuple(_repeated(x) if i in mapped else x for i, x in enumerate(tensors))
        case = Case(number, "rows", single, inputs, frozenset(mapped))
        if _has_rows(case):
            yield case
            return


def _repeated(x: Tensor) -> Tensor:
    return _varied(torch.cat([x] * math.ceil(ROWS / x.shape[0]))[:ROWS])


def _varied(x: Tensor) -> Tensor:
    """Other bits in every row of floats; what is sorted, positive or between 0 and 1 stays so."""
    if not (x.is_floating_point() or x.is_complex()):
        return x
    factors = 1 - torch.arange(len(x)) / 64
    return (x * factors.reshape(-1, *[1] * (x.dim() - 1))).to(x.dtype)


def _has_rows(case: Case) -> bool:
    """True if eager mode gives each row, up to rounding, whatever stands beside it, at every batch size."""
    try:
        alone = [tensors_in(case.call(*case.arguments(row, row + 1))) for row in range(ROWS)]
        return all(_are_rows(tensors_in(case.call(*case.arguments(0, n))), alone[:n]) for n in BATCHES)
    except Exception:  # sizes that do not fit: this sample has no rows
        return False


def _are_rows(together: list[Tensor], alone: list[list[Tensor]]) -> bool:
    if not together or any(x.dim() == 0 or x.shape[0] != len(alone) for x in together):
        return False
    return all(
        close(x, y[row : row + 1])
        for row, outputs in enumerate(alone)
        for x, y in zip(outputs, together, strict=True)
    )


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, NaN for NaN, in shape and dtype."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return bool(torch.equal(a, b))
    return torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
