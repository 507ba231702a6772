"""Attention of many queries on Hopper, by ``runtime/attention_specialised.py``: where it can be had, and its kernel.

The kernel is Gluon, Triton's lower language. It has no mask but that of a causal attention, and loads by TMA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import SymbolicGridFn
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv, Max, Min

from bi_inductor import contract
from bi_inductor.templates.emission import Template, TemplateKernel, emit, is_multiple, realized
from bi_inductor.virtual import is_interpreted

#: Queries of a program's tile, as ``runtime/attention_specialised.py`` has them; of fewer than two tiles most would be
#: computed for nothing.
ROWS = 128
_FEWEST_QUERIES = 2 * ROWS
#: Bytes of keys and values that stay in an H100's L2 cache of 50 MB beside what else passes through it.
_SECTION_BYTES = 40 << 20
_BUFFERED_TILES = 2

SOURCE = r"""
{{def_kernel("Q", "K", "V", "LSE", "OUT")}}
    attention_specialised.attend(
        Q,
        K,
        V,
        OUT,
        LSE,
        ({{size("Q", 0)}}, {{size("Q", 1)}}, {{size("Q", 2)}}, D),
        ({{size("K", 0)}}, {{size("K", 1)}}, {{size("K", 2)}}, D),
        ({{size("V", 0)}}, {{size("V", 1)}}, {{size("V", 2)}}, DV),
        ({{stride("Q", 0)}}, {{stride("Q", 1)}}, {{stride("Q", 2)}}),
        ({{stride("K", 0)}}, {{stride("K", 1)}}, {{stride("K", 2)}}),
        ({{stride("V", 0)}}, {{stride("V", 1)}}, {{stride("V", 2)}}),
        ({{stride("OUT", 0)}}, {{stride("OUT", 1)}}, {{stride("OUT", 2)}}),
        PAIRS_A_SECTION,
        BLOCK_D,
        BLOCK_DV,
        BLOCK_N,
        BUFFERED_TILES,
        CAUSAL,
        SCALE,
        NEAR_CHUNK,
        NEAR_CHUNKS,
        FAR_CHUNK,
    )
    index = tl.program_id(0)
    {{store_output(("index",), "index", val_shape=())}}
"""


class SpecialisedKernel(TemplateKernel):
    """A template kernel in Gluon, which may call ``runtime/attention_specialised.py``."""

    @classmethod
    def gen_common_triton_imports(cls) -> str:
        imports = super().gen_common_triton_imports()
        return imports + (
            "from triton.experimental import gluon\nfrom bi_inductor.runtime import attention_specialised\n"
        )

    def jit_lines(self) -> str:
        lines: str = super().jit_lines()
        return lines.replace("@triton.jit", "@gluon.jit")


class SpecialisedTemplate(Template):
    """A template of such a kernel."""

    kernel_type = SpecialisedKernel


@SymbolicGridFn
def programs_that_stay(work: Any, meta: dict[str, Any], *, min: Any) -> tuple[Any, int, int]:
    """(tiles of queries of all heads) -> one program per SM, or per tile where there are fewer."""
    return (min(work, meta["SM_COUNT"]), 1, 1)


specialised_template = SpecialisedTemplate(
    "batchinv_attention_specialised", grid=programs_that_stay, source=SOURCE
)


def is_suited(operands: Sequence[Any], scale: float) -> bool:
    """True if the kernel can be had for these q, k and v, which are realized."""
    query, _, value = operands
    if is_interpreted() or V.graph.cpp_wrapper:
        return False
    *rows, head_dim = query.get_size()
    value_dim = value.get_size()[-1]
    elements = sympy_product([*rows, Max(head_dim, value_dim)])
    return (
        DeviceProperties.create(query.get_device()).major == 9
        and query.get_dtype() in (torch.bfloat16, torch.float16)
        and all(32 < V.graph.sizevars.guard_int(width) <= 128 for width in (head_dim, value_dim))
        and 0 < scale < math.inf
        and all(_suits_tma(x) for x in operands)
        and TritonScheduling.can_use_32bit_indexing(elements, operands)
    )


def _sm_count(device: torch.device) -> int:
    return int(DeviceProperties.create(device).multi_processor_count)


def _suits_tma(x: Any) -> bool:
    """True if rows of x [B, H, S, D] are dense and start at multiples of 16 bytes, one after the other."""
    *outer, dense = (V.graph.sizevars.simplify(stride) for stride in x.get_stride())
    elements = 16 // x.get_dtype().itemsize
    is_spaced = all(
        stride != 0 and is_multiple(stride, elements)
        for stride in (*outer, x.get_layout().offset or elements)
    )
    return dense == 1 and is_spaced and x.get_name() not in V.graph.unaligned_buffers


def are_many(queries: Any) -> Any:
    """1 where the kernel is worth it, else 0: a number, or a size of the run."""
    return Min(1, Max(0, queries - (_FEWEST_QUERIES - 1)))


def specialised(
    operands: Sequence[Any],
    logsumexp: Any,
    out: Any,
    form: contract.Attention,
    is_causal: bool,
    scale: float,
    many: Any,
) -> None:
    """Write ``out`` [B, H, L, DV] and ``logsumexp`` [B, H, L] of q, k and v for which ``is_suited`` is true.

    ``many``: ``are_many`` of the queries; where it turns out to be 0 nothing is written.
    """
    query, key, value = operands
    batch, heads, queries, head_dim = query.get_size()
    key_heads, keys = key.get_size()[1:3]
    head_dim, value_dim = (V.graph.sizevars.guard_int(x) for x in (head_dim, value.get_size()[-1]))
    device = query.get_device()
    hints = V.graph.sizevars.optimization_hints([batch, heads, key_heads, keys, head_dim + value_dim])
    row_bytes = hints[4] * query.get_dtype().itemsize
    sections = -(-hints[0] * hints[2] * hints[3] * row_bytes // _SECTION_BYTES)
    pairs_a_section = -(-hints[0] * hints[2] // sections) * (hints[1] // hints[2])
    work = batch * heads * CeilDiv(queries, ROWS)
    emit(
        specialised_template,
        [realized(x) for x in (*operands, logsumexp, out)],
        ir.FixedLayout(device, torch.float32, [1]),
        num_warps=4,
        num_stages=1,
        mutated_inputs=[realized(x) for x in (logsumexp, out)],
        call_sizes=[work * many],
        may_be_idle=True,
        PAIRS_A_SECTION=pairs_a_section,
        SM_COUNT=_sm_count(device),
        D=head_dim,
        DV=value_dim,
        BLOCK_D=64 if head_dim <= 64 else 128,
        BLOCK_DV=64 if value_dim <= 64 else 128,
        BLOCK_N=form.tile,
        BUFFERED_TILES=_BUFFERED_TILES,
        CAUSAL=is_causal,
        SCALE=scale,
        NEAR_CHUNK=form.near_chunk,
        NEAR_CHUNKS=form.near_keys // form.near_chunk,
        FAR_CHUNK=form.far_chunk,
    )
