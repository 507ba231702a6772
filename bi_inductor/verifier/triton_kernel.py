"""What an emitted Triton kernel may contain: allow-lists of statements, calls and definitions.

A kernel that reduces in an order of its own has one of three shapes:

    held      total = ordered.tree_sum(where(mask, block, identity))                     R0_BLOCK >= length
    looped    stack = push_sum(stack, tree_sum(block), number), blocks ascending; total_sum(stack)
    chain     acc = tl.dot(a, b, acc) over k = 0, BLOCK_K, ... K, one loop, one accumulator
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from .finding import Report
from .lengths import Forms, Names, Values, ceil_div, constant, is_constant, values_of

#: Names that mean the same in every kernel, and what each may be called for.
CALLS: dict[str, frozenset[str]] = {
    "tl": frozenset(
        """abs advance arange broadcast_to cast cdiv clamp debug_barrier device_assert exp fma full
        inline_asm_elementwise load log make_block_ptr make_tensor_descriptor max_contiguous maximum minimum
        multiple_of num_programs program_id rand randint randint4x randn range reshape rsqrt sigmoid sqrt sqrt_rn
        static_assert store trans view where zeros zeros_like""".split()
    ),
    "ordered": frozenset("new_stack push_prod push_sum total_prod total_sum tree_prod tree_sum".split()),
    # Elementwise, and extrema (and any), which are exact in every order.
    "triton_helpers": frozenset(
        """any constexpr_next_power_of_2 bucketize_binary_search device_assert_then div_floor_integer fmax2 fmaximum
        fp8e4m3fn_to_float32 frexp if_mask inline_asm_pack inline_asm_unpack is_floating max2 max2_strict max_with_index
        maximum maximum_with_index min2 min2_strict min_with_index minimum minimum_with_index pow_integer
        promote_to_tensor rand4x randint64 randn4x remainder_integer select_one""".split()
    ),
}
#: Whole modules of elementwise functions.
ELEMENTWISE = frozenset(["libdevice", "tl_math", "tl.math"])
OTHER_CALLS = frozenset(["float", "triton.language.div_rn", "tl.extra.cuda.gdc_launch_dependents"])
OTHER_CALLS |= {"tl.extra.cuda.gdc_wait"}
METHODS = frozenset(["broadcast_to", "load", "store", "to"])
REDUCTIONS = frozenset(
    """argmax argmin associative_scan cumprod cumsum histogram max min prod reduce sort sum topk welford
    welford_combine welford_reduce xor_sum""".split()
) | {"online_softmax_combine", "online_softmax_combine_with_sum", "online_softmax_reduce", "sort_with_index"}

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
        "from bi_inductor.runtime import ordered",
        "from bi_inductor.runtime import schedules as triton_heuristics",
    ]
)
#: Settings of a kernel that reach its bits.
FLAGS = {"enable_fp_fusion": False, "native_matmul": False, "atomic_add_found": False}

_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.For, ast.Pass)
_FORBIDDEN_NODES = (ast.Lambda, ast.comprehension, ast.NamedExpr, ast.Await, ast.Yield, ast.Starred)
_SUBSCRIPT = r"(?:\[:(?:, :)*, None\])?"
_ROUNDED = r"(?:\.to\(tl\.(?:bfloat16|float16)\)\.to\(tl\.float32\))?"
_TREE = r"ordered\.tree_(?P<kind>sum|prod)\((?P<leaves>\w+)\)"
_BLOCKS = r"\(r0_numel \+ R0_BLOCK - 1\) // R0_BLOCK"
#: The lines that may call an ordered helper. ``zero``: a finished float sum gets + 0.0 once.
_ORDERED_LINES = {
    "held": rf"(?P<target>\w+) = \(?{_TREE}{_SUBSCRIPT}(?P<zero> \+ 0\.0\))?{_ROUNDED}",
    "new": r"(?P<target>_\w+) = ordered\.new_stack\((?P<identity>(?P=target)_identity), "
    r"\((?P<bound>\d+) \+ R0_BLOCK - 1\) // R0_BLOCK\)",
    "push": rf"(?P<target>_\w+) = ordered\.push_(?P<pushed>\w+)\((?P=target), {_TREE}, r0_offset // R0_BLOCK\)",
    "total": rf"(?P<target>\w+) = \(?ordered\.total_(?P<kind>sum|prod)\((?P<stack>_\w+), (?P=stack)_identity, "
    rf"{_BLOCKS}\){_SUBSCRIPT}(?P<zero> \+ 0\.0\))?{_ROUNDED}",
}
_ORDERED = {shape: re.compile(pattern) for shape, pattern in _ORDERED_LINES.items()}
#: How the reduced axis is walked: every name has one meaning.
_AXIS = {
    "r0_base": re.compile(r"tl\.arange\(0, R0_BLOCK\)\[(?:None, )*:\]"),
    "r0_index": re.compile(r"r0_offset \+ r0_base|tl\.arange\(0, R0_BLOCK\)\[(?:None, )*:\]"),
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
_REDUCED_LOOP = re.compile(r"tl\.range\(0, r0_numel, R0_BLOCK(?:, num_stages=\d+)?\)")
_CHAIN_LOOP = re.compile(r"tl\.range\(0, tl\.cdiv\(K, BLOCK_K\)\)")
_CARRIED_POINTERS = {"a_block": "BLOCK_K * stride_ak", "b_block": "BLOCK_K * stride_bk"}
_EXTREMUM = re.compile(
    r"(?:triton_helpers\.f?m(?:ax|in)imum(?:_with_index)?|tl\.m(?:ax|in)imum)\(|(?P<carried>\w+) [|^] \w+$"
)
_PRECISIONS = {"tf32/float32": ("tl.float32", "tf32"), "float32": ("tl.float32", "ieee")}
_PRECISIONS["float64"] = ("tl.float64", "ieee")
#: Upper limit of a block of a looped reduction: what a mask may be left out for.
_LARGEST_BLOCK = 1 << 16


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an expression made of names and attributes, or an empty string."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _is_power_of_two(values: Values | None) -> bool:
    return values is not None and is_constant(values) and values[0] > 0 and values[0] & (values[0] - 1) == 0


class TritonKernel:
    """One kernel definition: ``source`` is the string that ``async_compile.triton`` was given."""

    def __init__(self, source: str, report: Report) -> None:
        self.report, self.lines = report, source.splitlines()
        self.module = ast.parse(source)
        functions = [node for node in self.module.body if isinstance(node, ast.FunctionDef)]
        self.function = functions[-1] if functions else None
        self.parameters = [argument.arg for argument in self.function.args.args] if self.function else []
        #: Constants and constexprs the body sets itself: name -> value.
        self.constants: dict[str, ast.expr] = {}
        self.uses_helpers = self.uses_dot = False

    def text(self, node: ast.AST) -> str:
        """The emitted text of a node that stands on one line; else as Python would write it."""
        if node.lineno == node.end_lineno:  # type: ignore[attr-defined]
            line = self.lines[node.lineno - 1].encode()  # type: ignore[attr-defined]
            return line[node.col_offset : node.end_col_offset].decode()  # type: ignore[attr-defined]
        return ast.unparse(node)

    def line(self, node: ast.AST) -> str:
        return self.lines[node.lineno - 1].strip()  # type: ignore[attr-defined]

    def _note(self, rule: str, node: ast.AST, found: str = "") -> None:
        self.report.add(rule, node.lineno, found or self.line(node))  # type: ignore[attr-defined]

    # Rules that need the kernel alone

    def check(self) -> None:
        """Everything but the lengths, which need the wrapper and the forms."""
        self._check_module()
        if self.function is None:
            return
        self.assignments = dict(_assignments(self.function))
        for statement in _statements(self.function.body):
            self._check_statement(statement)
        for node in ast.walk(ast.Module(self.function.body, [])):
            if isinstance(node, ast.Call):
                self._check_call(node)
            elif isinstance(node, _FORBIDDEN_NODES):
                self.report.add("statement", getattr(node, "lineno", 1), type(node).__name__)
        self._check_division()
        for loop in (node for node in self.function.body if isinstance(node, ast.For)):
            self._check_loop(loop)
        self._check_stacks()
        if self.uses_dot:
            self._check_chain()

    def _check_module(self) -> None:
        for node in self.module.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                if self.line(node) not in IMPORTS:
                    self._note("import", node)
            elif isinstance(node, ast.FunctionDef):
                if node is not self.function:
                    self._note("statement", node, f"a second function, {node.name}")
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Constant))):
                self._note("statement", node)
        if self.function is None:
            self.report.add("statement", 1, "no function")
            return
        decorators = [d for d in self.function.decorator_list if isinstance(d, ast.Call)]
        if len(decorators) != 1:
            self._note("launch", self.function, "no heuristics")
        for decorator in decorators:
            owner, _, name = dotted(decorator.func).rpartition(".")
            if owner != "triton_heuristics" or name not in HEURISTICS:
                self._note("launch", decorator, dotted(decorator.func))
            self._check_flags(decorator)

    def _check_flags(self, decorator: ast.Call) -> None:
        found = {}
        for keyword in decorator.keywords:
            if keyword.arg in ("triton_meta", "inductor_meta") and isinstance(keyword.value, ast.Dict):
                for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                        found[key.value] = value
        for name, wanted in FLAGS.items():
            if name in found and found[name].value != wanted:
                self._note("flags", found[name], f"{name} = {found[name].value!r}, not {wanted}")
        if "enable_fp_fusion" not in found:
            self._note("flags", decorator, "enable_fp_fusion is not set to False")
        flush = found.get("disable_ftz")
        self.disable_ftz = flush.value if flush else None

    def _check_statement(self, node: ast.stmt) -> None:
        if not isinstance(node, _STATEMENTS) or getattr(node, "orelse", None):
            self._note("statement", node)
        for name, value in _assigned(node):
            if name in CALLS or name in ("libdevice", "tl_math", "triton", "float"):
                self._note("statement", node, f"{name} is rebound")
            shape = _AXIS.get(name)
            if shape and value is not None and not shape.fullmatch(self.text(value)):
                self._note("axis", node)

    def _check_call(self, node: ast.Call) -> None:
        name = dotted(node.func)
        owner, _, function = name.rpartition(".")
        if not name or (owner and owner.split(".")[0] not in (*CALLS, *ELEMENTWISE, "triton")):
            if not (isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
                self._note("call", node)
        elif owner == "tl" and function == "dot":
            self.uses_dot = True
        elif owner == "ordered" and function in CALLS["ordered"]:
            self.uses_helpers = True
        elif function.startswith("atomic_") or "atomic" in name:
            self._note("atomic", node)
        elif function in CALLS.get(owner, ()) or owner in ELEMENTWISE or name in OTHER_CALLS:
            pass
        else:
            self._note("reduction" if function in REDUCTIONS else "call", node)

    def _check_division(self) -> None:
        """fp32 quotients are rounded to nearest; Triton's ``/`` is not, except in fp64."""
        if "64'" in self.lines_with_pointers() or any("float64" in line for line in self.lines):
            return
        for node in ast.walk(ast.Module(self.function.body, [])):  # type: ignore[union-attr]
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                numerator = self.assignments.get(dotted(node.left))
                # Torch 2.11 writes a reciprocal as (int 1) / x wherever it occurs.
                if numerator is None or not self.text(numerator).endswith(", 1, tl.int32)"):
                    self._note("division", node)

    def lines_with_pointers(self) -> str:
        return next((line for line in self.lines if "'signature'" in line and "fp64" in line), "")

    # Loops

    def _check_loop(self, loop: ast.For) -> None:
        inner = [
            node for node in ast.walk(loop) if isinstance(node, (ast.For, ast.While)) and node is not loop
        ]
        for node in inner:
            self._note("loop", node, "a loop inside a loop")
        target, bounds = dotted(loop.target), self.text(loop.iter)
        is_chain = target == "step" and bool(_CHAIN_LOOP.fullmatch(bounds))
        if not is_chain and not (target == "r0_offset" and _REDUCED_LOOP.fullmatch(bounds)):
            self._note("loop", loop)
        for name, statement in _carried(loop):
            if not (self._is_chain_step if is_chain else self._is_exact_step)(name, statement):
                self._note("accumulation", statement)

    def _is_chain_step(self, name: str, statement: ast.stmt) -> bool:
        if name in _CARRIED_POINTERS and isinstance(statement, ast.AugAssign):
            return isinstance(statement.op, ast.Add) and self.text(statement.value) == _CARRIED_POINTERS[name]
        value = getattr(statement, "value", None)
        return name == "acc" and isinstance(value, ast.Call) and dotted(value.func) == "tl.dot"

    def _is_exact_step(self, name: str, statement: ast.stmt) -> bool:
        """A push on a stack, or an extremum carried through the loop: no order can change it."""
        line = self.line(statement)
        if line.startswith(f"{name} = ordered.push_"):
            return True
        match = re.fullmatch(rf"{name} = tl\.where\([^,]+, (\w+), {name}\)", line)
        updated = self.assignments.get(match.group(1)) if match else None
        return updated is not None and bool(_EXTREMUM.match(self.text(updated)))

    # Ordered sums

    def _check_stacks(self) -> None:
        """Every line with an ordered helper has one of the shapes of ``_ORDERED``, and they fit together."""
        stacks: dict[str, list[re.Match[str]]] = {}
        self.sums: list[tuple[str, int, bool]] = []  # kind, line, whether + 0.0 follows
        self.bounds: list[tuple[int, int]] = []
        self.leaves: list[tuple[str, str, ast.stmt]] = []
        for statement in _statements(self.function.body):  # type: ignore[union-attr]
            line = self.line(statement)
            if "ordered." not in line:
                continue
            shape, match = next(
                ((s, m) for s, p in _ORDERED.items() if (m := p.fullmatch(line))), (None, None)
            )
            if match is None or shape is None:
                self._note("ordered", statement)
                continue
            if shape in ("held", "push"):
                self.leaves.append((match["kind"], match["leaves"], statement))
            if shape in ("held", "total"):
                self.sums.append((match["kind"], statement.lineno, bool(match["zero"])))
            if shape != "held":
                stack = match["stack"] if shape == "total" else match["target"]
                stacks.setdefault(stack, []).append(match)
            if shape == "new":
                self.bounds.append((int(match["bound"]), statement.lineno))
            if shape == "push" and match["pushed"] != match["kind"]:
                self._note("ordered", statement)
            if shape in ("push", "held") and self._is_in_loop(statement) != (shape == "push"):
                self._note(
                    "ordered", statement, f"{line}: {'outside' if shape == 'push' else 'inside'} of the loop"
                )
        for name, matches in stacks.items():
            self._check_stack(name, matches)
        for kind, leaves, statement in self.leaves:
            self._check_leaves(kind, leaves, statement)

    def _is_in_loop(self, statement: ast.stmt) -> bool:
        return statement.col_offset > self.function.body[0].col_offset  # type: ignore[union-attr]

    def _check_stack(self, name: str, matches: list[re.Match[str]]) -> None:
        """One new, one push, one total, of one kind, with the identity of that kind."""
        kinds = {match.groupdict().get("kind") for match in matches} - {None}
        line = next((n for n, text in enumerate(self.lines, 1) if text.strip() == matches[0].string), 1)
        if len(matches) != 3 or len(kinds) != 1:
            self.report.add("ordered", line, f"{name}: not one new_stack, one push and one total of one kind")
            return
        identity = self.assignments.get(f"{name}_identity")
        wanted = "0" if kinds == {"sum"} else "1"
        if identity is None or not re.fullmatch(
            rf"tl\.full\(\[[\w, ]+\], {wanted}, tl\.\w+\)", self.text(identity)
        ):
            self.report.add("ordered", line, f"{name}_identity is not a block of {wanted}")

    def _check_leaves(self, kind: str, name: str, statement: ast.stmt) -> None:
        """Leaves fill the whole block, the reduced axis last, and what is past the end is the identity."""
        wanted = "0" if kind == "sum" else "1"
        value = self.assignments.get(name)
        text = self.text(value) if value is not None else ""
        match = re.fullmatch(rf"tl\.where\(([^,]+), (\w+), {wanted}\)", text)
        masks: set[str] = set()
        if match:
            masks = {mask.strip() for mask in match[1].split("&")}
            block = self.assignments.get(match[2])
            text = self.text(block) if block is not None else ""
        if not re.fullmatch(r"tl\.broadcast_to\(.+, \[[\w, ]*\bR0_BLOCK\]\)", text):
            self._note(
                "ordered", statement, f"{self.line(statement)}: leaves are not a masked block of R0_BLOCK"
            )
        mask = self.assignments.get("r0_mask")
        if mask is not None and self.text(mask) == "r0_index < r0_numel" and "r0_mask" not in masks:
            self._note("ordered", statement, f"{self.line(statement)}: leaves past the end are not masked")

    # Matrix products

    def _check_chain(self) -> None:
        """One tl.dot in one loop, chained through one accumulator that starts at zero."""
        dots = [
            node
            for node in ast.walk(self.function)  # type: ignore[arg-type]
            if isinstance(node, ast.Call) and dotted(node.func) == "tl.dot"
        ]
        loops = [node for node in self.function.body if isinstance(node, ast.For)]  # type: ignore[union-attr]
        if len(dots) != 1 or len(loops) != 1:
            self._note("dot", dots[-1], f"{len(dots)} products in {len(loops)} loops, not one in one")
        chained = [
            statement
            for loop in loops
            for statement in loop.body
            if isinstance(statement, ast.Assign)
            and re.fullmatch(
                r"acc = tl\.dot\((?:a, b|b, a), acc, input_precision=INPUT_PRECISION, out_dtype=ACC_TYPE\)",
                self.line(statement),
            )
        ]
        if len(chained) != 1:
            self._note("dot", dots[0])
        starts = [
            self.text(value)
            for statement in self.function.body  # type: ignore[union-attr]
            for name, value in _assigned(statement)
            if name == "acc" and value is not None
        ]
        transposed = self._constexpr("SWAP") == "True"
        wanted = ["tl.zeros((BLOCK_N, BLOCK_M), ACC_TYPE)", "tl.trans(acc) + 0.0"]
        if not transposed:
            wanted = ["tl.zeros((BLOCK_M, BLOCK_N), ACC_TYPE)", "acc + 0.0"]
        if starts[:2] != wanted:
            self._note("dot", dots[0], f"the accumulator starts and ends as {starts}, not as {wanted}")
        self._check_operands(loops)
        if any(dotted(n.func) == "tl.program_id" and self.text(n.args[0]) != "0" for n in self._calls()):
            self._note("dot", dots[0], "a product is shared between programs")

    def _calls(self) -> Iterator[ast.Call]:
        return (n for n in ast.walk(self.function) if isinstance(n, ast.Call) and n.args)  # type: ignore[arg-type]

    def _check_operands(self, loops: list[ast.For]) -> None:
        """Both pointers start at k = 0 and advance by BLOCK_K; what is past K is loaded as zero."""
        k = self.assignments.get("k")
        if k is None or self.text(k) != "tl.arange(0, BLOCK_K).to(INDEX_DTYPE)":
            self._note("dot", k or self.function, "k does not start at 0")  # type: ignore[arg-type]
        even = self._constexpr("EVEN_K") == "True"
        for loop in loops:
            advanced = {name for name, _ in _carried(loop)} & set(_CARRIED_POINTERS)
            if advanced != set(_CARRIED_POINTERS):
                self._note("dot", loop, f"only {sorted(advanced)} move with k")
            inside = self.assignments.get("inside")
            if even:
                continue
            if inside is None or self.text(inside) != "k < K - step * BLOCK_K":
                self._note("dot", inside or loop, "products past K are not masked")
            for name in "ab":
                load = self.assignments.get(name)
                if load is None or not re.fullmatch(
                    rf"tl\.load\({name}_block, mask=inside\[(?::, None|None, :)\], other=0\.0\)",
                    self.text(load),
                ):
                    self._note("dot", load or loop, f"{name} is not loaded with zeros past K")

    def _constexpr(self, name: str) -> str:
        value = self.assignments.get(name)
        return self.text(value) if value is not None else ""

    # Rules that need the forms

    def length(self, name: str, arguments: Names) -> Values | None:
        """The values of a size of the kernel: set in its body, or passed by the wrapper."""
        value = self.assignments.get(name)
        return values_of(value, arguments) if value is not None else arguments.get(name)

    def check_lengths(self, forms: Forms, derived: set[Values], arguments: Names) -> None:
        """Reduced lengths, chunks and blocks are those of ``forms``.

        ``derived``: numbers of chunks of the graph's earlier kernels; a kernel over chunks adds to it.
        """
        if self.uses_dot:
            self._check_chain_length(forms, arguments)
        if not self.uses_helpers or self.function is None:
            return
        length = self.length("r0_numel", arguments)
        block = self.assignments.get("R0_BLOCK")
        if block is not None:
            size = values_of(block, {})
            if not _is_power_of_two(size) or (
                length and size and any(a > b for a, b in zip(length, size, strict=True))
            ):
                self._note("block", block, f"R0_BLOCK = {self.text(block)} does not hold {length}")
        if length is None:
            return
        for bound, at in self.bounds:
            if is_constant(length) and bound < length[0]:
                self.report.add("ordered", at, f"a stack for {bound} elements, with {length[0]} to come")
        self._check_constant_mask(length, block is None)
        for kind, at, has_zero in self.sums:
            if not forms.is_open:
                self._check_reduced(kind, at, length, forms, derived)
            is_float = any(combine == kind for combine, _ in forms.trees)
            is_integer = any(combine == kind for combine, _ in forms.unordered)
            if kind == "sum" and is_float != is_integer and has_zero != is_float:
                self.report.add(
                    "ordered", at, f"{self.lines[at - 1]}: + 0.0 where a float sum ends, only there"
                )

    def _check_constant_mask(self, length: Values, is_looped: bool) -> None:
        mask = self.assignments.get("r0_mask")
        if mask is None or not self.text(mask).startswith("tl.full"):
            return
        block = constant(_LARGEST_BLOCK) if is_looped else values_of(self.assignments["R0_BLOCK"], {})
        whole = _is_power_of_two(length) if is_looped else length == block
        if not whole and not (is_looped and all(n % 4096 == 0 for n in length)):
            self._note("ordered", mask, f"no mask, but {length[0]} elements do not fill their blocks")

    def _check_reduced(self, kind: str, at: int, length: Values, forms: Forms, derived: set[Values]) -> None:
        whole = forms.lengths(kind)
        if length in whole or length in derived:
            return
        longer = {n for n in whole | derived if all(a > b for a, b in zip(n, length, strict=True))}
        if _is_power_of_two(length) and longer:
            derived |= {ceil_div(n, length) for n in longer}
        elif is_constant(length) and longer:
            self.report.add(
                "block", at, f"{length[0]} elements are neither a form's length nor a power of two"
            )
        else:
            self.report.add(
                "length", at, f"no form of this kernel reduces r0_numel = {_shown(length)} elements"
            )

    def _check_chain_length(self, forms: Forms, arguments: Names) -> None:
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
        sizes = {name: self.length(name, arguments) for name in names}
        for name, size in sizes.items():
            if not _is_power_of_two(size):
                self._note("block", self.assignments.get(name, self.function), f"{name} is no power of two")  # type: ignore[arg-type]
        length = self.length("K", arguments)
        at = self.assignments.get("K", self.function)
        if length is None:
            return
        block = sizes["BLOCK_K"]
        if (
            self._constexpr("EVEN_K") == "True"
            and block
            and any(n % b for n, b in zip(length, block, strict=True))
        ):
            self._note("dot", at, "EVEN_K, but BLOCK_K does not divide K")  # type: ignore[arg-type]
        if forms.is_open:
            return
        accumulators = {accumulator for accumulator, n in forms.chains if n == length}
        if not accumulators:
            self._note("length", at, f"no form of this kernel is a chain of K = {_shown(length)} products")  # type: ignore[arg-type]
            return
        found = self._constexpr("ACC_TYPE"), self._constexpr("INPUT_PRECISION").strip("'\"")
        if found not in {_PRECISIONS.get(accumulator) for accumulator in accumulators}:
            self._note(
                "precision", self.assignments["INPUT_PRECISION"], f"{found} for {sorted(accumulators)}"
            )


