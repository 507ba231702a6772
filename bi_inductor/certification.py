"""``certify``: the certificates of a function, made twice: as it is called, and with the batch size unknown."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

from . import certificate as certificate_of
from . import numerics
from .certificate import SCHEMA_VERSION, Certificate, Entry, Level
from .dry_run import DryRun, SpecializedBatchError
from .errors import BatchInvarianceError, OptionError
from .measurement import MeasuredOn, Measurement, with_measurement
from .numerics import Comparison
from .row_mixing import ROW_MIXING, Cause, FollowedRun, OutputRows


@dataclasses.dataclass(frozen=True)
class BatchCheck:
    """What came of compiling once more with the size of dimension ``dim`` of the inputs as a symbol.

    ``holds``: the graph with the symbol is the graph of the example, op for op, so its orders hold for every batch
    size from 2 on that fulfils ``guards``. ``reason``: why it does not. ``outputs``: of each graph, what it returns to
    the user (a backward: all), where the rows of it are, and through which ops a row can see another; empty if the
    batch became a constant.
    """

    dim: int
    size: int
    holds: bool
    reason: str = ""
    outputs: tuple[tuple[OutputRows, ...], ...] = ()
    guards: tuple[str, ...] = ()

    @property
    def row_mixing(self) -> tuple[Cause, ...]:
        """Every op through which a row can see another, once; empty if each output's rows are apart."""
        found = (cause for graph in self.outputs for output in graph for cause in output.mixing)
        return tuple(dict.fromkeys(found))

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> BatchCheck:
        """Of a JSON object. Raises KeyError and TypeError for another one."""

        def output(each: dict[str, Any]) -> OutputRows:
            return OutputRows(**{**each, "mixing": tuple(Cause(**cause) for cause in each["mixing"])})

        outputs = tuple(tuple(map(output, graph)) for graph in fields["outputs"])
        return cls(**{**fields, "outputs": outputs, "guards": tuple(fields["guards"])})


