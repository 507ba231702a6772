"""What an emitted C++ kernel may contain, read line by line as Inductor writes it: one statement each.

The inlined runtime is compared with ours byte by byte; what follows it may

    loop        upwards, in positive steps; threads share loops over outputs only (omp for), never one reduction
    reduce      floats by batchinv::Stream and batchinv::Lanes; anything else by an exact operation (max, any, int +)
    call        elementwise functions, and what moves data between memory, vectors and lanes
"""

from __future__ import annotations

import dataclasses
import re

from ..codegen.cpp import runtime_source
from ..templates.cpp_matmul import header_text
from .finding import Report
from .lengths import Forms, Names, Values, constant, cpp_values_of, is_constant

_PREFIX = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
_PRAGMA = re.compile(
    r"#pragma (?:omp parallel(?: num_threads\(\d+\))?|omp for(?: collapse\((?P<depth>\d+)\))?|omp single"
    r"|omp simd simdlen\(\d+\)|GCC ivdep|GCC unroll \d+)"
)
_FOR = re.compile(
    r"for\s*\(\s*(?:int64_t|int32_t|long|int)\s+(?P<variable>\w+)\s*=\s*(?P<start>[^;]+);\s*(?P=variable)\s*<\s*(?P<end>[^;]+);"
    r"\s*(?:(?P=variable)\s*\+=\s*(?P<step>[^;{]+)|(?P=variable)\+\+|\+\+(?P=variable))\s*\)(?P<rest>[^)]*)"
)
_CALL = re.compile(
    r"(?P<method>\.|->)?(?<![\w:])(?P<name>[A-Za-z_]\w*(?:::~?[A-Za-z_]\w*)*)(?:<[^;(){}&|]*>)?\s*\("
)
_ACCUMULATOR = re.compile(
    r"batchinv::(?P<kind>Stream|Lanes)<.*, batchinv::(?P<operator>Add|Multiply)>(?P<blocks>::Blocks)? (?P<name>\w+)"
)
_PUSH = re.compile(r"(?P<name>\w+?)(?:_arr\[[^\]]+\])?\.push\((?P<value>\w+)(?:, (?P<length>.+))?\);")
#: The lines that may name an ordered accumulator, besides a push.
_ORDERED = re.compile(
    r"batchinv::(?:Stream|Lanes)<.*>(?:::Blocks)? "
    r"(?P<name>\w+_ordered)(?:_arr|_blocks)?(?:\[\d+\]|\((?P=name)_blocks\))?;"
    r"|auto \w+ = \w+_ordered(?:_arr\[.+\])?\.total\(\);"
    r"|for \(int i = 0; i < \d+; i\+\+\) (?P<array>\w+_ordered)_arr\[i\] = batchinv::.*\((?P=array)_blocks\[i\]\);"
)
_DECLARATION = re.compile(r"(?P<type>[\w:]+(?:<[^=();]*>)?) (?P<name>tmp_acc\w*)(?:\[\d+\])?(?: = |;)")
_UPDATE = re.compile(
    r"(?P<name>[A-Za-z_]\w*)(?P<subscript>\[.*?\])? (?P<operator>[-+*/|&^]?)= (?P<value>.+);"
)
_BRACES = re.compile(r"\{[^{}]*\}")
_ATOMIC = re.compile(r"\batomic_\w+|\bstd::atomic\b|\b__atomic\w+|\b__sync_\w+|\bfetch_add\b")
#: What Inductor declares in every kernel, and adds nothing: a flag for integer divisions by zero.
_DIVISION_FLAG = "std::atomic<int> inductor_cpu_integer_div_error{0};"

