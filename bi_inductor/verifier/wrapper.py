"""What the generated module around the kernels may contain, and which sizes it passes to them."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator

from ..certificate import Entry
from .finding import Report
from .lengths import Values, values_of
from .syntax import dotted

#: Operators called by name that move or seed, and arithmetic of sizes; every other call of a library is refused.
LIBRARY_CALLS = frozenset(
    """aten.copy_ aten.copy_.default aten.randint.low_out aten.set_.source_Tensor aten.view.dtype torch.device
    torch.cuda._DeviceGuard torch.cuda.set_device torch.cuda.synchronize torch.cuda.current_stream torch.cuda.stream
    torch.ops.inductor._reinterpret_tensor inductor_ops.accumulate_grad_ torch.empty_strided torch.Size
    torch.sym_float torch.sym_int torch.sym_max torch.sym_min torch.sym_ite torch.sym_not torch._sym_sqrt
    inductor_ops.resize_storage_bytes_ torch.Stream torch.Event torch.tensor
    torch.ops.aten._linalg_check_errors.default
    torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs
    """.split()
)
#: Operators with one possible answer for the dtypes their rulings admit, integers and sorted values.
EXACT_CALLS = frozenset(
    "torch.ops.aten.sort.stable torch.ops.aten.searchsorted.Tensor torch.ops.aten.bucketize.Tensor".split()
)
#: Operators that move elements of complex tensors, for which Inductor has no kernels; by packet.
MOVES = frozenset(
    f"torch.ops.aten.{name}"
    for name in """as_strided as_strided_scatter cat clone constant_pad_nd copy empty expand flip full gather index
    index_select permute reshape roll scalar_tensor select select_scatter slice slice_scatter split
    split_with_sizes squeeze stack transpose unbind unsqueeze view view_as_complex view_as_real where
    zeros""".split()
)
_LIBRARIES = (
    "aten",
    "extern_kernels",
    "inductor_ops",
    "prims",
    "quantized_decomposed",
    "torch",
    "_quantized",
)
#: Parts of the module that only benchmarks call.
_NOT_EXECUTED = ("benchmark_compiled_module", "get_args")
#: Methods of tensors that compute nothing.
_METHODS = frozenset(
    "clone copy_ item size stride data_ptr numel storage_offset untyped_storage view is_contiguous".split()
)
_MAPPED = re.compile(r"#\s+\S+ => (.*)")


@dataclasses.dataclass
class Definition:
    """A kernel of the module: its name, text, first line in the module, and the graph nodes behind it."""

    name: str
    text: str
    line: int
    is_triton: bool
    nodes: frozenset[str] = frozenset()


class Wrapper:
    """The module, taken apart."""

    def __init__(self, source: str, report: Report, entries: tuple[Entry, ...] = ()) -> None:
        self.report, self.lines, self.entries = report, source.splitlines(), entries
        self.module = ast.parse(source)
        self.definitions: list[Definition] = []
        #: Kernel name -> positional arguments of each call of it.
        self.calls: dict[str, list[list[ast.expr]]] = {}
        self.sizes: dict[str, Values | None] = {}
        #: Text and first line of the C++ that a module with a C++ wrapper holds.
        self.cpp: tuple[str, int] | None = None
        for statement in self.module.body:
            if not self._define(statement):
                self._read(statement)

    def _define(self, statement: ast.stmt) -> bool:
        call = getattr(statement, "value", None)
        if isinstance(call, ast.Constant) and "inductor_entry_impl" in str(call.value):
            self.cpp = str(call.value), call.lineno
        if not (isinstance(call, ast.Call) and dotted(call.func).startswith("async_compile.")):
            return False
        strings = [a for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if strings and not self._is_declared_kernel(statement):
            text = max(strings, key=lambda constant: len(str(constant.value)))
            name = (
                dotted(statement.targets[0]) if isinstance(statement, ast.Assign) else str(strings[0].value)
            )
            self.definitions.append(
                Definition(
                    name,
                    str(text.value),
                    text.lineno,
                    "triton" in dotted(call.func),
                    self._nodes_above(statement),
                )
            )
        return bool(strings)

    def _is_declared_kernel(self, statement: ast.stmt) -> bool:
        """True for a Triton kernel of the user's, which Inductor numbers, that the certificate says is declared."""
        name = dotted(statement.targets[0]) if isinstance(statement, ast.Assign) else ""
        kernels = {e.op.removeprefix("triton::") for e in self.entries if e.verdict == "DECLARED"}
        return re.sub(r"_\d+$", "", name) in kernels

    def _nodes_above(self, statement: ast.stmt) -> frozenset[str]:
        """Graph nodes that the comment above a kernel maps to it."""
        nodes: set[str] = set()
        for line in reversed(self.lines[: statement.lineno - 1]):
            if not line.startswith("#"):
                break
            match = _MAPPED.match(line)
            if match:
                nodes |= {name.strip() for name in match[1].split(",")}
        return frozenset(nodes)

    def _read(self, top: ast.stmt) -> None:
        for node in _executed(top):
            if isinstance(node, ast.Call):
                self._read_call(node)
            elif (
                isinstance(node, ast.Assign)
                and len(node.targets) == 1
                and isinstance(node.targets[0], ast.Name)
            ):
                self._read_size(node.targets[0].id, node.value)
            elif isinstance(node, ast.alias) and "extern_kernels" in (node.name, node.asname):
                self._note("extern", node)

    def _read_size(self, name: str, value: ast.expr) -> None:
        if isinstance(value, (ast.BinOp, ast.Constant, ast.Name)) and not re.fullmatch(r"[su]\d+", name):
            values = values_of(value, self.sizes)
            known = self.sizes.setdefault(name, values)
            if known != values:
                self.sizes[name] = None

    def _read_call(self, node: ast.Call) -> None:
        name = dotted(node.func)
        root, _, rest = name.partition(".")
        if rest == "run" or (not rest and name):
            self.calls.setdefault(root, []).append(node.args)
        elif root in _LIBRARIES:
            if name not in LIBRARY_CALLS and not self._has_one_answer(name):
                self._note("extern", node)
        elif isinstance(node.func, ast.Attribute) and root != "math" and _is_tensor_method(node.func.attr):
            self._note("extern", node)

    def _note(self, rule: str, node: ast.AST) -> None:
        self.report.add(rule, node.lineno, self.lines[node.lineno - 1])  # type: ignore[attr-defined]

    def _has_one_answer(self, name: str) -> bool:
        if name.startswith("torch.ops.") and self._is_declared(name):
            return True
        return name.rpartition(".")[0] in MOVES or (name in EXACT_CALLS and self._is_exact(name))

    def _is_declared(self, name: str) -> bool:
        """True if the certificate says that the user vouches for the custom op of this call."""
        namespace, op = name.removeprefix("torch.ops.").split(".")[:2]
        return any(e.verdict == "DECLARED" and e.op == f"{namespace}::{op}" for e in self.entries)

    def _is_exact(self, name: str) -> bool:
        """True if the ruling on every op of this name was that no order can change its result."""
        op = name.removeprefix("torch.ops.")
        verdicts = {
            e.verdict == "INVARIANT" or e.form.startswith("Exact(") for e in self.entries if e.op == op
        }
        return verdicts == {True}

    def arguments(self, definition: Definition, parameters: list[str]) -> Iterator[dict[str, Values | None]]:
        """What each call of a kernel passes for ``parameters``; nothing where Python does not call it."""
        for arguments in self.calls.get(definition.name, []):
            yield {
                name: values_of(argument, self.sizes)
                for name, argument in zip(parameters, arguments, strict=False)
            }


def _executed(top: ast.stmt) -> Iterator[ast.AST]:
    if isinstance(top, ast.FunctionDef) and top.name in _NOT_EXECUTED:
        return
    if isinstance(top, ast.If):  # if __name__ == "__main__"
        return
    yield from ast.walk(top)


def _is_tensor_method(name: str) -> bool:
    import torch

    return hasattr(torch.Tensor, name) and name not in _METHODS
