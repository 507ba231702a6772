"""Orders rebuilt from the compiler's IR: the additions behind every element that a graph returns, as Triton made them.

    lowering    emitted kernels to TTIR, in every configuration that may be chosen; no GPU is needed
    text        TTIR as blocks of operations
    execution   one program on terms: addresses are numbers, values are what they were computed from
    module      the generated wrapper run on buffers of terms, kernel after kernel, over the whole grid
    orders      sums and chains of dots in the terms, compared with the canonical forms
    attention   one output element of attention, rebuilt from its scores

Which k one step of a matrix instruction adds is read from TTGIR (``..ttgir``).

What is shown holds for TTIR at the sizes of the example: which values each addition adds, in which chain ``tt.dot``
stands, and that k ascends. Of TTGIR, that each step of a matrix instruction adds neighbouring k. Below it the order is
Triton's to keep: a two-element sum has only one. What a step of the hardware does ``doctor`` measures on the device.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterable, Iterator

import torch

from ..certificate import Certificate, Entry
from ..errors import MissingDependencyError
from ..inspection import kernel_definitions
from ..verifier.lengths import Forms, constant, is_constant, values_of
from ..virtual import virtual_gpu

_SIGNATURE = re.compile(r"^ *(.+?),? = args$", re.MULTILINE)
#: Forms whose kernels are executed: those that are looked for, and those that add nothing in an order of theirs.
_UNDERSTOOD = (
    "Tree(",
    "Chain(",
    "Exact(",
    "Drawn(",
    "Scan(",
    "Segments(",
    "Attention(",
    "Chunks(",
    "ScaledChunks(",
)
_SIZE = re.compile(r"^ *(s\d+) = (\w+)$", re.MULTILINE)


#: What tells a sum from others of its graph.
Shown = tuple[str, int | tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Proof:
    """What the IR of one graph shows.

    ``proven``: (combine or "chain", length) of the forms that were found, in every configuration; of chunks ("chunks",
    (length, chunk, whether scaled)), of attention ("attention", (tile, near chunk, near keys, far chunk)).
    ``wrong``: sums in no form's order. ``unknown``: kernel -> why it was not followed. ``configurations``: kernel ->
    those it ran in.
    """

    proven: frozenset[Shown]
    wrong: tuple[str, ...]
    unknown: dict[str, str]
    configurations: dict[str, tuple[str, ...]]


def prove(source: str, certificate: Certificate, target: str) -> Proof:
    """Rebuild the orders of a generated module for a GPU ``target`` from its TTIR and compare them with its forms.

    A dynamic graph is taken at the sizes of its example. Raises MissingDependencyError without numpy or triton,
    ValueError for a module whose inputs' sizes cannot be read.
    """
    try:
        from .lowering import Lowering
        from .module import ModuleRun
        from .orders import Orders
    except ImportError as error:
        raise MissingDependencyError("orders in IR need numpy: pip install numpy") from error

    kernels = kernel_definitions(source)
    inputs, forms = _inputs(source, dict(certificate.symbols)), lengths_of(certificate.entries)
    left_out = _with_other_forms(certificate)
    cache: dict[str, Lowering] = {}
    proven: set[Shown] | None = None
    wrong: list[str] = []
    unknown: dict[str, str] = {}
    used: dict[str, list[str]] = {}
    with virtual_gpu(target) as device:
        number = 0
        while number == 0 or number < max((len(lowering.configs) for lowering in cache.values()), default=0):
            run = ModuleRun(source, device, kernels, cache, left_out)
            outputs = run.run(inputs, number)
            found = Orders(run.terms, forms).look(int(k) for output in outputs for k in set(output.tolist()))
            proven = found.proven if proven is None else proven & found.proven
            wrong += [f"{what} (configuration {number})" for what in found.wrong if not run.unknown]
            wrong += [f"{what} ({name})" for name, found in run.wrong.items() for what in found]
            unknown.update(run.unknown)
            for name, configuration in run.used.items():
                used.setdefault(name, []).append(configuration)
            number += 1
    shown = {name: tuple(dict.fromkeys(configurations)) for name, configurations in used.items()}
    return Proof(frozenset(proven or ()), tuple(dict.fromkeys(wrong)), unknown, shown)


def _with_other_forms(certificate: Certificate) -> dict[str, str]:
    """Kernel -> the form in it whose order is not looked for yet."""
    found = {}
    for kernel in certificate.kernels:
        others = [form for form in kernel.forms if not form.startswith(_UNDERSTOOD)]
        if others:
            found[kernel.name] = f"{others[0].split('(')[0]} is not looked for in IR yet"
    return found


def lengths_of(entries: Iterable[Entry]) -> set[Shown]:
    """(combine or "chain", length in the example) of the ordered forms among ``entries``; for others see ``Proof``."""
    numbers = [dataclasses.replace(entry, form=entry.example or entry.form) for entry in entries]
    forms = Forms(numbers)
    lengths = forms.trees | {("chain", length) for _, length in forms.chains}
    sums: set[Shown] = {(kind, length[0]) for kind, length in lengths if is_constant(length)}
    chunked = {
        (length[0], chunk, scaled) for _, length, chunk, scaled in forms.chunked if is_constant(length)
    }
    sums |= {("chunks", shape) for shape in chunked}
    return sums | {("attention", attention[1:]) for attention in forms.attentions}


def _inputs(source: str, symbols: dict[str, int]) -> list[object]:
    """Stand-ins for the inputs of the module: tensors with the sizes and strides that it asserts, and sizes."""
    names = [name.strip() for name in _SIGNATURE.findall(source)[-1].split(",")]
    sizes = {name: symbols[symbol] for symbol, name in _SIZE.findall(source) if symbol in symbols}
    shapes = dict(_asserted_shapes(source))
    missing = [name for name in names if name not in sizes and name not in shapes]
    if missing:
        raise ValueError(f"the module does not say what sizes {', '.join(missing)} have")
    return [
        sizes[name]
        if name in sizes
        else torch.empty_strided(*(_numbers(node, symbols) for node in shapes[name]), device="meta")
        for name in names
    ]


def _asserted_shapes(source: str) -> Iterator[tuple[str, tuple[ast.expr, ast.expr]]]:
    """Input -> its size and stride; torch 2.14 asserts several inputs at once."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id == "assert_size_stride" and isinstance(node.args[0], ast.Name):
            yield node.args[0].id, (node.args[1], node.args[2])
        elif node.func.id == "assert_size_stride_grouped":
            tensors, sizes, strides = (
                part.elts if isinstance(part, ast.Tuple) else [] for part in node.args[:3]
            )
            for tensor, size, stride in zip(tensors, sizes, strides, strict=True):
                yield ast.unparse(tensor), (size, stride)


def _numbers(node: ast.expr, symbols: dict[str, int]) -> tuple[int, ...]:
    """``(8, 64*s77)`` with the symbols' values."""
    known = {name: constant(value) for name, value in symbols.items()}
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    numbers = [values_of(part, known) for part in parts]
    if any(number is None for number in numbers):
        raise ValueError(f"cannot read the sizes {ast.unparse(node)}")
    return tuple(number[0] for number in numbers if number is not None)
