"""An executable specification of the code we emit, run on every compile before the code is handed out.

``verify`` reads a generated module the way a stranger would: the wrapper and every Triton kernel as Python, every
C++ kernel line by line; it asks no part of the code generator what was meant. What it finds is a bug of ours.

    statement, call, import, directive   something that is on no allow-list
    reduction, accumulation              a float sum outside the ordered helpers
    ordered                              an ordered helper that is not called as its form needs
    atomic, extern                       an atomic operation; a library kernel
    loop, axis, order                    a loop that is not 0, step, 2 step, ...; elements or chunks in another order
    block, length                        a block, chunk, reduced length or K that is not the form's
    dot, precision                       a matrix product that is not one chain of the form's kind
    division, flags, settings, launch    rounding that is not pinned; a launch that shares sums between programs
    openmp, runtime                      threads that share a sum; inlined C++ that is not ours

This is level one: the text. It does not see what Triton or a C++ compiler make of it, nor addresses: that a load
reads element i of the row is the business of the tests.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Iterable, Mapping

from ..certificate import Certificate, Entry, extract
from ..errors import BatchInvarianceError
from .cpp_kernel import CppKernel
from .cpp_module import CppModule
from .finding import Finding, Report
from .lengths import Forms, Names, Values
from .tiles import MappedReport, straightened
from .triton_kernel import TritonKernel
from .wrapper import Definition, Wrapper

__all__ = ["Examination", "ExaminedKernel", "Finding", "check", "examine", "verify", "verify_settings"]


@dataclasses.dataclass(frozen=True)
class ExaminedKernel:
    """A kernel as the verifier read it: its text, the graph nodes that a comment names for it, and ``retraced``:
    (combine, "chain", "chunks" or "group chain", length) of the sums and products that were followed in the text and
    have a form's order; a group's length is not known.
    """

    name: str
    text: str
    is_triton: bool
    nodes: frozenset[str]
    retraced: frozenset[tuple[str, Values]]


@dataclasses.dataclass(frozen=True)
class Examination:
    """What the contract does not allow, in the order of the module's lines, and what was followed."""

    findings: tuple[Finding, ...]
    kernels: tuple[ExaminedKernel, ...]


def verify(source: str, certificate: Certificate | None = None) -> tuple[Finding, ...]:
    """Everything in a generated wrapper module that the contract does not allow, in the order of its lines.

    ``certificate``: of the same graph; by default the one embedded in ``source``. Without one, reduced lengths and
    matrix precisions are not compared with forms.
    """
    return examine(source, certificate).findings


def examine(
    source: str, certificate: Certificate | None = None, ops_of: Mapping[str, Collection[str]] | None = None
) -> Examination:
    """The same, with what was found to be in order in each kernel.

    ``ops_of``: kernel name -> names of the ops in it, by default those that the certificate has; the comment above a
    kernel says for which one it was made, and not what else uses it.
    """
    made = certificate or extract(source)
    if ops_of is None:
        ops_of = {kernel.name: kernel.ops for kernel in made.kernels} if made else {}
    report = Report("wrapper")
    try:
        wrapper = Wrapper(source, report, made.entries if made else ())
    except SyntaxError as error:
        report.add("parse", error.lineno or 1, str(error))
        return Examination(tuple(report.findings), ())
    findings = report.findings
    graph = _Graph(made.entries if made else None, ops_of)
    for definition in wrapper.definitions:
        report = Report(definition.name, definition.line)
        if definition.is_triton:
            graph.check_triton(definition, wrapper, report)
        else:
            graph.check_cpp(definition, wrapper, report)
        findings += report.findings
    if wrapper.cpp:
        findings += graph.check_cpp_module(*wrapper.cpp)
    ordered = sorted(findings, key=lambda finding: finding.line)
    return Examination(tuple(ordered), tuple(graph.examined))


