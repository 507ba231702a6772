"""The verifier: real code is clean, and every corruption of it is found under the rule that forbids it."""

import dataclasses
import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from inspected import REDUCTIONS, Block
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx

from bi_inductor import BatchInvarianceError, certificate, graph, inspect, verifier
from bi_inductor.dry_run import DryRun
from bi_inductor.options import required_patches
from bi_inductor.verifier.lengths import Forms, cpp_values_of, values_of

R = torch.randn
FP8 = R(5, 272).to(torch.float8_e4m3fn), R(48, 272).to(torch.float8_e4m3fn).t()


def _scaled(**options):
    return lambda a, b, x, y: torch._scaled_mm(a, b, x, y, out_dtype=torch.bfloat16, **options)


def _grouped(a, b, ends):
    return torch._grouped_mm(a, b, offs=ends)


def BF(*shape):
    return R(shape).bfloat16()


ENDS = torch.tensor([3, 3, 17, 17, 38], dtype=torch.int32)
BASES = {
    "held": (lambda x: F.rms_norm(x, (4096,)), (R(8, 4096, dtype=torch.bfloat16),), {}),
    "product of elements": (lambda x: (1 + x / 9).prod(-1), (R(8, 300),), {}),
    "looped": (lambda x: x.sum(-1), (R(8, 3000),), {"dynamic": True}),
    "chunks": (lambda x: x.sum(-1), (R(4, 100000),), {}),
    "columns in chunks": (lambda x: x.sum(0), (R(5000, 100),), {}),
    "looped softmax": (lambda x: x.softmax(-1), (R(8, 3000),), {"dynamic": True}),
    "pointwise": (lambda x, y: x / y + torch.sqrt(x), (R(8, 300), R(8, 300)), {}),
    "copies": (lambda *x: torch.cat(x, -1).sin(), [R(4, 30 + i) for i in range(20)], {}),
    "copies alike": (lambda *x: torch.cat(x), [R(4, 300) for _ in range(20)], {}),
    "drawn": (lambda x: F.dropout(x, 0.5), (R(8, 300),), {}),
    "matmul": (lambda a, b: F.gelu(a @ b), (R(5, 33, 70), R(5, 70, 20)), {}),
    "even matmul": (lambda a, b: a @ b, (R(64, 256), R(256, 64)), {}),
    "tiles": (torch.nn.Linear(256, 320, bias=False).bfloat16(), (R(33, 256).bfloat16(),), {"dynamic": True}),
    "dynamic matmul": (lambda a, b: a @ b, (R(33, 70), R(70, 20)), {"dynamic": True}),
    "fp64 matmul": (lambda a, b: a @ b, (R(33, 70).double(), R(70, 20).double()), {}),
    "int8 matmul": (torch._int_mm, (R(33, 70).to(torch.int8), R(70, 20).to(torch.int8)), {}),
    "fp8 matmul": (_scaled(), (*FP8, R(1), R(1)), {}),
    "fast fp8 matmul": (_scaled(use_fast_accum=True), (*FP8, R(1), R(1)), {}),
    "fp8 matmul of blocks": (_scaled(), (*FP8, R(5, 3), R(3, 1)), {}),
    "grouped rows": (_grouped, (BF(40, 72), BF(5, 72, 24), ENDS), {}),
    "grouped depth": (_grouped, (BF(32, 40), BF(40, 24), ENDS), {}),
    "cpu grouped rows": (_grouped, (BF(40, 72), BF(5, 72, 24), ENDS), {"target": "cpu"}),
    "cpu grouped depth": (_grouped, (BF(32, 40), BF(40, 24), ENDS), {"target": "cpu"}),
    "cpu softmax": (lambda x: x.softmax(-1), (R(8, 4099),), {"target": "cpu"}),
    "cpu columns": (lambda x: x.sum(0), (R(600, 256),), {"target": "cpu"}),
    "cpu dynamic sum": (lambda x: x.sum(-1), (R(8, 3000),), {"target": "cpu", "dynamic": True}),
    "cpu extrema": (lambda x: (x.argmax(-1), x.amin(-1), x.int().sum(-1)), (R(8, 3000),), {"target": "cpu"}),
    "cpu tiles": (lambda x, y: (x + y.t()).sum(-1), (R(45, 37), R(37, 45)), {"target": "cpu"}),
    "cpu matmul": (lambda a, b: a @ b, (R(33, 70), R(70, 20)), {"target": "cpu"}),
    "cpu wrapper": (
        lambda a, b: (a @ b).sum(-1),
        (R(33, 70), R(70, 20)),
        {"target": "cpu", "dynamic": True, "options": {"cpp_wrapper": True}},
    ),
}


@pytest.fixture(scope="module")
def emitted():
    """Name -> (source, certificate) of a graph of ``BASES``, generated once."""
    made = {}

    def graph(name):
        if name not in made:
            torch._dynamo.reset()
            fn, args, options = BASES[name]
            (made[name],) = inspect(fn, *args, **options).graphs
        return made[name].source, made[name].certificate

    return graph


@pytest.mark.parametrize("name", BASES)
def test_emitted_code_is_clean(emitted, name):
    assert verifier.verify(*emitted(name)) == ()


@dataclass(frozen=True)
class Corruption:
    """The first match of ``old`` in the code of ``base`` replaced; ``rule`` finds it, ``here``: at the changed line."""

    base: str
    rule: str
    old: str
    new: str
    here: bool = True


def _in_held(rule, old, new, here=True):
    return Corruption("held", rule, old, new, here)


def _in_tiles(rule, old, new, here=True):
    return Corruption("tiles", rule, old, new, here)