_OPERATORS = {"Add": "sum", "Multiply": "prod"}
_EXACT_UPDATES = re.compile(
    r"(?:at::vec::(?:maximum|minimum)|std::(?:max|min)|(?:max|min|any|xor_sum)_masked_reduce|(?:max|min)_propagate_nan"
    r"|arg(?:max|min)_combine(?:_vec<[^()]*>)?)\((?P<name>\w+)(?:\[[^\]]*\])?,"
    r"|(?P<other>\w+)(?:\[[^\]]*\])? (?:\||\|\||\^) "
)
#: How an accumulator of an extremum starts, where there is an array of them.
_START = re.compile(r"(?:IndexValue<\w+>\{0, )?-?std::numeric_limits<\w+>::\w+\(\)\}?")
_EXACT_LAMBDA = re.compile(r"\{ return at::vec::(?:maximum|minimum)\(x, y\); \}")
_INTEGRAL = re.compile(r"(?:^|<)(?:u?int(?:8|16|32|64)_t|bool|int|long)\b")

_STD = """abs acos acosh array asin asinh atan atan2 atanh ceil copysign cos cosh erf erfc exp exp2 expm1 fabs floor fma
    fmax fmin fmod frexp get hypot isfinite isinf isnan ldexp lgamma log log10 log1p log2 make_unique max min modf move
    nearbyint nextafter numeric_limits pow remainder rint round signbit sin sinh size_t sqrt tan tanh tgamma trunc
    unique_ptr""".split()
_VECTORS = """Vectorized VectorizedN VecMask convert clamp clamp_max clamp_min flip fmadd maximum minimum transpose_mxn
    vec_reduce_all""".split()
_OURS = "convert_in_lane in_lane near one_nan remainder Stream Lanes".split()
_WORDS = """alignas alignof arange blendv cast catch decltype defined double float for from if infinity int int32_t
    int64_t int8_t int16_t kernel loadu long lowest max min omp_get_thread_num quiet_NaN reinterpret_cast return
    set sizeof size static_cast store switch to transpose_mxn uint16_t uint32_t uint64_t uint8_t while bool
    C10_LIKELY C10_UNLIKELY TORCH_CHECK AOTI_TORCH_CHECK assert unsigned char short div_floor_integer
    div_floor_floating_vec bit_cast convert data index value get all_masked all_zero is_masked loadu_one_fourth
    is_nan has_inf_nan isnan inductor_cpu_throw_if_integer_div_error floor_divide_integral remainder_integral
    mod remainder_integer normalized_rand_cpu randn_cpu randint64_cpu fmadd max_propagate_nan min_propagate_nan
    max_masked_reduce min_masked_reduce any_masked_reduce xor_sum_masked_reduce sum_masked_reduce
    prod_masked_reduce argmax_combine argmin_combine argmax_combine_vec argmin_combine_vec argmax_vec_reduce_all
    argmin_vec_reduce_all IndexValue IndexValueVec push total abs acos acosh angle asin asinh atan atan2 atanh
    ceil clamp conj copysign cos cosh digamma erf erfc erfinv exp exp2 exp_u20 expm1 fexp_u20 floor fmod frac
    hypot i0 i0e igamma igammac imag lgamma log log10 log1p log2 logical_not maximum minimum neg nextafter pow
    real reciprocal remainder round rsqrt sigmoid sin sinh sqrt tan tanh trigamma trunc zeta ndtri signbit sgn
    sign polygamma i1 i1e airy_ai_forward""".split()
#: Names of scalar special functions in ATen's headers.
_SPECIAL = re.compile(r"(?:calc_|spherical_bessel_|(?:modified_)?bessel_|[a-z_]+_polynomial_|scaled_)\w+")
_ALLOWED = {"std": frozenset(_STD), "at::vec": frozenset(_VECTORS), "batchinv": frozenset(_OURS)}
_ALLOWED |= {"c10": frozenset(["bit_cast", "convert", "div_floor_integer", "div_mod", "BFloat16", "Half"])}
_ALLOWED |= {
    "at": frozenset(["BFloat16", "Half"]),
    "bi_gemm": frozenset(["run", "run_depth_groups", "run_row_groups"]),
    "": frozenset(_WORDS),
}
_REDUCTIONS = re.compile(
    r"cascade_sum|welford|reduce_add|vec_reduce_all|accumulate|inner_product|transform_reduce|cumsum"
)
LIBRARY = re.compile(
    r"\b(?:at::native|mkl\w*|cblas_\w+|mkldnn\w*|onednn\w*|dnnl\w*|cpp_gemm\w*|[sd]gemm_?)\b"
    r"|\baoti_torch_(?!cpu_randint_low_out)(?:(?:cpu|cuda)_\w+|proxy_executor\w*)"
)


