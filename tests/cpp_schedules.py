"""Compile for the CPU under schedules that Inductor would not choose: what must not change a bit."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch._inductor import config
from torch._inductor.codegen import cpp as stock
from torch._inductor.utils import run_and_get_code

from bi_inductor.codegen import cpp as ours


def compiler(
    fn: Callable, *, schedule: str = "default", dynamic: bool = False
) -> Callable[..., list[torch.Tensor]]:
    """``fn`` compiled anew under a schedule that would not be chosen otherwise."""
    torch._dynamo.reset()
    call = torch.compile(fn, backend="batchinv", dynamic=dynamic)

    def scheduled(*inputs: torch.Tensor) -> list[torch.Tensor]:
        with config.patch(force_disable_caches=True), SCHEDULES[schedule]():
            return call(*inputs)

    return scheduled


def compiled(fn: Callable, *inputs: torch.Tensor, schedule: str = "default") -> list[torch.Tensor]:
    return compiler(fn, schedule=schedule)(*inputs)


def kernel_source(fn: Callable, *inputs: torch.Tensor, **how: object) -> str:
    """The emitted C++ functions, without the runtime inlined above them."""
    _, (code,) = run_and_get_code(compiler(fn, **how), *inputs)
    return "\n".join(part.split("''')")[0] for part in code.split('extern "C"')[1:])


def _choosing(indices: Callable[[int, int], list[int]]) -> Callable[[], contextlib.AbstractContextManager]:
    """A schedule that vectorises the axes ``indices(number of output axes, number of axes)``."""

    def select(self, functions, sizes, factor):
        group, reduced = max(sizes, key=lambda size: len(size[1]))
        return indices(len(group), len(group) + len(reduced))

    return lambda: mock.patch.object(ours.OrderedTilingSelect, "_select_tiling_indices", select)


@contextlib.contextmanager
def _scalar() -> Iterator[None]:
    def select(self, *args):
        return [], [], *stock.TilingSelect.select_tiling(self, *args)[2:]

    with mock.patch.object(ours.OrderedTilingSelect, "select_tiling", select):
        yield


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


SCHEDULES = {
    "default": contextlib.nullcontext,
    "scalar": _scalar,
    "along": lambda: _with_any_layout(_choosing(lambda outputs, axes: [axes - 1])),
    "across": lambda: _with_any_layout(_choosing(lambda outputs, axes: [max(0, outputs - 1)])),
    "scalar tails": lambda: config.patch({"cpp.enable_loop_tail_vec": False}),
    "one thread": _one_thread,
}


@contextlib.contextmanager
def _with_any_layout(choice: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Vectorise even where loads are not contiguous, which Inductor's heuristic would refuse."""
    with choice(), config.patch({"cpp.enable_tiling_heuristics": False}):
        yield


def rows_of(length: int, rows: int = 11, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(rows, length, generator=generator, dtype=torch.float64).to(dtype)
