"""``torch.matmul`` whose shape of product follows the number of dims alone.

Stock ``matmul`` folds a batch into rows, or not, by strides, sizes and ``requires_grad``. Each output is
one chain either way, but the graph, and with it the kernels and the gradients' sums, would differ between
batch sizes::

    [.., K] @ [K] and [.., K] @ [K, N]     mm of [rows, K]
    [K] or [M, K] @ [.., K, N]             bmm, the left operand expanded
    [.., M, K] @ [.., K, N]                bmm over the broadcast leading dims
"""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor
from torch.fx import Node

from bi_inductor.ops import composite
from bi_inductor.passes.retarget import Retarget, argument


@composite("matmul(Tensor input, Tensor other) -> Tensor")
def matmul(input: Tensor, other: Tensor) -> Tensor:
    """Same shapes, broadcasting and result as ``torch.matmul``."""
    torch._check(input.dim() > 0 and other.dim() > 0, lambda: "matmul takes operands of at least one dim")
    left = input.unsqueeze(0) if input.dim() == 1 else input
    right = other.unsqueeze(1) if other.dim() == 1 else other
    product = _rows_times_matrix(left, right) if right.dim() == 2 else _batched(left, right)
    if other.dim() == 1:
        product = product.squeeze(-1)
    if input.dim() == 1:
        product = product.squeeze(-1 if other.dim() == 1 else -2)
    return product


def _rows_times_matrix(left: Tensor, right: Tensor) -> Tensor:
    rows = left.reshape(math.prod(left.shape[:-1]), left.shape[-1])
    return torch.mm(rows, right).reshape(*left.shape[:-1], right.shape[-1])


def _batched(left: Tensor, right: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    flat = [x.expand(*batch, *x.shape[-2:]).reshape(math.prod(batch), *x.shape[-2:]) for x in (left, right)]
    return torch.bmm(*flat).reshape(*batch, left.shape[-2], right.shape[-1])


def _is_not_dense(node: Node) -> bool:
    """Nested and sparse operands have products of their own."""
    operands = [argument(node, 0, "input"), argument(node, 1, "other")]
    return any(isinstance(x, Tensor) and (x.is_nested or x.layout != torch.strided) for x in operands)


MATMUL = Retarget(
    name="matmul",
    targets=frozenset(
        {
            torch.matmul,
            torch.linalg.matmul,
            operator.matmul,
            torch.ops.aten.matmul.default,
            "matmul",
            "__matmul__",
        }
    ),
    replacement=matmul,
    leave=_is_not_dense,
)
