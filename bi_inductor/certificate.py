"""What a compiled graph is made of, op by op and kernel by kernel, and why its bits per row cannot follow the batch.

A certificate is a value: it is written into the generated module, read back from every cache, compared with others and
written as JSON (``docs/certificate.md``). What goes into it from a graph is the business of ``entries.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from . import numerics
from .numerics import Comparison

SCHEMA_VERSION = 5
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_MARKER = "# batchinv certificate: "


class Level(enum.Enum):
    """How far a claim was checked. A certificate never says more than what was done for this graph."""

    NONE = "no claim"
    CONSTRUCTION = "by construction"
    SOURCE = "verified in source"
    IR = "verified in IR"
    MEASURED = "measured on this GPU"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One op of a graph.

    ``name``, ``op``: of the FX node. ``form``: the canonical order, over reduced lengths only; ``example``: the form
    at the lengths of the example that was compiled, where ``form`` has symbols. ``constants``: scalars that reach the
    bits. ``inputs``: names of the tensors it reads; ``moves``: which elements an op takes that computes nothing.
    ``source``: the user's line. ``level``: how far the claim was checked.
    """

    name: str
    op: str
    verdict: str
    form: str
    dtype: str
    constants: tuple[str, ...]
    source: str
    reason: str = ""
    example: str = ""
    inputs: tuple[str, ...] = ()
    moves: str = ""
    level: str = Level.CONSTRUCTION.value


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One generated kernel: the ops in it, their forms and source lines, and the freedom that its schedule used.

    ``language``: "triton" or "cpp". ``schedule``: what was chosen among schedules of one order. ``retraced``: what the
    verifier found in the text to be in order: "sum", "prod" (a tree), "chain", "group chain", "attention" or
    "attention gradient".
    """

    name: str
    language: str
    ops: tuple[str, ...]
    forms: tuple[str, ...]
    schedule: tuple[str, ...]
    sources: tuple[str, ...]
    retraced: tuple[str, ...]
    level: str


@dataclasses.dataclass(frozen=True)
class Environment:
    """What bits depend on beside the graph: backend ("cpp", "triton"), device and architecture, versions.

    ``options``: what the user asked for; they cannot change a bit, but say which ops may be UNPROVEN.
    """

    device: str
    architecture: str
    versions: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, str], ...] = ()

    def difference(self, other: Environment) -> str:
        """What of it keeps equal graphs from having equal bits; empty if nothing does."""
        if self.architecture != other.architecture:
            return f"{self.architecture} against {other.architecture}"
        ours, theirs = dict(self.versions), dict(other.versions)
        return ", ".join(
            f"{name} {ours.get(name)} against {theirs.get(name)}"
            for name in dict.fromkeys([*ours, *theirs])
            if ours.get(name) != theirs.get(name)
        )


@dataclasses.dataclass(frozen=True)
class Certificate:
    """One compiled graph: its ops in the order of the graph, its kernels, and what its bits depend on beside them.

    ``inputs``: names of its tensor inputs, in the order in which the function first uses them. ``outputs``: of what it
    returns to the user (of a backward graph, all). ``floats``: inputs that hold one Python float, with the values of
    the example; the entries have these as constants. ``guards``: conditions on the symbols of a dynamic graph, without
    which another graph would be compiled; ``symbols``: their values in the example. ``target``: "cpu" or "cuda".
    """

    entries: tuple[Entry, ...]
    kernels: tuple[Kernel, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    target: str
    environment: Environment
    is_backward: bool = False
    floats: tuple[tuple[str, float], ...] = ()
    guards: tuple[str, ...] = ()
    symbols: tuple[tuple[str, int], ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of what the graph returns: every op behind it with its form at the example's lengths, its
        dtype, its constants, and what it reads through which data movement.

        Sizes are not in it, so it is equal for every batch size; neither are names, weights, the order of ops, nor what
        a training graph saves for its backward.
        """
        return numerics.fingerprint(self)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the fingerprint, the architecture and the versions.

        Equal digests mean equal bits, of functions whose views cut tensors alike: sizes of views are not in it.
        """
        parts = (self.fingerprint, self.environment.architecture, self.environment.versions)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """Number of ops per verdict."""
        return dict(Counter(entry.verdict for entry in self.entries))

    @property
    def levels(self) -> dict[str, int]:
        """Number of CANONICAL ops per level."""
        return dict(Counter(entry.level for entry in self.entries if entry.form))

    def same_numerics(self, other: Certificate) -> Comparison:
        """Whether ``other`` computes the same bits from the same inputs, and if not, at which node they part.

        A form with a symbol for its length, and one with a number, are one form: the length is the inputs'.
        """
        return numerics.compare(self, other)

    def summary(self) -> str:
        """One line: verdicts and their numbers, forms, how far they were checked, fingerprint."""
        verdicts = ", ".join(f"{n} {v}" for v, n in sorted(self.counts.items()))
        kinds = Counter(entry.form.split("(")[0] for entry in self.entries if entry.form)
        forms = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        levels = "".join(f"; {n} {level}" for level, n in sorted(self.levels.items()))
        return f"{len(self.entries)} ops: {verdicts} ({forms}){levels}; fingerprint {self.fingerprint[:16]}"

    def to_json(self) -> str:
        """The certificate as one JSON object, as ``certificate.schema.json`` describes it."""
        fields = {"schema": SCHEMA_VERSION, "fingerprint": self.fingerprint, "digest": self.digest}
        return json.dumps({**fields, **dataclasses.asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """The inverse of ``to_json``. Raises ValueError for another schema version and for a changed document."""
        fields = json.loads(text)
        if fields.pop("schema", None) != SCHEMA_VERSION:
            raise ValueError("this certificate was written by another version of batchinv")
        fingerprint, digest = fields.pop("fingerprint"), fields.pop("digest")
        made = cls(
            entries=tuple(Entry(**frozen(entry)) for entry in fields.pop("entries")),
            kernels=tuple(Kernel(**frozen(kernel)) for kernel in fields.pop("kernels")),
            environment=Environment(**frozen(fields.pop("environment"))),
            **frozen(fields),
        )
        if (fingerprint, digest) != (made.fingerprint, made.digest):
            raise ValueError("the fingerprint or digest of this certificate is not that of its entries")
        return made

    def __str__(self) -> str:
        way = "backward" if self.is_backward else "forward"
        environment = self.environment
        versions = ", ".join(f"{name} {version}" for name, version in environment.versions)
        lines = [
            f"batchinv certificate, {self.target}, {way}",
            f"{environment.device} ({environment.architecture}), {versions}",
            self.summary(),
            "",
            *map(_entry_line, self.entries),
            "",
            *(line for kernel in self.kernels for line in _kernel_lines(kernel)),
        ]
        return "\n".join(lines).rstrip()


def frozen(fields: dict[str, Any]) -> dict[str, Any]:
    """Lists of a JSON object as tuples."""

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return {name: tuples(value) for name, value in fields.items()}


def _entry_line(entry: Entry) -> str:
    level = entry.level if entry.form else ""
    form = f"({entry.reason})" if entry.verdict == "DECLARED" else entry.form
    return f"{entry.verdict:10} {entry.op:34} {form:40} {level:20} {entry.source}".rstrip()


def _kernel_lines(kernel: Kernel) -> list[str]:
    lines = [f"kernel {kernel.name} ({kernel.language}, {kernel.level}): {', '.join(kernel.schedule)}"]
    lines += [f"  order  {form}" for form in kernel.forms]
    return lines + [f"  source {source}" for source in kernel.sources]


def source_line(node: Node) -> str:
    """``file:line: code`` of the user's line a node stems from, or an empty string."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]*)', trace)
    if not frames:
        return ""
    users = [frame for frame in frames if not frame[0].startswith(_LIBRARIES)]
    path, line, code = (users or frames)[-1]
    return f"{path}:{line}: {code.strip()}"


