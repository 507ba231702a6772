"""The real pipeline, from Dynamo to generated code, on fake tensors; it stops where code would be loaded.

Autograd cannot record fake CUDA tensors in a process without CUDA (its engine asks the driver for streams).
Training graphs for a GPU are therefore traced on the CPU, and moved to the GPU before Inductor sees them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from bi_inductor import certificate, traced
from bi_inductor.capture import captured
from bi_inductor.errors import BatchInvarianceError
from bi_inductor.fakes import FakeCall, fake_call
from bi_inductor.virtual import for_the_interpreter, virtual_gpu

#: Executes a generated module: (source, graph inputs) -> graph outputs.
Runner = Callable[[str, list[Any]], list[Any]]


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What to generate code for, and how: the arguments of ``inspect``.

    With a ``batch_dim`` that dimension of the arguments is a symbol, and all other sizes are numbers.
    """

    target: str
    dynamic: bool = False
    options: dict[str, Any] | None = None
    backward: bool = False
    runner: Runner | None = None
    batch_dim: int | None = None

    @property
    def device(self) -> str:
        """Where the code is meant to run."""
        return "cpu" if self.target == "cpu" else "cuda:0"

    @property
    def traced_device(self) -> str:
        """Where the fakes live that Dynamo and autograd see."""
        return "cpu" if self.backward else self.device

    def __call__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[str], Any]:
        """(sources of the generated modules in the order of compilation, what ``fn`` returned).

        Without a runner the result is fake, but for inputs that are returned. Raises BatchInvarianceError for
        what the backend refuses.
        """
        from torch._subclasses.fake_tensor import FakeTensorMode

        with contextlib.ExitStack() as stack:
            stack.enter_context(
                contextlib.nullcontext() if self.device == "cpu" else virtual_gpu(self.target)
            )
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(self._configured())
            call = fake_call(fn, args, kwargs, self.traced_device, keep_grad=self.backward)
            if self.backward:
                _ask_for_gradients(call)
            sources = stack.enter_context(self._recording(call.originals))
            dynamic: bool | None = self.dynamic
            if self.batch_dim is not None:
                call, dynamic = self._with_unknown_batch(call), None
            backend = captured(lambda gm, inputs: self._backend(gm, inputs))
            compiled = torch.compile(_fresh(call.fn), backend=backend, dynamic=dynamic)
            with _refusals_unwrapped():
                result = compiled(*call.args, **call.kwargs)
            return sources, pytree.tree_map(lambda x: call.originals.get(id(x), x), result)

    def compiled(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """``gm``, a graph on the CPU, by code for ``target``: for a backend of Dynamo. Needs ``backward``, which says
        that graphs are traced on the CPU, and a runner."""
        from bi_inductor.backend import batchinv

        with virtual_gpu(self.target), self._configured(), self._recording({}) as sources:
            compiled = batchinv(gm, inputs, options=self.options)
        for source in sources:
            certificate.record_from(source)
        return compiled

    @contextlib.contextmanager
    def _configured(self) -> Iterator[None]:
        """No caches; shapes as asked for, whatever was compiled before; backwards lowered at once."""
        inductor: dict[str, Any] = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
        inductor["compile_threads"] = 1  # no worker process is started for what will not be compiled
        if self.runner:
            inductor["assume_aligned_inputs"] = True  # fakes have no address to check
        with (
            torch._inductor.config.patch(inductor),
            torch._functorch.config.patch(
                enable_autograd_cache=False,
                enable_remote_autograd_cache=False,
                force_non_lazy_backward_lowering=self.backward,
            ),
            torch._dynamo.config.patch(automatic_dynamic_shapes=False),
            torch.enable_grad() if self.backward else torch.no_grad(),
            _moved_before_inductor(self.device)
            if self.traced_device != self.device
            else contextlib.nullcontext(),
            for_the_interpreter() if self.runner else contextlib.nullcontext(),
        ):
            yield

    def batch_size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The size of the batch dimension of the first tensor argument that has it. Raises ValueError without one."""
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.ndim > (self.batch_dim or 0):
                return leaf.shape[self.batch_dim or 0]
        raise ValueError(f"no tensor argument has a dimension {self.batch_dim}, which should be the batch")

    def _with_unknown_batch(self, call: FakeCall) -> FakeCall:
        """``call`` with its batch dimension marked. A batch of one, which would become a constant, becomes two."""
        dim, size = self.batch_dim or 0, self.batch_size(call.args, call.kwargs)

        def marked(x: torch.Tensor) -> torch.Tensor:
            if x.ndim <= dim or x.shape[dim] != size:
                return x
            if size == 1:
                shape = [2 if d == dim else n for d, n in enumerate(x.shape)]
                grown = torch.empty(shape, dtype=x.dtype, device=x.device, requires_grad=x.requires_grad)
                x = grown
            torch._dynamo.mark_dynamic(x, dim)
            return x

        args, kwargs = pytree.tree_map_only(torch.Tensor, marked, (call.args, call.kwargs))
        return call._replace(args=args, kwargs=kwargs)

    def _backend(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """The real backend. Without a runner its result is thrown away: the graph itself is run, on fakes."""
        from bi_inductor.backend import batchinv

        runnable = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))
        compiled = batchinv(gm, inputs, options=self.options)
        return compiled if self.runner else runnable.forward

    @contextlib.contextmanager
    def _recording(self, originals: dict[int, Any]) -> Iterator[list[str]]:
        """Sources of this thread's graphs, recorded where they would be loaded."""
        from torch._inductor.graph import GraphLowering

        owner, load = threading.get_ident(), GraphLowering.compile_to_module
        sources: list[str] = []

        def record(graph: GraphLowering) -> Any:
            if threading.get_ident() != owner:
                return load(graph)
            wrapper, _ = graph.codegen_with_cpp_wrapper() if graph.cpp_wrapper else graph.codegen()
            sources.append(wrapper.value)
            self._look_at(graph)
            return types.SimpleNamespace(call=self._runnable(wrapper.value, originals), __file__="<dry run>")

        with mock.patch.object(GraphLowering, "compile_to_module", record):
            yield sources

    def _look_at(self, graph: Any) -> None:
        """For subclasses: a graph (Inductor's GraphLowering) whose code was just generated."""

    def _runnable(self, source: str, originals: dict[int, Any]) -> Callable[[list[Any]], Any]:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        def call(inputs: list[Any]) -> Any:
            if self.runner is None:
                raise RuntimeError("this graph was generated, not loaded: it cannot be run")
            with unset_fake_temporarily():
                return self.runner(source, [originals.get(id(x), x) for x in inputs])

        return call


class SpecializedBatchError(ValueError):
    """The function has another graph for every batch size: something in it takes the size for a constant."""


@contextlib.contextmanager
def _refusals_unwrapped() -> Iterator[None]:
    """BatchInvarianceError as the backend raised it, not as Dynamo wrapped it; a constant batch in one line."""
    from torch._dynamo.exc import BackendCompilerFailed, UserError
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

    try:
        yield
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, BatchInvarianceError):
            raise error.inner_exception from None
        raise
    except (ConstraintViolationError, UserError) as error:
        reason = next(
            (line.strip(" -") for line in str(error).splitlines() if "specializ" in line), str(error)
        )
        raise SpecializedBatchError(f"the batch size became a constant: {reason[:300]}") from error