@dataclasses.dataclass(frozen=True)
class Certification:
    """Certificates of all graphs of a function for ``target``, in the order of compilation.

    ``measured``: the GPU that claims with the level "measured on this GPU" are about, and its versions.
    """

    target: str
    certificates: tuple[Certificate, ...]
    batch: BatchCheck | None = None
    measured: MeasuredOn | None = None

    @property
    def digest(self) -> str:
        """sha256 (hex) over the graphs' digests: as for these, equal ones mean equal bits for equal inputs."""
        return hashlib.sha256("\n".join(made.digest for made in self.certificates).encode()).hexdigest()

    def same_numerics(self, other: Certification) -> Comparison:
        """Whether ``other`` computes the same bits from the same inputs, and if not, at which node they part.

        Forward graphs are compared with forward graphs, so a trainer's certification fits its server's.
        """
        for is_backward in (False, True):
            ours, theirs = (
                [c for c in side.certificates if c.is_backward == is_backward] for side in (self, other)
            )
            if is_backward and not (ours and theirs):  # one of them is for inference
                continue
            if len(ours) != len(theirs):
                return Comparison(
                    f"{len(ours)} graphs against {len(theirs)}: Dynamo cut them at other places"
                )
            for a, b in zip(ours, theirs, strict=True):
                compared = a.same_numerics(b)
                if not compared:
                    return compared
        return Comparison(assuming=tuple(x for made in self.certificates for x in made.floats))

    def to_json(self) -> str:
        """One JSON object, as ``certificate.schema.json`` describes it."""
        fields = {
            "schema": SCHEMA_VERSION,
            "target": self.target,
            "digest": self.digest,
            "batch": dataclasses.asdict(self.batch) if self.batch else None,
            "measured": dataclasses.asdict(self.measured) if self.measured else None,
            "certificates": [json.loads(made.to_json()) for made in self.certificates],
        }
        return json.dumps(fields, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Certification:
        """The inverse of ``to_json``. Raises ValueError for what is no such document, or was changed."""
        try:
            fields = json.loads(text)
            batch = BatchCheck.from_fields(fields["batch"]) if fields["batch"] else None
            made = tuple(Certificate.from_json(json.dumps(each)) for each in fields["certificates"])
            measured = MeasuredOn(**fields["measured"]) if fields["measured"] else None
            read = cls(fields["target"], made, batch, measured)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no certification of batchinv: {error!r}") from error
        if fields["digest"] != read.digest:
            raise ValueError("the digest of this certification is not that of its certificates")
        return read

    def __str__(self) -> str:
        lines = [f"batchinv certification for {self.target}", f"digest {self.digest}"]
        if self.batch is not None:
            lines += _batch_lines(self.batch)
        if self.measured is not None:
            lines.append(str(self.measured))
        return "\n\n".join(["\n".join(lines), *map(str, self.certificates)])


def _batch_lines(batch: BatchCheck) -> list[str]:
    how = f"batch (dimension {batch.dim}, here {batch.size}) as a symbol: "
    narrowed = f" (where {', '.join(batch.guards)})" if batch.guards else ""
    said = f"the same graph{narrowed}" if batch.holds else f"NOT SHOWN: {batch.reason}"
    lines = (line for graph in batch.outputs for output in graph for line in _output_lines(output))
    return [how + said, *lines]


def _output_lines(output: OutputRows) -> list[str]:
    if not output.mixing:
        return [f"  output {output}"]
    causes = dict.fromkeys(map(str, output.mixing))
    return [
        f"  output {output.name}: {ROW_MIXING}: a row can see another",
        *(f"    through {cause}" for cause in causes),
    ]


def certify(
    fn: Callable[..., Any],
    *args: Any,
    batch_dim: int | None = 0,
    target: str = "sm_90",
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
    backward: bool = False,
    ir: bool = False,
    measured: Measurement | None = None,
    **kwargs: Any,
) -> Certification:
    """Why ``torch.compile(fn, backend="batchinv")`` cannot depend on the batch, for ``fn(*args, **kwargs)``.

    Code is generated for ``target`` ("cpu" or a GPU, which need not exist), read by the verifier, and not run. With a
    ``batch_dim``, that dimension of every tensor argument that has the size of the first one's there is the batch;
    the function is compiled once more with its size as a symbol, and ``batch.outputs`` says of each output whether any
    row can see another, and through which op: ``row_mixing`` follows the rows through the graph that is lowered.
    ``ir``: also rebuild the orders from the compiler's IR (GPU targets; needs numpy; seconds to minutes).
    ``measured``: ``Measurement.from_json`` of what ``doctor --json`` wrote; products and attention whose tiles and
    schedules it has in one class of bits are "measured on this GPU", if GPU and versions are those of the target. Other
    arguments as for ``inspect``.
    Raises what ``inspect`` raises.

    >>> trained, served = certify(model, x, backward=True), certify(model, x)
    >>> assert trained.same_numerics(served)
    """
    run = DryRun(target, bool(dynamic), options, backward)
    made = _certificates(run, fn, args, kwargs, ir=ir, measured=measured)
    on = measured.about(made[0].environment) if measured else None
    if batch_dim is None:
        return Certification(target, made, None, on)
    made, batch = _with_batch(
        made, FollowedRun(target, bool(dynamic), options, backward, batch_dim=batch_dim), fn, args, kwargs
    )
    return Certification(target, made, batch, on)


def _with_batch(
    made: tuple[Certificate, ...],
    run: FollowedRun,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Certificate, ...], BatchCheck]:
    """``made`` with its ROW-MIXING ops, and what ``run``, which has the batch as a symbol, shows about the batch."""
    dim, size = run.batch_dim or 0, run.batch_size(args, kwargs)
    try:
        symbolic = _certificates(run, fn, args, kwargs)
    except SpecializedBatchError as error:
        return made, BatchCheck(dim, size, False, str(error))
    guards = tuple(dict.fromkeys(guard for each in symbolic for guard in each.guards))
    outputs = tuple(_returned(*pair) for pair in zip(symbolic, run.outputs, strict=True))
    reason = _difference(made, symbolic)
    batch = BatchCheck(dim, size, not reason, reason, outputs, guards)
    if batch.holds:
        nodes = {cause.node for cause in batch.row_mixing}
        made = tuple(_marked(*pair, nodes) for pair in zip(made, symbolic, strict=True))
    return made, batch


