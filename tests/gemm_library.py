"""``runtime/cpp/gemm.h`` as a function of tensors, built with Inductor's compiler flags but without a graph.

One build serves all sizes and strides of a combination of dtypes and scales, so whole ladders take seconds.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.codecache import CppCodeCache

from bi_inductor.options import required_patches
from bi_inductor.templates.cpp_matmul import header_text

_CPP = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "at::BFloat16",
    torch.float16: "at::Half",
}

_ENTRY = """
struct Spec {{
    using In = {operand}; using Acc = {accumulator}; using Bias = {bias}; using Out = {out};
    static constexpr bool has_bias() {{ return {has_bias}; }}
    static constexpr bool bias_is_start() {{ return {bias_is_start}; }}
    static constexpr bool scale_product() {{ return {scale_product}; }}
    static constexpr bool scale_bias() {{ return {scale_bias}; }}
    static constexpr double alpha() {{ return {alpha}; }}
    static constexpr double beta() {{ return {beta}; }}
}};
extern "C" void product(
    const {operand}* a, const {operand}* b, const {bias}* bias, {out}* out,
    const int64_t* s, const int64_t* sizes)
{{
    const int64_t m = sizes[1], n = sizes[2];
    bi_gemm::run<Spec>(
        {{{{a, s[0], s[1], s[2]}}, {{b, s[3], s[4], s[5]}}, {{bias, s[6], s[7], s[8]}}, {{out, m * n, n, 1}},
          sizes[0], m, n, sizes[3]}},
        int(sizes[4]));
}}
"""


@dataclasses.dataclass(frozen=True)
class Gemm:
    """``round(alpha * (a @ b) + beta * bias)`` of [B, M, K], [B, K, N] and perhaps a bias that broadcasts."""

    dtype: torch.dtype = torch.float32
    has_bias: bool = False
    bias_is_start: bool = False
    alpha: float = 1.0
    beta: float = 1.0
    out_dtype: torch.dtype | None = None
    header: str | None = None

    def __call__(self, a: Tensor, b: Tensor, bias: Tensor | None = None, threads: int = 2) -> Tensor:
        (batch, m, k), n = a.shape, b.shape[2]
        out = torch.empty(batch, m, n, dtype=self.out_dtype or self.dtype)
        addend = torch.zeros((), dtype=self.dtype) if bias is None else bias
        strides = (*a.stride(), *b.stride(), *addend.expand(batch, m, n).stride())
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (a, b, addend, out)]
        integers = [(ctypes.c_int64 * len(v))(*v) for v in (strides, (batch, m, n, k, threads))]
        self._library.product(*pointers, *integers)
        return out

    @functools.cached_property
    def _library(self) -> ctypes.CDLL:
        double = self.dtype == torch.float64
        entry = _ENTRY.format(
            operand=_CPP[self.dtype],
            accumulator="double" if double else "float",
            bias=_CPP[self.dtype],
            out=_CPP[self.out_dtype or self.dtype],
            has_bias=str(self.has_bias).lower(),
            bias_is_start=str(self.bias_is_start).lower(),
            scale_product=str(self.alpha != 1).lower(),
            scale_bias=str(self.beta != 1).lower(),
            alpha=self.alpha,
            beta=self.beta,
        )
        with config.patch(required_patches()):
            return CppCodeCache.load((self.header or header_text()) + entry)