class _Graph:
    """What the kernels of one graph have in common: its forms, and how many chunks its sums were cut into.

    A kernel's own forms are those of the ops that the comment above it names and of ``ops_of``, by its name; without
    any, all of the graph's.
    """

    def __init__(self, entries: tuple[Entry, ...] | None, ops_of: Mapping[str, Collection[str]]) -> None:
        self.entries, self.ops_of = entries, ops_of
        self.forms = Forms(entries or ())
        self.chunks: set[Values] = set()
        self.disable_ftz: set[object] = set()
        self.examined: list[ExaminedKernel] = []

    def check_triton(self, definition: Definition, wrapper: Wrapper, report: Report) -> None:
        try:
            straight = list(straightened(definition.text, report))
            kernels = [TritonKernel(one.text, MappedReport(report, one)) for one in straight]
            kernels = kernels or [TritonKernel(definition.text, report)]
        except SyntaxError as error:
            report.add("parse", error.lineno or 1, str(error))
            return
        for kernel in kernels:
            self._check_triton_kernel(kernel, definition, wrapper)
        for kernel, one in zip(kernels, straight, strict=False):
            for sizes in one.others:
                kernel.set_constants(sizes)
                self._check_lengths(kernel, definition, wrapper)
        followed = [k.sums.retraced | k.product.retraced | k.attention.retraced for k in kernels]
        retraced = frozenset.intersection(*map(frozenset, followed))
        self.examined.append(
            ExaminedKernel(definition.name, definition.text, True, definition.nodes, retraced)
        )

    def _check_triton_kernel(self, kernel: TritonKernel, definition: Definition, wrapper: Wrapper) -> None:
        kernel.check()
        flush = kernel.flags.get("disable_ftz")
        if not kernel.copies.is_meant:  # copies flush nothing; torch 2.11 does not say for them
            self.disable_ftz.add(flush and flush.value)
        if len(self.disable_ftz) > 1:
            kernel.note("flags", flush, "disable_ftz differs between the kernels of one graph")
        self._check_lengths(kernel, definition, wrapper)

    def _check_lengths(self, kernel: TritonKernel, definition: Definition, wrapper: Wrapper) -> None:
        if self.entries is not None:
            names = definition.nodes.union(self.ops_of.get(definition.name, ()))
            own = [entry for entry in self.entries if entry.name in names] or self.entries
            forms = Forms(own)
            has_flip = any(entry.op.startswith(("aten.flip", "prims.rev")) for entry in own)
            for arguments in list(wrapper.arguments(definition, kernel.parameters)) or [{}]:
                kernel.check_lengths(forms if forms.are_any else self.forms, self.chunks, arguments, has_flip)

    def check_cpp(self, definition: Definition, wrapper: Wrapper, report: Report) -> None:
        kernel = CppKernel(definition.text, report)
        calls = wrapper.arguments(definition, kernel.parameters)
        self._check_cpp_kernel(kernel, calls, definition.name, definition.text)

    def _check_cpp_kernel(self, kernel: CppKernel, calls: Iterable[Names], name: str, text: str) -> None:
        kernel.check()
        if self.entries is not None:
            for arguments in list(calls) or [{}]:
                kernel.check_lengths(self.forms, arguments)
        self.examined.append(ExaminedKernel(name, text, False, frozenset(), frozenset(kernel.retraced)))

    def check_cpp_module(self, text: str, line: int) -> list[Finding]:
        """Findings in the C++ of a module with a C++ wrapper."""
        module = CppModule(text, line, Report("wrapper"))
        module.check()
        findings = module.report.findings
        for name, source in module.kernels:
            kernel = CppKernel(source, Report(name, module.line_of(source)), with_runtime=False)
            self._check_cpp_kernel(kernel, module.arguments(name, kernel.parameters), name, source)
            findings += kernel.report.findings
        return findings


def verify_settings() -> tuple[Finding, ...]:
    """Inductor settings that should be in force while code is generated and compiled, and are not."""
    from torch._inductor import config

    from ..options import required_patches

    report = Report("settings")
    for name, wanted in required_patches().items():
        value = operator.attrgetter(name)(config)
        if value != wanted:
            report.add("settings", 1, f"{name} = {value!r}, not {wanted!r}")
    return tuple(report.findings)


def check(
    source: str, certificate: Certificate | None = None, ops_of: Mapping[str, Collection[str]] | None = None
) -> Examination:
    """Raise BatchInvarianceError for the first finding in ``source`` or in Inductor's settings."""
    examination = examine(source, certificate, ops_of)
    findings = verify_settings() + examination.findings
    if findings:
        first, more = findings[0], len(findings) - 1
        raise BatchInvarianceError(
            f"the generated kernel {first.kernel}",
            f"rule {first.rule!r} is broken in line {first.line} of the emitted module: {first.found}"
            + (f" (and {more} more)" if more else ""),
            "please report the graph: this is a bug of batchinv, and nothing was run",
        )
    return examination
