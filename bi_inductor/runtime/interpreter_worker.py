"""Runs generated modules on CPU tensors, their Triton kernels in Triton's interpreter. Run as a process:

    TRITON_INTERPRET=1 python -m bi_inductor.runtime.interpreter_worker < requests > replies

A request is a pickled (source, inputs, config number or None, state of the generator of random numbers); a reply is
(outputs, state, None) or (None, None, traceback).
Triton decides at import whether its functions are compiled or interpreted, hence the process.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import pickle
import struct
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any, BinaryIO
from unittest import mock

import torch

#: Elements of a block of a kernel whose blocks may be widened.
_WIDEST = 2**17


class InterpretedKernel:
    """What ``cached_autotune`` makes of an emitted kernel: ``run`` executes one of its configurations."""

    def __init__(
        self,
        function: Any,
        configs: list[Any],
        inductor_meta: dict[str, Any],
        number: int | None,
        choice: Any,
    ) -> None:
        self._function, self._inductor_meta = function, inductor_meta
        self._config, self._choice = configs[(number or 0) % len(configs)], choice
        self._is_widened = number is None

    def run(self, *args: Any, stream: Any = None, **kwargs: Any) -> None:
        from torch._inductor.runtime.triton_heuristics import GridExpr

        if self._choice is not None:  # the tile follows the sizes, as on a GPU
            self._config = self._choice.configs[self._choice(*args[-3:])[0]]
        blocks = {k: v for k, v in self._config.kwargs.items() if k in self._function.arg_names}
        names = [name for name in self._function.arg_names if name not in blocks]
        launch_only = self._inductor_meta.get("extra_launcher_args", [])  # a template's grid
        given = {**dict(zip([*names, *launch_only], args, strict=False)), **kwargs}
        config = copy.copy(self._config)
        if self._is_widened:
            blocks = _widened(blocks, given)
            config.kwargs = {**config.kwargs, **blocks}
        grid = GridExpr.from_meta(self._inductor_meta, config).eval_slow({**config.kwargs, **given})
        own = {name: value for name, value in given.items() if name not in launch_only}
        self._function[grid](**own, **blocks)


def _widened(blocks: dict[str, int], given: dict[str, Any]) -> dict[str, int]:
    """XBLOCK as wide as what there is, within reason: an operation on a block costs as much as one on an element."""
    if not {"XBLOCK", "xnumel"} <= {*blocks, *given}:
        return blocks
    width, others = blocks["XBLOCK"], 2 * math.prod(blocks.values()) // blocks["XBLOCK"]
    while width < given["xnumel"] and width * others <= _WIDEST:
        width *= 2
    return {**blocks, "XBLOCK": width}


def _interpreting_autotune(number: int | None) -> Callable[..., Any]:
    """Stands in for ``triton_heuristics.cached_autotune``."""

    def cached_autotune(size_hints: Any, configs: Any, triton_meta: Any, *_: Any, **options: Any) -> Any:
        inductor_meta = options.get("inductor_meta") or {}
        choice = getattr(options.get("caching_autotuner_cls"), "keywords", {}).get("choice")
        return lambda function: InterpretedKernel(function, configs, inductor_meta, number, choice)

    return cached_autotune


class _AsyncCompile:
    """Stands in for the ``AsyncCompile`` of generated modules; kernels are defined at once."""

    def triton(self, name: str, source: str, device_str: str = "cuda") -> InterpretedKernel:
        from torch._inductor.codecache import PyCodeCache

        # A module per definition: two requests may define one source with different configurations.
        return getattr(PyCodeCache.load(source, extra=os.urandom(8).hex()), name)

    def wait(self, scope: dict[str, Any]) -> None:
        pass


@contextlib.contextmanager
def _cuda_is_the_cpu(number: int | None) -> Any:
    """What a generated module asks of CUDA, answered by the CPU."""
    import torch._inductor.async_compile as async_compile
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    from bi_inductor.runtime import interpreter_semantics

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch._C, "_cuda_getCurrentRawStream", lambda index: 0),
            (torch._C._dynamo.guards, "_empty_strided_cuda", _empty_strided),
            (torch.cuda, "_DeviceGuard", lambda index: contextlib.nullcontext()),
            (torch.cuda, "set_device", lambda index: None),
            (async_compile, "AsyncCompile", _AsyncCompile),
            (triton_heuristics, "cached_autotune", _interpreting_autotune(number)),
            (triton_helpers, "set_driver_to_gpu", lambda: None),
            *interpreter_semantics.replacements(),
        ):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield


def _empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    """Memory that a kernel must write before reading: NaN (or an odd integer) wherever it does not."""
    length = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
    poison = float("nan") if dtype.is_floating_point else 0x55 if dtype != torch.bool else True
    return torch.full((length,), poison, dtype=dtype).as_strided(size, stride)


def run_module(source: str, inputs: list[Any], number: int | None) -> list[Any]:
    """Outputs of a generated module for its graph inputs, with configuration ``number`` of each kernel, or with the
    first one and blocks as wide as may be."""
    with _cuda_is_the_cpu(number):
        module = types.ModuleType("generated")
        module.__dict__["__file__"] = "<generated>"
        exec(compile(source, "<generated>", "exec"), module.__dict__)
        return list(module.call(list(inputs)))


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    while header := requests.read(8):
        request = torch.load(io.BytesIO(requests.read(*struct.unpack("<q", header))), weights_only=False)
        reply: tuple[list[Any] | None, torch.Tensor | None, str | None]
        try:
            *arguments, state = request
            torch.set_rng_state(state)
            reply = (run_module(*arguments), torch.get_rng_state(), None)
        except Exception:
            reply = (None, None, traceback.format_exc())
        buffer = io.BytesIO()
        torch.save(reply, buffer, pickle_protocol=pickle.HIGHEST_PROTOCOL)
        replies.write(struct.pack("<q", buffer.tell()) + buffer.getvalue())
        replies.flush()


if __name__ == "__main__":
    # Kernels may print: what is left of stdout goes to stderr, so that replies stay alone on their pipe.
    own_stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _serve(sys.stdin.buffer, own_stdout)
