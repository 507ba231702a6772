"""Which op is what: one verdict per node of the lowered FX graph, unknown ops refused by name.

INVARIANT   computes each output element from its own inputs, in one way: pointwise ops, views, gathers
CANONICAL   has a sum whose order is a form of ``contract.py``
DECLARED    a custom op the user vouches for
UNPROVEN    stock lowering, because the user asked for it (``batchinv.unproven="warn"``)
REFUSED     everything else
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from . import contract
from .declared_ops import RULED_NAMESPACES, declarable_name, declarations

aten, prims = torch.ops.aten, torch.ops.prims


class Verdict(enum.Enum):
    """What is known about one op of a graph."""

    INVARIANT = "INVARIANT"
    CANONICAL = "CANONICAL"
    DECLARED = "DECLARED"
    UNPROVEN = "UNPROVEN"
    REFUSED = "REFUSED"


@dataclasses.dataclass(frozen=True)
class Ruling:
    """A verdict with the form (CANONICAL) or the reason and remedy (REFUSED) behind it."""

    verdict: Verdict
    form: contract.Form | None = None
    reason: str = ""
    remedy: str = ""


_REMEDY = (
    "rewrite the line with ops that have a canonical form, keep it outside the compiled function, or compile "
    'its stock lowering with options={"batchinv.unproven": "warn"}'
)

#: Data movement: each output element is one input element (or a constant), so nothing is added.
_MOVEMENT = """
    alias as_strided as_strided_copy _unsafe_view view view_copy reshape expand expand_copy permute permute_copy
    t t_copy transpose transpose_copy select select_copy slice slice_copy squeeze squeeze_copy unsqueeze
    unsqueeze_copy split split_with_sizes unbind unfold diagonal diagonal_copy
    clone contiguous detach copy copy_ lift_fresh_copy cat stack repeat flip roll constant_pad_nd
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    gather index _unsafe_index _unsafe_masked_index index_select embedding masked_fill where
    select_scatter slice_scatter as_strided_scatter diagonal_scatter
    full full_like zeros zeros_like ones ones_like empty empty_like empty_strided empty_permuted new_empty
    new_full new_zeros new_ones new_empty_strided scalar_tensor arange eye tril triu tril_indices triu_indices
    fill _to_copy pixel_shuffle pixel_unshuffle _linalg_check_errors _assert_async _assert_scalar
    _local_scalar_dense _assert_tensor_metadata view_as_real view_as_complex
    sym_size sym_stride sym_numel sym_storage_offset sym_constrain_range sym_constrain_range_for_size
""".split()

_MOVEMENT_PRIMS = """
    convert_element_type broadcast_in_dim iota fma device_put collapse_view split_dim squeeze transpose
    view_of empty_strided copy_strided rev _make_token _sink_tokens inductor_seed inductor_seeds inductor_lookup_seed
    _low_memory_max_pool_with_offsets _low_memory_max_pool_offsets_to_indices
""".split()

_FLOAT_SUMS = {
    "sum": "sum",
    "mean": "sum",
    "prod": "prod",
    "var": "sum",
    "var_mean": "sum",
    "std": "sum",
    "std_mean": "sum",
    "_softmax": "sum",
    "_log_softmax": "sum",
    "logsumexp": "sum",
    "_softmax_backward_data": "sum",
    "_log_softmax_backward_data": "sum",
}
_EXACT = {
    "amax": "max",
    "amin": "min",
    "max": "max",
    "min": "min",
    "any": "any",
    "all": "any",
    "argmax": "argmax",
    "argmin": "argmin",
    "aminmax": "max",
    "xor_sum": "xor_sum",
}
_MATMULS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "bmm_wide": (0, 1)}

#: Pointwise for PyTorch, but their result has more than the element's own inputs behind it.
_NOT_POINTWISE = frozenset({"bernoulli", "native_dropout", "rrelu_with_noise", "rrelu_with_noise_functional"})


def _value(argument: Any) -> Any:
    """The fake tensor behind an FX argument."""
    return argument.meta.get("val") if isinstance(argument, Node) else argument


def _length(sizes: Any) -> contract.Length:
    """Product of sizes as an int or a sympy expression."""
    product = sympy.sympify(
        sympy.prod([size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes])
    )
    return int(product) if product.is_Integer else product


def _reduced_length(x: torch.Tensor, dims: Any) -> contract.Length:
    if dims is None or dims == []:
        return _length(x.shape)
    dims = [dims] if isinstance(dims, int) else dims
    return _length([x.shape[d] for d in dims] if x.ndim else [])


def _argument(node: Node, *names: str) -> Any:
    """The value given for the first of ``names`` the op's schema knows, or its default."""
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name in names:
            if argument.name in node.kwargs:
                return node.kwargs[argument.name]
            return node.args[position] if position < len(node.args) else argument.default_value
    return None


