"""What an emitted Triton kernel may contain: allow-lists of imports, statements, calls, definitions and settings."""

from __future__ import annotations

import ast
import re

from .finding import Report
from .lengths import Forms, Names, Values
from .syntax import KernelSyntax, assigned, carried, dotted
from .triton_attention import CALLS as ATTENTION_CALLS
from .triton_attention import MAP_CALLS, AttentionProgram
from .triton_attention_backward import CALLS as ATTENTION_BACKWARD_CALLS
from .triton_computed import ComputedFunctions
from .triton_copies import CALLS as COPY_CALLS
from .triton_copies import ManyCopies
from .triton_grouped import GroupedProduct
from .triton_product import ChainedProduct
from .triton_quantized import QuantizedProduct
from .triton_sums import OrderedSums

#: Names that mean the same in every kernel, and what each may be called for.
CALLS: dict[str, frozenset[str]] = {
    "tl": frozenset(
        """abs advance arange broadcast_to cast cdiv clamp debug_barrier device_assert dot exp fma full
        inline_asm_elementwise load log make_block_ptr make_tensor_descriptor max_contiguous maximum minimum
        multiple_of num_programs program_id randint randint4x range reshape rsqrt sigmoid sqrt sqrt_rn
        static_assert store trans view where zeros zeros_like""".split()
    ),
    "attention": ATTENTION_CALLS,
    "attention_backward": ATTENTION_BACKWARD_CALLS,
    "attention_map": MAP_CALLS,
    "attention_specialised": frozenset(["attend"]),
    "draws": frozenset(["normal", "uniform"]),
    "ordered": frozenset("new_stack push_prod push_sum total_prod total_sum tree_prod tree_sum".split()),
    # Elementwise, and extrema (and any), which are exact in every order.
    "triton_helpers": frozenset(
        """any bucketize_binary_search constexpr_next_power_of_2 device_assert_then div_floor_integer fmax2 fmaximum
        fp8e4m3fn_to_float32 frexp if_mask inline_asm_pack inline_asm_unpack is_floating max2 max2_strict
        max_with_index maximum maximum_with_index min2 min2_strict min_with_index minimum minimum_with_index
        pow_integer promote_to_tensor randint64 remainder_integer select_one
        sort_with_index""".split()
    ),
    "tl.extra.cuda": frozenset(["gdc_launch_dependents", "gdc_wait"]),
    "triton.language": frozenset(["div_rn"]),
    "": frozenset(["float"]),
}
#: Whole modules of elementwise functions.
ELEMENTWISE = frozenset(["libdevice", "tl_math", "tl.math"])
METHODS = frozenset(["broadcast_to", "load", "store", "to"])
REDUCTIONS = frozenset(
    """argmax argmin associative_scan cumprod cumsum histogram max min online_softmax_combine
    online_softmax_combine_with_sum online_softmax_reduce prod reduce sort sum topk welford
    welford_combine welford_reduce xor_sum""".split()
)
#: Decorators that launch one program per tile of outputs. (Cooperative and split-scan kernels share a sum.)
HEURISTICS = frozenset("foreach persistent_reduction pointwise reduction template".split())
#: What Inductor and our code generator import; anything else could rebind a name of the lists above.
IMPORTS = frozenset(
    [
        "import triton",
        "import triton.language as tl",
        "from torch._inductor.runtime import triton_helpers, triton_heuristics",
        "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math",
        "from torch._inductor.runtime.hints import AutotuneHint, ReductionHint, TileHint, DeviceProperties",
        "from bi_inductor.runtime import attention",
        "from bi_inductor.runtime import attention_backward",
        "from bi_inductor.runtime import attention_map",
        "from bi_inductor.runtime import attention_specialised",
        "from bi_inductor.runtime import checked as triton_heuristics",
        "from bi_inductor.runtime import draws",
        "from bi_inductor.runtime import ordered",
        "from bi_inductor.runtime import schedules as triton_heuristics",
        "from bi_inductor.runtime import tiles as triton_heuristics",
        "from triton.experimental import gluon",
    ]
)
#: What makes numbers of sizes fp64; see ``codegen/triton_sizes.py``.
_FP64_ONE = "tl.full([], 1.0, tl.float64)"
#: Settings of a kernel that reach its bits; ``enable_fp_fusion`` must be given.
FLAGS = {"enable_fp_fusion": False, "native_matmul": False, "atomic_add_found": False}

