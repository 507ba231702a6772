"""``python -m bi_inductor doctor``: do all tiles and schedules that may be chosen give the same bits on this GPU?"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING

from bi_inductor.commands.reporting import CommandError, progress, quiet_torch

if TYPE_CHECKING:
    from bi_inductor import doctor, doctor_attention
    from bi_inductor.doctor import Result

#: Processes that examine kinds side by side: each has a context on the GPU, of some hundred MiB.
_MOST_WORKERS = 16

SUMMARY = "Check on this GPU that every tile of a matrix product, and every schedule of attention, gives the same bits."
EXAMPLE = """examples:
  python -m bi_inductor doctor --kinds bfloat16,float8_e4m3fn
  python -m bi_inductor doctor --json > h100.json    (for certify --measured h100.json)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which kinds of products and attention."""
    parser.add_argument("--kinds", help="names from the first column, separated by commas (default: all)")


def run(options: argparse.Namespace) -> int:
    """Measure and print a table; 1 if the tiles of one kind disagree."""
    import torch

    from bi_inductor.virtual import require_triton

    require_triton()
    if not torch.cuda.is_available():
        raise CommandError("doctor runs kernels, and there is no GPU here; inspect needs none")
    began = time.perf_counter()
    names = _chosen(options.kinds)
    results = examine_all(names, _examine, workers=min(len(names), _MOST_WORKERS, os.cpu_count() or 1))
    if options.json:
        print(json.dumps(_as_json(results), indent=2))
    else:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n{table(results)}")
        print(f"\n{verdict(results)} ({time.perf_counter() - began:.0f} s)")
    return 0 if agree(results) else 1


def examine_all(names: list[str], examine: Callable[[str], list[Result]], workers: int = 1) -> list[Result]:
    """The results of ``examine`` for ``names``, in their order, from ``workers`` processes that do one at a time.

    What takes the time is compiling, which fills one core. An error of one ends all.
    """
    if workers < 2:
        return [result for name in names for result in _announced(name, examine)]
    with _compiling_in_one_thread(), _processes(workers) as pool:
        progress(f"{len(names)} kinds, {workers} at a time")
        started = {pool.submit(examine, name): name for name in reversed(names)}  # attention takes longest
        for number, future in enumerate(as_completed(started), 1):
            future.result()
            progress(f"{started[future]}: done, {number} of {len(names)}")
        by_name = {name: future.result() for future, name in started.items()}
    return [result for name in names for result in by_name[name]]


def _announced(name: str, examine: Callable[[str], list[Result]]) -> list[Result]:
    progress(name)
    return examine(name)


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """New ones, since CUDA does not survive a fork; after an error those that wait are not begun."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _compiling_in_one_thread() -> Iterator[None]:
    """Inductor's setting in processes that start now: each would start a pool of compilers of its own."""
    name = "TORCHINDUCTOR_COMPILE_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _examine(name: str) -> list[Result]:
    """The kind called ``name``, on this GPU."""
    from bi_inductor import doctor, doctor_attention

    kind = _kinds()[name]
    with quiet_torch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(kind, doctor_attention.Kind):
            return [*doctor_attention.examine(kind)]
        return doctor.examine(kind)


def _kinds() -> dict[str, doctor.Kind | doctor_attention.Kind]:
    """All that this GPU has, by name."""
    import torch

    from bi_inductor import doctor, doctor_attention

    major, minor = torch.cuda.get_device_capability()
    kinds: list[doctor.Kind | doctor_attention.Kind] = []
    kinds += [kind for kind in doctor.KINDS if doctor.is_supported(kind, 10 * major + minor)]
    kinds += doctor_attention.KINDS
    return {kind.name: kind for kind in kinds}


def _chosen(names: str | None) -> list[str]:
    possible = _kinds()
    wanted = [*dict.fromkeys(names.split(","))] if names else [*possible]
    unknown = [name for name in wanted if name not in possible]
    if unknown:
        raise CommandError(f"--kinds takes names out of {', '.join(possible)}, not {unknown[0]!r}")
    return wanted


def agree(results: list[Result]) -> bool:
    """True if the selectable tiles or schedules of every kind gave one class of bits for every K."""
    return all(result.agrees for result in results)


def verdict(results: list[Result]) -> str:
    """One line for the user."""
    bad = list(dict.fromkeys(result.kind for result in results if not result.agrees))
    if not bad:
        return "Every tile and schedule gives the same bits: the contract holds here."
    return f"TILES DISAGREE for {'; '.join(bad)}: bits may follow the batch here. Please report this table."


def table(results: list[Result]) -> str:
    """One line per kind and, where tiles use several, per family of instructions. K of attention: keys."""
    head = ("kind", "instructions", "tiles", "K", "classes", "")
    rows = [
        (
            result.kind,
            result.family,
            str(result.tiles),
            "/".join(map(str, result.depths)),
            "/".join(map(str, result.classes)),
            "ok" if result.agrees else "DIFFER",
        )
        for result in results
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    )


def _as_json(results: list[Result]) -> dict[str, object]:
    import torch
    import triton

    from bi_inductor import __version__
    from bi_inductor.measurement import DOCTOR_SCHEMA, driver_version

    return {
        "schema": DOCTOR_SCHEMA,
        "gpu": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "batchinv": __version__,
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "agree": agree(results),
        "results": [dataclasses.asdict(result) for result in results],
    }
