"""Emitted Triton kernels compiled to cubins on a machine without their GPU.

Triton brings ptxas, so everything but the launch happens: what Inductor's own launcher would compile, for the
configurations its heuristic would choose from, with the options the kernel's decorator asks for.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any
from unittest import mock

from bi_inductor.inspection import Inspection, kernel_definitions
from bi_inductor.targets import find_target
from bi_inductor.virtual import virtual_gpu


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """One kernel in one configuration: its PTX, its cubin, and what it needs of the machine."""

    name: str
    target: str
    config: str
    ptx: str
    cubin: bytes
    num_warps: int
    shared_bytes: int
    registers: int
    stack_bytes: int

    @property
    def spills(self) -> bool:
        """True if values did not fit in registers (or are indexed) and live on the stack of a thread."""
        return self.stack_bytes > 0

    def resources(self) -> dict[str, Any]:
        """What the kernel needs, as plain values: per thread ``registers`` and ``stack_bytes`` (spilled values live
        there), per program ``num_warps`` and ``shared_bytes``."""
        names = ("name", "target", "config", "num_warps", "registers", "stack_bytes", "shared_bytes")
        return {**{name: getattr(self, name) for name in names}, "spills": self.spills}

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.config}) for {self.target}: {self.registers} registers, "
            f"{self.shared_bytes} bytes of shared memory, {self.stack_bytes} bytes of stack, "
            f"cubin of {len(self.cubin)} bytes"
        )


def compile_offline(
    kernels: Inspection | Mapping[str, str] | str, target: str = "sm_90", *, every_config: bool = False
) -> list[CompiledKernel]:
    """Compile emitted Triton kernels for ``target`` and return one result per kernel and configuration.

    ``kernels``: an Inspection, kernel sources by name, or the source of a whole generated module. They should
    have been generated for the same target. ``every_config``: all configurations of the heuristic, not just
    the first. Raises OptionError for an unknown target and Triton's own errors for what does not compile.
    """
    find_target(target)
    if isinstance(kernels, Inspection):
        kernels = kernels.kernels
    elif isinstance(kernels, str):
        kernels = kernel_definitions(kernels)
    with virtual_gpu(target) as device:
        compiled = []
        for name, source in kernels.items():
            if source.lstrip().startswith("#include"):
                continue  # C++: a loop counts its steps on the CPU
            autotuner = load_kernel(source, name.split("#")[0])
            autotuner.device_props = autotuner.device_props._replace(cc=device.arch, major=device.major)
            configs = _configs(autotuner) if every_config else autotuner.configs[:1]
            compiled += [_compile(autotuner, config, name, target) for config in configs]
        return compiled


def load_kernel(source: str, name: str) -> Any:
    """The CachingAutotuner that the source of one kernel defines; nothing is compiled yet."""
    from torch._inductor.codecache import PyCodeCache

    return getattr(PyCodeCache.load(source), name)


def _configs(autotuner: Any) -> list[Any]:
    """All configurations of a kernel; those of a matrix product are its tiles."""
    return autotuner.choice.configs if hasattr(autotuner, "choice") else autotuner.configs


def _compile(autotuner: Any, config: Any, name: str, target: str) -> CompiledKernel:
    from torch._inductor.runtime import triton_heuristics

    # Static launchers load the cubin on a device; the ordinary kind does so at the first launch.
    never = mock.patch.object(
        triton_heuristics.StaticTritonCompileResult, "can_statically_launch", staticmethod(lambda *_: None)
    )
    with never:
        kernel = autotuner._precompile_config(config).kernel
    cubin = kernel.asm["cubin"]
    registers, stack_bytes = resources_of(cubin)
    return CompiledKernel(
        name=name,
        target=target,
        config=str(config),
        ptx=kernel.asm["ptx"],
        cubin=cubin,
        num_warps=kernel.metadata.num_warps,
        shared_bytes=kernel.metadata.shared,
        registers=registers,
        stack_bytes=stack_bytes,
    )


def resources_of(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) per thread of the kernel in ``cubin``."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing.stdout)
    if found is None:
        raise ValueError(f"cuobjdump did not say what the kernel uses: {listing.stdout}")
    return int(found[1]), int(found[2])