def _returned(made: Certificate, outputs: tuple[OutputRows, ...]) -> tuple[OutputRows, ...]:
    """Those of ``outputs`` that the user gets, in his order: not what a training graph saves for its backward."""
    by_name = {output.name: output for output in outputs}
    return tuple(by_name[name] for name in made.outputs)


def _certificates(
    run: DryRun,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    ir: bool = False,
    measured: Measurement | None = None,
) -> tuple[Certificate, ...]:
    if ir and run.target == "cpu":
        raise OptionError("orders are rebuilt from Triton's IR: give a GPU as the target")
    sources, _ = run(fn, args, kwargs)
    if not sources:
        raise ValueError(f"{fn} was not compiled at all: Dynamo skips such functions and runs them eagerly")
    certificates = []
    for source in sources:
        made = certificate_of.extract(source)
        if made is not None:
            made = _with_ir(source, made, run.target) if ir else made
            certificates.append(with_measurement(made, source, measured) if measured else made)
    return tuple(certificates)


def _with_ir(source: str, made: Certificate, target: str) -> Certificate:
    """``made`` with the level of those ops whose orders were rebuilt from the IR of every kernel they are in."""
    from .ir import lengths_of, prove

    if "UNPROVEN" in made.counts:
        return made
    proof = prove(source, made, target)
    if proof.wrong:
        raise BatchInvarianceError(
            f"the compiled kernels of this graph for {target}",
            f"their IR has {proof.wrong[0]}"
            + (f" (and {len(proof.wrong) - 1} more)" if proof.wrong[1:] else ""),
            "please report the graph: this is a bug of batchinv or of Triton",
        )
    unknown = {op for kernel in made.kernels if kernel.name in proof.unknown for op in kernel.ops}

    def is_rebuilt(entry: Entry) -> bool:
        lengths = lengths_of([entry]) if entry.form else set()
        return bool(lengths) and lengths <= proof.proven and entry.name not in unknown

    entries = tuple(
        dataclasses.replace(entry, level=Level.IR.value) if is_rebuilt(entry) else entry
        for entry in made.entries
    )
    rebuilt = {entry.name for entry in entries if entry.level == Level.IR.value}
    kernels = tuple(
        dataclasses.replace(kernel, level=Level.IR.value) if rebuilt & set(kernel.ops) else kernel
        for kernel in made.kernels
    )
    return dataclasses.replace(made, entries=entries, kernels=kernels)


def _difference(made: tuple[Certificate, ...], symbolic: tuple[Certificate, ...]) -> str:
    """Where the graphs with the symbol are not those of the example; empty if they are, op for op."""
    if len(made) != len(symbolic):
        return f"{len(made)} graphs against {len(symbolic)}"
    compared = (numerics.compare(ours, theirs) for ours, theirs in zip(made, symbolic, strict=True))
    return next((each.reason for each in compared if not each), "")


def _marked(made: Certificate, symbolic: Certificate, nodes: set[str]) -> Certificate:
    """``made`` with ROW-MIXING for its ops with a form through which a row can see another: those of ``symbolic`` that
    are among ``nodes``, or whose form has the symbol."""
    alike, _, _ = numerics.pairs(made, symbolic)
    mixing = {
        ours.entry.name
        for ours, theirs in alike
        if ours.entry.form and (theirs.entry.example or theirs.entry.name in nodes)
    }
    entries = tuple(
        dataclasses.replace(entry, verdict=ROW_MIXING) if entry.name in mixing else entry
        for entry in made.entries
    )
    return dataclasses.replace(made, entries=entries)
