"""Canonical forms: what an op's order of additions is, as values.

A form is made by a pure function of the reduced length and the dtype. Nothing else can enter it: no batch
size, no stride, no device. ``oracle.py`` executes forms in plain torch; ``codegen/`` and ``templates/`` emit
kernels that compute them under any schedule.

    TREE   sum, prod and all that is built on them: the aligned binary tree of adjacent pairs over the
           row-major index of the reduced dimensions, padded with the identity to a power of two.
           Every aligned stretch of 2**k elements is a subtree, so any power-of-two block, any split at
           such a border and any looped or persistent schedule computes the same form.
    SEGMENTS  scatter_add, index_put, gradients of gathers: per destination, the TREE over its contributions in
           source order.
    SCAN   cumsum, cumprod: a prefix of m elements is the left-to-right fold of the aligned blocks of m's
           binary digits, highest first, each a TREE. It depends on m alone, not on the length.
    CHAIN  matrix products: one accumulator per output element, k ascending from 0.
    GROUP  grouped products whose groups are stretches of K: a CHAIN over each group's own rows.
    CHUNKS fp8 products: a chain for each 128 of K, and their sums added left to right in fp32.
    ATTENTION  on a GPU: keys ascending in tiles and chunks that no size but the head dim's enters.
    ATTENTION GRADIENT  on a GPU: chains over ascending keys and queries, of terms computed again.
    EXACT  max, min, any, all, arg*, integer sums: no order can change the result.
    DRAWN  random numbers: by seed and position.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import sympy

Length: TypeAlias = int | sympy.Expr


@dataclasses.dataclass(frozen=True)
class Form:
    """A canonical order of additions; ``str()`` of it goes into certificates and fingerprints."""

    accumulator: str

    def __str__(self) -> str:
        fields = ", ".join(str(getattr(self, field.name)) for field in dataclasses.fields(self))
        return f"{type(self).__name__}({fields})"

    @property
    def free_symbols(self) -> set[sympy.Symbol]:
        """Symbols the form depends on: reduced lengths only, by construction."""
        length = getattr(self, "length", 0)
        return set(sympy.sympify(length).free_symbols)


@dataclasses.dataclass(frozen=True)
class Tree(Form):
    """Aligned binary tree of adjacent pairs over ``length`` elements; sums end with ``+ 0.0``."""

    combine: str
    length: Length


@dataclasses.dataclass(frozen=True)
class Segments(Form):
    """Per destination, the TREE over the contributions it receives, in source order; sums end with ``+ 0.0``."""

    combine: str


@dataclasses.dataclass(frozen=True)
class Scan(Form):
    """Prefix of m elements: fold of the aligned blocks of m's binary digits, each a TREE; sums end ``+ 0.0``."""

    combine: str


@dataclasses.dataclass(frozen=True)
class Chain(Form):
    """One accumulator, ``length`` products added in ascending order, one rounding at the end."""

    length: Length


@dataclasses.dataclass(frozen=True)
class GroupChain(Form):
    """A Chain over the rows of a group, ascending from its first; how many they are, the data says at run time."""


@dataclasses.dataclass(frozen=True)
class ContinuedChain(Form):
    """As Chain, from the gradient that is there instead of 0; not rounded."""

    length: Length


@dataclasses.dataclass(frozen=True)
class ContinuedSum(Form):
    """Trees over blocks of ``block`` elements, added left to right to the gradient that is there."""

    length: Length
    block: int


@dataclasses.dataclass(frozen=True)
class Chunks(Form):
    """Every ``chunk`` of ``length`` products is a Chain from 0; their sums are added left to right in fp32."""

    chunk: int
    length: Length


@dataclasses.dataclass(frozen=True)
class ScaledChunks(Chunks):
    """Chunks whose sums are each multiplied by a's scale, then by b's, in fp32 before they are added."""


@dataclasses.dataclass(frozen=True)
class Attention(Form):
    """A query row over ascending keys, in tiles of ``tile`` keys from key 0; see ``runtime/attention.py``.

    Each chunk, a chain of tiles, has its own running maximum (an integer in log2 units), sum and accumulator; chunks
    are joined from left to right: chunks of ``near_chunk`` keys up to key ``near_keys``, then of ``far_chunk`` keys.
    Scores and sums are fp32; probabilities are rounded to the dtype of the values, and so is the result, once.
    """

    tile: int
    near_chunk: int
    near_keys: int
    far_chunk: int


@dataclasses.dataclass(frozen=True)
class AttentionGradient(Form):
    """Chains over keys (dq), and over the queries of a group's heads, head after head (dk, dv), all ascending.

    Their terms, of which none is stored, are made of chains over the two head dims; see
    ``runtime/attention_backward.py``.
    """


