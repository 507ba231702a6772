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

import operator
from collections.abc import Iterable

from ..certificate import Certificate, Entry, extract
from ..errors import BatchInvarianceError
from .cpp_kernel import CppKernel
from .cpp_module import CppModule
from .finding import Finding, Report
from .lengths import Forms, Names, Values
from .triton_kernel import TritonKernel
from .wrapper import Definition, Wrapper

__all__ = ["Finding", "check", "verify", "verify_settings"]


def verify(source: str, certificate: Certificate | None = None) -> tuple[Finding, ...]:
    """Everything in a generated wrapper module that the contract does not allow, in the order of its lines.

    ``certificate``: of the same graph; by default the one embedded in ``source``. Without one, reduced lengths and
    matrix precisions are not compared with forms.
    """
    made = certificate or extract(source)
    report = Report("wrapper")
    try:
        wrapper = Wrapper(source, report, made.entries if made else ())
    except SyntaxError as error:
        report.add("parse", error.lineno or 1, str(error))
        return tuple(report.findings)
    findings = report.findings
    graph = _Graph(made.entries if made else None)
    for definition in wrapper.definitions:
        report = Report(definition.name, definition.line)
        if definition.is_triton:
            graph.check_triton(definition, wrapper, report)
        else:
            graph.check_cpp(definition, wrapper, report)
        findings += report.findings
    if wrapper.cpp:
        findings += graph.check_cpp_module(*wrapper.cpp)
    return tuple(sorted(findings, key=lambda finding: finding.line))


class _Graph:
    """What the kernels of one graph have in common: its forms, and how many chunks its sums were cut into.

    A kernel's own forms are those of the ops that the comment above it names; without any, all of the graph's.
    """

    def __init__(self, entries: tuple[Entry, ...] | None) -> None:
        self.entries = entries
        self.forms = Forms(entries or ())
        self.chunks: set[Values] = set()
        self.disable_ftz: set[object] = set()

    def check_triton(self, definition: Definition, wrapper: Wrapper, report: Report) -> None:
        try:
            kernel = TritonKernel(definition.text, report)
        except SyntaxError as error:
            report.add("parse", error.lineno or 1, str(error))
            return
        kernel.check()
        flush = kernel.flags.get("disable_ftz")
        self.disable_ftz.add(flush and flush.value)
        if len(self.disable_ftz) > 1:
            kernel.note("flags", flush, "disable_ftz differs between the kernels of one graph")
        if self.entries is not None:
            own = [entry for entry in self.entries if entry.name in definition.nodes] or self.entries
            forms = Forms(own)
            has_flip = any(entry.op.startswith(("aten.flip", "prims.rev")) for entry in own)
            for arguments in list(wrapper.arguments(definition, kernel.parameters)) or [{}]:
                kernel.check_lengths(forms if forms.are_any else self.forms, self.chunks, arguments, has_flip)

    def check_cpp(self, definition: Definition, wrapper: Wrapper, report: Report) -> None:
        kernel = CppKernel(definition.text, report)
        self._check_cpp_kernel(kernel, wrapper.arguments(definition, kernel.parameters))

    def _check_cpp_kernel(self, kernel: CppKernel, calls: Iterable[Names]) -> None:
        kernel.check()
        if self.entries is not None:
            for arguments in list(calls) or [{}]:
                kernel.check_lengths(self.forms, arguments)

    def check_cpp_module(self, text: str, line: int) -> list[Finding]:
        """Findings in the C++ of a module with a C++ wrapper."""
        module = CppModule(text, line, Report("wrapper"))
        module.check()
        findings = module.report.findings
        for name, source in module.kernels:
            kernel = CppKernel(source, Report(name, module.line_of(source)), with_runtime=False)
            self._check_cpp_kernel(kernel, module.arguments(name, kernel.parameters))
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


def check(source: str, certificate: Certificate | None = None) -> None:
    """Raise BatchInvarianceError for the first finding in ``source`` or in Inductor's settings."""
    findings = verify_settings() + verify(source, certificate)
    if findings:
        first, more = findings[0], len(findings) - 1
        raise BatchInvarianceError(
            f"the generated kernel {first.kernel}",
            f"rule {first.rule!r} is broken in line {first.line} of the emitted module: {first.found}"
            + (f" (and {more} more)" if more else ""),
            "please report the graph: this is a bug of batchinv, and nothing was run",
        )
