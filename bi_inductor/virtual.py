"""A GPU that is not there: while it is active, Inductor lowers for it and Triton generates code for it.

    with virtual_gpu("sm_90"), FakeTensorMode() as fake:
        x = fake.from_tensor(...)  # or torch.empty(..., device="cuda")

Nothing can be launched on it: use it with fake tensors only, and stop a compile before its kernels are
loaded (``inspection.py`` does both). Answers are given to the thread that opened the context; other threads
keep asking the real machine, except through memoised answers, which is why memos are dropped on both sides.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bi_inductor.device_guard import cuda_guard_that_does_nothing
from bi_inductor.errors import MissingDependencyError
from bi_inductor.targets import VirtualDevice, find_target

_LOCK = threading.RLock()
_INTERPRETED = contextvars.ContextVar("_INTERPRETED", default=False)

#: Modules whose memoised functions may have captured an answer of the (virtual or real) GPU.
_MEMOISING_MODULES = (
    "torch.utils._triton",
    "torch._inductor.utils",
    "torch._inductor.comm_analysis",
    "torch._inductor.kernel.mm",
    "torch._inductor.codegen.cutlass.utils",
)
#: The same for memoised methods: (module, class, method).
_MEMOISING_METHODS = (
    ("torch._inductor.codecache", "CacheBase", "get_system"),
    ("torch._inductor.runtime.hints", "DeviceProperties", "create"),
)


@contextlib.contextmanager
def for_the_interpreter() -> Iterator[None]:
    """While it is active, kernels are emitted that Triton's interpreter can run: it has no Gluon."""
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def is_interpreted() -> bool:
    """True if what is emitted is run by Triton's interpreter."""
    return _INTERPRETED.get()


def require_triton() -> None:
    """Raise MissingDependencyError if triton is not installed (a CPU build of torch does not bring it)."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        message = "compiling for a GPU needs triton, which is not installed: pip install triton"
        raise MissingDependencyError(message) from error


def forget_memoised_answers() -> None:
    """Empty every memo that may hold what a device answered."""
    for name in _MEMOISING_MODULES:
        with contextlib.suppress(ImportError):
            for value in vars(importlib.import_module(name)).values():
                if isinstance(value, functools._lru_cache_wrapper) and value.__module__ == name:
                    value.cache_clear()
    for name, owner, method in _MEMOISING_METHODS:
        memo = vars(getattr(importlib.import_module(name), owner)).get(method)
        memo = getattr(memo, "__func__", memo)
        if isinstance(memo, functools._lru_cache_wrapper):
            memo.cache_clear()


class _PerThread(dict):
    """The registered device interfaces: ours for the thread that made it, the real ones for all others."""

    def __init__(self, real: dict[str, Any], ours: dict[str, Any]) -> None:
        super().__init__(real)
        self._owner, self._ours = threading.get_ident(), {**real, **ours}

    def _view(self) -> dict[str, Any]:
        return self._ours if threading.get_ident() == self._owner else dict(super().items())

    def __getitem__(self, key: str) -> Any:
        return self._view()[key]

    def __contains__(self, key: object) -> bool:
        return key in self._view()

    def items(self) -> Any:
        return self._view().items()


def _switched(real: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """``ours`` for the current thread, ``real`` for every other."""
    owner = threading.get_ident()

    def answer(*args: Any, **kwargs: Any) -> Any:
        return (ours if threading.get_ident() == owner else real)(*args, **kwargs)

    # Dynamo calls a function with this mark and takes what it returns for a constant.
    answer._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return answer


def _switched_property(real: property, ours: object) -> property:
    """The value ``ours`` for the current thread, the property ``real`` for every other."""
    return property(_switched(real.fget, lambda self: ours))  # type: ignore[arg-type]


class _OnTheCpu(TorchDispatchMode):
    """Ops that are asked to work on a GPU work on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def on_the_cpu(value: Any) -> Any:
            return torch.device("cpu") if isinstance(value, torch.device) else value

        return func(*pytree.tree_map(on_the_cpu, args), **pytree.tree_map(on_the_cpu, kwargs or {}))


