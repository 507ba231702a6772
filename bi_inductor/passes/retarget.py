"""The one kind of rewrite on the Dynamo graph: point a node at another function of the same signature.

The node itself stays, with its arguments and its ``meta``: AOTAutograd runs the replacement under that
node, so every op it expands to inherits the user's ``stack_trace``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from bi_inductor.errors import BatchInvarianceError


def _never(node: Node) -> bool:
    return False


def _accept(node: Node) -> None:
    return None


def _same_arguments(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return node.args, dict(node.kwargs)


@dataclass(frozen=True)
class Retarget:
    """A rewrite as data.

    ``targets`` are the callables (or names of methods) replaced by ``replacement``; ``leave(node)`` says
    when a node keeps its target; ``refuse(node)`` returns the error for a node that has no canonical form,
    or None (without a replacement it always returns one); ``arguments(node)`` gives the args and kwargs for
    a replacement with another signature.
    """

    name: str
    targets: frozenset[Any]
    replacement: Callable[..., Any] | None = None
    leave: Callable[[Node], bool] = _never
    refuse: Callable[[Node], BatchInvarianceError | None] = _accept
    arguments: Callable[[Node], tuple[tuple[Any, ...], dict[str, Any]]] = _same_arguments

    def matches(self, node: Node) -> bool:
        called = node.op in ("call_function", "call_method") and node.target in self.targets
        return called and not self.leave(node)

    def apply(self, node: Node) -> None:
        node.args, node.kwargs = self.arguments(node)
        node.op, node.target = "call_function", self.replacement  # type: ignore[assignment]


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """The value a call passes for one parameter, positionally or by name; for a node, its example value."""
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    return value.meta.get("example_value", value.meta.get("val")) if isinstance(value, Node) else value