def _reduction_ruling(node: Node, combine: str) -> Ruling:
    x = _value(node.args[0])
    length = _reduced_length(x, _argument(node, "dim", "dims"))
    dtype = _argument(node, "dtype") or x.dtype
    return Ruling(Verdict.CANONICAL, contract.reduction_form(combine, length, dtype))


def _matmul_ruling(node: Node, operands: tuple[int, int]) -> Ruling:
    a = _value(node.args[operands[0]])
    if a.dtype.is_complex or not a.dtype.is_floating_point:
        return _refusal(f"matrix products of {a.dtype} have no canonical form")
    tf32 = a.device.type == "cuda" and a.dtype == torch.float32 and _tf32_is_allowed()
    return Ruling(Verdict.CANONICAL, contract.matmul_form(_length(a.shape[-1:]), a.dtype, tf32=tf32))


def _tf32_is_allowed() -> bool:
    from .templates.triton_matmul import tf32_is_allowed

    return tf32_is_allowed()


def _refusal(reason: str, remedy: str = _REMEDY) -> Ruling:
    return Ruling(Verdict.REFUSED, reason=reason, remedy=remedy)


def is_pointwise(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


#: Why an op without a form has none, by name; matched in this order, a name by its beginning.
_REASONS = (
    (
        "_fft",
        "transforms longer than 2048, and of fp16, have no canonical form: they would be products of their length",
    ),
    (
        "linalg_eig linalg_eigh _linalg_eigh _linalg_svd linalg_qr geqrf ormqr linalg_householder_product "
        "linalg_ldl linalg_lstsq linalg_pinv linalg_matrix_exp",
        "its factorisation iterates, or reduces, in a library whose algorithm follows the size",
    ),
    (
        "linalg _linalg cholesky lu_ triangular_solve",
        "systems are eliminated step by step up to 16 rows of real numbers; larger ones are a library's",
    ),
    (
        "nonzero masked_select unique _unique repeat_interleave",
        "how many rows it returns only the data knows",
    ),
    (
        "poisson binomial _standard_gamma _sample_dirichlet standard_gamma",
        "it draws as many random numbers as the data want",
    ),
    ("_ctc_loss _cudnn_ctc", "its recursion over the alignments is a library's"),
)


def _reason(name: str) -> str:
    for names, reason in _REASONS:
        if name.startswith(tuple(names.split())):
            return reason
    return "it has no canonical form yet"


_SPECIAL: dict[str, Callable[[Node], Ruling]] = {}


def _special(*names: str) -> Callable[[Callable[[Node], Ruling]], Callable[[Node], Ruling]]:
    def register(rule: Callable[[Node], Ruling]) -> Callable[[Node], Ruling]:
        _SPECIAL.update(dict.fromkeys(names, rule))
        return rule

    return register


@_special("index_put", "index_put_", "_unsafe_index_put")
def _index_put(node: Node) -> Ruling:
    if _argument(node, "accumulate"):
        return _refusal("accumulating into repeated indices adds in the order in which threads arrive")
    return _refusal("with repeated indices the last thread to arrive wins")


@_special("_int_mm")
def _integer_product(node: Node) -> Ruling:
    length = _length(_value(node.args[0]).shape[-1:])
    return Ruling(Verdict.CANONICAL, contract.reduction_form("sum", length, _value(node).dtype))


@_special("scaled_product")
def _scaled_product(node: Node) -> Ruling:
    a = _value(node.args[0])
    family = _fp8_family(a.device)
    if family is None:
        return _refusal(
            "the order in which this GPU's tensor cores add fp8 products is not known",
            "use a GPU of compute capability 8.9, 9.0, 10.0 or 10.3, or multiply bfloat16 operands",
        )
    form = contract.fp8_matmul_form(
        _length(a.shape[-1:]),
        family,
        fast_accumulation=_argument(node, "fast_accumulation"),
        block_scales=_argument(node, "block_scales"),
    )
    return Ruling(Verdict.CANONICAL, form)


def _fp8_family(device: torch.device) -> str | None:
    from torch._inductor.runtime.hints import DeviceProperties

    from .templates.mma_family import fp8_family

    return fp8_family(DeviceProperties.create(device).cc)


@_special("grouped_rows")
def _grouped_rows(node: Node) -> Ruling:
    a = _value(node.args[0])
    return Ruling(Verdict.CANONICAL, contract.matmul_form(_length(a.shape[-1:]), a.dtype))


@_special("grouped_depth")
def _grouped_depth(node: Node) -> Ruling:
    return Ruling(Verdict.CANONICAL, contract.GroupChain(contract.accumulator_of(_value(node.args[0]).dtype)))


@_special("_scaled_grouped_mm", "_scaled_grouped_mm_v2")
def _scaled_grouped_mm(node: Node) -> Ruling:
    return _refusal(
        "grouped products of fp8 matrices have no canonical form yet",
        "multiply the groups in bfloat16 with torch._grouped_mm, or one by one with torch._scaled_mm",
    )


@_special("_scaled_mm", "_scaled_mm_v2")
def _scaled_mm(node: Node) -> Ruling:
    """What the decompositions could not express."""
    return _refusal(
        "scale_result, blocks of other than 128 of K and, on a CPU, block scales have no canonical form"
    )


@_special("inductor_random", "inductor_randint")
def _drawn(node: Node) -> Ruling:
    return Ruling(Verdict.CANONICAL, contract.Drawn(str(_value(node).dtype).removeprefix("torch.")))


@_special("segment_tree")
def _segment_tree(node: Node) -> Ruling:
    accumulator = contract.accumulator_of(_value(node.args[0]).dtype)
    return Ruling(Verdict.CANONICAL, contract.Segments(accumulator, _argument(node, "combine")))


@_special("mm_from")
def _mm_from(node: Node) -> Ruling:
    a = _value(node.args[1])
    chain = contract.ContinuedChain(contract.accumulator_of(a.dtype), _length(a.shape[-1:]))
    return Ruling(Verdict.CANONICAL, chain)


@_special("sum_from")
def _sum_from(node: Node) -> Ruling:
    length = _reduced_length(_value(node.args[1]), node.args[2])
    block: Any = node.args[3]
    return Ruling(Verdict.CANONICAL, contract.ContinuedSum("float32", length, block))


@_special("block_scan")
def _block_scan(node: Node) -> Ruling:
    accumulator = contract.accumulator_of(_value(node.args[0]).dtype)
    return Ruling(Verdict.CANONICAL, contract.Scan(accumulator, _argument(node, "combine")))


@_special("attention")
def _attention(node: Node) -> Ruling:
    query, value = _value(node.args[0]), _value(node.args[2])
    tf32 = query.dtype == torch.float32 and _tf32_is_allowed()
    widths = int(query.shape[-1]), int(value.shape[-1])
    form = contract.attention_form(*widths, query.dtype, tf32=tf32)
    if form is None or query.device.type != "cuda":
        return _refusal(f"attention of {query.dtype} over heads of {widths} elements has no kernel")
    return Ruling(Verdict.CANONICAL, form)


@_special("attention_backward")
def _attention_backward(node: Node) -> Ruling:
    query, value = _value(node.args[1]), _value(node.args[3])
    widths = int(query.shape[-1]), int(value.shape[-1])
    tf32 = query.dtype == torch.float32 and _tf32_is_allowed()
    form = contract.attention_gradient_form(*widths, query.dtype, tf32=tf32)
    if form is None or query.device.type != "cuda":
        return _refusal(
            f"the gradient of attention of {query.dtype} over heads of {widths} elements has no kernel"
        )
    return Ruling(Verdict.CANONICAL, form)


@_special("sort")
def _sort(node: Node) -> Ruling:
    """A stable sort of integers has one answer; floats were decomposed into that."""
    dtype = _value(node.args[0]).dtype
    if dtype.is_floating_point or dtype.is_complex:
        return _refusal(f"a sort of {dtype} may order equal values by algorithm")
    if not _argument(node, "stable"):
        return _refusal("an unstable sort orders equal values by algorithm")
    return Ruling(Verdict.INVARIANT)


@_special("attention_map", "row_major", "store_rows", "searchsorted", "bucketize")
def _invariant(node: Node) -> Ruling:
    return Ruling(Verdict.INVARIANT)


@_special(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "fractional_max_pool2d", "fractional_max_pool3d"
)
def _window_maximum(node: Node) -> Ruling:
    length = _length(_argument(node, "kernel_size"))
    return Ruling(Verdict.CANONICAL, contract.reduction_form("max", length, _value(node.args[0]).dtype))


@_special("copy_")
def _copy(node: Node) -> Ruling:
    return Ruling(Verdict.INVARIANT)


def rule(node: Node) -> Ruling:
    """The ruling for one call_function node of a lowered (post-grad) graph."""
    target = node.target
    custom = declarable_name(node)
    if custom is not None:
        return _custom_ruling(custom)
    if target is operator.getitem or not isinstance(target, torch._ops.OpOverload):
        return _rule_for_python(node)
    name = target._schema.name.split("::")[1]
    if name in _SPECIAL:
        return _SPECIAL[name](node)
    if name in _MATMULS:
        return _matmul_ruling(node, _MATMULS[name])
    if name in _FLOAT_SUMS or name in _EXACT:
        return _reduction_ruling(node, _FLOAT_SUMS.get(name) or _EXACT[name])
    known = _MOVEMENT_PRIMS if target.namespace in ("prims", "inductor_prims") else _MOVEMENT
    if name in known or (is_pointwise(target) and name not in _NOT_POINTWISE):
        return Ruling(Verdict.INVARIANT)
    return _refusal(_reason(name))


def _custom_ruling(name: str) -> Ruling:
    reason = declarations().get(name)
    if reason is not None:
        return Ruling(Verdict.DECLARED, reason=reason)
    remedy = (
        "if each row of its results is known to be the same whatever the batch, say so with "
        f'bi_inductor.declare_invariant("{name}", reason=...); otherwise {_REMEDY}'
    )
    what = "a Triton kernel" if name.startswith("triton::") else "a custom op"
    reason = f"nothing is known about the order of additions in {what}"
    return Ruling(Verdict.REFUSED, reason=reason, remedy=remedy)


#: Their bodies are graphs, with rulings of their own.
_WITH_BODIES = frozenset(["cond", "while_loop", "invoke_subgraph"])


def _rule_for_python(node: Node) -> Ruling:
    """Integer arithmetic on sizes and tuple access are invariant; higher-order ops are refused."""
    target = node.target
    if target is torch.ops.higher_order.with_effects and is_movement(node.args[1]):
        return Ruling(Verdict.INVARIANT)  # a check that raises, kept in its place among other effects
    if isinstance(target, torch._ops.HigherOrderOperator):
        if target.name() in _WITH_BODIES:
            return Ruling(Verdict.INVARIANT)
        if target.name() == "associative_scan":
            reason = "its kernel combines elements in an order that follows the tile"
            return Ruling(Verdict.REFUSED, reason=reason, remedy='pass combine_mode="generic" to it')
        return _refusal("this higher-order op is not looked into yet")
    return Ruling(Verdict.INVARIANT)


def is_movement(target: Any) -> bool:
    """True for ops whose results are elements of their inputs, or constants."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in RULED_NAMESPACES:
        return False
    known = _MOVEMENT_PRIMS if target.namespace in ("prims", "inductor_prims") else _MOVEMENT
    return target._schema.name.split("::")[1] in known


def reduced_operand(node: Node) -> tuple[Any, Any] | None:
    """An operand of an op and the dimensions of it that the op reduces (None: all); None where none is named."""
    name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    if name in _MATMULS:
        return node.args[_MATMULS[name][0]], [-1]
    if name in _FLOAT_SUMS or name in _EXACT:
        return node.args[0], _argument(node, "dim", "dims")
    return None