_RESERVED = frozenset({owner.split(".")[0] for owner in (*CALLS, *ELEMENTWISE)} | {"float", "tl_math"})
_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.For, ast.Pass)
_FORBIDDEN = (ast.Lambda, ast.comprehension, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom, ast.Starred)
#: How the reduced axis is walked: every name has one meaning.
_ARANGE = r"tl\.arange\(0, R0_BLOCK\)\[(?:None, )*:\](?:\.to\(tl\.int64\))?"
_AXIS = {
    "r0_base": re.compile(_ARANGE),
    "r0_index": re.compile(rf"r0_offset \+ r0_base|{_ARANGE}"),
    "r0_offset": re.compile(r"0"),
    "r0_mask": re.compile(
        r"r0_index < r0_numel|tl\.full\(\[R0_BLOCK\], True, tl\.int1\)(?:\[(?:None, )*:\])?"
    ),
    "rbase": re.compile(r"r0_base"),
    "rindex": re.compile(r"r0_index"),
    "roffset": re.compile(r"r0_offset"),
    "rnumel": re.compile(r"r0_numel"),
    "RBLOCK": re.compile(r"R0_BLOCK"),
}
_REDUCED_LOOP = re.compile(r"for r0_offset in tl\.range\(0, r0_numel, R0_BLOCK(?:, num_stages=\d+)?\):")
#: An extremum or a disjunction of the value carried through a loop: no order can change it.
_EXACT_STEP = (
    r"(?:triton_helpers\.f?m(?:ax|in)imum(?:_with_index)?|tl\.m(?:ax|in)imum)\(\s*{name}, .*|{name} [|^] \w+"
)


def _product_of(kernel: KernelSyntax) -> ChainedProduct:
    """The rules for the matrix product of ``kernel``, which may have none."""
    if "ENDS" in kernel.assignments:
        return GroupedProduct(kernel)
    return (ChainedProduct if "INPUT_PRECISION" in kernel.assignments else QuantizedProduct)(kernel)


