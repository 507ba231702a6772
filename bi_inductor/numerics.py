"""What two graphs compute, compared through their certificates: the digest of each op, and the first that differs.

An op that computes is what it is (op, form at the example's lengths, dtype, constants) and what it reads. Views and
copies compute nothing and are looked through; ops that select, permute or join elements are part of what is read.

A product and the transpose of the product of its transposed operands, ``a @ b`` and ``(b.T @ a.T).T``, are one: each
element is the same chain, with the factors of its products exchanged. Autograd chooses between them by strides.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from .certificate import Certificate, Entry

_OPS = ("aten.", "prims.", "inductor_prims.", "bi_inductor.")
_WITH_LENGTH = ("Chain(", "Chunks(", "Exact(", "ScaledChunks(", "Tree(")
_LONGEST_SHOWN = 300
_IN_PLACE = re.compile(r"[^_]_\.\w+$")  # aten.copy_.default, and not aten.__rshift__.Scalar
#: What an op reads: "input 0", an op that computes, or elements moved from there.
_Reads: TypeAlias = tuple[str, ...]

#: Elements stay where they are; only the shape or the memory changes, and that may follow the batch size.
VIEWS = frozenset(
    """alias as_strided as_strided_copy _unsafe_view view view_copy reshape expand expand_copy squeeze squeeze_copy
    unsqueeze unsqueeze_copy clone contiguous detach copy copy_ lift_fresh_copy broadcast_in_dim collapse_view
    split_dim view_of device_put row_major _assert_async _assert_scalar _assert_tensor_metadata""".split()
)

#: Of these, the ones that change no dimension.
_COPIES = frozenset("alias clone contiguous detach lift_fresh_copy device_put row_major".split())


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
    # A slice_scatter without moves replaces everything.
    is_view = short_name(entry.op) in (*VIEWS, "slice_scatter")
    return entry.verdict == "INVARIANT" and bool(
        entry.moves or is_view or not entry.dtype or not entry.op.startswith(_OPS)
    )


#: Ops that multiply their last two operands as matrices, and the rank of what they read and return.
_PRODUCTS = {"mm": 2, "_int_mm": 2, "addmm": 2, "mm_from": 2, "bmm": 3, "bmm_wide": 3, "baddbmm": 3}


@dataclasses.dataclass(frozen=True)
class _Value:
    """A tensor: ``digest`` of it and of everything behind it, and that of its transpose where it is known.

    Transposed: with the last two dimensions exchanged. It is not known of a view, which may have other dimensions.
    """

    digest: str
    transpose: str = ""

    def transposed(self, rank: int) -> _Value:
        dims = [*range(rank - 2), rank - 1, rank - 2]
        return _Value(self.transpose or _sha(f"permute dims={dims} [{self.digest}]"), self.digest)


_Values: TypeAlias = dict[str, _Value]


def _transposed_rank(entry: Entry) -> int:
    """The rank of a tensor whose last two dimensions ``entry`` exchanges; 0 for any other op."""
    permuted = re.fullmatch(r"permute dims=\[([-\d, ]+)\]", entry.moves)
    dims = [int(dim) for dim in permuted[1].split(",")] if permuted else []
    rank = len(dims)
    expected = [*range(rank - 2), rank - 1, rank - 2]
    return rank if rank > 1 and [dim % rank for dim in dims] == expected else 0


@dataclasses.dataclass(frozen=True)
class _Step:
    """An op that computes: ``digest`` of it and of everything behind it, and what it reads, to be shown."""

    entry: Entry
    digest: str
    reads: _Reads


def _values(
    certificate: Certificate, *, with_lengths: bool = True, saved: _Values | None = None
) -> tuple[_Values, list[_Step]]:
    """(name of a tensor -> what it is, the ops that compute in the graph's order).

    Without lengths a form is its kind and accumulator alone. ``saved``: the forward graph's tensors, for a backward,
    whose other inputs are gradients and have their names.
    """
    values = {tensor: _Value(f"input {number}") for number, tensor in enumerate(certificate.inputs)}
    if saved is not None:
        values = {tensor: saved.get(tensor, _Value(f"input {tensor}")) for tensor in certificate.inputs}
    shown = {tensor: value.digest for tensor, value in values.items()}
    steps = []
    for entry in certificate.entries:
        reads = tuple(values.get(x, _Value(x)) for x in entry.inputs)
        digests, names = tuple(value.digest for value in reads), tuple(shown.get(x, x) for x in entry.inputs)
        if not is_movement(entry):
            value, digest = _computed(entry, reads, with_lengths)
            values[entry.name], shown[entry.name] = value, entry.name
            steps.append(_Step(entry, digest, names))
        elif entry.moves:
            rank = _transposed_rank(entry)
            moved = reads[0].transposed(rank) if rank else _Value(_sha(_moved(entry, digests)))
            values[entry.name], shown[entry.name] = moved, _moved(entry, names)[:_LONGEST_SHOWN]
        elif reads:  # a view, or a copy of its last operand
            is_same = short_name(entry.op) in _COPIES
            values[entry.name], shown[entry.name] = reads[-1] if is_same else _Value(digests[-1]), names[-1]
    return values, steps


def _computed(entry: Entry, reads: Sequence[_Value], with_lengths: bool) -> tuple[_Value, str]:
    """(the result of ``entry``, digest of the op). A product is the lesser, as digests go, of its two spellings."""
    what, digests = _what(entry, with_lengths), tuple(value.digest for value in reads)
    rank = _PRODUCTS.get(short_name(entry.op), 0)
    if not rank or len(reads) < 2:
        digest = _sha((what, digests))
        return _Value(digest), digest
    *added, a, b = (value.transposed(rank).digest for value in reads)
    exchanged = (*added, b, a)
    digest = _sha((what, min(digests, exchanged)))
    is_symmetric = digests == exchanged
    product = _Value(digest, digest if is_symmetric else _sha(f"transpose [{digest}]"))
    return (product if digests <= exchanged else product.transposed(rank)), digest


def _what(entry: Entry, with_lengths: bool) -> tuple[object, ...]:
    verdict = "CANONICAL" if entry.verdict == "ROW-MIXING" else entry.verdict  # a remark, not another order
    form = entry.example or entry.form
    if form.startswith(_WITH_LENGTH) and not with_lengths:
        form = form.rpartition(", ")[0]
    return entry.op, verdict, form, entry.dtype, entry.constants


def _moved(entry: Entry, reads: _Reads) -> str:
    return f"{' '.join([entry.moves, *entry.constants])} [{', '.join(reads)}]"


def _sha(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def joint_fingerprint(certificates: Sequence[Certificate]) -> str:
    """sha256 of all graphs, each backward read as going on from the forward before it.

    Which tensors a forward saves and which of them its backward computes again may follow the batch size.
    """
    found, forward = [], _Values()
    for certificate in certificates:
        found.append(fingerprint(certificate, forward if certificate.is_backward else None))
        if not certificate.is_backward:
            forward = _values(certificate)[0]
    return _sha(found)


def fingerprint(certificate: Certificate, saved: _Values | None = None) -> str:
    """sha256 of what the graph returns and writes, and of everything behind it; ``saved``: as for ``_values``."""
    known = _values(certificate, saved=saved)[0]
    returned = [known.get(name, _Value(name)).digest for name in certificate.outputs]
    written = sorted(known.get(entry.inputs[-1], _Value("")).digest for entry in _writes(certificate))
    return _sha((certificate.target, returned, written))


def _writes(certificate: Certificate) -> list[Entry]:
    """Ops that write into an input."""
    return [entry for entry in certificate.entries if _IN_PLACE.search(entry.op) and entry.inputs]


def _reached(certificate: Certificate) -> set[str]:
    """Names of the entries that outputs or written inputs depend on: not what a training graph saves besides."""
    inputs = {entry.name: entry.inputs for entry in certificate.entries}
    pending = [*certificate.outputs, *(entry.name for entry in _writes(certificate))]
    reached: set[str] = set()
    while pending:
        name = pending.pop()
        if name in inputs and name not in reached:
            reached.add(name)
            pending += inputs[name]
    return reached


def pairs(a: Certificate, b: Certificate) -> tuple[list[tuple[_Step, _Step]], list[_Step], list[_Step]]:
    """Ops of two graphs that are alike but for lengths, and what is left of each. Independent ops have no order."""
    ours, theirs = (
        [s for s in _values(made, with_lengths=False)[1] if s.entry.name in _reached(made)] for made in (a, b)
    )
    waiting: dict[str, list[_Step]] = {}
    for step in theirs:
        waiting.setdefault(step.digest, []).append(step)
    alike, left = [], []
    for step in ours:
        partners = waiting.get(step.digest)
        if partners:
            alike.append((step, partners.pop(0)))
        else:
            left.append(step)
    over = {id(step) for partners in waiting.values() for step in partners}
    return alike, left, [step for step in theirs if id(step) in over]


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
    alike, ours, theirs = pairs(a, b)
    for left, right in alike:
        if not _same_form(left.entry.form, right.entry.form):
            return Comparison(_reason(left, right), left.entry, right.entry)
    if ours and theirs:
        return Comparison(_reason(ours[0], theirs[0]), ours[0].entry, theirs[0].entry)
    if ours or theirs:
        more, side = (ours, "a") if ours else (theirs, "b")
        sides = (more[0].entry, None) if ours else (None, more[0].entry)
        return Comparison(f"{side} goes on where the other ends, at {more[0].entry.name}", *sides)
    if _results(a) != _results(b):
        return Comparison(f"{len(a.outputs)} results against {len(b.outputs)}, or in another order")
    unproven = next((entry for entry in a.entries if entry.verdict == "UNPROVEN"), None)
    if unproven is not None:
        return Comparison(f"nothing is known about {unproven.op}: it is UNPROVEN", unproven, None)
    return Comparison(assuming=tuple(dict.fromkeys(a.floats + b.floats)))


def _results(made: Certificate) -> list[str]:
    known, _ = _values(made, with_lengths=False)
    return [known.get(name, _Value(name)).digest for name in made.outputs]


def _reason(left: _Step, right: _Step) -> str:
    a, b = left.entry, right.entry
    if a.op != b.op:
        return f"{a.op} against {b.op}"
    if _what(a, True)[1] != _what(b, True)[1]:
        return f"{a.op} is {a.verdict} against {b.verdict}"
    if not _same_form(a.form, b.form):
        return f"the order of {a.op} is {a.form} against {b.form}"
    if a.dtype != b.dtype:
        return f"{a.op} rounds to {a.dtype} against {b.dtype}"
    if a.constants != b.constants:
        return f"{a.op} has the constants {a.constants} against {b.constants}"
    return f"{a.op} reads {', '.join(left.reads)} against {', '.join(right.reads)}"
