// One row times a matrix whose columns are contiguous (a weight [N, K] read as [K, N]), for gemm.h.
//
// The same chain per element as everywhere. Packing would cost as much as the product itself, so squares of 8 x 8
// are transposed in registers and consumed at once: what is left is the time to read the matrix.
#ifndef BI_INDUCTOR_GEMM_ROW_H
#define BI_INDUCTOR_GEMM_ROW_H

#include "gemm_product.h"

namespace bi_gemm {

#if defined(__AVX2__) && defined(__FMA__)
template <class Spec>
constexpr bool kHasRowKernel = std::is_same_v<typename Spec::Acc, float>;

// sums[c] = chain of a[k] * b[c * stride + k] for 8 * Groups columns; Groups chains hide each other's latency.
template <int Groups, class In>
inline void chain_columns(
    int64_t depth, const float* __restrict a, const In* __restrict b, int64_t stride, float* sums) {
  __m256 sum[Groups];
#pragma GCC unroll 4
  for (int g = 0; g < Groups; ++g) sum[g] = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16) {  // one cache line of each fp32 column
#pragma GCC unroll 4
    for (int g = 0; g < Groups; ++g)
#pragma GCC unroll 2
      for (int half = 0; half < 16; half += 8) {
        __m256 column[8];
        load_columns(column, b + 8 * g * stride + k + half, stride);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i)
          sum[g] = _mm256_fmadd_ps(_mm256_broadcast_ss(a + k + half + i), column[i], sum[g]);
      }
  }
  for (int g = 0; g < Groups; ++g) _mm256_storeu_ps(sums + 8 * g, sum[g]);
  for (; k < depth; ++k)
    for (int c = 0; c < 8 * Groups; ++c) sums[c] = std::fma(a[k], widen<float>(b[c * stride + k]), sums[c]);
}

template <class Spec> void run_row(const Product<Spec>& p, int threads) {
  constexpr int64_t chunk = 64;  // columns of a work item
  const int64_t chunks = ceil_div(p.n, chunk);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t item = 0; item < p.batches * chunks; ++item) {
    static thread_local Workspace workspace;
    const int64_t batch = item / chunks, first = item % chunks * chunk;
    const int64_t cols = std::min(chunk, p.n - first);
    const Product<Spec> one = p.select(batch);
    float* a = static_cast<float*>(workspace.reserve(p.k * sizeof(float)));
    pack<float>(a, p.k, one.a, 1, p.k);
    alignas(64) float sums[chunk] = {};
    int64_t c = 0;
    for (; c + 16 <= cols; c += 16) chain_columns<2>(p.k, a, one.b.at(0, first + c), one.b.col, sums + c);
    for (; c + 8 <= cols; c += 8) chain_columns<1>(p.k, a, one.b.at(0, first + c), one.b.col, sums + c);
    for (int64_t k = 0; k < p.k; ++k)
      for (int64_t rest = c; rest < cols; ++rest)
        sums[rest] = std::fma(a[k], widen<float>(*one.b.at(k, first + rest)), sums[rest]);
    one.write(0, first, 1, cols, sums, chunk);
  }
}
#else
template <class Spec>
constexpr bool kHasRowKernel = false;
#endif

}  // namespace bi_gemm

#endif