@dataclasses.dataclass(frozen=True)
class Exact(Form):
    """Order-free: the result is the same bits whatever the order."""

    combine: str
    length: Length


@dataclasses.dataclass(frozen=True)
class Drawn(Form):
    """A random number: a function of the seed and of the element's position in its tensor, row-major.

    It does not depend on the batch size or on the neighbours, but a row that moves draws other numbers.
    """


_ACCUMULATORS = {
    "float64": "float64",
    "float32": "float32",
    "float16": "float32",
    "bfloat16": "float32",
}
_EXACT_COMBINES = frozenset(
    {"max", "min", "any", "argmax", "argmin", "xor_sum"}
    | {f"arg{extreme}_{what}" for extreme in ("max", "min") for what in ("value", "with_value")}
)


def accumulator_of(dtype: Any) -> str:
    """Name of the dtype that sums of ``dtype`` are carried in; integers carry themselves."""
    name = str(dtype).removeprefix("torch.")
    return _ACCUMULATORS.get(name, name)


def is_ordered(combine: str, dtype: Any) -> bool:
    """True if the order of a reduction matters: float ``sum`` and ``prod``."""
    return combine in ("sum", "prod") and accumulator_of(dtype).startswith(("float", "complex"))


def reduction_form(combine: str, length: Length, dtype: Any) -> Form:
    """The form of reducing ``length`` elements of ``dtype`` with ``combine``.

    Raises ValueError for a combine that has no canonical form (Welford, online softmax).
    """
    accumulator = accumulator_of(dtype)
    if is_ordered(combine, dtype):
        return Tree(accumulator, combine, length)
    if combine in _EXACT_COMBINES or combine in ("sum", "prod"):
        return Exact(accumulator, combine, length)
    raise ValueError(f"no canonical form for a {combine} reduction of {dtype}")


#: Products of K that an fp8 product adds up in a tensor core before it adds in fp32, and that share a block scale.
FP8_CHUNK = 128


def fp8_matmul_form(
    length: Length, family: str, *, fast_accumulation: bool = False, block_scales: bool = False
) -> Form:
    """The form of a product of fp8 matrices on the MMA instructions called ``family`` (``"wgmma_k32"`` ...)."""
    accumulator = f"fp8_{family}/float32"
    if block_scales:
        return ScaledChunks(accumulator, FP8_CHUNK, length)
    return Chain(accumulator, length) if fast_accumulation else Chunks(accumulator, FP8_CHUNK, length)


def matmul_form(length: Length, dtype: Any, *, tf32: bool = False) -> Form:
    """The form of a matrix product with inner dimension ``length`` and operands of ``dtype``."""
    return Chain("tf32/float32" if tf32 else accumulator_of(dtype), length)


#: Chunks that decoding computes side by side. The near ones are short, so that one sequence of a few thousand keys
#: fills a GPU; the far ones are longer, since prefill pays for each border, but not so long that decoding waits for one
#: (attention_decode_sweep.csv, attention_far_chunk.csv).
_NEAR_CHUNK, _NEAR_KEYS, _FAR_CHUNK = 512, 8192, 1024


def attention_form(head_dim: int, value_dim: int, dtype: Any, *, tf32: bool = False) -> Attention | None:
    """The form of attention over heads of these sizes on a GPU, or None where there is none.

    There is none for fp64, for fp32 beyond 256 elements, and beyond 576 elements (512 of values): MLA's latent heads.
    """
    name = str(dtype).removeprefix("torch.")
    widest = max(head_dim, value_dim)
    is_held = widest <= 256 or (widest <= 576 and value_dim <= 512 and name != "float32")
    if name not in ("bfloat16", "float16", "float32") or min(head_dim, value_dim) <= 0 or not is_held:
        return None
    tile = (64 if widest <= 128 else 32) // (2 if name == "float32" else 1)
    accumulator = "tf32/float32" if tf32 and name == "float32" else "float32"
    # The tiles of a chunk fit in a word (``attention_tiles.py``).
    return Attention(accumulator, tile, _NEAR_CHUNK, _NEAR_KEYS, min(_FAR_CHUNK, 32 * tile))


def attention_gradient_form(
    head_dim: int, value_dim: int, dtype: Any, *, tf32: bool = False
) -> AttentionGradient | None:
    """The form of attention's gradients in two kernels, or None where they are products that store all scores."""
    form = attention_form(head_dim, value_dim, dtype, tf32=tf32)
    is_held = form is not None and max(head_dim, value_dim) <= 256
    return AttentionGradient(form.accumulator) if form is not None and is_held else None