def _on_the_cpu(real: Callable[..., Any]) -> Callable[..., Any]:
    """``real`` with its ops on the CPU."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        with _OnTheCpu():
            return real(*args, **kwargs)

    return _switched(real, answer)


@contextlib.contextmanager
def _without_fakes_on_the_cpu() -> Iterator[None]:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), _OnTheCpu():
        yield


def _cuda_answers(device: VirtualDevice) -> dict[str, Callable[..., Any]]:
    """What ``torch.cuda.<name>`` says while ``device`` is active."""
    generator_state = torch.zeros(16, dtype=torch.uint8)
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_tf32_supported": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda _=None: device,
        "get_device_capability": lambda _=None: device.capability,
        "get_device_name": lambda _=None: device.name,
        "get_arch_list": lambda: [f"sm_{device.arch}"],
        "mem_get_info": lambda _=None: (device.total_memory, device.total_memory),
        "memory_allocated": lambda _=None: 0,
        "get_rng_state": lambda _="cuda": generator_state.clone(),
        "set_rng_state": lambda state, _="cuda": None,
    }


def _device_interface(device: VirtualDevice) -> type:
    """A CudaInterface that answers for ``device``."""
    from torch._dynamo.device_interface import CudaInterface

    class VirtualWorker(CudaInterface.Worker):
        set_device = staticmethod(lambda device: None)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda _=None: device)

    answers: dict[str, Any] = {
        name: staticmethod(answer)
        for name, answer in _cuda_answers(device).items()
        if hasattr(CudaInterface, name)
    }
    own: dict[str, Callable[..., Any]] = {
        "exchange_device": lambda device: 0,
        "maybe_exchange_device": lambda device: 0,
        "get_raw_stream": lambda index: 0,
        "get_compute_capability": lambda _=None: device.arch,
        "is_triton_capable": lambda _=None: True,
        "raise_if_triton_unavailable": lambda _=None: None,
    }
    answers.update({name: staticmethod(answer) for name, answer in own.items()}, Worker=VirtualWorker)
    return type("VirtualCudaInterface", (CudaInterface,), answers)


def _triton_driver(device: VirtualDevice) -> Any:
    """A Triton driver whose current target is ``device``; other threads reach the driver that was active."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    owner, previous = threading.get_ident(), driver._active
    answers: dict[str, Callable[..., Any]] = {
        "get_current_target": lambda: GPUTarget("cuda", device.arch, device.warp_size),
        "get_current_device": lambda: 0,
        "get_active_torch_device": lambda: torch.device("cuda", 0),
        "get_device_capability": lambda _=None: device.capability,
        "get_device_interface": lambda: torch.cuda,
    }

    class VirtualDriver(CudaDriver):
        # A subclass, so that Inductor's set_driver_to_gpu() takes it for the active CUDA driver; without
        # CudaDriver.__init__, which loads libcuda.
        def __init__(self) -> None:
            pass

        def __getattribute__(self, name: str) -> Any:
            if threading.get_ident() != owner:
                return getattr(previous or driver.default, name)
            return answers[name] if name in answers else super().__getattribute__(name)

    return VirtualDriver()


@contextlib.contextmanager
def _active_triton_driver(replacement: Any) -> Iterator[None]:
    from triton.runtime import driver

    with mock.patch.object(driver, "_active", replacement):
        yield


@contextlib.contextmanager
def virtual_gpu(target: str = "sm_90") -> Iterator[VirtualDevice]:
    """Make device ``cuda:0`` a ``target`` ("sm_80" ... "sm_100") for this thread, whatever the machine has.

    Yields the device's properties. Everything is as before on exit. One thread at a time; it may be nested.
    Raises OptionError for an unknown target and MissingDependencyError without triton.
    """
    device = find_target(target)
    require_triton()
    import torch._dynamo.device_interface as interfaces
    import torch._subclasses.fake_tensor as fake_tensor
    from torch._inductor import compile_fx
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.runtime import triton_helpers
    from torch.fx.experimental import proxy_tensor

    mode = fake_tensor.FakeTensorMode
    folder = joint_graph.UniformValueConstantFolder
    interfaces.get_interface_for_device("cpu")  # registers the real ones
    virtual = dict.fromkeys(["cuda", "cuda:0"], _device_interface(device))
    patches: list[tuple[Any, str, Any]] = [
        # It warns once per process, and only a real GPU's user should hear it.
        (compile_fx, "_warn_tf32_disabled", _switched(compile_fx._warn_tf32_disabled, lambda: None)),
        (interfaces, "device_interfaces", _PerThread(interfaces.device_interfaces, virtual)),
        (fake_tensor, "init_gpu_context", _switched(fake_tensor.init_gpu_context, lambda device: None)),
        (triton_helpers, "set_driver_to_gpu", _switched(triton_helpers.set_driver_to_gpu, lambda: None)),
        # A virtual GPU has no streams to trace.
        (torch.accelerator, "is_available", _switched(torch.accelerator.is_available, lambda: False)),
        # Fake tensors must not initialise a device when they are made from data.
        (mode, "avoid_device_init", _switched_property(mode.avoid_device_init, True)),
        # Patterns are traced once per process with what the device answers, and stay: not with our answers.
        (joint_graph, "lazy_init", _switched(joint_graph.lazy_init, lambda *_: None)),
        (post_grad, "lazy_init", _switched(post_grad.lazy_init, lambda *_: None)),
        # Constants of one element are computed for real, to be known and written into the graph.
        (
            proxy_tensor,
            "unset_fake_temporarily",
            _switched(proxy_tensor.unset_fake_temporarily, _without_fakes_on_the_cpu),
        ),
        (folder, "run", _on_the_cpu(folder.run)),
        (folder, "_add_peephole_patterns", _on_the_cpu(folder._add_peephole_patterns)),
    ]
    for name, answer in _cuda_answers(device).items():
        patches.append((torch.cuda, name, _switched(getattr(torch.cuda, name), answer)))
    with _LOCK, cuda_guard_that_does_nothing(), contextlib.ExitStack() as stack:
        stack.callback(forget_memoised_answers)
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_active_triton_driver(_triton_driver(device)))
        forget_memoised_answers()
        yield device
