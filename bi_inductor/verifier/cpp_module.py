"""The C++ half of a module generated with ``cpp_wrapper``: an entry point, the runtime, and kernels, in one text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..codegen.cpp import runtime_source
from ..templates.cpp_matmul import header_text
from .cpp_kernel import LIBRARY
from .finding import Report
from .lengths import Values, cpp_values_of

_KERNEL = re.compile(r'^extern "C"\s+void\s+(?P<name>\w+)\([^)]*\)\s*\{\n.*?^\}', re.MULTILINE | re.DOTALL)


class CppModule:
    """``text`` begins at line ``line`` of the generated module."""

    def __init__(self, text: str, line: int, report: Report) -> None:
        self.text, self.line, self.report = text, line, report
        self.kernels = [(match["name"], match[0]) for match in _KERNEL.finditer(text)]
        self.entry = text[: text.find("} // inductor_entry_impl")]

    def check(self) -> None:
        """The entry point calls no library, and the runtime is ours."""
        for number, line in enumerate(self.entry.splitlines(), self.line):
            if LIBRARY.search(line):
                self.report.add("extern", number, line)
        for mark, runtime in (("batchinv::", runtime_source()), ("bi_gemm::", header_text())):
            if any(mark in kernel for _, kernel in self.kernels) and runtime not in self.text:
                self.report.add("runtime", self.line, "the inlined runtime is not the one of this package")

    def line_of(self, kernel: str) -> int:
        """The line of the module where ``kernel``, the text of one, begins."""
        return self.line + self.text.count("\n", 0, self.text.find(kernel))

    def arguments(self, name: str, parameters: list[str]) -> Iterator[dict[str, Values | None]]:
        """What each call in the entry point passes for ``parameters``."""
        for call in re.findall(rf"^\s*{name}\((.*)\);$", self.entry, re.MULTILINE):
            values = [cpp_values_of(argument, {}) for argument in _split(call)]
            yield dict(zip(parameters, values, strict=False))


def _split(arguments: str) -> list[str]:
    """``arguments`` at the commas outside of parentheses."""
    parts, depth = [""], 0
    for character in arguments:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
