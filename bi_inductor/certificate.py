"""What a compiled graph is made of, op by op, and why its bits per row cannot follow the batch."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.fx import GraphModule, Node

from . import verdicts
from .errors import BatchInvarianceError
from .verdicts import Ruling, Verdict

SCHEMA_VERSION = 1
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_MARKER = "# batchinv certificate: "


@dataclasses.dataclass(frozen=True)
class Entry:
    """One op: its FX name, target, verdict, canonical form, constants that reach its bits, source line."""

    name: str
    op: str
    verdict: str
    form: str
    dtype: str
    constants: tuple[str, ...]
    source: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The entries of one compiled graph, in the order of the graph.

    ``fingerprint`` (sha256, hex) covers every op that computes: target, form, dtype and constants. Data
    movement and batch sizes are not in it, so it is equal for every batch size of one function.
    """

    entries: tuple[Entry, ...]
    target: str
    versions: tuple[tuple[str, str], ...]
    is_backward: bool = False

    @property
    def fingerprint(self) -> str:
        computing = [
            (e.op, e.verdict, e.form, e.dtype, e.constants)
            for e in self.entries
            if e.verdict != Verdict.INVARIANT.value or not _is_movement(e)
        ]
        return hashlib.sha256(repr((self.target, computing)).encode()).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """Number of ops per verdict."""
        return dict(Counter(entry.verdict for entry in self.entries))

    def summary(self) -> str:
        """One line: verdicts and their numbers, forms, fingerprint."""
        verdict_counts = ", ".join(f"{n} {v}" for v, n in sorted(self.counts.items()))
        kinds = Counter(entry.form.split("(")[0] for entry in self.entries if entry.form)
        forms = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        return f"{len(self.entries)} ops: {verdict_counts} ({forms}); fingerprint {self.fingerprint[:16]}"

    def to_json(self) -> str:
        """The certificate as one JSON object (``schema`` names the version of its layout)."""
        return json.dumps({"schema": SCHEMA_VERSION, **dataclasses.asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """The inverse of ``to_json``. Raises ValueError for another schema version."""
        fields = json.loads(text)
        if fields.pop("schema") != SCHEMA_VERSION:
            raise ValueError("this certificate was written by another version of batchinv")
        entries = tuple(Entry(**{**e, "constants": tuple(e["constants"])}) for e in fields.pop("entries"))
        versions = tuple((name, version) for name, version in fields.pop("versions"))
        return cls(entries=entries, versions=versions, **fields)

    def __str__(self) -> str:
        header = f"batchinv certificate, {self.target}, {'backward' if self.is_backward else 'forward'}"
        lines = [header, self.summary(), ""]
        for entry in self.entries:
            line = f"{entry.verdict:10} {entry.op:34} {entry.form:40} {entry.source}"
            lines.append(line.rstrip())
        return "\n".join(lines)


def source_line(node: Node) -> str:
    """``file:line: code`` of the user's line a node stems from, or an empty string."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]*)', trace)
    if not frames:
        return ""
    users = [frame for frame in frames if not frame[0].startswith(_LIBRARIES)]
    path, line, code = (users or frames)[-1]
    return f"{path}:{line}: {code.strip()}"


def make(
    gm: GraphModule,
    rulings: dict[Node, Ruling],
    unproven: Sequence[BatchInvarianceError] = (),
    *,
    target: str,
    is_backward: bool,
) -> Certificate:
    """The certificate of a post-grad graph whose call_function nodes have ``rulings``.

    ``unproven``: composites that were taken apart before they could be ruled on.
    """
    entries = (
        *(Entry("", e.op, Verdict.UNPROVEN.value, "", "", (), e.source or "", e.reason) for e in unproven),
        *(_entry(node, rulings[node]) for node in gm.graph.nodes if node in rulings),
    )
    versions = [("torch", str(torch.__version__))]
    return Certificate(entries, target, tuple(versions), is_backward)


def _entry(node: Node, ruling: Ruling) -> Entry:
    value = node.meta.get("val")
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return Entry(
        name=node.name,
        op=str(node.target),
        verdict=ruling.verdict.value,
        form=str(ruling.form or ""),
        dtype=dtype,
        constants=_constants(node),
        source=source_line(node),
        reason=ruling.reason,
    )


def _constants(node: Node) -> tuple[str, ...]:
    """Scalars that reach the bits of a result: floats, bools and dtypes, and integers of pointwise ops.

    A float is what it is in the accumulator's dtype: a decomposition may have rounded it already, or not yet.
    """
    pointwise = verdicts.is_pointwise(node.target)
    kinds = (float, bool, torch.dtype, int) if pointwise else (float, bool, torch.dtype)
    flat, _ = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
    wide = any(_dtype(n) in (torch.float64, torch.complex128) for n in (node, *node.all_input_nodes))
    scalars = (value for value in flat if isinstance(value, kinds))
    return tuple(repr(ctypes.c_float(v).value if isinstance(v, float) and not wide else v) for v in scalars)


def _dtype(node: Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _is_movement(entry: Entry) -> bool:
    name = entry.op.split(".")[1] if "." in entry.op else entry.op
    return name in verdicts._MOVEMENT or not entry.op.startswith(("aten.", "prims.", "inductor_prims."))


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


def record_from(source: str) -> None:
    """Remember the certificate of generated source that was compiled or loaded from a cache."""
    certificate = extract(source)
    if certificate is not None:
        with _registry_lock:
            _registry.append(certificate)


def certificates() -> list[Certificate]:
    """Certificates of all graphs the backend compiled or loaded from a cache in this process, oldest first."""
    with _registry_lock:
        return list(_registry)
