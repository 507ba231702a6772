// Strided operands and their copies in the order a kernel reads them, for gemm.h.
#ifndef BI_INDUCTOR_GEMM_PACK_H
#define BI_INDUCTOR_GEMM_PACK_H

#include "gemm_vector.h"

namespace bi_gemm {

template <class T> struct Matrix {
  T* data;
  int64_t batch, row, col;  // strides in elements

  T* at(int64_t r, int64_t c) const { return data + r * row + c * col; }
  Matrix from(int64_t r, int64_t c) const { return {at(r, c), batch, row, col}; }
  Matrix select(int64_t b) const { return {data + b * batch, batch, row, col}; }
  Matrix transposed() const { return {data, batch, col, row}; }
};

#if defined(__AVX2__)
// Four consecutive elements, widened.
template <class In> BI_INLINE __m128 load_four(const In* source) {
  if constexpr (std::is_same_v<In, float>) {
    return _mm_loadu_ps(source);
  } else {
    if constexpr (std::is_same_v<In, c10::BFloat16>)
      return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)source)), 16));
#if defined(__F16C__)
    if constexpr (std::is_same_v<In, c10::Half>) return _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)source));
#endif
    return _mm_setr_ps(
        widen<float>(source[0]), widen<float>(source[1]), widen<float>(source[2]), widen<float>(source[3]));
  }
}

// column[j][i] = source[i * stride + j] for an 8 x 8 square.
template <class In> BI_INLINE void load_columns(__m256 column[8], const In* source, int64_t stride) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m256 rows[4], pairs[4];  // rows i and i + 4 side by side
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const In* from = source + i * stride + 4 * half;
      rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(load_four(from)), load_four(from + 4 * stride), 1);
    }
    pairs[0] = _mm256_unpacklo_ps(rows[0], rows[1]);
    pairs[1] = _mm256_unpackhi_ps(rows[0], rows[1]);
    pairs[2] = _mm256_unpacklo_ps(rows[2], rows[3]);
    pairs[3] = _mm256_unpackhi_ps(rows[2], rows[3]);
    column[4 * half + 0] = _mm256_shuffle_ps(pairs[0], pairs[2], 0x44);
    column[4 * half + 1] = _mm256_shuffle_ps(pairs[0], pairs[2], 0xee);
    column[4 * half + 2] = _mm256_shuffle_ps(pairs[1], pairs[3], 0x44);
    column[4 * half + 3] = _mm256_shuffle_ps(pairs[1], pairs[3], 0xee);
  }
}

// target[c * ld + r] = source[r * stride + c] for an 8 x 8 (float) or 4 x 4 (double) square.
template <class In> BI_INLINE void transpose_square(float* target, int64_t ld, const In* source, int64_t stride) {
  __m256 column[8];
  load_columns(column, source, stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) _mm256_storeu_ps(target + i * ld, column[i]);
}

template <class In> BI_INLINE void transpose_square(double* target, int64_t ld, const In* source, int64_t stride) {
  __m256d row[4], pair[4];
  for (int i = 0; i < 4; ++i) {
    alignas(32) double wide[4];
    for (int j = 0; j < 4; ++j) wide[j] = widen<double>(source[i * stride + j]);
    row[i] = _mm256_load_pd(wide);
  }
  for (int i = 0; i < 2; ++i) {
    pair[2 * i] = _mm256_unpacklo_pd(row[2 * i], row[2 * i + 1]);
    pair[2 * i + 1] = _mm256_unpackhi_pd(row[2 * i], row[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    _mm256_storeu_pd(target + i * ld, _mm256_permute2f128_pd(pair[i], pair[i + 2], 0x20));
    _mm256_storeu_pd(target + (i + 2) * ld, _mm256_permute2f128_pd(pair[i], pair[i + 2], 0x31));
  }
}
template <class T> constexpr int kSquare = 32 / int(sizeof(T));
#else
template <class T> constexpr int kSquare = 4;
template <class T, class In> BI_INLINE void transpose_square(T* target, int64_t ld, const In* source, int64_t stride) {
  for (int c = 0; c < 4; ++c)
    for (int r = 0; r < 4; ++r) target[c * ld + r] = widen<T>(source[r * stride + c]);
}
#endif

// target[r * ld + c] = source[r, c], widened, for rows x cols elements of any strides.
template <class T, class In>
void pack(T* __restrict target, int64_t ld, Matrix<const In> source, int64_t rows, int64_t cols) {
  constexpr int square = kSquare<T>;
  if (source.col == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const In* from = source.at(r, 0);
      int64_t c = 0;
      for (; c + kLanes<T> <= cols; c += kLanes<T>) store<T>(target + r * ld + c, load_widened<T>(from + c));
      for (; c < cols; ++c) target[r * ld + c] = widen<T>(from[c]);
    }
    return;
  }
  int64_t c = 0;
  if (source.row == 1) {
    for (; c + square <= cols; c += square) {
      int64_t r = 0;
      for (; r + square <= rows; r += square)
        transpose_square(target + r * ld + c, ld, source.at(r, c), source.col);
      for (; r < rows; ++r)
        for (int i = 0; i < square; ++i) target[r * ld + c + i] = widen<T>(*source.at(r, c + i));
    }
  }
  for (; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r) target[r * ld + c] = widen<T>(*source.at(r, c));
}

}  // namespace bi_gemm

#endif
