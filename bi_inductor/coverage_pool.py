"""Judging ops in a process of its own, which may crash or hang without taking the table with it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from bi_inductor.coverage import CaseResult, OpResult, Settings, judge_op


def judged(names: Iterable[str], settings: Settings, limit: float) -> Iterator[OpResult]:
    """Results in the order of ``names``; an op that takes longer than ``limit`` seconds is an ERROR."""
    worker = _Worker(settings)
    try:
        for name in names:
            yield worker.judge(name, limit)
    finally:
        worker.stop()


class _Worker:
    """One process, started when it is needed and replaced when it is lost."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.process: Any = None
        self.connection: Any = None

    def judge(self, name: str, limit: float) -> OpResult:
        if self.process is None:
            self._start()
        self.connection.send(name)
        try:
            if self.connection.poll(limit):
                result, goes_on = self.connection.recv()
                if not goes_on:
                    self.stop()
                return result
            reason = f"took longer than {limit:.0f} s"
        except EOFError:
            reason = "the process died"
        self.stop()
        return OpResult(name, self.settings.target, (CaseResult(0, "none", "ERROR", reason),), limit)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.settings), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()  # torch is imported: from here on the limit counts

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
        self.process = None


def _serve(connection: Connection, settings: Settings) -> None:
    warnings.simplefilter("ignore")
    if "TORCH_LOGS" not in os.environ:
        logging.disable(logging.CRITICAL)
    connection.send("ready")
    while True:
        connection.send((judge_op(connection.recv(), settings), _goes_on(settings)))


def _goes_on(settings: Settings) -> bool:
    """False once a kernel has failed on a GPU: nothing more can be done there by this process."""
    try:
        if settings.device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
