"""What the verifier says about emitted code."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Finding:
    """One violation: the kernel (or "wrapper"), the line of the emitted module, the rule, and what was found."""

    kernel: str
    line: int
    rule: str
    found: str

    def __str__(self) -> str:
        return f"{self.kernel}, line {self.line}: {self.rule}: {self.found}"


class Report:
    """Collects the findings of one kernel whose first line is line ``first_line`` of the module."""

    def __init__(self, kernel: str, first_line: int = 1) -> None:
        self.kernel, self.first_line = kernel, first_line
        self.findings: list[Finding] = []

    def add(self, rule: str, line: int, found: str) -> None:
        """Note ``found`` at ``line`` of the kernel (from 1)."""
        self.findings.append(Finding(self.kernel, self.first_line + line - 1, rule, found.strip()[:200]))