@dataclasses.dataclass
class _Loop:
    variable: str
    line: int
    start: str
    end: str
    step: str | None
    is_parallel: bool
    condition: str  # the last one above it
    depth: int = 0  # of braces around its body


class CppKernel:
    """One kernel: ``source`` is the string that ``async_compile.cpp_pybinding`` was given.

    ``with_runtime``: false for the text of one function, whose runtime stands elsewhere.
    """

    def __init__(self, source: str, report: Report, with_runtime: bool = True) -> None:
        self.report = report
        self.is_product = "bi_gemm::" in source
        self.text, self.skipped = self._without_runtime(source) if with_runtime else (source, 0)
        self.lines = self.text.splitlines()
        signature = re.search(r"\bvoid\s+\w+\(([^)]*)\)", self.text)
        names = (
            [parameter.split()[-1] for parameter in signature[1].split(",")]
            if signature and signature[1]
            else []
        )
        self.parameters = [name.lstrip("*&") for name in names]
        #: (combine, line, extent of the reduced loop) of every push.
        self.reduced: list[tuple[str, int, str]] = []
        #: (combine or "chain", length) of the forms that loops of this kernel were found to have.
        self.retraced: set[tuple[str, Values]] = set()
        #: Loops over what is left of a reduced loop whose steps are longer than one element.
        self.tails: list[tuple[_Loop, _Loop]] = []

    def _without_runtime(self, source: str) -> tuple[str, int]:
        """The kernel itself, and how many lines of runtime stand before it."""
        runtime = header_text() if self.is_product else _PREFIX + runtime_source()
        start = source.find(runtime)
        if start < 0:
            self.report.add("runtime", 1, "the inlined runtime is not the one of this package")
            start = source.find('extern "C"')
            return source[max(start, 0) :], source.count("\n", 0, max(start, 0))
        rest = source[start + len(runtime) :]
        if source[:start].strip():
            self.report.add("runtime", 1, f"before the runtime: {source[:start].strip()}")
        return rest, source.count("\n", 0, start + len(runtime))

    def _note(self, rule: str, number: int, found: str = "") -> None:
        self.report.add(rule, self.skipped + number, found or self.lines[number - 1])

    def check(self) -> None:
        """Everything but the lengths."""
        self._loops: list[_Loop] = []
        self._depth, self._parallel_loops, self._condition = 0, 0, ""
        self._blocks, self._open_blocks = 0, [0]
        self._accumulators: dict[str, tuple[str, str, int]] = {}
        self._pushed: set[tuple[str, int]] = set()
        self._types: dict[str, str] = {}
        self._pending: _Loop | None = None
        for number, line in enumerate(self.lines, 1):
            line = line.strip()
            if not line or line.startswith("//"):
                continue
            self._check_line(number, line)
            self._track_braces(line)
        if self._depth != 0:
            self._note("parse", len(self.lines), "unbalanced braces")

    def _check_line(self, number: int, line: str) -> None:
        if line.startswith("#"):
            self._check_directive(number, line)
            return
        if not _is_one_statement(line):
            self._note("statement", number)
        if _ATOMIC.search(line) and line != _DIVISION_FLAG:
            self._note("atomic", number)
        if LIBRARY.search(line):
            self._note("extern", number)
        if re.search(r"\b(?:for|while|goto)\b", line):
            self._check_loop(number, line)
        elif line.startswith("if("):
            self._condition = line
        self._check_calls(number, line)
        match = _ACCUMULATOR.match(line)
        if match and not match["blocks"]:
            self._accumulators[match["name"].removesuffix("_arr")] = (
                match["kind"],
                match["operator"],
                len(self._loops),
            )
        push = _PUSH.fullmatch(line)
        if push:
            self._check_push(number, push)
        elif "_ordered" in line and not _ORDERED.fullmatch(line):
            self._note("ordered", number)
        self._check_update(number, line)

    def _check_directive(self, number: int, line: str) -> None:
        match = _PRAGMA.fullmatch(line)
        if match is None:
            is_include = line.startswith(("#include <", '#include "')) and "mkl" not in line
            if not is_include or line.startswith("#pragma"):
                self._note("openmp" if line.startswith("#pragma omp") else "directive", number)
        elif line.startswith("#pragma omp for"):
            self._parallel_loops = int(match["depth"] or 1)

    def _check_loop(self, number: int, line: str) -> None:
        match = _FOR.match(line)
        if match is None:
            self._note("loop", number)
            return
        step = match["step"]
        size = cpp_values_of(step, {}) if step else constant(1)
        if size is None or not is_constant(size) or size[0] <= 0:
            self._note("loop", number)
        is_parallel, self._parallel_loops = self._parallel_loops > 0, max(0, self._parallel_loops - 1)
        loop = _Loop(
            match["variable"], number, match["start"], match["end"], step, is_parallel, self._condition
        )
        if not match["rest"].strip() or match["rest"].strip() == "{":
            self._pending = loop

    def _track_braces(self, line: str) -> None:
        for character in line:
            if character == "{":
                self._depth += 1
                self._blocks += 1
                self._open_blocks.append(self._blocks)
                if self._pending:
                    self._pending.depth = self._depth
                    self._loops.append(self._pending)
                    self._pending = None
            elif character == "}":
                if self._loops and self._loops[-1].depth == self._depth:
                    self._loops.pop()
                self._depth -= 1
                if len(self._open_blocks) > 1:
                    self._open_blocks.pop()

    def _check_calls(self, number: int, line: str) -> None:
        for match in _CALL.finditer(line):
            namespace, _, name = match["name"].rpartition("::")
            if line.startswith('extern "C"'):
                continue
            if name in _ALLOWED.get(namespace, ()) or (not namespace and self._is_local(name)):
                continue
            if namespace.startswith("at::vec::") and name in ("loadu", "from", "blendv", "arange", "set"):
                continue
            if namespace.startswith(("std::numeric_limits", "std::array")) or name in ("push", "total"):
                continue
            rule = "reduction" if _REDUCTIONS.search(name) else "call"
            if not LIBRARY.search(line) and not (_ATOMIC.search(line) and line != _DIVISION_FLAG):
                self._note(rule, number, f"{match['name']}: {line}")
        if "vec_reduce_all" in line and "vec_reduce_all<" in line.split("at::vec::", 1)[-1]:
            self._check_lanes(number, line)

    def _check_lanes(self, number: int, line: str) -> None:
        kind = re.search(r"\bvec_reduce_all<(\w+(?:::\w+)*)", line)
        if not (kind and (_INTEGRAL.search(kind[1]) or _EXACT_LAMBDA.search(line))):
            self._note("reduction", number)

    def _is_local(self, name: str) -> bool:
        return (
            bool(_SPECIAL.fullmatch(name) or re.fullmatch(r"(?:tmp|buf|x)\w*", name))
            or (
                self.is_product
                and name in ("has_bias", "bias_is_start", "scale_product", "scale_bias", "alpha", "beta")
            )
            or name in ("__builtin_nan", "__builtin_inf")
        )

    def _check_push(self, number: int, push: re.Match[str]) -> None:
        accumulator = self._accumulators.get(push["name"])
        if accumulator is None:
            self._note("ordered", number, f"{push['name']} is no ordered accumulator: {push.string}")
            return
        kind, operator, outer = accumulator
        if (push["name"], self._open_blocks[-1]) in self._pushed:
            self._note("ordered", number, f"pushed twice: {push.string}")
        self._pushed.add((push["name"], self._open_blocks[-1]))
        inside = self._loops[outer:]
        loops = [loop for loop in inside if not loop.variable.endswith(("_tail", "_inner"))]
        if len(loops) != 1:
            self._note("ordered", number, f"a sum over {len(loops)} loops, not one: {push.string}")
            return
        (loop,) = loops
        if loop.is_parallel:
            self._note("openmp", loop.line, "threads share one sum")
        if cpp_values_of(loop.start, {}) != constant(0):
            self._note("loop", loop.line)
        # A transposed tile, and a tail, are walked by a loop of their own; a lane gets one element of each step.
        own = [
            part for part in inside if part.variable in (f"{loop.variable}_inner", f"{loop.variable}_tail")
        ]
        if kind == "Lanes" and (
            push["length"] or not (own or cpp_values_of(loop.step or "1", {}) == constant(1))
        ):
            self._note("ordered", loop.line, "a lane must be pushed element by element")
        for part in own:
            if part.variable.endswith("_inner") and part.start != "0":
                self._note("loop", part.line)
        self.tails += [(part, loop) for part in own if part.variable.endswith("_tail")]
        self.reduced.append((_OPERATORS[operator], number, loop.end))

    def _check_update(self, number: int, line: str) -> None:
        declared = _DECLARATION.match(line)
        if declared:
            self._types[declared["name"].removesuffix("_arr")] = declared["type"]
            return
        update = _UPDATE.match(line)
        if update is None:
            return
        name = update["name"].removesuffix("_arr")
        if update["operator"]:
            if not _INTEGRAL.search(self._types.get(name, "")):
                self._note("reduction", number)
        elif name.startswith("tmp_acc") and not _INTEGRAL.search(self._types.get(name, "")):
            if update["subscript"] == "[i]" and _START.fullmatch(update["value"]):
                return
            exact = _EXACT_UPDATES.match(update["value"])
            carried = exact and (exact["name"] or exact["other"]).removesuffix("_arr").removesuffix("_vec")
            if carried != name.removesuffix("_vec"):
                self._note("reduction", number)

    def check_lengths(self, forms: Forms, arguments: Names) -> None:
        """Reduced loops, and K of a product, have the length of a form."""
        if forms.is_open:
            return
        for tail, loop in self.tails:
            if not _continues(tail, loop, arguments):
                self._note("loop", tail.line)
        for combine, number, end in self.reduced:
            length = cpp_values_of(end, arguments)
            if length is not None and (combine, length) in forms.trees:
                self.retraced.add((combine, length))
            if length is not None and length not in forms.lengths(combine):
                self._note("length", number, f"no form of this graph reduces {end} elements by {combine}")
        has_groups_of_k = "run_depth_groups" in self.text
        if has_groups_of_k and forms.group_chains:
            self.retraced.add(("group chain", ()))
        elif has_groups_of_k:
            self._note("length", 1, "no form of this graph is a chain over the rows of a group")
        k = arguments.get("k") if self.is_product and not has_groups_of_k else None
        lengths = {length for _, length in forms.chains}
        # A constant K may be what guards made of a symbol; no batch size is in it.
        settled = k is not None and is_constant(k) and not all(map(is_constant, lengths))
        if k is not None and k in lengths:
            self.retraced.add(("chain", k))
        if k is not None and k not in lengths and not settled:
            self._note("length", 1, "no form of this graph is a chain of this K")


def _continues(tail: _Loop, loop: _Loop, arguments: Names) -> bool:
    """True if ``tail`` runs from the last whole step of ``loop`` to its end, as far as the bounds can be read.

    Or from 0, in the first step only.
    """
    start, end = cpp_values_of(tail.start, arguments), cpp_values_of(loop.end, arguments)
    step = cpp_values_of(loop.step or "1", arguments)
    if start is None or end is None or step is None:
        return True
    whole = tuple(n - n % m for n, m in zip(end, step, strict=True))
    if f" {loop.variable} < static_cast<int64_t>(1))" in tail.condition.replace("1L)", "1)"):
        whole = constant(0)
    return start == whole and cpp_values_of(tail.end, arguments) == end


def _is_one_statement(line: str) -> bool:
    """True if at most one statement stands on ``line``, next to the head of a loop and the bodies of lambdas."""
    head = _FOR.match(line)
    rest = line[head.end() :] if head else line
    while "{" in rest and _BRACES.search(rest):
        rest = _BRACES.sub("", rest)
    _, _, second = rest.partition(";")
    return not second.strip() or second.strip() == "}"
