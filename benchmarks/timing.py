"""Timing side by side on one GPU: CUDA graphs, L2 flushed, interleaved, medians.

Each candidate is captured once as a CUDA graph, so neither guards nor Python are timed. Every round runs all
candidates in a rotated order, each after the L2 cache was overwritten; the medians over the rounds are compared.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable
from pathlib import Path

import torch


def captured(fn: Callable[[], object], warm_ups: int = 3) -> torch.cuda.CUDAGraph:
    """``fn`` as a CUDA graph, after warm-up calls that compile and tune it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph


def interleaved_medians(candidates: dict[str, Callable[[], object]], rounds: int = 40) -> dict[str, float]:
    """Median time of each candidate in microseconds."""
    return interleaved_graphs({name: captured(fn) for name, fn in candidates.items()}, rounds)


def interleaved_graphs(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int = 40) -> dict[str, float]:
    """As ``interleaved_medians``, of graphs that are captured already."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    names = list(graphs)
    for round_number in range(rounds):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def print_longest_kernels(candidates: dict[str, Callable[[], object]], count: int) -> None:
    """Microseconds in all, calls and name of the ``count`` kernels of each candidate that take longest."""
    for name, fn in candidates.items() if count else ():
        print(f"{name}, microseconds, calls:")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            fn()
            torch.cuda.synchronize()
        found = [(event.self_device_time_total, event.count, event.key) for event in profile.key_averages()]
        for taken, calls, kernel in sorted(found, reverse=True)[:count]:
            print(f"  {taken:9.1f} {calls:4d}  {kernel[:90]}")


#: Bytes per second of the memory, by the vendor's datasheets: what no kernel can beat.
_MEMORY_BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12, "B200": 8.0e12}


def memory_bandwidth() -> float:
    """Datasheet bandwidth of this GPU in bytes per second. Raises StopIteration for one that is not listed."""
    name = torch.cuda.get_device_name()
    return next(value for key, value in _MEMORY_BANDWIDTH.items() if key in name)


def machine() -> dict[str, str]:
    """Names and versions that every row of a result carries."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def write_csv(path: str, rows: list[dict[str, object]], command: str) -> None:
    """Rows as CSV under a comment line with the command that made them; a row may lack columns of others."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="") as file:
        file.write(f"# {command}\n")
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
