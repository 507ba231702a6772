"""Which schedule of attention a generated kernel runs with, under which mask; and which ones a doctor ran.

The doctor writes one :class:`AttentionRun` for each kernel that it compares, and the same is read here from the text of
a kernel whose claim it may raise. They have to be equal in every field. Not among the fields, and not the same as the
doctor's: numbers of rows, queries, keys and heads in a group, strides, and what is fused to the end of a kernel.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from . import contract

#: Element types of a kernel's signature -> torch's names.
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "i1": "bool", "u1": "bool"}
_CONSTANT = re.compile(r"^ +(\w+) ?: tl\.constexpr = (.+)$", re.MULTILINE)
#: A kernel with the sums of attention; of those with warps of two kinds no doctor has runs.
_SUMS = re.compile(r"attention\.(?:one_chunk|all_chunks)\(|attention_specialised\.attend\(")
_LAUNCH = re.compile(r"^(num_\w+)=(\d+)", re.MULTILINE)
_ARGUMENT = re.compile(r"'(arg_\w+)': '\*(\w+)'")
#: Operands of a template are places in its arguments; several can be in one, as in a projection to q, k and v.
_OPERAND = re.compile(r"^ +(\w+) = (arg_\w+)(?: \+ .+)?$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class AttentionRun:
    """One kernel of attention. ``form``: as in a certificate; ``dtype``: of queries, keys and values; ``head_dim``: of
    all three; ``scale``: of the scores. ``mask``: "none", or the dtype of its elements, "bool with a map" where
    tiles are left out. The others: what is free, as in ``triton_attention.Schedule``."""

    form: str
    dtype: str
    head_dim: int
    scale: float
    block_m: int
    num_warps: int
    num_stages: int
    split: bool
    mask: str
    causal: bool

    @property
    def heads(self) -> tuple[str, str, int]:
        """What all schedules have to agree on."""
        return self.form, self.dtype, self.head_dim


def measured_runs(results: Iterable[dict[str, Any]]) -> frozenset[AttentionRun]:
    """The kernels that a doctor ran, of its ``results``, without those heads of which some had other bits.

    Raises KeyError and TypeError for what is no result of attention.
    """
    runs: set[AttentionRun] = set()
    wrong: set[tuple[str, str, int]] = set()
    for result in results:
        ran = [AttentionRun(**run) for run in result["runs"]]
        runs.update(ran)
        if set(result["classes"]) != {1}:
            wrong.update(run.heads for run in ran)
    return frozenset(run for run in runs if run.heads not in wrong)


def run_of(kernels: Sequence[str], form: str) -> AttentionRun | None:
    """How the attention of these kernels, the sources of all that an op is in, runs; None if they do not say.

    ``form``: of the op. The kernel that joins chunks belongs to every split schedule and has no freedom of its own.
    """
    sums = [text for text in kernels if _SUMS.search(text)]
    folds = [text for text in kernels if "attention.fold_chunks(" in text]
    split = len(sums) == 1 and "attention.one_chunk(" in sums[0]
    if len(sums) != 1 or len(folds) != split:
        return None
    run = _run(sums[0], split)
    if run is None or run.form != form or not all(_joins(fold, run) for fold in folds):
        return None
    return run


def _run(text: str, split: bool) -> AttentionRun | None:
    values = _constants(text)
    if values.get("COMPUTED") or values.get("SCORED"):
        return None  # a doctor's masks are in memory, and it modifies no score
    types = {name: _DTYPES.get(element, element) for name, element in operand_types(text).items()}
    try:
        operands = {types[name] for name in "QKV"}
        widths = {values[name] for name in ("D", "DV")}
        accumulator = "tf32/float32" if values["INPUT_PRECISION"] == "tf32" else "float32"
        near = values["NEAR_CHUNK"]
        form = contract.Attention(
            accumulator, values["BLOCK_N"], near, near * values["NEAR_CHUNKS"], values["FAR_CHUNK"]
        )
        return AttentionRun(
            form=str(form),
            dtype=_only(operands),
            head_dim=_only(widths),
            scale=values["SCALE"],
            block_m=values["BLOCK_M"],
            num_warps=values["num_warps"],
            num_stages=values["num_stages"],
            split=split,
            mask=types["MASKS"] + (" with a map" if values["MASK"] == 3 else "")
            if values["MASK"]
            else "none",
            causal=values["CAUSAL"],
        )
    except (KeyError, ValueError):
        return None


def operand_types(text: str) -> dict[str, str]:
    """The operands of a template's kernel by name, with the element types of the kernel's signature."""
    elements = dict(_ARGUMENT.findall(text))
    return {name: elements[argument] for name, argument in _OPERAND.findall(text) if argument in elements}


def _joins(text: str, run: AttentionRun) -> bool:
    """True if the kernel ``text`` joins the chunks of ``run`` as a doctor's did."""
    values = _constants(text)
    expected = {"DV": run.head_dim, "BLOCK_M": 1, "num_warps": 1, "num_stages": 1}
    return values.get("OUT_TYPE") == f"tl.{run.dtype}" and expected.items() <= values.items()


def _constants(text: str) -> dict[str, Any]:
    """The constants of a kernel and of its launch; an expression as its text."""
    return {name: _value(value) for name, value in (*_CONSTANT.findall(text), *_LAUNCH.findall(text))}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _only(values: set[Any]) -> Any:
    (value,) = values
    return value
