"""Grouped matrix products in emitted Triton kernels: one chain, over K or over the rows of a group."""

from __future__ import annotations

import ast
import re

from .lengths import Forms, Names
from .syntax import assigned
from .triton_product import ChainedProduct

_STRIDE = r"\(\w+\)"
#: A size of the graph, or the product of several: tokens of a batch of sequences.
_SIZE = r"(?:\w+\*)*\w+"
#: How a program finds its group, and the group's stretch of rows or of k: sums of integers, and only these.
_ROWS = {
    "group": r"tl\.arange\(0, GROUPS\)",
    "ends": rf"tl\.minimum\(tl\.load\(ENDS \+ group \* {_STRIDE}, mask=group < groups, other=0\), M\)",
    "before": r"\(group > 0\) & \(group < groups\)",
    "starts": rf"tl\.load\(ENDS \+ \(group - 1\) \* {_STRIDE}, mask=before, other=0\)",
    "sizes": r"tl\.maximum\(ends - starts, 0\)",
    "tiles": r"tl\.cdiv\(sizes, BLOCK_M\) \* tl\.cdiv\(N, BLOCK_N\)",
    "mine": r"tl\.sum\(\(\(tl\.cumsum\(tiles, 0\) <= number\) & \(group < groups\)\)\.to\(tl\.int32\), 0\)",
    "first_tile": r"tl\.sum\(tl\.where\(group < mine, tiles, 0\), 0\)",
    "first_row": r"tl\.sum\(tl\.where\(group < mine, sizes, 0\), 0\)",
    "own_rows": r"tl\.sum\(tl\.where\(group == mine, sizes, 0\), 0\)",
    "last_row": r"tl\.minimum\(tl\.where\(mine < groups, first_row \+ own_rows, M\), M\)",
    "steps": r"tl\.where\(mine < groups, tl\.cdiv\(K, BLOCK_K\), 0\)",
}
_DEPTH = {
    "last_k": rf"tl\.minimum\(tl\.load\(ENDS \+ idx_b \* {_STRIDE}\), {_SIZE}\)",
    "first_k": rf"tl\.load\(ENDS \+ \(idx_b - 1\) \* {_STRIDE}, mask=idx_b > 0, other=0\)",
    "K": r"last_k - first_k",
    "steps": r"tl\.cdiv\(K, BLOCK_K\)",
}
#: Both operands begin with the first k of the group.
_ADVANCES = {f"{name} += first_k.to(INDEX_DTYPE) * stride_{name.lower()}k" for name in "AB"}


class GroupedProduct(ChainedProduct):
    """The product of one kernel that reads the ends of its groups."""

    loop = "for step in tl.range(0, steps):"

    @property
    def is_over_groups(self) -> bool:
        """True if a group is a stretch of k, false if it is a stretch of rows."""
        return "first_k" in self.kernel.assignments

    def is_exact_sum(self, call: ast.Call) -> bool:
        """True for the sums of integers that find a program's group."""
        line = self.kernel.line(call)
        name, _, value = line.partition(" = ")
        return name in _ROWS and bool(re.fullmatch(_ROWS[name], value))

    def check(self) -> None:
        super().check()
        kernel = self.kernel
        for name, shape in (_DEPTH if self.is_over_groups else _ROWS).items():
            bindings = [name for s in kernel.statements for bound, _ in assigned(s) if bound == name]
            if len(bindings) != 1 or not re.fullmatch(shape, kernel.text_of(name)):
                kernel.note("dot", kernel.assignments.get(name), f"{name} = {kernel.text_of(name)}")
        advances = {kernel.line(s) for s in kernel.statements if isinstance(s, ast.AugAssign)}
        if self.is_over_groups and not advances >= _ADVANCES:
            kernel.note("dot", kernel.assignments.get("first_k"), "an operand does not begin with its group")

    def check_lengths(self, forms: Forms, arguments: Names) -> None:
        super().check_lengths(forms, arguments)
        found = self.kernel.text_of("ACC_TYPE"), self.kernel.text_of("INPUT_PRECISION")
        is_form = "float32" in forms.group_chains and found == ("tl.float32", "'ieee'")
        if self.is_over_groups and is_form:
            self.retraced.add(("group chain", ()))
        elif self.is_over_groups and not forms.is_open:
            self.kernel.note(
                "length", self.kernel.assignments.get("K"), "no form of this kernel is a chain of a group"
            )
