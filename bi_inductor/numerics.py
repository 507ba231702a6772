"""What two graphs compute, compared through their certificates: the digest of each op, and the first that differs.

An op that computes is what it is (op, form at the example's lengths, dtype, constants) and what it reads. Views and
copies compute nothing and are looked through; ops that select, permute or join elements are part of what is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from .certificate import Certificate, Entry

_OPS = ("aten.", "prims.", "inductor_prims.", "bi_inductor.")
_WITH_LENGTH = ("Chain(", "Exact(", "Tree(")
_LONGEST_SPELLED = 300
#: What an op reads, spelled out as far as the ops that compute: "input 0", "#3" (the fourth of them), ...
_Reads: TypeAlias = tuple[str, ...]

#: Elements stay where they are; only the shape or the memory changes, and that may follow the batch size.
VIEWS = frozenset(
    """alias as_strided as_strided_copy _unsafe_view view view_copy reshape expand expand_copy squeeze squeeze_copy
    unsqueeze unsqueeze_copy clone contiguous detach copy copy_ lift_fresh_copy broadcast_in_dim collapse_view
    split_dim view_of device_put row_major _assert_async _assert_scalar _assert_tensor_metadata""".split()
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The answer of ``same_numerics``: true if bits are equal, else where and why they part.

    ``reason``: empty if nothing differs. ``ours``, ``theirs``: the entries at which two graphs part, or None.
    ``assuming``: float inputs that were taken to be those of the examples.
    """

    reason: str = ""
    ours: Entry | None = None
    theirs: Entry | None = None
    assuming: tuple[tuple[str, float], ...] = ()

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        if self:
            floats = ", ".join(f"{name} = {value}" for name, value in self.assuming)
            return "same numerics" + (f", given the float inputs {floats}" if floats else "")
        lines = [f"numerics differ: {self.reason}"]
        for side, entry in (("a", self.ours), ("b", self.theirs)):
            if entry is not None:
                what = " ".join(filter(None, [entry.op, entry.form, entry.dtype, *entry.constants]))
                lines.append(f"  {side}: {entry.name}: {what}  {entry.source}".rstrip())
        return "\n".join(lines)


def short_name(op: str) -> str:
    """``mul`` of ``aten.mul.Tensor``."""
    return op.split(".")[1] if "." in op else op


def is_movement(entry: Entry) -> bool:
    """True if the op computes nothing: views, copies, selections, arithmetic on sizes."""
    return entry.verdict == "INVARIANT" and bool(
        entry.moves or short_name(entry.op) in VIEWS or not entry.dtype or not entry.op.startswith(_OPS)
    )


@dataclasses.dataclass(frozen=True)
class _Step:
    """An op that computes, with its inputs spelled out."""

    entry: Entry
    reads: _Reads

    @property
    def what(self) -> tuple[object, ...]:
        entry = self.entry
        verdict = (
            "CANONICAL" if entry.verdict == "ROW-MIXING" else entry.verdict
        )  # a remark, not another order
        return entry.op, verdict, entry.example or entry.form, entry.dtype, entry.constants

    def is_like(self, other: _Step) -> bool:
        """Equal but for lengths of which one is a symbol."""
        ours, theirs = self.what, other.what
        same_form = _same_form(self.entry.form, other.entry.form)
        return self.reads == other.reads and same_form and ours[:2] + ours[3:] == theirs[:2] + theirs[3:]


def _steps(certificate: Certificate, name: Callable[[int, _Step], str]) -> Iterator[_Step]:
    """The ops that compute, in order; ``name`` is what later ones call them in their ``reads``."""
    meaning = {tensor: f"input {number}" for number, tensor in enumerate(certificate.inputs)}
    count = 0
    for entry in certificate.entries:
        reads = tuple(meaning.get(tensor, tensor) for tensor in entry.inputs)
        if not is_movement(entry):
            step = _Step(entry, reads)
            meaning[entry.name] = name(count, step)
            count += 1
            yield step
        elif entry.moves:
            meaning[entry.name] = _moved(entry, reads)
        elif reads:  # a view, or a copy of its last operand
            meaning[entry.name] = reads[-1]


def _moved(entry: Entry, reads: _Reads) -> str:
    what = " ".join([entry.moves, *entry.constants])
    text = f"{what} [{', '.join(reads)}]"
    return text if len(text) <= _LONGEST_SPELLED else f"{what} [{_sha(text)}]"


def _sha(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def digests(certificate: Certificate) -> list[str]:
    """For each op that computes a hash of it and of everything behind it, in the order of the graph."""

    def digest(number: int, step: _Step) -> str:
        return _sha((step.what, step.reads))

    return [digest(0, step) for step in _steps(certificate, digest)]


def computing(certificate: Certificate) -> list[Entry]:
    """The entries of ops that compute, in the order of the graph."""
    return [entry for entry in certificate.entries if not is_movement(entry)]


def _same_form(a: str, b: str) -> bool:
    """Equal forms; a length that is a symbol on one side stands for the number on the other."""
    if a == b:
        return True
    (head_a, _, length_a), (head_b, _, length_b) = a.rpartition(", "), b.rpartition(", ")
    is_number = [re.fullmatch(r"\d+\)", length) is not None for length in (length_a, length_b)]
    return head_a == head_b and head_a.startswith(_WITH_LENGTH) and not all(is_number)


def compare(a: Certificate, b: Certificate) -> Comparison:
    """See ``Certificate.same_numerics``."""
    if a.target != b.target:
        return Comparison(f"one is for {a.target}, the other for {b.target}")
    unlike = a.environment.difference(b.environment)
    if unlike:
        return Comparison(f"the promise holds within one architecture and versions: {unlike}")
    ours, theirs = ([*_steps(made, lambda number, _: f"#{number}")] for made in (a, b))
    for left, right in zip(ours, theirs, strict=False):
        if not left.is_like(right):
            return Comparison(_reason(left, right), left.entry, right.entry)
    if len(ours) != len(theirs):
        more = (ours if len(ours) > len(theirs) else theirs)[min(len(ours), len(theirs))]
        side = "a" if len(ours) > len(theirs) else "b"
        return Comparison(
            f"{side} goes on where the other ends, at {more.entry.name}",
            more.entry if side == "a" else None,
            more.entry if side == "b" else None,
        )
    unproven = next((step.entry for step in ours if step.entry.verdict == "UNPROVEN"), None)
    if unproven is not None:
        return Comparison(f"nothing is known about {unproven.op}: it is UNPROVEN", unproven, None)
    return Comparison(assuming=tuple(dict.fromkeys(a.floats + b.floats)))


def _reason(left: _Step, right: _Step) -> str:
    a, b = left.entry, right.entry
    if a.op != b.op:
        return f"{a.op} against {b.op}"
    if left.what[1] != right.what[1]:
        return f"{a.op} is {a.verdict} against {b.verdict}"
    if not _same_form(a.form, b.form):
        return f"the order of {a.op} is {a.form} against {b.form}"
    if a.dtype != b.dtype:
        return f"{a.op} rounds to {a.dtype} against {b.dtype}"
    if a.constants != b.constants:
        return f"{a.op} has the constants {a.constants} against {b.constants}"
    return f"{a.op} reads {', '.join(left.reads)} against {', '.join(right.reads)}"