def _shown(length: Values) -> str:
    return str(length[0]) if is_constant(length) else "(an expression with symbols)"


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        for name in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, name, []))


def _assigned(statement: ast.stmt) -> Iterator[tuple[str, ast.expr | None]]:
    """Names a statement binds, with the value where it binds one name to one expression."""
    if isinstance(statement, ast.Assign):
        for target in statement.targets:
            if isinstance(target, ast.Tuple):
                yield from ((dotted(element), statement.value) for element in target.elts)
            else:
                yield dotted(target), statement.value
    elif isinstance(statement, ast.AnnAssign):
        yield dotted(statement.target), statement.value
    elif isinstance(statement, (ast.AugAssign, ast.For)):
        yield dotted(statement.target), None


def _assignments(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    for statement in _statements(function.body):
        yield from ((name, value) for name, value in _assigned(statement) if value is not None)


def _carried(loop: ast.For) -> Iterator[tuple[str, ast.stmt]]:
    """Names that a loop's body reads before it binds them, and the statement that then does."""
    bound: set[str] = {dotted(loop.target)}
    read: set[str] = set()
    for statement in loop.body:
        names = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        targets = {name for name, _ in _assigned(statement)}
        if isinstance(statement, ast.AugAssign):
            names |= targets
        read |= names - bound
        yield from ((name, statement) for name in sorted(targets & read))
        bound |= targets
