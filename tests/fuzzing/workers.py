"""A schedule carried out: by this process, or by several that are started for it and share nothing but the machine."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .campaign import Outcome
from .schedule import Bundle, Schedule, Task


def campaign(arguments: argparse.Namespace) -> int:
    """Run it, print the counts, append them to the CSV; 1 if anything was violated or failed."""
    schedule = Schedule(arguments)
    carry_out(schedule, arguments.workers)
    print(schedule.total)
    for message, times in schedule.messages.most_common(30):
        print(f"{times:5} {message}")
    return int(bool(schedule.total["violating"] or schedule.total["failed"]))


def carry_out(schedule: Schedule, workers: int) -> None:
    """Until ``schedule`` has nothing left. What runs when its time is over is finished if that is soon, and counted."""
    torch.set_num_threads(_threads(schedule))
    if workers > 1:
        _carry_out_in_parallel(schedule, workers)
        return
    while (task := schedule.next()) is not None:
        schedule.finish(task, task())


def _threads(schedule: Schedule) -> int:
    """Two for C++: with one, a loop that is parallel where it must not be does not show."""
    return 2 if schedule.arguments.target == "cpu" else 1


def _carry_out_in_parallel(schedule: Schedule, workers: int) -> None:
    with contextlib.ExitStack() as stack:
        caches = Path(tempfile.mkdtemp(prefix="batchinv-fuzzing-"))
        stack.callback(shutil.rmtree, caches, ignore_errors=True)
        everybody = [_Worker(caches / str(number), _threads(schedule)) for number in range(workers)]
        stack.callback(_stop, everybody)
        idle, busy = list(everybody), dict[Any, tuple[_Worker, Task]]()
        while True:
            while idle and (task := schedule.next()) is not None:
                worker = idle.pop()
                worker.connection.send(task)
                busy[worker.connection] = worker, task
            ready = wait(list(busy), schedule.patience()) if busy else []
            if not ready:
                schedule.drop([task for _, task in busy.values()])
                return
            for connection in ready:
                worker, task = busy.pop(connection)
                try:
                    result = connection.recv()
                except EOFError:
                    result = _of_a_crash(task, worker)
                    everybody.remove(worker)
                    worker = _Worker(worker.cache, worker.threads)
                    everybody.append(worker)
                schedule.finish(task, result)
                idle.append(worker)


def _stop(workers: Sequence[_Worker], patience: float = 5.0) -> None:
    """The idle ones end by themselves; the others after some seconds, whatever they do."""
    for worker in workers:
        worker.connection.close()
    until = time.time() + patience
    for worker in workers:
        worker.process.join(max(until - time.time(), 0.0))
        worker.process.terminate()
        worker.process.join()


def _of_a_crash(task: Task, worker: _Worker) -> Outcome:
    """Every graph of a bundle whose process died has failed: nobody knows which it was."""
    worker.process.join()
    message = f"its process ended with exit code {worker.process.exitcode}"
    if not isinstance(task, Bundle):
        raise RuntimeError(f"{task}: {message}")
    outcome = Outcome()
    outcome.counts["failed"] = len(task.graphs)
    outcome.messages[message] = 1
    outcome.report = "\n".join([f"FAILED: {message}", *(program.source() for program in task.graphs)])
    return outcome


class _Worker:
    """A process of its own that runs tasks one after another, with caches of its own and one thread to compile."""

    def __init__(self, cache: Path, threads: int) -> None:
        self.cache, self.threads = cache, threads
        context = multiprocessing.get_context("spawn")  # a forked child cannot use CUDA
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        with mock.patch.dict(os.environ, self._environment()):
            self.process.start()
        theirs.close()

    def _environment(self) -> dict[str, str]:
        return {
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"),
            "TRITON_CACHE_DIR": str(self.cache / "triton"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": str(self.threads),
        }


def _serve(connection: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):  # nobody waits any more
        while True:
            connection.send(connection.recv()())