def embed(source: str, certificate: Certificate) -> str:
    """Generated wrapper source with its certificate as the last comment, so that caches carry it."""
    return f"{source}\n{_MARKER}{certificate.to_json()}\n"


def extract(source: str) -> Certificate | None:
    """The certificate that ``embed`` put into generated source, or None."""
    for line in reversed(source.rstrip().splitlines()):
        if line.startswith(_MARKER):
            return Certificate.from_json(line.removeprefix(_MARKER))
    return None


_registry: list[Certificate] = []
_registry_lock = threading.Lock()
_collections: list[list[str]] = []


def record_from(source: str) -> Certificate | None:
    """Remember the certificate of generated source that was compiled or loaded from a cache, and return it."""
    certificate = extract(source)
    if certificate is not None:
        with _registry_lock:
            _registry.append(certificate)
            for collection in _collections:
                collection.append(source)
    return certificate


@contextlib.contextmanager
def collected_sources() -> Iterator[list[str]]:
    """A list to which the source of each graph is added that this process compiles or loads from a cache meanwhile.

    Inductor's own list of loaded modules is emptied after each graph where caches are disabled.
    """
    sources: list[str] = []
    with _registry_lock:
        _collections.append(sources)
    try:
        yield sources
    finally:
        with _registry_lock:  # by identity: two empty lists are equal
            _collections[:] = [other for other in _collections if other is not sources]


def certificates() -> list[Certificate]:
    """Certificates of all graphs the backend compiled or loaded from a cache in this process, oldest first."""
    with _registry_lock:
        return list(_registry)
