"""Matrix products of emitted Triton kernels: one chain, acc = tl.dot(a, b, acc) over k = 0, BLOCK_K, ... K."""

from __future__ import annotations

import ast
import re

from .lengths import Forms, Names, Values, is_constant
from .syntax import KernelSyntax, assigned, carried, dotted, is_power_of_two

#: Pointers of the operands, and how far a step of k moves them.
POINTERS = {
    "a_block": "BLOCK_K * stride_ak",
    "b_block": "BLOCK_K * stride_bk",
    "extra_block": "BLOCK_K * stride_bk",
}
_DOT = re.compile(r"acc = tl\.dot\((?:a, b|b, a), acc, input_precision=INPUT_PRECISION, out_dtype=ACC_TYPE\)")
#: The products of the columns beside a tile's first ones: a second accumulator.
_EXTRA_DOT = "extra_acc = tl.dot(a, extra, extra_acc, input_precision=INPUT_PRECISION, out_dtype=ACC_TYPE)"
#: What TMA may load: step after step of one operand, whichever of its dimensions is dense.
_TMA = {
    "a": re.compile(r"a_tiles\.load\(\[(?:row, step \* BLOCK_K|step \* BLOCK_K, row)\]\)|tl\.trans\(a\)"),
    "b": re.compile(
        r"b_tiles\.load\(\[(?:column, step \* BLOCK_K|step \* BLOCK_K, column)\]\)|tl\.trans\(b\)"
    ),
    "a_tiles": re.compile(
        r"tl\.make_tensor_descriptor\(A, (?:\[M, K\], \[stride_am, 1\], \[BLOCK_M, BLOCK_K\]|"
        r"\[K, M\], \[stride_ak, 1\], \[BLOCK_K, BLOCK_M\])\)"
    ),
    "b_tiles": re.compile(
        r"tl\.make_tensor_descriptor\(B, (?:\[N, K\], \[stride_bn, 1\], \[BLOCK_N, BLOCK_K\]|"
        r"\[K, N\], \[stride_bk, 1\], \[BLOCK_K, BLOCK_N\])\)"
    ),
}
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
        """One tl.dot in one loop, chained through one accumulator that starts at zero and ends + 0.0.

        A tile with extra columns has two such products, each with an accumulator of its own.
        """
        kernel, dot = self.kernel, self.dots[0]
        wanted_dots = 2 if self.has_extra_columns else 1
        if len(self.dots) != wanted_dots or len(kernel.loops) != 1:
            kernel.note("dot", dot, f"{len(self.dots)} products in {len(kernel.loops)} loops, not one in one")
        steps = [kernel.line(statement) for loop in kernel.loops for statement in loop.body]
        if not any(map(self.dot.fullmatch, steps)):
            kernel.note("dot", dot)
        if self.has_extra_columns:
            self._check_extra_columns(steps)
        outside = [statement for statement in kernel.statements if not kernel.is_in_loop(statement)]
        bound = [kernel.text(value) for s in outside for name, value in assigned(s) if name == "acc"]
        wanted = ["tl.zeros((BLOCK_M, BLOCK_N), ACC_TYPE)", *self._end()]
        if kernel.text_of("SWAP") == "True":
            wanted = ["tl.zeros((BLOCK_N, BLOCK_M), ACC_TYPE)", "tl.trans(acc)", *self._end()]
        if self.has_extra_columns:
            wanted += ["extra_acc", *self._end()]
        if bound != wanted:
            kernel.note("dot", dot, f"the accumulator is bound to {bound}, not to {wanted}")
        for call in kernel.calls:
            if dotted(call.func) == "tl.program_id" and kernel.text(call) != "tl.program_id(0)":
                kernel.note("dot", call, "programs may share one product")
        self._check_operands()

    @property
    def has_extra_columns(self) -> bool:
        return self.kernel.text_of("EXTRA_N") not in ("", "0")

    def _check_extra_columns(self, steps: list[str]) -> None:
        kernel = self.kernel
        if _EXTRA_DOT not in steps:
            kernel.note(
                "dot", kernel.assignments.get("extra_acc"), "the extra columns are no chain of their own"
            )
        starts = [kernel.text(v) for s in kernel.statements for name, v in assigned(s) if name == "extra_acc"]
        if starts[:1] != ["tl.zeros((BLOCK_M, EXTRA_N), ACC_TYPE)"]:
            kernel.note("dot", kernel.assignments.get("extra_acc"), f"extra columns start as {starts[:1]}")

    def _end(self) -> list[str]:
        """What follows the sums, once: + 0.0 in a form that Triton does not merge with the last product."""
        return ["tl.where(acc == 0.0, 0.0, acc)"]

    def is_exact_sum(self, call: ast.Call) -> bool:
        """True for a reduction that no order can change, as a grouped product needs it."""
        return False

    def is_step(self, name: str, statement: ast.stmt) -> bool:
        """True if ``statement``, in the loop over k, may change the carried ``name``."""
        if isinstance(statement, ast.AugAssign):
            step = self.kernel.text(statement.value)
            return isinstance(statement.op, ast.Add) and step == POINTERS.get(name)
        is_sum = name in ("acc", "extra_acc")
        return is_sum and self.kernel.line(statement).startswith(f"{name} = tl.dot(")

    def _check_operands(self) -> None:
        """Both pointers start at k = 0 and advance with it; what is past K is loaded as zero."""
        kernel = self.kernel
        if kernel.text_of("k") != "tl.arange(0, BLOCK_K).to(INDEX_DTYPE)":
            kernel.note("dot", kernel.assignments.get("k"), "k does not start at 0")
        if kernel.text_of("TMA") == "True":
            self._check_tma()
            return
        operands = ("a", "b", "extra") if self.has_extra_columns else ("a", "b")
        for loop in kernel.loops:
            still = {f"{name}_block" for name in operands} - {name for name, _ in carried(loop)}
            if still:
                kernel.note("dot", loop, f"{sorted(still)} do not advance with k")
        if kernel.text_of("EVEN_K") == "True":
            return
        if kernel.text_of("inside") != "k < K - step * BLOCK_K":
            kernel.note("dot", kernel.assignments.get("inside"), "products past K are not masked")
        for name in operands:
            masked = rf"tl\.load\({name}_block, mask=inside\[(?::, None|None, :)\], other=0\.0\)"
            if not re.fullmatch(masked, kernel.text_of(name)):
                kernel.note("dot", kernel.assignments.get(name), f"{name} is not loaded with zeros past K")

    def _check_tma(self) -> None:
        """Both operands come tile by tile of K; TMA loads zeros past an edge."""
        kernel = self.kernel
        for statement in kernel.statements:
            for name, value in assigned(statement):
                if name in _TMA and not (value and _TMA[name].fullmatch(kernel.text(value))):
                    kernel.note("dot", statement, f"{name} is not what TMA loads for this step")

    def check_lengths(self, forms: Forms, arguments: Names) -> None:
        """K, accumulator and precision are those of one form; blocks are powers of two."""
        kernel = self.kernel
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "EXTRA_N")[: 4 if self.has_extra_columns else 3]:
            if not is_power_of_two(kernel.values(name, arguments)):
                kernel.note(
                    "block", kernel.assignments.get(name), f"{name} = {kernel.text_of(name)}, no power of two"
                )
        length, block = kernel.values("K", arguments), kernel.values("BLOCK_K", arguments)
        at = kernel.assignments.get("K")
        if length is None:
            return
        is_masked = kernel.text_of("EVEN_K") != "True" or kernel.text_of("TMA") == "True"
        if not is_masked and block and any(n % block[0] for n in length):
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
