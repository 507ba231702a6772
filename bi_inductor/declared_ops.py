"""Custom ops and user Triton kernels that the user vouches for: ``declare_invariant("ns::op", reason="...")``.

What is declared is compiled as stock Inductor compiles it; the certificate says DECLARED and gives the reason. What is
declared takes part in every compile-cache key.
"""

from __future__ import annotations

import dataclasses
import difflib
import threading
from types import TracebackType
from typing import Any

import torch
from torch.fx import Node

from .errors import DeclarationError

#: Namespaces whose ops have rulings; nothing in them can be declared.
RULED_NAMESPACES = frozenset(["aten", "prims", "inductor_prims", "bi_inductor"])
#: Namespace of user Triton kernels: "triton::" and the name of the kernel's function.
TRITON = "triton"

_lock = threading.Lock()
_declared: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Declaration:
    """One declared op. As a context manager it is taken back when the block is left."""

    op: str
    reason: str

    def __enter__(self) -> Declaration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        undeclare(self.op)


def declare_invariant(op: str, *, reason: str) -> Declaration:
    """Vouch for a custom op: each row of its results has the same bits whatever the batch.

    ``op``: "namespace::name", all overloads of it; "triton::name" for a Triton kernel that your function launches.
    ``reason``: why it is so; shown in certificates. It holds for graphs compiled from now on. Raises DeclarationError
    for an op that is not registered, an op of PyTorch's own, and an empty reason.

    >>> declare_invariant("mylib::rotary", reason="elementwise; one thread for each element")
    """
    _check_name(op)
    if not isinstance(reason, str) or not reason.strip():
        raise DeclarationError(f"say why {op} is batch-invariant: reason must not be empty")
    with _lock:
        _declared[op] = reason.strip()
    return Declaration(op, reason.strip())


def undeclare(op: str) -> None:
    """Take a declaration back, for graphs compiled from now on. Raises DeclarationError if there is none."""
    with _lock:
        if op not in _declared:
            raise DeclarationError(f"{op!r} is not declared{_hint(op, list(_declared))}")
        del _declared[op]


def declarations() -> dict[str, str]:
    """Declared ops with their reasons."""
    with _lock:
        return dict(_declared)


def _check_name(op: str) -> None:
    namespace, separator, name = str(op).partition("::")
    if not (separator and namespace and name) or "." in name:
        raise DeclarationError(f"an op is named 'namespace::name', without an overload, not {op!r}")
    if namespace in RULED_NAMESPACES:
        raise DeclarationError(
            f"{op} is not a custom op: its ruling cannot be declared. options={{'batchinv.unproven': 'warn'}} compiles "
            "its stock lowering"
        )
    if namespace != TRITON and not torch._C._jit_get_schemas_for_operator(op):
        known = {schema.name for schema in torch._C._jit_get_all_schemas()}
        raise DeclarationError(
            f"no op {op!r} is registered (import what defines it first){_hint(op, sorted(known))}"
        )


def _hint(op: str, known: list[str]) -> str:
    close = difflib.get_close_matches(op, known, n=1, cutoff=0.8)
    return f"; did you mean {close[0]!r}?" if close else ""


def declarable_name(node: Node) -> str | None:
    """The name under which what a node calls can be declared; None for what has rulings."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return None if target.namespace in RULED_NAMESPACES else target._schema.name
    if isinstance(target, torch._ops.HigherOrderOperator) and "triton_kernel_wrapper" in target.name():
        return triton_name(int(node.kwargs["kernel_idx"]))  # type: ignore[arg-type]
    return None


def triton_name(index: int) -> str:
    """ "triton::name" of the user's kernel with this place in the table that Dynamo keeps."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel: Any = kernel_side_table.get_kernel(index)
    while not hasattr(kernel, "__name__"):
        kernel = kernel.fn  # an autotuner or a heuristic around it
    return f"{TRITON}::{kernel.__name__}"