class TritonKernel(KernelSyntax):
    """One kernel definition and the rules it is held to."""

    def __init__(self, source: str, report: Report) -> None:
        super().__init__(source, report)
        self.flags: dict[str, ast.Constant] = {}
        self.sums, self.attention = OrderedSums(self), AttentionProgram(self)
        self.product, self.copies = _product_of(self), ManyCopies(self)
        self.computed = ComputedFunctions(self)

    def check(self) -> None:
        """Everything but lengths, which need the wrapper and the forms."""
        self._check_module()
        for statement in self.statements:
            self._check_statement(statement)
        for call in self.calls:
            self._check_call(call)
        for node in self.others:
            if isinstance(node, _FORBIDDEN):
                self.report.add("statement", getattr(node, "lineno", 1), type(node).__name__)
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                self._check_division(node)
        for loop in self.loops:
            self._check_loop(loop)
        self.sums.check()
        if self.product.dots:
            self.product.check()
        if self.attention.calls:
            self.attention.check()
        self.computed.check(ELEMENTWISE)
        if self.copies.is_meant:
            self.copies.check()

    def check_lengths(self, forms: Forms, chunks: set[Values], arguments: Names, has_flip: bool) -> None:
        """Reduced lengths are those of ``forms``, for one call with ``arguments``. See OrderedSums."""
        if self.product.dots:
            self.product.check_lengths(forms, arguments)
        if self.attention.calls:
            self.attention.check_lengths(forms, arguments)
        if self.sums.finished:
            self.sums.check_lengths(forms, chunks, arguments, has_flip)

    def _check_module(self) -> None:
        for node in self.module.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                if self.line(node) not in IMPORTS:
                    self.note("import", node)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                if not self.line(node).startswith("triton_helpers.set_driver_to_"):
                    self.note("statement", node)
            elif node is not self.function and node not in self.computed.functions:
                self.note("statement", node)
        if self.function is None:
            self.report.add("statement", 1, "no function")
            return
        heuristics = [d for d in self.function.decorator_list if isinstance(d, ast.Call)]
        if [dotted(d.func) for d in heuristics] not in [[f"triton_heuristics.{name}"] for name in HEURISTICS]:
            self.note(
                "launch", self.function, ", ".join(dotted(d.func) for d in heuristics) or "no heuristics"
            )
        for decorator in heuristics:
            self._check_flags(decorator)

    def _check_flags(self, decorator: ast.Call) -> None:
        for keyword in decorator.keywords:
            if keyword.arg in ("triton_meta", "inductor_meta") and isinstance(keyword.value, ast.Dict):
                for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                        self.flags[str(key.value)] = value
        for name, wanted in FLAGS.items():
            if name in self.flags and self.flags[name].value is not wanted:
                self.note("flags", self.flags[name], f"{name} = {self.flags[name].value!r}, not {wanted}")
        if "enable_fp_fusion" not in self.flags:
            self.note("flags", decorator, "enable_fp_fusion is not set to False")

    def _check_statement(self, node: ast.stmt) -> None:
        is_plain = isinstance(node, _STATEMENTS) and not getattr(node, "orelse", None)
        if not is_plain and node not in self.copies.heads:
            self.note("statement", node)
        for name, value in assigned(node):
            if name in _RESERVED:
                self.note("statement", node, f"{name} is rebound")
            shape = _AXIS.get(name)
            if shape and value is not None and not shape.fullmatch(self.text(value)):
                self.note("axis", node)

    def _check_call(self, node: ast.Call) -> None:
        name = dotted(node.func)
        owner, _, function = name.rpartition(".")
        if function == "sort_with_index" and "stable=True" not in map(ast.unparse, node.keywords):
            self.note("reduction", node)  # equal keys would stand in an order of the algorithm's
            return
        if self.copies.is_meant:
            is_known = function in COPY_CALLS.get(owner, ())
        else:
            is_known = function in CALLS.get(owner, ()) or owner in ELEMENTWISE
        if name and is_known:
            return
        if "atomic" in name:
            self.note("atomic", node)
        elif owner in CALLS and function in REDUCTIONS:
            if not self.product.is_exact_sum(node):
                self.note("reduction", node)
        elif owner.split(".")[0] in _RESERVED - {""} or not isinstance(node.func, ast.Attribute):
            self.note("call", node)
        elif node.func.attr not in METHODS:
            self.note("reduction" if node.func.attr in REDUCTIONS else "call", node)

    def _check_division(self, node: ast.BinOp) -> None:
        """fp32 quotients are rounded to nearest; Triton's ``/`` is not, except in fp64."""
        if ast.unparse(node.left).startswith(f"{_FP64_ONE} * "):  # of sizes
            return
        if any("float64" in line.replace(_FP64_ONE, "") or "*fp64'" in line for line in self.lines):
            return
        # Torch 2.11 writes a reciprocal as (int 1) / x wherever it occurs.
        if not self.text_of(dotted(node.left)).endswith(", 1, tl.int32)"):
            self.note("division", node)

    def _check_loop(self, loop: ast.For) -> None:
        is_chain = self.line(loop) == self.product.loop and bool(self.product.dots)
        if not is_chain and not _REDUCED_LOOP.fullmatch(self.line(loop)):
            self.note("loop", loop)
        for statement in loop.body:
            if isinstance(statement, (ast.For, ast.While)):
                self.note("loop", statement, "a loop inside a loop")
        for name, statement in carried(loop):
            if not (self.product.is_step if is_chain else self._is_exact_step)(name, statement):
                self.note("accumulation", statement)

    def _is_exact_step(self, name: str, statement: ast.stmt) -> bool:
        line = self.line(statement)
        if line.startswith(f"{name} = ordered.push_"):  # the rules for sums look at the rest of it
            return True
        match = re.fullmatch(rf"{name} = tl\.where\([^,]+, (\w+), {name}\)", line)
        if self.text_of("r0_mask").startswith("tl.full("):  # no element of a block is past the end
            match = match or re.fullmatch(rf"{name} = (\w+)", line)
        updated = self.text_of(match[1]) if match else ""
        carried_name = name.removesuffix("_index")
        return bool(re.fullmatch(_EXACT_STEP.format(name=carried_name), updated, re.DOTALL))
