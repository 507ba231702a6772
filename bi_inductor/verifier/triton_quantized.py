"""Matrix products of 8-bit operands in emitted Triton kernels: exact in int32, or fp8 in a chain or in chunks."""

from __future__ import annotations

import ast
import re

from ..templates.mma_family import fp8_family_of
from ..templates.tile_table import Tile
from .lengths import Forms, Values
from .triton_product import ChainedProduct

_CHAIN_DOT = re.compile(r"acc = tl\.dot\((?:a, b|b, a), acc, out_dtype=ACC_TYPE\)")
_CHUNK_DOT = re.compile(
    r"chunk = tl\.dot\((?:a, b|b, a), max_num_imprecise_acc=BLOCK_K, out_dtype=ACC_TYPE\)"
)
#: What an fp8 operand is called in a kernel's signature.
_FP8 = re.compile(r"'arg_[AB]': '\*fp8e(?:4nv|5)'")
_CHUNK = re.compile(r"acc \+= chunk")
_SCALED_CHUNK = re.compile(
    r"acc \+= chunk \* (a_scale\[None, :\] \* b_scale\[:, None\]|a_scale\[:, None\] \* b_scale\[None, :\])"
)
_SCALE = {
    "a_scale": re.compile(r"tl\.load\(a_scales \+ step \* \(.+\)\)"),
    "b_scale": re.compile(r"tl\.load\(b_scales \+ step \* \(.+\)\)"),
}


class QuantizedProduct(ChainedProduct):
    """The product of one kernel with 8-bit operands.

    A chunk is added to ``acc`` as it is, or times the scale of its blocks; the tile is of the form's MMA family.
    """

    @property
    def is_chunked(self) -> bool:
        return "chunk" in self.kernel.assignments

    @property
    def is_scaled(self) -> bool:
        return "a_scale" in self.kernel.assignments

    @property
    def dot(self) -> re.Pattern[str]:  # type: ignore[override]
        return _CHUNK_DOT if self.is_chunked else _CHAIN_DOT

    def _end(self) -> list[str]:
        return [] if self.kernel.text_of("ACC_TYPE") == "tl.int32" else super()._end()

    def is_step(self, name: str, statement: ast.stmt) -> bool:
        if name == "acc" and self.is_chunked:
            wanted = _SCALED_CHUNK if self.is_scaled else _CHUNK
            return wanted.fullmatch(self.kernel.line(statement)) is not None
        return super().is_step(name, statement)

    def check(self) -> None:
        super().check()
        if self.is_scaled:
            for name, shape in _SCALE.items():
                if not shape.fullmatch(self.kernel.text_of(name)):
                    self.kernel.note("dot", self.kernel.assignments.get(name))

    def _check_form(self, length: Values, forms: Forms, at: ast.AST | None) -> None:
        if self.kernel.text_of("ACC_TYPE") == "tl.int32":
            if ("sum", length) not in forms.unordered:
                self.kernel.note("length", at, "no form of this kernel is an exact sum of length K")
            return
        accumulators = self._accumulators(length, forms)
        if not accumulators:
            self.kernel.note("length", at, "no form of this kernel has this K in such chunks")
            return
        self.retraced.add(("chunks" if self.is_chunked else "chain", length))
        family = self._family()
        if f"fp8_{family}/float32" not in accumulators or self.kernel.text_of("ACC_TYPE") != "tl.float32":
            self.kernel.note(
                "precision", self.kernel.assignments.get("BLOCK_M"), f"{family}, not {accumulators}"
            )

    def _accumulators(self, length: Values, forms: Forms) -> list[str]:
        """Accumulators of the forms that this kernel may be."""
        if not self.is_chunked:
            return sorted(accumulator for accumulator, n in forms.chains if n == length)
        block = self.kernel.text_of("BLOCK_K")
        return sorted(
            accumulator
            for accumulator, n, chunk, is_scaled in forms.chunked
            if n == length and str(chunk) == block and is_scaled == self.is_scaled
        )

    def _family(self) -> str | None:
        """The MMA family of this kernel's tile on the device it is compiled for, or None if it is not fp8's."""
        text = "\n".join(self.kernel.lines)
        capability, warps = re.search(r"\bcc=(\d+)", text), re.search(r"\bnum_warps=(\d+)", text)
        sizes = [self.kernel.text_of(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
        if not (capability and warps and all(size.isdigit() for size in sizes) and _FP8.search(text)):
            return None
        m, n, k = map(int, sizes)
        tile = Tile(m, n, k, int(warps[1]), num_stages=2, swap=self.kernel.text_of("SWAP") == "True")
        return fp8_family_of(tile, int(capability[1]))
