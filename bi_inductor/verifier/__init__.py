"""An executable specification of the code we emit, run on every compile before the code is handed out.

``verify`` reads a generated module the way a stranger would: the wrapper and every Triton kernel as Python, every
C++ kernel line by line; it asks no part of the code generator what was meant. What it finds is a bug of ours.

    statement, call, import, directive   something that is on no allow-list
    reduction, accumulation              a float sum outside the ordered helpers
    ordered                              an ordered helper that is not called as its form needs
    atomic, extern                       an atomic operation; a library kernel
    loop, axis                           a loop that is not 0, step, 2 step, ...; a reduced axis walked another way
    block, length                        a block, chunk, reduced length or K that is not the form's
    dot, precision                       a matrix product that is not one chain of the form's kind
    division, flags, settings, launch    rounding that is not pinned; a launch that shares sums between programs
    openmp, runtime                      threads that share a sum; inlined C++ that is not ours

This is level one: the text. It does not see what Triton or a C++ compiler make of it, nor addresses: that a load
reads element i of the row is the business of the tests.
"""

from __future__ import annotations

from ..certificate import Certificate, Entry, extract
from ..errors import BatchInvarianceError
from .cpp_kernel import CppKernel
from .finding import Finding, Report
from .lengths import Forms, Values
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
    return tuple(sorted(findings, key=lambda finding: finding.line))


class _Graph:
    """What the kernels of one graph have in common: its forms and the chunks its sums were cut into."""

    def __init__(self, entries: tuple[Entry, ...] | None) -> None:
        self.entries = entries
        self.forms = Forms(entries or ())
        self.derived: set[Values] = set()
        self.disable_ftz: set[object] = set()

    def check_triton(self, definition: Definition, wrapper: Wrapper, report: Report) -> None:
        try:
            kernel = TritonKernel(definition.text, report)
        except SyntaxError as error:
            report.add("parse", error.lineno or 1, str(error))
            return
        kernel.check()
        self.disable_ftz.add(getattr(kernel, "disable_ftz", None))
        if len(self.disable_ftz) > 1:
            report.add("flags", 1, "disable_ftz differs between the kernels of one graph")
        if self.entries is not None and kernel.function is not None:
            forms = self._forms_of(definition)
            for arguments in list(wrapper.arguments(definition, kernel.parameters)) or [{}]:
                kernel.check_lengths(forms, self.derived, arguments)

    def check_cpp(self, definition: Definition, wrapper: Wrapper, report: Report) -> None:
        kernel = CppKernel(definition.text, report)
        kernel.check()
        if self.entries is not None:
            for arguments in list(wrapper.arguments(definition, kernel.parameters)) or [{}]:
                kernel.check_lengths(self.forms, arguments)

    def _forms_of(self, definition: Definition) -> Forms:
        """Forms of the ops a kernel was made from, as the comment above it says; else those of the graph."""
        own = Forms(entry for entry in self.entries or () if entry.name in definition.nodes)
        return own if own.trees or own.chains or own.unordered else self.forms


def verify_settings() -> tuple[Finding, ...]:
    """Inductor settings that should be in force while code is generated and compiled, and are not."""
    from torch._inductor import config

    from ..options import required_patches

    report = Report("settings")
    values = config.get_config_copy()
    for name, wanted in required_patches().items():
        if values[name] != wanted:
            report.add("settings", 1, f"{name} = {values[name]!r}, not {wanted!r}")
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
