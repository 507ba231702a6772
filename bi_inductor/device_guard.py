"""Lets a CPU build of torch index, record and copy *fake* CUDA tensors.

C++ code that is about to work on a tensor enters a guard for its device, found in a registry by device type.
FakeTensorMode puts a guard that does nothing there for a CUDA build that sees no device. A CPU build has no
entry at all: ``x[:, None]`` of a fake CUDA tensor raises, and autograd ends the process. Here the CPU's guard,
which does nothing either, stands in for the missing one.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

#: ``std::array<std::atomic<const DeviceGuardImplInterface*>, ...>``, indexed by c10::DeviceType.
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_CPU, _CUDA = 0, 1


@contextlib.contextmanager
def cuda_guard_that_does_nothing() -> Iterator[None]:
    """In a CPU build, register a CUDA device guard for the duration; elsewhere do nothing."""
    registry = None if torch.backends.cuda.is_built() else _registry()
    if registry is None or registry[_CUDA] is not None:
        yield
        return
    registry[_CUDA] = registry[_CPU]
    try:
        yield
    finally:
        registry[_CUDA] = None


def _registry() -> ctypes.Array[ctypes.c_void_p] | None:
    """The first two entries of the registry, or None if this build of torch does not export it."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    try:
        return (ctypes.c_void_p * 2).in_dll(ctypes.CDLL(str(library)), _REGISTRY)
    except (OSError, ValueError):
        return None
