"""Do all schedules of attention give the same bits, on the GPU at hand, whatever mask says that keys are visible?

One graph holds the op once for every schedule that may be chosen, and for each of them without a mask, with one of
bools, with that and the map of its tiles, with one of floats where that is the same function, and causal; these four
with further keys that are hidden.
Results and logsumexps of the row that sees the same keys in all of them are compared bit for bit.

A 16-bit result hides in which of two ways the fp32 sum behind it was rounded, but for one element in 2**16: enough that
two orders of adding pass for one. So the values of a row's last two keys are such that its sum ends near 0; what is
left to be rounded is its error. Scores are shifted so that logsumexps are near 0 too.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bi_inductor import attention_op, contract, doctor
from bi_inductor.attention_tiles import attention_map
from bi_inductor.doctor import Result
from bi_inductor.measurement_attention import AttentionRun
from bi_inductor.templates import triton_attention
from bi_inductor.templates.triton_attention import Schedule

#: Attention rows, each with keys and values of its own.
BATCH, HEADS = 8, 16
#: Keys that stand behind a mask, or after the last query.
_HIDDEN = 37
#: Score of the last two keys in log2 units, before the shift: among the higher of the others.
_LAST_SCORE = 2.3
_KERNEL = re.compile(r"attention\.(?:one_chunk|all_chunks)\(")


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of attention. ``depths``: numbers of keys, to the middle of a tile, and past a chunk.

    ``width``: head dim. Masks of floats are added to scaled scores, which rounds once more unless the scale is a power
    of two: they are left out of kinds whose width is no power of 4.
    """

    name: str
    dtype: torch.dtype
    width: int
    depths: tuple[int, ...] = (89, 700)
    tf32: bool = False

    @property
    def form(self) -> contract.Attention:
        form = contract.attention_form(self.width, self.width, self.dtype, tf32=self.tf32)
        assert form is not None
        return form

    @property
    def scale(self) -> float:
        """As ``scaled_dot_product_attention`` has it: to the last bit, since kernels are compared by it."""
        return 1.0 / math.sqrt(self.width)

    @property
    def float_masks(self) -> bool:
        return math.frexp(self.scale)[0] == 0.5

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """All that may be chosen."""
        width = triton_attention.padded(self.width)
        return triton_attention.schedules(self.form, width, self.dtype.itemsize)


KINDS = (
    Kind("attention-bfloat16", torch.bfloat16, 64),
    Kind("attention-bfloat16-128", torch.bfloat16, 128),
    Kind("attention-bfloat16-wide", torch.bfloat16, 256),
    Kind("attention-bfloat16-latent", torch.bfloat16, 320),
    Kind("attention-float16", torch.float16, 64),
    Kind("attention-tf32", torch.float32, 64, tf32=True),
    Kind("attention-float32", torch.float32, 64),
)