def _in_copy(rule, new):
    """Instead of a load, or ``new`` around it, in one of many copies."""
    return Corruption("copies", rule, r"( +)tmp0 = (tl\.load\(in_ptr0.*\))", rf"\1{new}")


def _in_cpp_wrapper(rule, old, new, here=True):
    return Corruption("cpu wrapper", rule, old, new, here)


def _in_sum(rule, new):
    """Instead of the push of a C++ sum."""
    return Corruption("cpu dynamic sum", rule, r"tmp_acc0_ordered\.push\((\w+)\);", new)


LOOP = r"tl\.range\(0, r0_numel, R0_BLOCK\)"
STEPS = r"tl\.range\(0, tl\.cdiv\(K, BLOCK_K\)\)"
DOT = r"acc = tl\.dot\(a, b, acc, input_precision=INPUT_PRECISION, out_dtype=ACC_TYPE\)"
END = r"acc = tl\.where\(acc == 0\.0, 0\.0, acc\)"
CAST = r"static_cast<int64_t>"
CPP_LOOP = rf"for\(int64_t x1={CAST}\(0L\); x1<{CAST}\((\w+)\); x1\+={CAST}\(\d+L\)\)"
CORRUPTIONS = {
    # Triton: sums
    "tl.sum": _in_held("reduction", r"ordered\.tree_sum\((\w+)\)", r"tl.sum(\1, 1)"),
    "tl.reduce": _in_held("reduction", r"ordered\.tree_sum\((\w+)\)", r"tl.reduce(\1, 1, add)"),
    "tl.cumsum": _in_held("reduction", r"ordered\.tree_sum\((\w+)\)", r"tl.cumsum(\1, 1)"),
    "associative scan": _in_held(
        "reduction", r"ordered\.tree_sum\((\w+)\)", r"tl.associative_scan(\1, 1, add)"
    ),
    "sum method": _in_held("reduction", r"ordered\.tree_sum\((\w+)\)", r"\1.sum(1)"),
    "welford": _in_held("reduction", r"ordered\.tree_sum\(", "triton_helpers.welford_reduce("),
    "online softmax": Corruption(
        "looped softmax", "reduction", r"triton_helpers\.max2\(", "triton_helpers.online_softmax_reduce("
    ),
    "helper prod": Corruption(
        "product of elements", "reduction", r"ordered\.tree_prod\((\w+)\)", r"triton_helpers.prod(\1, 1)"
    ),
    "sum for a product": Corruption(
        "product of elements", "ordered", r"ordered\.tree_prod", "ordered.tree_sum"
    ),
    "identity of another kind": _in_held("ordered", r"(tmp\w+ = tl\.where\(.*), 0\)", r"\1, 1)", here=False),
    "leaves of a row": _in_held(
        "ordered",
        r"tl\.broadcast_to\((\w+), \[XBLOCK, R0_BLOCK\]\)",
        r"tl.broadcast_to(\1, [R0_BLOCK, XBLOCK])",
        False,
    ),
    "no mask": Corruption(
        "looped", "ordered", r"tl\.where\(r0_mask & xmask, (\w+), 0\)", r"tl.where(xmask, \1, 0)", False
    ),
    "no + 0.0": _in_held("ordered", r"(ordered\.tree_sum\(.*\]) \+ 0\.0", r"\1"),
    "another axis": _in_held(
        "axis", r"r0_index = tl\.arange\(0, R0_BLOCK\)", "r0_index = 4095 - tl.arange(0, R0_BLOCK)"
    ),
    "accumulation in a loop": Corruption(
        "looped", "accumulation", r"_(tmp\d+) = ordered\.push_sum\(.*\)", r"_\1 = _\1 + tmp0"
    ),
    "a maximum that became a sum": Corruption(
        "looped softmax",
        "accumulation",
        r"(tmp\d+) = (?:triton_helpers|tl)\.maximum\((_tmp\d+), (\w+).*\)",
        r"\1 = \2 + \3",
        False,
    ),
    "push into another stack": Corruption(
        "looped", "ordered", r"ordered\.push_sum\(_tmp", "ordered.push_sum(_other"
    ),
    "blocks counted backwards": Corruption(
        "looped", "ordered", r"r0_offset // R0_BLOCK\)", "-(r0_offset // R0_BLOCK))"
    ),
    "another kind of total": Corruption(
        "looped", "ordered", r"ordered\.total_sum", "ordered.total_prod", False
    ),
    "a stack of another size": Corruption(
        "looped", "ordered", r"(ordered\.new_stack\(_\w+, \()\d+ \+ ", r"\g<1>r0_numel + "
    ),
    "descending loop": Corruption("looped", "loop", LOOP, "tl.range(r0_numel, 0, -R0_BLOCK)"),
    "loop that starts late": Corruption("looped", "loop", LOOP, "tl.range(R0_BLOCK, r0_numel, R0_BLOCK)"),
    "loop over the batch": Corruption("looped", "loop", LOOP, "tl.range(0, xnumel, R0_BLOCK)"),
    "while loop": Corruption(
        "looped", "statement", r"for r0_offset in tl\.range.*:", "while r0_offset < r0_numel:"
    ),
    "batch symbol for a length": Corruption(
        "looped", "length", r"(sum_0\.run\(\w+, \w+, s\d+), (s\d+), s\d+,", r"\1, \2, \2,", False
    ),
    "block of three": _in_held("block", r"R0_BLOCK: tl\.constexpr = 4096", "R0_BLOCK: tl.constexpr = 6144"),
    "block too small": _in_held("block", r"R0_BLOCK: tl\.constexpr = 4096", "R0_BLOCK: tl.constexpr = 2048"),
    "another length": _in_held("block", r"r0_numel = 4096", "r0_numel = 4095", False),
    "chunk of no power of two": Corruption("chunks", "block", r"r0_numel = 4096", "r0_numel = 4095", False),
    "another chunk": Corruption("chunks", "block", r"r0_numel = 4096", "r0_numel = 2048", False),
    "fewer chunks": Corruption("chunks", "block", r"r0_numel = 25\b", "r0_numel = 50", False),
    "chunks in another order": Corruption("chunks", "order", r"\(r0_1 \+ 25\*x0\)", "(24 - r0_1 + 25*x0)"),
    "chunks from the end": Corruption(
        "chunks",
        "order",
        r"tl\.load\(in_ptr0 \+ \(r0_2 \+ 4096\*x0 \+",
        "tl.load(in_ptr0 + (98304 + r0_2 + (-4096)*x0 +",
    ),
    "columns from the end": Corruption(
        "columns in chunks",
        "order",
        r"tl\.load\(in_ptr0 \+ \(x0 \+ 100\*r0_2 \+ 6400\*x1\)",
        "tl.load(in_ptr0 + (x0 + 100*r0_2 + (-6400)*x1)",
    ),
    # Triton: copies
    "tl.sum in a copy": _in_copy("reduction", r"tmp0 = tl.sum(\2, 0)"),
    "atomic add in a copy": _in_copy("atomic", r"tmp0 = tl.atomic_add(out_ptr0, \2, xmask)"),
    "dot in a copy": _in_copy("call", r"tmp0 = tl.dot(\2, \2)"),
    "tree in a copy": _in_copy("call", r"tmp0 = ordered.tree_sum(\2)"),
    "loop in a copy": _in_copy("copies", r"for step in tl.range(0, 4):\n\1    tmp0 = tmp0 + \2"),
    "loop around a copy": _in_copy("copies", r"for step in tl.range(0, 4):\n\1    tmp0 = \2"),
    "addition in a copy": _in_copy("copies", r"tmp0 = \2 + \2"),
    "+= in a copy": _in_copy("copies", r"tmp0 += \2"),
    "branch in a copy": _in_copy("statement", r"if pid < num_xblocks_0:\n\1    tmp0 = \2"),
    "copy of a copy": Corruption("copies", "copies", r"tmp1 = .*", "tmp1 = tmp0"),
    "programs of two copies": Corruption(
        "copies", "copies", r"num_xblocks_1 = num_xblocks_0 \+", "num_xblocks_1 ="
    ),
    "programs too few": Corruption(
        "copies", "copies", r"num_xblocks_0 = tl\.cdiv\(\d+,", "num_xblocks_0 = tl.cdiv(1,", False
    ),
    "condition": Corruption("copies", "copies", r"if pid < num_xblocks_0:", "if pid <= num_xblocks_0:"),
    "program of no copy": Corruption(
        "copies alike", "copies", r"else:\n( +)", r"else:\n\1tl.store(out_ptr0, 0.0)\n\1"
    ),
    "copy in other programs": Corruption(
        "copies alike", "copies", r"pid_offset = pid - .*", "pid_offset = pid", False
    ),
    "atomic add of a copy": Corruption(
        "copies alike",
        "atomic",
        r"(?s)(.*)tl\.store\((.*?), (tmp\d+), xmask\)",
        r"\1tl.atomic_add(\2, \3, xmask)",
    ),
    "programs of no copy": Corruption(
        "pointwise", "copies", r"triton_heuristics\.pointwise", "triton_heuristics.foreach", False
    ),
    "branch": Corruption(
        "pointwise", "statement", r"( +)(tl\.store\(.*)", r"\1if pid < num_xblocks_0:\n\1    \2"
    ),
    # Triton: anything
    "atomic": _in_held("atomic", r"tl\.store\(", "tl.atomic_add("),
    "unknown call": _in_held("call", r"libdevice\.rsqrt\(", "tl.histogram2("),
    "a draw that follows the tile": Corruption(
        "drawn", "call", r"draws\.uniform\(", "triton_helpers.rand4x("
    ),
    "another draw": Corruption("drawn", "call", r"draws\.uniform\(", "tl.rand("),
    "unknown helper": _in_held("call", r"libdevice\.rsqrt\(", "triton_helpers.fast_rsqrt("),
    "library of its own": _in_held(
        "import", r"from bi_inductor\.runtime import ordered", "from elsewhere import ordered"
    ),
    "rebound helper": _in_held("statement", r"rnumel = r0_numel", "ordered = tl"),
    "second function": _in_held(
        "statement", r"@triton\.jit", "@triton.jit\ndef add(a, b):\n    return a + b\n@triton.jit", False
    ),
    "FMA on": _in_held("flags", r"'enable_fp_fusion': False", "'enable_fp_fusion': True"),
    "FMA unsaid": _in_held("flags", r"'enable_fp_fusion': False, ", "", False),
    "atomics declared": _in_held("flags", r"'atomic_add_found': False", "'atomic_add_found': True"),
    "denormals differ": Corruption("chunks", "flags", r"'disable_ftz': False", "'disable_ftz': True", False),
    "cooperative": _in_held(
        "launch", r"triton_heuristics\.\w+\(", "triton_heuristics.cooperative_reduction(", False
    ),
    "approximate quotient": Corruption(
        "pointwise", "division", r"triton\.language\.div_rn\((\w+), (\w+)\)", r"(\1 / \2)"
    ),
    "not Python": _in_held("parse", r"rnumel = r0_numel", "rnumel = ="),
    # Triton: matrix products
    "other precision": Corruption(
        "matmul",
        "precision",
        "INPUT_PRECISION : tl.constexpr = 'ieee'",
        "INPUT_PRECISION : tl.constexpr = 'tf32'",
    ),
    "three TF32 products": Corruption(
        "matmul", "dot", "input_precision=INPUT_PRECISION", "input_precision='tf32x3'"
    ),
    "allow_tf32": Corruption("matmul", "dot", "input_precision=INPUT_PRECISION", "allow_tf32=True"),
    "fp32 for fp64": Corruption(
        "fp64 matmul",
        "precision",
        r"ACC_TYPE : tl\.constexpr = tl\.float64",
        "ACC_TYPE : tl.constexpr = tl.float32",
        False,
    ),
    "unchained": Corruption("matmul", "accumulation", DOT, "acc += tl.dot(a, b, out_dtype=ACC_TYPE)"),
    "two chains": Corruption("matmul", "dot", rf"( +){DOT}", r"\g<0>\n\1acc = tl.dot(b, a, acc)", False),
    "start at one": Corruption("matmul", "dot", r"acc = tl\.zeros\(", "acc = tl.ones(", False),
    "no + 0.0 at the end": Corruption("matmul", "dot", END, "acc = acc", False),
    "+ 0.0 as an addition": Corruption("matmul", "dot", END, "acc = acc + 0.0", False),
    "a choice of something else": Corruption(
        "matmul", "dot", END, "acc = tl.where(acc == 0.0, 1.0, acc)", False
    ),
    "+ 0.0 as an addition in a tile": _in_tiles("dot", END, "acc = acc + 0.0", False),
    "+ 0.0 as an addition to extra columns": _in_tiles(
        "dot", rf"(acc = extra_acc\n +){END}", r"\1acc = acc + 0.0", False
    ),
    "+ 0.0 as an addition to fp8": Corruption("fp8 matmul", "dot", END, "acc = acc + 0.0", False),
    "+ 0.0 as an addition to a chain of fp8": Corruption(
        "fast fp8 matmul", "dot", END, "acc = acc + 0.0", False
    ),
    "+ 0.0 as an addition to a group": Corruption("grouped rows", "dot", END, "acc = acc + 0.0", False),
    "k from the end": Corruption("matmul", "loop", STEPS, "tl.range(tl.cdiv(K, BLOCK_K) - 1, -1, -1)"),
    "pointers backwards": Corruption("matmul", "accumulation", r"a_block \+= ", "a_block -= "),
    "k from one": Corruption(
        "matmul", "dot", r"k = tl\.arange\(0, BLOCK_K\)", "k = 1 + tl.arange(0, BLOCK_K)"
    ),
    "split K": Corruption(
        "matmul", "loop", STEPS, "tl.range(tl.program_id(1), tl.cdiv(K, BLOCK_K), SPLIT_K)"
    ),
    "split over programs": Corruption(
        "even matmul", "loop", r"range\(tl\.program_id\(0\)", "range(tl.program_id(1)"
    ),
    "every second tile": _in_tiles("loop", r"tl\.num_programs\(0\)", "2 * tl.num_programs(0)"),
    "sum over tiles": _in_tiles(
        "accumulation", r"acc = tl\.zeros\(\(BLOCK_M, BLOCK_N\), ACC_TYPE\)", "acc += 0.0", False
    ),
    "another chain's accumulator": _in_tiles("dot", r"extra, extra_acc,", "extra, acc,", False),
    "extra columns start at one": _in_tiles("dot", r"extra_acc = tl\.zeros\(", "extra_acc = tl.ones(", False),
    "extra columns of another k": _in_tiles(
        "accumulation", r"extra_block \+= BLOCK_K", "extra_block += 2 * BLOCK_K"
    ),
    "TMA from another step": _in_tiles("dot", r"\[row, step \* BLOCK_K\]", "[row, (step + 1) * BLOCK_K]"),
    "TMA with another stride": _in_tiles("dot", r"\[stride_am, 1\]", "[2 * stride_am, 1]"),
    "a tile's block of K": _in_tiles("block", r"'BLOCK_K': \d+", "'BLOCK_K': 24", False),
    "a tile longer than K": _in_tiles("dot", r"'BLOCK_K': \d+", "'BLOCK_K': 512", False),
    "an unknown branch": _in_tiles("statement", r"if EXTRA_N:", "if M:"),
    "half of K": Corruption("matmul", "length", r"\bK = 70", "K = 35"),
    "batch symbol for K": Corruption("dynamic matmul", "length", r"\bK = ks\d", "K = ks0"),
    "block of K": Corruption(
        "matmul", "block", r"BLOCK_K : tl\.constexpr = \d+", "BLOCK_K : tl.constexpr = 24"
    ),
    "no zeros past K": Corruption("matmul", "dot", r"mask=inside\[None, :\], other=0\.0", "other=0.0"),
    "even where it is not": Corruption(
        "matmul", "dot", r"EVEN_K : tl\.constexpr = False", "EVEN_K : tl.constexpr = True", False
    ),
    # Triton: products of 8-bit operands
    "another MMA family for fp8": Corruption(
        "fp8 matmul", "precision", r"BLOCK_N : tl\.constexpr = \d+", "BLOCK_N : tl.constexpr = 32", False
    ),
    "another MMA family for fast fp8": Corruption(
        "fast fp8 matmul", "precision", r"SWAP : tl\.constexpr = True", "SWAP : tl.constexpr = False", False
    ),
    "too few warps for wgmma": Corruption("fp8 matmul", "precision", r"num_warps=4", "num_warps=2", False),
    "half a chunk": Corruption(
        "fp8 matmul", "length", r"BLOCK_K : tl\.constexpr = 128", "BLOCK_K : tl.constexpr = 64", False
    ),
    "promoted more often": Corruption(
        "fp8 matmul", "dot", r"max_num_imprecise_acc=BLOCK_K", "max_num_imprecise_acc=32"
    ),
    "a chain for chunks": Corruption(
        "fp8 matmul", "dot", r"chunk = tl\.dot\((\w, \w), max.*\)", r"chunk = tl.dot(\1, acc)"
    ),
    "chunks for a chain": Corruption(
        "fast fp8 matmul",
        "length",
        r"acc = tl\.dot\((\w, \w), acc, .*\)",
        r"chunk = tl.dot(\1, max_num_imprecise_acc=BLOCK_K, out_dtype=ACC_TYPE)\n        acc += chunk",
        False,
    ),
    "a chunk subtracted": Corruption("fp8 matmul", "accumulation", r"acc \+= chunk", "acc -= chunk"),
    "a scale of its own": Corruption(
        "fp8 matmul of blocks", "dot", r"tl\.load\(a_scales \+ step", "tl.load(a_scales - step"
    ),
    "a scale left out": Corruption(
        "fp8 matmul of blocks", "accumulation", r"acc \+= chunk \* a_scale\S+ \S+", "acc += chunk"
    ),
    "one scale before the other": Corruption(
        "fp8 matmul of blocks", "accumulation", r"chunk \* (a_scale.*) \* (b_scale.*)", r"chunk * \2 * \1"
    ),
    "int8 in fp32": Corruption(
        "int8 matmul",
        "length",
        r"ACC_TYPE : tl\.constexpr = tl\.int32",
        "ACC_TYPE : tl.constexpr = tl.float32",
        False,
    ),
    "half of an int8 product": Corruption("int8 matmul", "length", r"\bK = 70", "K = 35"),
    # grouped products
    "rows of another group": Corruption(
        "grouped rows", "dot", r"\(group - 1\) \* \(1\), mask=before", "(group - 2) * (1), mask=before", False
    ),
    "rows of another start": Corruption(
        "grouped rows",
        "dot",
        r"tl\.where\(group < mine, sizes, 0\)",
        "tl.where(group <= mine, sizes, 0)",
        False,
    ),
    "a sum of values": Corruption(
        "grouped rows", "reduction", r"first_row = tl\.sum\(.*\)", "first_row = tl.sum(acc, 0)", False
    ),
    "steps that follow the rows": Corruption(
        "grouped rows",
        "dot",
        r"steps = tl\.where\(mine < groups, tl\.cdiv\(K,",
        "steps = tl.where(mine < groups, tl.cdiv(M,",
    ),
    "half of a grouped K": Corruption("grouped rows", "length", r"\bK = 72", "K = 36"),
    "k from the start of all groups": Corruption(
        "grouped depth", "dot", r"A \+= first_k\.to\(INDEX_DTYPE\) \* stride_ak", "A += 0", False
    ),
    "k of all groups before": Corruption("grouped depth", "dot", r"K = last_k - first_k", "K = last_k"),
    "a product that is not grouped": Corruption(
        "cpu grouped rows", "length", r"bi_gemm::run_row_groups<", "bi_gemm::run_depth_groups<", False
    ),
    "rows for depth": Corruption(
        "cpu grouped depth", "length", r"bi_gemm::run_depth_groups<", "bi_gemm::run_row_groups<", False
    ),
    # the wrapper
    "extern mm": Corruption(
        "matmul", "extern", r"( +)(\w+)\.run\((\w+), (\w+), (\w+),.*", r"\1extern_kernels.bmm(\3, \4, out=\5)"
    ),
    "import of libraries": Corruption(
        "held", "extern", "import math", "from torch._inductor.select_algorithm import extern_kernels"
    ),
    "ATen sum": Corruption(
        "chunks", "extern", r"(buf1) = empty_strided.*", r"\1 = torch.ops.aten.sum.dim_IntList(buf0, [1])"
    ),
    "torch function": Corruption("chunks", "extern", r"(buf1) = empty_strided.*", r"\1 = torch.sum(buf0, 1)"),
    "tensor method": Corruption("chunks", "extern", r"(buf1) = empty_strided.*", r"\1 = buf0.sum(1)"),
    "rounding by a library": Corruption(
        "chunks", "extern", r"(buf1) = empty_strided.*", r"\1 = torch.trunc(buf0)"
    ),
    # C++
    "another runtime": Corruption(
        "cpu softmax", "runtime", r"constexpr int kFan = 8;", "constexpr int kFan = 4;", False
    ),
    "another product": Corruption(
        "cpu matmul",
        "runtime",
        r"fused_multiply_add<T>\(left, right\[v\]",
        "fused_multiply_add<T>(right[v], left",
        False,
    ),
    "before the runtime": Corruption(
        "cpu softmax",
        "runtime",
        r"#include <torch/csrc/inductor/cpp_prefix\.h>",
        "#define Add Multiply\n\\g<0>",
        False,
    ),
    "omp reduction": Corruption(
        "cpu softmax", "openmp", r"#pragma omp for", "#pragma omp for reduction(+:tmp_acc0)"
    ),
    "parallel for reduction": Corruption(
        "cpu softmax", "openmp", r"#pragma omp for", "#pragma omp parallel for reduction(+:sum)"
    ),
    "simd reduction": Corruption(
        "cpu columns", "openmp", r"#pragma omp for", "#pragma omp simd reduction(+:tmp_acc0)"
    ),
    "threads share a sum": Corruption(
        "cpu dynamic sum", "openmp", rf"( +)({CPP_LOOP})", r"\1#pragma omp for\n\g<0>", False
    ),
    "fast math": Corruption(
        "cpu softmax", "directive", r"#pragma omp parallel.*", '#pragma GCC optimize("fast-math")'
    ),
    "contraction": Corruption(
        "cpu softmax", "directive", r"#pragma omp parallel.*", "#pragma STDC FP_CONTRACT ON"
    ),
    "C++ loop from the end": Corruption(
        "cpu dynamic sum", "loop", CPP_LOOP, r"for(int64_t x1=\1; x1>=0; x1-=static_cast<int64_t>(16L))"
    ),
    "C++ loop that starts late": Corruption(
        "cpu dynamic sum", "loop", r"x1=static_cast<int64_t>\(0L\)", "x1=static_cast<int64_t>(16L)"
    ),
    "C++ batch symbol": Corruption(
        "cpu dynamic sum", "length", r"(sum_0\(\w+, \w+), (s\d+), s\d+\)", r"\1, \2, \2)", False
    ),
    "C++ length": Corruption(
        "cpu columns", "length", r"static_cast<int64_t>\(600L\)", "static_cast<int64_t>(300L)", False
    ),
    "pushed twice": Corruption(
        "cpu dynamic sum", "ordered", r"( +)\w+\.push\(\w+\);", r"\g<0>\n\g<0>", False
    ),
    "plain +=": _in_sum("reduction", r"tmp_acc0 += \1;"),
    "plain sum": _in_sum("reduction", r"tmp_acc0 = tmp_acc0 + \1;"),
    "cascade sum": _in_sum("reduction", r"tmp_acc0 = cascade_sum_combine(\1, &helper);"),
    "welford in C++": _in_sum("reduction", r"tmp_acc0 = welford_combine(tmp_acc0, \1);"),
    "lanes added": Corruption(
        "cpu extrema", "reduction", r"return at::vec::minimum\(x, y\);", "return x + y;"
    ),
    "vector method": Corruption("cpu softmax", "reduction", r"\b(tmp\d+)\.exp\(\)", r"\1.reduce_add()"),
    "std::accumulate": Corruption(
        "cpu softmax", "reduction", r"\b(tmp\d+)\.exp\(\)", r"std::accumulate(\1, 8, 0.f)"
    ),
    "atomic in C++": Corruption(
        "cpu columns",
        "atomic",
        r"(tmp_acc\w+)\.store\((\w+) \+ .*\);",
        r"atomic_add_vec<float, 1, 1>(\2, 0, \1);",
    ),
    "std::atomic": Corruption("cpu columns", "atomic", r"int tid = .*;", "std::atomic<float> sum{0};"),
    "MKL": Corruption(
        "cpu matmul", "extern", r"bi_gemm::run<Spec>\(.*\);", "mkl_sgemm(input0, input1, output, m, n, k);"
    ),
    "ATen in C++": Corruption("cpu softmax", "extern", r"\b(tmp\d+)\.exp\(\)", r"at::native::sum(\1)"),
    "unknown function": Corruption("cpu softmax", "call", r"\b(tmp\d+)\.exp\(\)", r"fast_exp(\1)"),
    "K of the C++ product": Corruption("cpu matmul", "length", r"(mm_0\(.*), 70\)", r"\1, 20)", False),
    "push of something else": _in_sum("ordered", r"tmp_acc0_ordered.push(\1 + \1);"),
    "two statements": _in_sum("statement", r"tmp_acc0_ordered.push(\1); tmp_acc0_ordered.push(\1);"),
    "tile from one": Corruption("cpu tiles", "loop", r"x1_inner = 0;", "x1_inner = 1;"),
    "lanes of whole vectors": Corruption(
        "cpu tiles", "ordered", r"for \(long x1_inner = 0;", "for (long y1 = 0;", False
    ),
    # the C++ wrapper
    "C++ extern mm": _in_cpp_wrapper(
        "extern", r"cpp_fused_mm_0\(\(.*", "aoti_torch_cpu_mm_out(buf0, arg2_1, arg4_1);"
    ),
    "C++ wrapper, plain sum": _in_cpp_wrapper(
        "reduction", r"tmp_acc0_ordered\.push\((\w+)\);", r"tmp_acc0 += \1;"
    ),
    "C++ wrapper, symbol": _in_cpp_wrapper(
        "length", r"(_sum_1\(\(.*), (s\d+), s\d+\)", r"\1, \2, \2)", False
    ),
    "C++ wrapper, K": _in_cpp_wrapper("length", r"(_mm_0\(\(.*), (s\d+), s\d+\)", r"\1, \2, \2)", False),
    "C++ wrapper, runtime": _in_cpp_wrapper("runtime", r"kFan = 8;", "kFan = 4;", False),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_found(emitted, name):
    corruption = CORRUPTIONS[name]
    source, certificate = emitted(corruption.base)
    corrupted = re.sub(corruption.old, corruption.new, source, count=1)
    assert corrupted != source, "the corruption changes nothing"
    lines = zip(source.splitlines(), corrupted.splitlines(), strict=False)
    changed = next(number for number, (before, after) in enumerate(lines, 1) if before != after)
    findings = verifier.verify(corrupted, certificate)
    found = {finding.line for finding in findings if finding.rule == corruption.rule}
    assert found, f"not found; other findings: {[*map(str, findings)]}"
    if corruption.here:
        assert changed in found


SPREAD = {
    **{name: (fn, (R(8, 2048),), {}) for name, fn in REDUCTIONS.items()},
    "model": (Block(), (R(3, 64),), {}),
    "dynamic model": (Block(), (R(3, 64),), {"dynamic": True}),
    "training": (Block(), (R(3, 64),), {"backward": True}),
    "dynamic training": (Block(), (R(3, 64),), {"backward": True, "dynamic": True}),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        (R(2, 4, 17, 16), R(2, 4, 17, 16), R(2, 4, 17, 16)),
        {},
    ),
    "scaled addmm": (
        lambda bias, a, b: torch.addmm(bias, a, b, alpha=2, beta=3).tanh(),
        (R(20), R(33, 70), R(70, 20)),
        {},
    ),
    "embedding": (
        lambda i, table: F.layer_norm(F.embedding(i, table), (64,)),
        (torch.zeros(4, 9, dtype=torch.long), R(100, 64)),
        {},
    ),
    "dropout": (lambda x: F.dropout(x, 0.5, True) + torch.randn_like(x), (R(8, 64),), {}),
    "integers": (lambda x: ((x > 0).sum(-1), x.int().prod(-1)), (R(8, 2048),), {}),
    "gradient of a norm": (
        lambda x, w, b: F.layer_norm(x, (300,), w, b),
        (R(800, 300), R(300), R(300)),
        {"backward": True},
    ),
    "functions": (
        lambda x: torch.erf(x.sin()) * torch.pow(x.abs(), 2.5) / torch.lgamma(x.abs() + 1) + (x // 2) % 3,
        (R(8, 64),),
        {},
    ),
    "pooling": (lambda x: F.max_pool2d(x, 2), (R(2, 3, 16, 16),), {}),
    "sizes that are computed": (
        lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
        (R(2, 3, 13, 11),),
        {"dynamic": True},
    ),
    "groups of channels": (
        torch.nn.Sequential(torch.nn.Conv1d(3, 16, 3), torch.nn.GroupNorm(4, 16)),
        (R(4, 3, 40),),
        {"dynamic": True},
    ),
    "experts of sequences": (
        lambda x, y, ends: _grouped(x.flatten(0, 1).t(), y.flatten(0, 1), ends),
        (BF(4, 10, 32), BF(4, 10, 24), ENDS),
        {"dynamic": True},
    ),
    "attention over patches": (
        lambda x, w, q: F.scaled_dot_product_attention(
            q, *[F.conv2d(x, w, stride=4, padding=1).flatten(2).mT[:, None]] * 2
        ),
        (R(2, 3, 25, 25), R(16, 3, 4, 4), R(2, 1, 5, 16)),
        {"dynamic": True},
    ),
    "half sums": (lambda x: (x.sum(-1), x.mean(0), x.softmax(-1)), (R(40, 3000).half(),), {}),
    "counts cut in chunks": (lambda x: (x > 0).sum(-1), (R(3, 40000),), {}),
    "cut in chunks": (lambda x: (x.var(-1), x.logsumexp(-1)), (R(4, 40000),), {}),
    "flipped": (lambda x: x.flip(0).sum(), (R(16, 4096),), {}),
    "copies of rows and columns": (
        lambda *x: (torch.cat([y.t() for y in x], -1), torch.cat(x), torch.cat(x, -1)),
        [BF(3, 16) for _ in range(10)],
        {},
    ),
    "gradient of parts": (lambda x: x.sin().split(1), (R(20, 5),), {"backward": True}),
}


@pytest.mark.lengthy
@pytest.mark.parametrize("target", ["sm_90", "cpu"])
def test_no_false_alarm(target):
    """All of it is also verified as it is generated: ``inspect`` would raise."""
    for name, (fn, args, options) in SPREAD.items():
        torch._dynamo.reset()
        for made in inspect(fn, *args, target=target, **options).graphs:
            assert verifier.verify(made.source, made.certificate) == (), name


def test_a_finding_names_kernel_line_and_rule(emitted):
    source, certificate = emitted("chunks")
    (finding,) = verifier.verify(source.replace("+ 25*x0", "- r0_1 + 25*x0 - r0_1"), certificate)
    assert finding.kernel == "triton_per_fused_sum_1" and finding.rule == "order"
    assert source.splitlines()[finding.line - 1].strip().startswith("tmp0 = tl.load(")
    assert str(finding).startswith(f"triton_per_fused_sum_1, line {finding.line}: order: tmp0 = tl.load(")


def test_stock_code_is_found(monkeypatch):
    """Negative control: what Inductor emits without us has sums and libraries that we do not allow."""
    monkeypatch.setattr(
        "bi_inductor.backend.batchinv", lambda gm, inputs, *, options=None: compile_fx(gm, inputs)
    )
    for target, rules in {
        "sm_90": {"reduction", "extern", "flags"},
        "cpu": {"reduction", "extern", "runtime"},
    }.items():
        torch._dynamo.reset()
        (source,), _ = DryRun(target)(Block(), (R(64, 64),), {})
        assert rules <= {finding.rule for finding in verifier.verify(source)}


@pytest.fixture
def broken_generator(monkeypatch):
    """A backend whose C++ and Triton sums are not ours."""

    stock = graph._without_unused_library_import

    def corrupted(source):
        source = stock(source)
        source = re.sub(r"ordered\.tree_sum\((\w+)\)", r"tl.sum(\1, 1)", source)
        return re.sub(r"tmp_acc0_ordered\.push\((\w+)\);", r"tmp_acc0 = tmp_acc0 + \1;", source)

    monkeypatch.setattr("bi_inductor.graph._without_unused_library_import", corrupted)


@pytest.mark.parametrize("target", ["sm_90", "cpu"])
def test_code_is_not_handed_out(broken_generator, target):
    with pytest.raises(
        BatchInvarianceError, match=r"(?s)kernel \w+_sum_0.*'reduction'.*line \d+.*report the graph"
    ):
        inspect(lambda x: x.sum(-1), R(8, 300), target=target)


def test_compiled_code_is_not_run(broken_generator):
    compiled = torch.compile(lambda x: x.sum(-1) + 7, backend="batchinv")
    with config.patch(force_disable_caches=True), pytest.raises(BatchInvarianceError, match="'reduction'"):
        compiled(R(8, 300))


def test_unproven_graphs_are_not_judged(broken_generator):
    def with_unproven_op(x):
        return torch.linalg.svdvals(x), x.sum(-1)

    with pytest.warns(UserWarning, match="UNPROVEN"):
        inspection = inspect(with_unproven_op, R(8, 300), options={"batchinv.unproven": "warn"})
    (graph,) = inspection.graphs
    assert {"reduction", "extern"} <= {f.rule for f in verifier.verify(graph.source, graph.certificate)}


def test_settings():
    required = required_patches()
    with config.patch(required):
        assert verifier.verify_settings() == ()
        for name, value in required.items():
            other = (not value) if isinstance(value, bool) else 1 if value == 0 else "other"
            with config.patch({name: other}):
                assert [finding.rule for finding in verifier.verify_settings()] == ["settings"], name
    with pytest.raises(BatchInvarianceError, match="settings"):
        verifier.check("pass")


@pytest.mark.parametrize(
    ("form", "emitted"),
    [
        ("s33*s50", "s50*s33"),
        ("s0", "(s0 // 16) * 16"),  # a guard may have said that it divides
        ("CeilDiv(s7, 4096)", "(4095 + s7) // 4096"),
        ("Max(1, s0)", "max(s0, 1)"),
    ],
)
def test_equal_lengths_have_equal_values(form, emitted):
    assert values_of(form) == values_of(emitted) is not None


@pytest.mark.parametrize("other", ["s33", "s50", "s33*s51", "s33*s50 + 1", "s33*s50*2", "4096"])
def test_other_lengths_have_other_values(other):
    assert values_of(other) != values_of("s33*s50")


def test_lengths_in_cpp():
    sizes = {"ks0": values_of("s0"), "ks1": values_of("s1")}
    text = f"{CAST}(ks0*ks1 + 3L*(c10::div_floor_integer({CAST}(ks1), {CAST}(16L))))"
    assert cpp_values_of(text, sizes) == values_of("s0*s1 + 3*(s1//16)")
    assert cpp_values_of("sizeof(float)", sizes) is None


def test_an_unreadable_form_makes_no_claim():
    assert Forms([]).is_open is False
    (graph,) = inspect(lambda x: x.sum(-1), R(8, 300)).graphs
    entry = next(entry for entry in graph.certificate.entries if entry.form)
    for form, is_open in {
        "Tree(float32, sum, s0**s1)": True,
        "Knot(float32, 3)": True,
        "Drawn(float32)": False,
    }.items():
        assert Forms([type(entry)(**{**vars(entry), "form": form})]).is_open is is_open


def test_tensors_past_int32_are_admitted():
    """Indices of their kernels are int64."""

    def reduced(x):
        return torch.softmax(x.float(), -1).sum(0), x.amax(-1)

    (graph,) = inspect(reduced, torch.empty(80_000, 32_768, device="meta", dtype=torch.bfloat16)).graphs
    assert "R0_BLOCK)[None, :].to(tl.int64)" in graph.source


def test_an_extremum_of_rows_with_a_rest_keeps_what_it_found():
    """Teeth for the next one: what is past the end of a row must not be taken for an element."""
    (graph,) = inspect(lambda x: x.amax(-1), torch.empty(4096, 128_256, device="meta")).graphs
    kept = re.compile(r"(_tmp\d+) = tl\.where\(r0_mask, (tmp\d+), \1\)\n")
    assert kept.search(graph.source)
    assert verifier.verify(kept.sub(r"\1 = \2\n", graph.source), graph.certificate)


def test_an_extremum_of_rows_without_a_rest_is_admitted():
    """Where no element of a block is past the end, what was found is kept without ``tl.where``."""

    def greedy(x):
        return x.amax(-1), x.argmax(-1)

    (graph,) = inspect(greedy, torch.empty(4096, 131_072, device="meta", dtype=torch.bfloat16)).graphs
    kept = re.compile(r"(_tmp\d+) = (tmp\d+)\n")
    assert kept.search(graph.source)
    assert verifier.verify(kept.sub(r"\1 = tmp0\n", graph.source, count=1), graph.certificate)


@pytest.mark.parametrize("target", ["sm_90", "cpu"])
def test_a_kernel_that_serves_two_ops_has_the_lengths_of_both(target):
    """Weight gradients of two batches that are symbols of their own: one kernel, called with either."""

    def products(x, a, y, b):
        return x @ a, y @ b

    inputs = [torch.empty(131, 8, 2), torch.empty(2, 3)] * 2
    run = DryRun(target, backward=True, batch_dim=0)
    sources, _ = run(products, tuple(x.clone().requires_grad_() for x in inputs), {})
    made = certificate.extract(sources[1])
    assert not verifier.verify(sources[1], made)
    if target != "cpu":
        told = verifier.verify(sources[1], dataclasses.replace(made, kernels=()))
        assert {finding.rule for finding in told} == {"length"}
