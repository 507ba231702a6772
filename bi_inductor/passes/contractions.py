"""Products of several tensors in one fixed association, left to right, as they are written.

``multi_dot`` and ``chain_matmul`` pick the cheapest association from the sizes, ``einsum`` of three or more
operands does when ``opt_einsum`` is installed, and ``bilinear`` unrolls its sum by size. ``cdist`` switches
to a matrix product above 25 rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bi_inductor.certificate import source_line
from bi_inductor.errors import BatchInvarianceError
from bi_inductor.ops import composite
from bi_inductor.passes.einsum import einsum
from bi_inductor.passes.linear import linear
from bi_inductor.passes.matmul import matmul
from bi_inductor.passes.retarget import Retarget, argument


@composite("multi_dot(Tensor[] tensors) -> Tensor")
def multi_dot(tensors: list[Tensor]) -> Tensor:
    """``((a @ b) @ c) @ ...``; the first and the last operand may be 1-D."""
    return functools.reduce(matmul, tensors)


@composite("chain_matmul(Tensor[] matrices) -> Tensor")
def chain_matmul(matrices: list[Tensor]) -> Tensor:
    """``((a @ b) @ c) @ ...`` of matrices; one matrix is returned as it is."""
    return functools.reduce(torch.mm, matrices)


@composite("bilinear(Tensor input1, Tensor input2, Tensor weight, Tensor? bias=None) -> Tensor")
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``out[.., o] = sum_(i, j) (x[.., i] * y[.., j]) * w[o, i, j] + b[o]`` as one chain over (i, j)."""
    pairs = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
    return linear(pairs, weight.flatten(1), bias)


@composite("cdist(Tensor x1, Tensor x2, float p=2., str? compute_mode=None) -> Tensor")
def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """``[.., P, M]``, ``[.., R, M]`` -> norms of the differences ``[.., P, R]``: never a matrix product."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)


@composite("pdist(Tensor input, float p=2.) -> Tensor")
def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """``[N, M]`` -> norms of the differences of rows i < j, ``[N (N - 1) / 2]``."""
    first, second = torch.triu_indices(input.shape[0], input.shape[0], 1, device=input.device).unbind(0)
    return torch.linalg.vector_norm(input[first] - input[second], p, dim=-1)


def _operand_list(operands: Sequence[Any]) -> list[Any]:
    """The operands of a variadic call, which may come as one list."""
    return (
        list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    )


def _chain_matmul_arguments(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_operand_list(node.args),), {}


def _einsum_arguments(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Operands as one list, and no path: they are contracted from left to right."""
    return (node.args[0], _operand_list(node.args[1:])), {}


def _is_no_product(node: Node) -> bool:
    """One operand: nothing is multiplied."""
    return isinstance(node.args[0], str) and len(_operand_list(node.args[1:])) < 2


def _einsum_refusal(node: Node) -> BatchInvarianceError | None:
    if isinstance(argument(node, 0, "equation"), str):
        return None
    reason = "the sublist form is contracted along a path that follows the sizes"
    return BatchInvarianceError("einsum", reason, "write the equation as a string", source_line(node))


CONTRACTIONS = (
    Retarget(
        "multi_dot", frozenset({torch.linalg.multi_dot, torch.ops.aten.linalg_multi_dot.default}), multi_dot
    ),
    Retarget(
        "chain_matmul",
        frozenset({torch.functional.chain_matmul}),
        chain_matmul,
        arguments=_chain_matmul_arguments,
    ),
    Retarget("bilinear", frozenset({torch.bilinear, torch.ops.aten.bilinear.default}), bilinear),
    Retarget("cdist", frozenset({torch.functional.cdist}), cdist),
    Retarget("pdist", frozenset({torch.pdist, torch.ops.aten.pdist.default}), pdist),
    Retarget(
        "einsum",
        frozenset({torch.functional.einsum}),
        einsum,
        leave=_is_no_product,
        refuse=_einsum_refusal,
        arguments=_einsum_arguments,
    ),
)
