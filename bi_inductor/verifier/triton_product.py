"""Matrix products of emitted Triton kernels: one chain, acc = tl.dot(a, b, acc) over k = 0, BLOCK_K, ... K."""

from __future__ import annotations

import ast
import re

from .lengths import Forms, Names, Values, is_constant
from .syntax import KernelSyntax, assigned, carried, dotted, is_power_of_two

#: Pointers of the operands, and how far a step of k moves them.
POINTERS = {"a_block": "BLOCK_K * stride_ak", "b_block": "BLOCK_K * stride_bk"}
_DOT = re.compile(r"acc = tl\.dot\((?:a, b|b, a), acc, input_precision=INPUT_PRECISION, out_dtype=ACC_TYPE\)")
#: A chain's accumulator -> what the kernel is compiled with.
_PRECISIONS = {
    "tf32/float32": ("tl.float32", "'tf32'"),
    "float32": ("tl.float32", "'ieee'"),
    "float64": ("tl.float64", "'ieee'"),
}


class ChainedProduct:
    """The matrix product of one kernel."""

    #: The statement that adds products.
    dot = _DOT
    #: The loop over k.
    loop = "for step in tl.range(0, tl.cdiv(K, BLOCK_K)):"

    def __init__(self, kernel: KernelSyntax) -> None:
        self.kernel = kernel
        #: ("chain", K) of the forms that the product was found to have.
        self.retraced: set[tuple[str, Values]] = set()
        self.dots = [call for call in kernel.calls if dotted(call.func) == "tl.dot"]

    def check(self) -> None:
        """One tl.dot in one loop, chained through one accumulator that starts at zero and ends + 0.0."""
        kernel, dot = self.kernel, self.dots[0]
        if len(self.dots) != 1 or len(kernel.loops) != 1:
            kernel.note("dot", dot, f"{len(self.dots)} products in {len(kernel.loops)} loops, not one in one")
        if not any(
            self.dot.fullmatch(kernel.line(statement)) for loop in kernel.loops for statement in loop.body
        ):
            kernel.note("dot", dot)
        outside = [statement for statement in kernel.statements if not kernel.is_in_loop(statement)]
        bound = [kernel.text(value) for s in outside for name, value in assigned(s) if name == "acc"]
        wanted = ["tl.zeros((BLOCK_M, BLOCK_N), ACC_TYPE)", f"acc{self._end()}"]
        if kernel.text_of("SWAP") == "True":
            wanted = ["tl.zeros((BLOCK_N, BLOCK_M), ACC_TYPE)", f"tl.trans(acc){self._end()}"]
        if bound[:2] != wanted:
            kernel.note("dot", dot, f"the accumulator starts and ends as {bound[:2]}, not as {wanted}")
        for call in kernel.calls:
            if dotted(call.func) == "tl.program_id" and kernel.text(call) != "tl.program_id(0)":
                kernel.note("dot", call, "programs may share one product")
        self._check_operands()

    def _end(self) -> str:
        """What follows the sums, once."""
        return " + 0.0"

    def is_exact_sum(self, call: ast.Call) -> bool:
        """True for a reduction that no order can change, as a grouped product needs it."""
        return False

    def is_step(self, name: str, statement: ast.stmt) -> bool:
        """True if ``statement``, in the loop over k, may change the carried ``name``."""
        if isinstance(statement, ast.AugAssign):
            step = self.kernel.text(statement.value)
            return isinstance(statement.op, ast.Add) and step == POINTERS.get(name)
        return name == "acc" and self.kernel.line(statement).startswith("acc = tl.dot(")

    def _check_operands(self) -> None:
        """Both pointers start at k = 0 and advance with it; what is past K is loaded as zero."""
        kernel = self.kernel
        if kernel.text_of("k") != "tl.arange(0, BLOCK_K).to(INDEX_DTYPE)":
            kernel.note("dot", kernel.assignments.get("k"), "k does not start at 0")
        for loop in kernel.loops:
            still = set(POINTERS) - {name for name, _ in carried(loop)}
            if still:
                kernel.note("dot", loop, f"{sorted(still)} do not advance with k")
        if kernel.text_of("EVEN_K") == "True":
            return
        if kernel.text_of("inside") != "k < K - step * BLOCK_K":
            kernel.note("dot", kernel.assignments.get("inside"), "products past K are not masked")
        for name in "ab":
            masked = rf"tl\.load\({name}_block, mask=inside\[(?::, None|None, :)\], other=0\.0\)"
            if not re.fullmatch(masked, kernel.text_of(name)):
                kernel.note("dot", kernel.assignments.get(name), f"{name} is not loaded with zeros past K")

    def check_lengths(self, forms: Forms, arguments: Names) -> None:
        """K, accumulator and precision are those of one form; blocks are powers of two."""
        kernel = self.kernel
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
            if not is_power_of_two(kernel.values(name, arguments)):
                kernel.note(
                    "block", kernel.assignments.get(name), f"{name} = {kernel.text_of(name)}, no power of two"
                )
        length, block = kernel.values("K", arguments), kernel.values("BLOCK_K", arguments)
        at = kernel.assignments.get("K")
        if length is None:
            return
        if kernel.text_of("EVEN_K") == "True" and block and any(n % block[0] for n in length):
            kernel.note("dot", at, "EVEN_K, but BLOCK_K does not divide K")
        if not forms.is_open:
            self._check_form(length, forms, at)

    def _check_form(self, length: Values, forms: Forms, at: ast.AST | None) -> None:
        accumulators = sorted(accumulator for accumulator, n in forms.chains if n == length)
        if not accumulators:
            shown = str(length[0]) if is_constant(length) else "with its symbols"
            self.kernel.note("length", at, f"no form of this kernel is a chain of length K, {shown}")
            return
        self.retraced.add(("chain", length))
        found = self.kernel.text_of("ACC_TYPE"), self.kernel.text_of("INPUT_PRECISION")
        if found not in {_PRECISIONS.get(accumulator) for accumulator in accumulators}:
            self.kernel.note(
                "precision", self.kernel.assignments.get("INPUT_PRECISION"), f"{found} for {accumulators}"
            )
