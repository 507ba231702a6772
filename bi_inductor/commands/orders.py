"""``python -m bi_inductor orders``: orders of summation measured at several batch sizes, as text, JSON or SVG."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bi_inductor.commands import script
from bi_inductor.commands.reporting import CommandError, one_line, progress, quiet_torch

if TYPE_CHECKING:
    from bi_inductor.sum_tree import SumTree

SUMMARY = "Measure and draw the order in which sums are added."
EXAMPLE = """examples:
  python -m bi_inductor orders column-sum --length 16 --batch 1,64 --backend inductor,batchinv --svg orders.svg
  python -m bi_inductor orders matmul --length 64 --columns 1 --batch 1,2,16 --backend eager

What is measured, by calling the compiled function, is the order of the additions behind row 0: of [batch, length]
summed over dim -1, column 0 of [length, batch] summed over dim 0, element [0, 0] of [batch, length] @ [length,
columns], one query over length keys. Exit code 1: the order of some backend changes with the batch."""

_OPERATIONS = ("sum", "mean", "column-sum", "matmul", "attention")
_BACKENDS = {"eager": "eager", "inductor": "stock Inductor", "batchinv": "batchinv"}
_DTYPES = ("float32", "float64", "bfloat16", "float16")


def _probe(operation: str, compiled: Callable[..., Any], batch: int, columns: int) -> Callable[..., Any]:
    """What ``reveal_order`` calls; ``compiled`` puts a function through the backend."""
    import torch
    import torch.nn.functional as F

    from bi_inductor import orders

    if operation == "sum":
        return orders.row_sum(compiled(lambda x: x.sum(-1)), batch=batch)
    if operation == "mean":
        return orders.row_sum(compiled(lambda x: x.mean(-1)), batch=batch)
    if operation == "column-sum":
        return orders.column_sum(compiled(lambda x: x.sum(0)), batch=batch)
    if operation == "matmul":
        return orders.matmul_element(compiled(torch.matmul), rows=batch, columns=columns)
    return orders.attention_row(compiled(F.scaled_dot_product_attention), batch=batch)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("operation", metavar="OPERATION", help=", ".join(_OPERATIONS))
    parser.add_argument("--length", type=int, default=16, help="terms of the sum (default: %(default)s)")
    script.add_batches(parser, "1,64")
    parser.add_argument(
        "--backend", default="inductor,batchinv", help="of eager, inductor, batchinv (default: %(default)s)"
    )
    parser.add_argument(
        "--columns", type=int, default=8, help="columns of a product's right operand (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(_DTYPES)} (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="write the pictures beside each other here")


def run(options: argparse.Namespace) -> int:
    """Measure, print and draw; 1 if the order of some backend changes with the batch."""
    batches = script.batches(options.batch)
    try:
        with quiet_torch():
            return _run(options, batches)
    except (ValueError, OSError) as error:  # an argument, a sum that has no one order, a file
        raise CommandError(one_line(error)) from error


def _run(options: argparse.Namespace, batches: list[int]) -> int:
    backends = _checked(options)
    measured = list(_measure(options, backends, batches))
    groups = _same_trees(measured)
    if options.svg:
        from bi_inductor.drawing import draw_svg

        pictures = [(f"{_BACKENDS[backend]}, batch {batch}", tree) for backend, batch, tree in measured]
        options.svg.write_text(draw_svg(pictures, columns=len(batches)), encoding="utf-8")
    differs = [backend for backend in backends if sum(group[0] == backend for group in groups) > 1]
    if options.json:
        orders = [
            {"backend": backend, "batches": same, "contract": _contract_name(tree), **tree.to_json()}
            for backend, same, tree in groups
        ]
        print(json.dumps({"operation": options.operation, "changes_with_batch": differs, "orders": orders}))
    else:
        print("\n\n".join(_text(*group) for group in groups))
    return 1 if differs else 0


def _checked(options: argparse.Namespace) -> list[str]:
    import torch

    backends = options.backend.split(",")
    for given, known, what in (
        ([options.operation], _OPERATIONS, "operation"),
        (backends, tuple(_BACKENDS), "backend"),
        ([options.dtype], _DTYPES, "dtype"),
        ([options.device], ("cpu", "cuda"), "device"),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"unknown {what} {unknown[0]!r}: take one of {', '.join(known)}")
    if options.length < 1 or options.columns < 1:
        raise ValueError("--length and --columns take positive integers")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device on this machine")
    if options.svg and not options.svg.resolve().parent.is_dir():
        raise ValueError(f"there is no directory {options.svg.parent} to write {options.svg.name} to")
    return list(dict.fromkeys(backends))


def _measure(
    options: argparse.Namespace, backends: list[str], batches: list[int]
) -> Iterator[tuple[str, int, SumTree]]:
    import torch

    from bi_inductor.orders import reveal_order

    for backend in backends:
        for batch in batches:
            progress(f"{backend} at batch {batch}")
            torch._dynamo.reset()
            probe = _probe(options.operation, _compiler(backend), batch, options.columns)
            dtype = getattr(torch, options.dtype)
            yield backend, batch, reveal_order(probe, options.length, dtype=dtype, device=options.device)


def _compiler(backend: str) -> Callable[..., Any]:
    import torch

    if backend == "eager":
        return lambda fn: fn
    return lambda fn: torch.compile(fn, backend=backend, dynamic=False)


def _same_trees(measured: list[tuple[str, int, SumTree]]) -> list[tuple[str, list[int], SumTree]]:
    """Each backend's different trees, with the batches that have them."""
    groups: dict[tuple[str, SumTree], list[int]] = {}
    for backend, batch, tree in measured:
        groups.setdefault((backend, tree), []).append(batch)
    return [(backend, batches, tree) for (backend, tree), batches in groups.items()]


def _contract_name(tree: SumTree) -> str | None:
    from bi_inductor.sum_tree import chain, contract_tree

    names = {"Tree": contract_tree(tree.terms), "Chain": chain(tree.terms)}
    return next((name for name, expected in names.items() if tree == expected), None)


def _text(backend: str, batches: list[int], tree: SumTree) -> str:
    name = _contract_name(tree)
    same = f"  (as the contract's {name})" if name else ""
    return f"{_BACKENDS[backend]}, batch {', '.join(map(str, batches))}{same}\n{tree}"
