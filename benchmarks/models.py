"""Models as people compile them, at toy sizes with random weights: do they compile, near eager, row for row?

    python benchmarks/models.py --csv benchmarks/results/models.csv [--only NAME ...] [--device cuda] [--stock]
    python benchmarks/models.py --backward --csv ...
    python benchmarks/models.py --generate cpu [--backward]

For every model: the largest difference from eager (over the largest value), and how many rows change when the same
rows are computed at batch 1, 2 and 7 instead of 7 at once. With ``--backward`` the model is in training mode with its
dropout off, the loss of a row is the sum of the squares of its outputs, and the gradients of inputs and of embedded
tokens are compared row by row, those of parameters from run to run. ``--generate`` makes the code, which the verifier
reads, but neither compiles nor runs it: seconds instead of minutes. What is refused is named. Transformers, torchvision
and timm are used where they are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from model_cases import BATCHES, MODELS, Case
from timing import write_csv
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bi_inductor import BatchInvarianceError, certify
from bi_inductor.testing import changed_rows_over_batches, same_bits


@contextlib.contextmanager
def _seconds(result: dict[str, object]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    result["seconds"] = round(time.perf_counter() - start, 1)


_OF_PARAMETERS = ("parameters", "parameters_changed")


def measure(name: str, device: str, backend: str, backward: bool) -> dict[str, object]:
    """One row of the table: model, mode, backend, difference from eager, rows compared, rows changed, refusal."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    result: dict[str, object] = dict.fromkeys(
        (
            "model",
            "mode",
            "backend",
            "device",
            "difference",
            "rows",
            "changed",
            *_OF_PARAMETERS,
            "seconds",
            "refused",
        ),
        "",
    )
    result |= {"mode": "training" if backward else "inference", "torch": torch.__version__}
    result |= {"model": name, "backend": backend, "device": device}
    with _seconds(result):
        try:
            result |= (_compare_gradients if backward else _compare)(name, device, backend)
        except Exception as error:
            result["refused"] = f"{type(error).__name__}: {error}"
            if not result["refused"].startswith("BatchInvariance"):  # type: ignore[attr-defined]
                traceback.print_exc()
    return result


def _made(name: str, device: str) -> Case:
    module, inputs, call = MODELS[name]()
    with torch.no_grad():
        for parameter in module.parameters():  # some heads start at zero, and would show nothing
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return module.eval().to(device), tuple(x.to(device) for x in inputs), call