def _fresh(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A module or method behind a code object of its own, as functions have from ``fake_call``."""
    if isinstance(fn, types.FunctionType):
        return fn

    def traced(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return types.FunctionType(traced.__code__.replace(), globals(), "traced", None, traced.__closure__)


def _ask_for_gradients(call: Any) -> None:
    """If nothing in ``call`` requires a gradient, make every floating-point tensor argument require one."""
    modules = [m for m in pytree.tree_leaves(tuple(call[:3])) if isinstance(m, torch.nn.Module)]
    tensors = [x for x in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, torch.Tensor)]
    if not any(x.requires_grad for x in [*tensors, *(p for m in modules for p in m.parameters())]):
        for x in tensors:
            if x.is_floating_point():
                x.requires_grad_()


@contextlib.contextmanager
def _moved_before_inductor(device: str) -> Iterator[None]:
    """Graphs that AOTAutograd traced on the CPU reach Inductor as if they had been traced on ``device``."""
    from torch._inductor import compile_fx

    inner = compile_fx.compile_fx_inner

    def moved_inner(gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        with torch._guards.detect_fake_mode(example_inputs) or contextlib.nullcontext():
            _move_graph(gm, torch.device(device))
            example_inputs = pytree.tree_map_only(torch.Tensor, lambda x: _moved(x, device), example_inputs)
        return inner(gm, example_inputs, **kwargs)

    with traced.moved_to(device), mock.patch.object(compile_fx, "compile_fx_inner", moved_inner):
        yield


def _moved(x: torch.Tensor, device: Any) -> torch.Tensor:
    moved = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)
    return moved if not x.storage_offset() else moved.as_strided(x.size(), x.stride(), x.storage_offset())


def _move_graph(gm: torch.fx.GraphModule, device: torch.device) -> None:
    """Replace the CPU by ``device`` in every argument and in every recorded value of ``gm`` and of its bodies."""

    def moved_argument(value: Any) -> Any:
        return device if isinstance(value, torch.device) and value.type == "cpu" else value

    graphs = (module.graph for module in gm.modules() if isinstance(module, torch.fx.GraphModule))
    for node in (node for graph in graphs for node in graph.nodes):
        node.args = pytree.tree_map(moved_argument, node.args)
        node.kwargs = pytree.tree_map(moved_argument, node.kwargs)
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map_only(
                torch.Tensor, lambda x: _moved(x, device), node.meta["val"]
            )
