"""GPUs one can compile for without having them: what Inductor and Triton ask a device about itself.

Sources: limits per compute capability from the "Technical Specifications per Compute Capability" table of
the CUDA C++ Programming Guide; SM counts, memory and L2 sizes from NVIDIA's data sheets of the named board.
"""

from __future__ import annotations

import dataclasses
import difflib

from bi_inductor.errors import OptionError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclasses.dataclass(frozen=True)
class VirtualDevice:
    """What ``torch.cuda.get_device_properties`` says of a board; field names are torch's."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int
    L2_cache_size: int
    max_threads_per_multi_processor: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block_optin: int
    shared_memory_per_block: int = 48 * KIB
    regs_per_multiprocessor: int = 65536
    max_threads_per_block: int = 1024
    warp_size: int = 32
    gcnArchName: str = ""
    is_integrated: int = 0
    is_multi_gpu_board: int = 0

    @property
    def capability(self) -> tuple[int, int]:
        """(major, minor), as ``torch.cuda.get_device_capability``."""
        return self.major, self.minor

    @property
    def arch(self) -> int:
        """The number Triton's ``GPUTarget`` takes: 90 for compute capability 9.0."""
        return self.major * 10 + self.minor


TARGETS: dict[str, VirtualDevice] = {
    "sm_80": VirtualDevice(
        "NVIDIA A100-SXM4-80GB", 8, 0, 108, 80 * GIB, 40 * MIB, 2048, 164 * KIB, 163 * KIB
    ),
    "sm_86": VirtualDevice("NVIDIA A10", 8, 6, 72, 24 * GIB, 6 * MIB, 1536, 100 * KIB, 99 * KIB),
    "sm_89": VirtualDevice("NVIDIA L40S", 8, 9, 142, 48 * GIB, 96 * MIB, 1536, 100 * KIB, 99 * KIB),
    "sm_90": VirtualDevice(
        "NVIDIA H100 80GB HBM3", 9, 0, 132, 80 * GIB, 50 * MIB, 2048, 228 * KIB, 227 * KIB
    ),
    "sm_100": VirtualDevice("NVIDIA B200", 10, 0, 148, 180 * GIB, 126 * MIB, 2048, 228 * KIB, 227 * KIB),
}


def find_target(target: str) -> VirtualDevice:
    """The device called ``target``; OptionError with a suggestion if there is none."""
    if target in TARGETS:
        return TARGETS[target]
    close = difflib.get_close_matches(str(target), TARGETS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise OptionError(f"unknown target {target!r}: known are {', '.join(TARGETS)}{hint}")