def _compiled(call: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Compiled with all sizes as symbols; of images the batch alone: windows of symbolic sides take torch minutes."""
    anything = torch.compile(call, backend=backend, dynamic=True)
    images = torch.compile(call, backend=backend)

    def run(*inputs: Any) -> Any:
        pictures = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() == 4]
        for picture in pictures:
            torch._dynamo.maybe_mark_dynamic(picture, 0)
        return (images if pictures else anything)(*inputs)

    return run


def _difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """The largest difference over the largest value, of all tensors together."""
    differences = (float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True))
    return f"{max(differences) / max(float(b.abs().max()) for b in expected):.1e}"


@torch.no_grad()
def _compare(name: str, device: str, backend: str) -> dict[str, object]:
    _, inputs, call = _made(name, device)
    expected = call(*inputs)
    compiled = _compiled(call, backend)
    difference = _difference([compiled(*inputs)], [expected])
    changed = changed_rows_over_batches(compiled, inputs, BATCHES)
    return {"difference": difference, "rows": sum(changed), "changed": sum(changed.values())}


def _without_dropout(module: nn.Module) -> nn.Module:
    """In training mode, with every probability of dropping something 0: what is drawn follows a row's slot."""
    for part in module.train().modules():
        for attribute in ("p", "dropout", "attention_dropout", "activation_dropout", "drop_prob"):
            if isinstance(getattr(part, attribute, None), float):
                setattr(part, attribute, 0.0)
    return module


def _losses(module: nn.Module, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss of each row. ``offsets`` are added to embedded tokens: their gradients are those of the tokens."""

    def losses(inputs: Sequence[Tensor], offsets: Sequence[Tensor | None]) -> Tensor:
        given = (
            x if offset is None else module.get_input_embeddings()(x) + offset  # type: ignore[operator]
            for x, offset in zip(inputs, offsets, strict=True)
        )
        return call(*given).square().flatten(1).sum(1)

    return losses


def _leaves(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Inputs with their gradients, and zeros as offsets of those that are tokens."""

    def offset(tokens: Tensor) -> Tensor:
        width = module.get_input_embeddings().embedding_dim  # type: ignore[operator]
        return torch.zeros(*tokens.shape, width, device=tokens.device, requires_grad=True)

    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    return leaves, [offset(x) if x.dtype == torch.int64 else None for x in inputs]


def generate(name: str, target: str, backward: bool) -> dict[str, object]:
    """Model, mode, number of generated kernels, refusal."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, inputs, call = _made(name, "cpu")
    arguments: Sequence[Any] = inputs
    if backward:
        call, arguments = _losses(_without_dropout(module), call), _leaves(module, inputs)
    result: dict[str, object] = {"model": name, "mode": "training" if backward else "inference"}
    try:
        with torch.set_grad_enabled(backward):
            made = certify(call, *arguments, batch_dim=None, target=target, backward=backward)
    except BatchInvarianceError as error:
        return result | {"kernels": 0, "refused": str(error)}
    return result | {"kernels": sum(len(graph.kernels) for graph in made.certificates), "refused": ""}


def _compare_gradients(name: str, device: str, backend: str) -> dict[str, object]:
    module, inputs, call = _made(name, device)
    parameters = list(_without_dropout(module).parameters())

    def gradients_of_rows(losses: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        def step(*rows: Tensor) -> list[Tensor]:
            module.zero_grad()
            leaves, offsets = _leaves(module, rows)
            loss = losses(leaves, offsets)
            loss.sum().backward()
            return [
                loss.detach(),
                *(x.grad for x in [*leaves, *offsets] if x is not None and x.grad is not None),
            ]

        return step

    def gradients(losses: Callable[..., Tensor]) -> list[Tensor]:
        rows = gradients_of_rows(losses)(*inputs)
        return [*rows[1:], *(p.grad.clone() for p in parameters if p.grad is not None)]

    losses = _losses(module, call)
    compiled = _compiled(losses, backend)
    expected, first, second = gradients(losses), gradients(compiled), gradients(compiled)
    result: dict[str, object] = {
        "difference": _difference(first, expected),
        "parameters": len(parameters),
        "parameters_changed": sum(not same_bits(a, b) for a, b in zip(first, second, strict=True)),
    }
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
        return result  # its statistics are those of the batch: rows see each other
    changed = changed_rows_over_batches(gradients_of_rows(compiled), inputs, BATCHES)
    return result | {"rows": sum(changed), "changed": sum(changed.values())}


def main() -> int:
    """1 if any model was refused, or any of its rows changed, under our backend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(MODELS), help="names of models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stock", action="store_true", help="stock Inductor beside ours")
    parser.add_argument("--backward", action="store_true", help="a training step instead of inference")
    parser.add_argument(
        "--generate", metavar="TARGET", help="generate and verify code for this target, no more"
    )
    parser.add_argument("--csv")
    arguments = parser.parse_args()
    if arguments.generate:
        made = [generate(name, arguments.generate, arguments.backward) for name in arguments.only]
        print(*made, sep="\n")
        return int(any(row["refused"] for row in made))
    rows = []
    for name in arguments.only:
        for backend in ("batchinv", "inductor") if arguments.stock else ("batchinv",):
            rows.append(measure(name, arguments.device, backend, arguments.backward))
            print({k: str(v)[:400] for k, v in rows[-1].items()}, flush=True)
    if arguments.csv:
        write_csv(arguments.csv, rows, shlex.join(["python", *sys.argv]))
    bad = ("refused", "changed", "parameters_changed")
    return int(any(row[key] for row in rows for key in bad if row["backend"] == "batchinv"))


if __name__ == "__main__":
    sys.exit(main())