@dataclasses.dataclass(frozen=True)
class AttentionResult(Result):
    """``tiles``: how many kernels were compared; ``runs``: which, one for each schedule and mask."""

    runs: tuple[AttentionRun, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """Operands of the op. Its last query sees the keys of the case without a mask."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    tiles: Tensor | None = None

    @property
    def mask_name(self) -> str:
        if self.mask is None:
            return "none"
        name = str(self.mask.dtype).removeprefix("torch.")
        return name if self.tiles is None else f"{name} with a map"


def examine(
    kind: Kind,
    schedules: Sequence[Schedule] | None = None,
    *,
    device: str = "cuda",
    execute: Callable[..., list[list[Any]]] | None = None,
) -> list[AttentionResult]:
    """Run ``kind`` with every schedule (by default all that may be chosen) and every mask, and count classes of bits.

    ``execute(graph, *inputs)``: how a graph is run, by default compiled for the GPU. Returns one result.
    """
    schedules = kind.schedules if schedules is None else schedules
    cases = [_masked(kind, *operands(kind, depth, device)) for depth in kind.depths]
    runs = tuple(_run(kind, schedule, case) for schedule in schedules for case in cases[0])
    # Copies, so that no two ops of the graph are the same expression.
    inputs = [[_copied(case) for _ in schedules for case in row] for row in cases]
    in_turn = [schedule for _ in kind.depths for schedule in schedules for _ in cases[0]]
    with doctor.prepared("triton_attention", "schedule_for", in_turn, tf32=kind.tf32) as sources:
        results = (execute or _on_the_gpu)(_graph, inputs)
    classes = tuple(len({_digest(result) for result in row}) for row in results)
    count, step = len(runs), len(cases[0])  # named for one mask alone: it takes a compile
    families = [
        family
        for source in sources
        for family in doctor.instructions(source, count, pattern=_KERNEL, step=step)
    ]
    family = " + ".join(dict.fromkeys(families)) or "unknown"
    return [AttentionResult(kind.name, family, len(runs), kind.depths, classes, runs=runs)]


def _run(kind: Kind, schedule: Schedule, case: Case) -> AttentionRun:
    return AttentionRun(
        form=str(kind.form),
        dtype=str(kind.dtype).removeprefix("torch."),
        head_dim=kind.width,
        scale=kind.scale,
        **dataclasses.asdict(schedule),
        mask=case.mask_name,
        causal=case.is_causal,
    )


def _on_the_gpu(graph: Callable[..., Any], inputs: list[list[tuple[Any, ...]]]) -> list[list[Any]]:
    """Compiled with the number of keys as a symbol: all lengths of a case share a kernel, and compiling takes long."""
    for query, key, value, mask, is_causal, _ in itertools.chain(*inputs):
        lengths = [(key, 2), (value, 2)] + [(mask, 3)] * (mask is not None) + [(query, 2)] * is_causal
        for tensor, dim in lengths:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return doctor.on_the_gpu(graph, inputs)


def _copied(case: Case) -> tuple[Any, ...]:
    return case.query.clone(), case.key, case.value, case.mask, case.is_causal, case.tiles


def _graph(inputs: list[list[tuple[Any, ...]]]) -> list[list[tuple[Tensor, Tensor]]]:
    return [
        [
            attention_op.attention(q, k, v, mask, causal, 1.0 / math.sqrt(q.shape[-1]), tiles)
            for q, k, v, mask, causal, tiles in row
        ]
        for row in inputs
    ]


def _digest(result: tuple[Tensor, Tensor]) -> str:
    output, logsumexp = result
    return doctor.digest(output[:, :, -1]) + doctor.digest(logsumexp[:, :, -1])


def _masked(kind: Kind, query: Tensor, key: Tensor, value: Tensor) -> list[Case]:
    """The same attention without a mask, with each kind of mask before further keys, and as the last causal row."""
    size = (*query.shape[:-1], key.shape[2] + _HIDDEN)
    visible = (torch.arange(size[-1], device=query.device) < key.shape[2]).expand(size)
    longer = [torch.cat([x, x[:, :, :_HIDDEN] + 1], 2) for x in (key, value)]
    added = torch.zeros(size, dtype=query.dtype, device=query.device).masked_fill(~visible, -math.inf)
    longer_key, longer_value = longer
    tiles = attention_map(visible, HEADS, kind.form.tile)
    last = query.expand(-1, -1, key.shape[2], -1)
    return [
        Case(query, key, value, None, False),
        Case(query, longer_key, longer_value, visible, False),
        Case(query, longer_key, longer_value, visible, False, tiles),
        *([Case(query, longer_key, longer_value, added, False)] if kind.float_masks else []),
        Case(last, longer_key, longer_value, None, True),
    ]


def rounded_probabilities(t: Tensor, form: contract.Attention, dtype: torch.dtype) -> Tensor:
    """[..., keys <= near_keys] scores in log2 units -> round(exp2(t - m)) exp2(m - max t), m the running maximum."""
    keys = t.shape[-1]
    maxima = [
        t[..., start // form.near_chunk * form.near_chunk : end]
        .amax(-1, keepdim=True)
        .expand_as(t[..., start:end])
        for start, end in ((start, min(start + form.tile, keys)) for start in range(0, keys, form.tile))
    ]
    m = torch.cat(maxima, -1)
    return torch.exp2(t - m).to(dtype).double() * torch.exp2(m - t.amax(-1, keepdim=True))


def operands(kind: Kind, keys: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """query [BATCH, HEADS, 1, D], key and value [BATCH, HEADS, ``keys``, D]: sums that end near 0, in both results."""
    generator = torch.Generator().manual_seed(keys)

    def random(length: int) -> Tensor:
        size = (BATCH, HEADS, length, kind.width)
        return torch.randn(size, generator=generator, dtype=torch.float64).to(kind.dtype).double()

    query, key, value = random(1), random(keys), random(keys)
    factor = kind.scale * attention_op.LOG2_E
    unit = query / (query.square().sum(-1, keepdim=True) * factor)  # what adds 1 to the score of a key
    key[:, :, -2:] = unit * _LAST_SCORE
    total = torch.exp2(query @ key.transpose(2, 3) * factor).sum(-1, keepdim=True)
    key = (key - unit * torch.log2(total)).to(kind.dtype).double()
    t = query @ key.transpose(2, 3) * factor
    p = rounded_probabilities(t, kind.form, kind.dtype)
    left = -(p[..., :-2] @ value[:, :, :-2])
    for last in (-2, -1):
        value[:, :, last, None] = (left / p[..., last, None]).to(kind.dtype).double()
        left = left - p[..., last, None] * value[:, :, last, None]
    return tuple(x.to(kind.dtype).to(device) for x in (query, key, value))  # type: ignore[return-value]
