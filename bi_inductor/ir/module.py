"""A whole generated module executed on terms: buffers hold numbers of terms, kernels are executed from their TTIR.

The wrapper is run as Python, as the interpreter's worker does, with buffers of the sizes it asks for. What a kernel
cannot be followed in becomes unknown, and the kernel is named.
"""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ..targets import VirtualDevice
from ..ttgir import wrong_sums
from .execution import Pointer, Program, UnsupportedError
from .lowering import LoweredKernel, Lowering
from .terms import INPUT, Terms
from .text import Block, UnreadableError, parse

#: Elements that all programs of one launch may touch together; more would take minutes.
_MOST_ELEMENTS = 1 << 22


class ModuleRun:
    """One execution of a module with configuration ``number`` of each kernel.

    ``left_out``: kernels that are not to be followed, and why. ``unknown``: kernel -> why it was not followed.
    ``used``: kernel -> the configuration it ran in. ``wrong``: kernel -> what its TTGIR says of wrong sums.
    """

    def __init__(
        self,
        source: str,
        device: VirtualDevice,
        kernels: dict[str, str],
        cache: dict[str, Lowering],
        left_out: dict[str, str],
    ) -> None:
        self.left_out = left_out
        self.source, self.device, self.kernels, self.cache = source, device, kernels, cache
        self.terms = Terms()
        self.unknown: dict[str, str] = {}
        self.used: dict[str, str] = {}
        self.wrong: dict[str, list[str]] = {}
        self.number = 0

    def run(self, inputs: list[Any], number: int) -> list[np.ndarray]:
        """Terms of the outputs, one array each. ``inputs``: fakes (only sizes and strides matter) and integers."""
        self.number = number
        with _cuda_is_the_cpu(self):
            module = types.ModuleType("generated")
            module.__dict__["__file__"] = "<generated>"
            exec(compile(self.source, "<generated>", "exec"), module.__dict__)
            results = module.call([self._input(k, x) for k, x in enumerate(inputs)])
        return [x.reshape(-1).numpy() for x in results if isinstance(x, Tensor)]

    def _input(self, number: int, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        length = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        memory = torch.tensor([self.terms.one(INPUT, number, k) for k in range(length)], dtype=torch.int64)
        return memory.as_strided(x.shape, x.stride())

    def launch(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Execute every program of a launch, or make what it writes unknown."""
        if name not in self.cache:
            self.cache[name] = Lowering(self.kernels[name], name, self.device)
        lowering = self.cache[name]
        lowered = lowering.lowered(self.number)
        self.wrong[name] = wrong_sums(lowered.ttgir, lowered.ttir)
        try:
            if name in self.left_out:
                raise UnsupportedError(self.left_out[name])
            if not lowered.ttir:
                raise UnsupportedError("Gluon is not followed yet")
            self.used[name] = lowered.shown
            self._execute(lowering, lowered, args, kwargs)
        except (UnsupportedError, UnreadableError) as error:
            self.unknown[name] = str(error) or type(error).__name__
            self._forget(lowering, args)

    def _execute(
        self, lowering: Lowering, lowered: LoweredKernel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given, grid = _launch_arguments(lowering, lowered, args, kwargs)
        block = parse(lowered.ttir)
        programs = list(itertools.product(range(grid[0]), range(grid[1]), range(grid[2])))
        if len(programs) * _tile_size(block) > _MOST_ELEMENTS:
            raise UnsupportedError(f"{len(programs)} programs are too many to follow")
        values = {
            parameter: _pointer(given[name]) if isinstance(given[name], Tensor) else np.int64(given[name])
            for parameter, name in zip(block.arguments, lowered.arguments, strict=True)
        }
        for program_id in programs:
            program = Program(self.terms, program_id, grid)
            program.values = dict(values)
            program.run(block)

    def _forget(self, lowering: Lowering, args: tuple[Any, ...]) -> None:
        """Everything that the kernel may have written is unknown now."""
        names = lowering.autotuner.fn.arg_names
        for name, value in zip(names, args, strict=False):
            if isinstance(value, Tensor) and ("out" in name.lower() or name == "arg_LSE"):
                memory = _pointer(value).memory
                memory[:] = [
                    self.terms.one("unknown", len(self.unknown), name, k) for k in range(len(memory))
                ]


def _launch_arguments(
    lowering: Lowering, lowered: LoweredKernel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Parameters by name, and the grid, as Inductor's launcher has them."""
    from torch._inductor.runtime.triton_heuristics import GridExpr

    blocks = lowered.config.kwargs
    meta = lowering.inductor_meta
    names = [name for name in lowering.autotuner.fn.arg_names if name not in blocks]
    launch_only = meta.get("extra_launcher_args", [])
    given = {**dict(zip([*names, *launch_only], args, strict=False)), **kwargs}
    grid = GridExpr.from_meta(meta, lowered.config).eval_slow({**blocks, **given})
    return given, tuple(int(n) for n in grid)  # type: ignore[return-value]


def _tile_size(block: Block) -> int:
    """Elements of the largest value of a program."""
    sizes = [int(np.prod(op.shape)) for op in block.operations]
    inside = [_tile_size(region) for op in block.operations for region in op.regions]
    return max([1, *sizes, *inside])


def _pointer(x: Tensor) -> Pointer:
    """The memory behind ``x`` and where ``x`` begins in it."""
    memory = torch.empty(0, dtype=torch.int64).set_(x.untyped_storage()).numpy()
    return Pointer(memory, np.int64(x.storage_offset()))


class _Kernel:
    """Stands in for a kernel of the wrapper."""

    def __init__(self, run: ModuleRun, name: str) -> None:
        self._run, self._name = run, name

    def run(self, *args: Any, stream: Any = None, **kwargs: Any) -> None:
        self._run.launch(self._name, args, kwargs)


@contextlib.contextmanager
def _cuda_is_the_cpu(run: ModuleRun) -> Iterator[None]:
    """What a generated module asks of CUDA, answered with buffers of terms."""
    import torch._inductor.async_compile as async_compile

    undefined = run.terms.one("undefined")

    class AsyncCompile:
        def triton(self, name: str, source: str, device_str: str = "cuda") -> _Kernel:
            return _Kernel(run, name)

        def wait(self, scope: dict[str, Any]) -> None:
            pass

    def empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        length = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
        return torch.full((length,), undefined, dtype=torch.int64).as_strided(size, stride)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch._C, "_cuda_getCurrentRawStream", lambda index: 0),
            (torch._C._dynamo.guards, "_empty_strided_cuda", empty_strided),
            (torch.cuda, "_DeviceGuard", lambda index: contextlib.nullcontext()),
            (torch.cuda, "set_device", lambda index: None),
            (async_compile, "AsyncCompile", AsyncCompile),
        ):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield
