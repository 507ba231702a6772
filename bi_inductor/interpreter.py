"""Emitted Triton kernels executed on a machine without a GPU, in Triton's interpreter.

Slow, exact in the order of every sum, and free of layouts: what ``oracle.py`` says a kernel computes is compared with
what its source says, bit for bit. A matrix product is a chain of single products here, where an MMA adds several.
"""

from __future__ import annotations

import atexit
import functools
import io
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bi_inductor.capture import captured
from bi_inductor.dry_run import DryRun
from bi_inductor.virtual import require_triton


class _Worker:
    """A process that runs generated modules; see ``runtime/interpreter_worker.py``."""

    def __init__(self) -> None:
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bi_inductor.runtime.interpreter_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        )
        atexit.register(self._process.kill)

    def run(self, source: str, inputs: list[Any], config_number: int | None) -> list[Any]:
        """Send one request and wait for its reply. Random seeds come from this process's generator."""
        buffer = io.BytesIO()
        torch.save((source, inputs, config_number, torch.get_rng_state()), buffer)
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(struct.pack("<q", buffer.tell()) + buffer.getvalue())
            self._process.stdin.flush()
            header = self._process.stdout.read(8)
            if len(header) < 8:
                raise RuntimeError("the interpreter's process ended; its last words are on stderr")
            reply = self._process.stdout.read(*struct.unpack("<q", header))
        outputs, state, error = torch.load(io.BytesIO(reply), weights_only=False)
        if error is not None:
            raise RuntimeError(f"a generated module failed in the interpreter:\n{error}")
        torch.set_rng_state(state)
        return outputs


@functools.cache
def _worker() -> _Worker:
    return _Worker()


def run_module(source: str, inputs: list[Any], *, config_number: int | None = 0) -> list[Any]:
    """Execute a generated module (wrapper and Triton kernels) on CPU tensors and return its graph outputs.

    ``inputs`` are the graph's inputs in its order; tensors are not changed, what the module mutates is lost.
    ``config_number`` chooses among the configurations of each kernel's heuristic (modulo their number). None takes the
    first, with blocks as wide as the tensors, which is the fastest here.
    Raises MissingDependencyError without triton, RuntimeError with the worker's traceback.
    """
    require_triton()
    return _worker().run(source, [x.cpu() if isinstance(x, Tensor) else x for x in inputs], config_number)


def run_in_interpreter(
    fn: Callable[..., Any],
    *args: Any,
    target: str = "sm_90",
    dynamic: bool = False,
    options: dict[str, Any] | None = None,
    config_number: int = 0,
) -> Any:
    """``fn(*args)`` by the kernels emitted for ``target``, in the interpreter; returns what ``fn`` returns.

    ``fn`` takes and returns CPU tensors; other arguments as for ``inspect`` and ``run_module``.
    """
    runner = functools.partial(run_module, config_number=config_number)
    _, result = DryRun(target, runner=runner, options=options, dynamic=dynamic)(fn, args, {})
    return result


def interpreting(target: str = "sm_90", *, config_number: int | None = None) -> Callable[..., Any]:
    """A backend for ``torch.compile`` on CPU tensors: the kernels emitted for ``target``, in the interpreter.

    Gradients, dynamic sizes and recompiles work as with the backend itself. ``options``: as there.
    """
    runner = functools.partial(run_module, config_number=config_number)

    @captured
    def backend(gm: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        run = DryRun(target, backward=True, runner=runner, options=options.get("options"))
        return run.compiled(gm, inputs)

    return backend
