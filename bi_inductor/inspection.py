"""What ``torch.compile(fn, backend="batchinv")`` would generate, for a GPU that need not be there.

Neither ptxas nor a C++ compiler is called, and nothing runs: see ``dry_run.py``.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Callable
from typing import Any

from bi_inductor import certificate, numerics
from bi_inductor.certificate import Certificate, Entry
from bi_inductor.dry_run import DryRun
from bi_inductor.errors import NotCompiledError


@dataclasses.dataclass(frozen=True)
class GeneratedGraph:
    """The code of one graph: its wrapper module, which holds its kernels."""

    source: str
    certificate: Certificate
    is_backward: bool = False

    @property
    def kernels(self) -> dict[str, str]:
        """Kernel name -> source, in the order of the module."""
        return kernel_definitions(self.source)


def kernel_definitions(source: str) -> dict[str, str]:
    """Kernel name -> source, from the lines ``x = async_compile.triton('x', '''...''')`` of a module."""
    return {
        node.targets[0].id: _longest_string(node.value)  # type: ignore[attr-defined]
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and _is_kernel_definition(node.value)
    }


def _is_kernel_definition(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    owner = node.func.value
    return isinstance(owner, ast.Name) and owner.id == "async_compile" and node.func.attr != "wait"


def _longest_string(call: ast.AST) -> str:
    strings = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return max(strings, key=len, default="")


def _generated_graph(source: str) -> GeneratedGraph:
    """``source`` parted from the certificate in its last comment."""
    made = certificate.extract(source)
    if made is None:
        raise ValueError("generated without a certificate: not a graph of this backend")
    return GeneratedGraph(source[: source.rstrip().rindex("\n") + 1], made, made.is_backward)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Generated code and verdicts of ``fn`` for ``target``; ``str()`` of it is meant to be read.

    Attributes: ``target``; ``graphs`` (in the order of compilation: one per graph that Dynamo cut, and its
    backward behind it).
    """

    target: str
    graphs: tuple[GeneratedGraph, ...]

    @property
    def source(self) -> str:
        """Whole generated modules, wrappers and kernels, of all graphs."""
        return "\n\n".join(graph.source for graph in self.graphs)

    @property
    def kernels(self) -> dict[str, str]:
        """Kernel name -> source; a name used by an earlier graph gets the graph's number, "name#1"."""
        found: dict[str, str] = {}
        for number, graph in enumerate(self.graphs):
            for name, source in graph.kernels.items():
                found[f"{name}#{number}" if name in found else name] = source
        return found

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        """One per graph."""
        return tuple(graph.certificate for graph in self.graphs)

    @property
    def verdicts(self) -> tuple[Entry, ...]:
        """One entry per op of all graphs: name, op, verdict, form, dtype, constants, source line."""
        return tuple(entry for made in self.certificates for entry in made.entries)

    @property
    def fingerprint(self) -> str:
        """Digest of the numerics: equal for every batch size, different when any op or form differs."""
        return numerics.joint_fingerprint(self.certificates)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "target": self.target,
            "fingerprint": self.fingerprint,
            "certificates": [json.loads(made.to_json()) for made in self.certificates],
            "kernels": self.kernels,
            "source": self.source,
        }

    def __str__(self) -> str:
        header = (
            f"batchinv for {self.target}: {_count(len(self.graphs), 'graph')}, "
            f"{_count(len(self.kernels), 'kernel')}\nfingerprint {self.fingerprint}"
        )
        return "\n\n".join([header, *map(str, self.certificates), self.source])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def inspect(
    fn: Callable[..., Any],
    *args: Any,
    target: str = "sm_90",
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    backward: bool = False,
    **kwargs: Any,
) -> Inspection:
    """Generate code for ``fn(*args, **kwargs)`` on ``target`` without running anything on it.

    ``fn``: a function or module; tensors may be on any device (only sizes, strides and dtypes matter).
    ``target``: "cpu" or a GPU from ``bi_inductor.targets.TARGETS``; the GPU need not exist.
    ``dynamic``: as for ``torch.compile``, except that None means static. ``backward``: training graphs too.

    Raises OptionError for an unknown target, MissingDependencyError without triton (GPU targets),
    BatchInvarianceError for what the backend refuses, NotCompiledError for what Dynamo leaves to eager.

    >>> print(inspect(model, torch.randn(8, 512), target="sm_90"))
    """
    sources, _ = DryRun(target, bool(dynamic), options, backward)(fn, args, kwargs)
    if not sources:
        raise NotCompiledError(
            f"{fn} was not compiled at all: Dynamo skips such functions and runs them eagerly"
        )
    return Inspection(target, tuple(map(_generated_graph, sources)))
