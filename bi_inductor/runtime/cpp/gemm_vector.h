// Vectors of accumulators and the four element types, for gemm.h.
#ifndef BI_INDUCTOR_GEMM_VECTOR_H
#define BI_INDUCTOR_GEMM_VECTOR_H

#if !defined(__GNUC__)
#error "batchinv's C++ matmul needs GCC or Clang (vector extensions)"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#include <omp.h>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace bi_gemm {

#define BI_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

template <class T> struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> constexpr int kLanes = kVectorBytes / int(sizeof(T));

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halfwords __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes

template <class V> BI_INLINE V load_bytes(const void* source) {
  V v;
  std::memcpy(&v, source, sizeof v);
  return v;
}

template <class V> BI_INLINE void store_bytes(void* target, V v) { std::memcpy(target, &v, sizeof v); }

template <class T> BI_INLINE Vector<T> load(const T* source) { return load_bytes<Vector<T>>(source); }
template <class T> BI_INLINE void store(T* target, Vector<T> v) { store_bytes(target, v); }

// Not zeros + x, which would lose the sign of a zero. GCC assembles a loop over lanes one by one, hence intrinsics.
template <class T> BI_INLINE Vector<T> broadcast(T x) {
  constexpr bool single = std::is_same_v<T, float>;
#if defined(__AVX512F__)
  if constexpr (single) return (Vector<T>)_mm512_set1_ps(x);
  else return (Vector<T>)_mm512_set1_pd(x);
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (single) return (Vector<T>)_mm256_set1_ps(x);
  else return (Vector<T>)_mm256_set1_pd(x);
#elif defined(__aarch64__)
  if constexpr (single) return (Vector<T>)vdupq_n_f32(x);
  else return (Vector<T>)vdupq_n_f64(x);
#else
  if constexpr (single) return Vector<T>{x, x, x, x};
  else return Vector<T>{x, x};
#endif
}

// One rounding per lane. The generic loop becomes the target's instruction where it has one, else calls of libm.
template <class T> BI_INLINE Vector<T> fused_multiply_add(Vector<T> a, Vector<T> b, Vector<T> c) {
  constexpr bool single = std::is_same_v<T, float>;
#if defined(__AVX512F__)
  if constexpr (single) return (Vector<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else return (Vector<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (single) return (Vector<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else return (Vector<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  if constexpr (single) return (Vector<T>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  else return (Vector<T>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  for (int i = 0; i < kLanes<T>; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

// Which NaN an FMA returns depends on the operand order a compiler chose, so every NaN becomes the same one.
template <class T> BI_INLINE Vector<T> with_one_nan(Vector<T> v) {
  return v == v ? v : broadcast<T>(std::numeric_limits<T>::quiet_NaN());
}

template <class T, class In> BI_INLINE T widen(In x) {
  if constexpr (std::is_same_v<In, double>) return static_cast<T>(x);
  else return static_cast<T>(static_cast<float>(x));
}

// kLanes<T> consecutive elements, widened exactly.
template <class T, class In> BI_INLINE Vector<T> load_widened(const In* source) {
  constexpr bool single = std::is_same_v<T, float>;
  if constexpr (std::is_same_v<T, In>) return load<T>(source);
  if constexpr (single && std::is_same_v<In, c10::BFloat16>)
    return (Vector<T>)(__builtin_convertvector(load_bytes<Halfwords>(source), Words) << 16);
#if defined(__AVX512F__)
  if constexpr (single && std::is_same_v<In, c10::Half>)
    return (Vector<T>)_mm512_cvtph_ps(load_bytes<__m256i>(source));
#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
  if constexpr (single && std::is_same_v<In, c10::Half>)
    return (Vector<T>)_mm256_cvtph_ps(load_bytes<__m128i>(source));
#endif
  Vector<T> v{};
  for (int i = 0; i < kLanes<T>; ++i) v[i] = widen<T>(source[i]);
  return v;
}

// To nearest, ties to even: add half a unit in the last place kept, one less before an even number. The only NaN
// that arrives here is the quiet one, which this leaves a NaN.
template <class Bits> BI_INLINE Bits upper_half_rounded(Bits x) { return (x + 0x7fffu + ((x >> 16) & 1u)) >> 16; }

template <class Out, class T> BI_INLINE Out narrow(T x) {
  if constexpr (std::is_same_v<Out, c10::BFloat16>) {
    const float value = static_cast<float>(x);
    const uint32_t bits = upper_half_rounded(load_bytes<uint32_t>(&value));
    return c10::BFloat16(static_cast<uint16_t>(bits), c10::BFloat16::from_bits());
  } else if constexpr (std::is_same_v<Out, c10::Half>) {
    return c10::Half(static_cast<float>(x));
  } else {
    return static_cast<Out>(x);
  }
}

template <class Out, class T> BI_INLINE void store_narrowed(Out* target, Vector<T> v) {
  constexpr bool single = std::is_same_v<T, float>;
  if constexpr (std::is_same_v<T, Out>) return store<T>(target, v);
  if constexpr (single && std::is_same_v<Out, c10::BFloat16>)
    return store_bytes(target, __builtin_convertvector(upper_half_rounded((Words)v), Halfwords));
#if defined(__AVX512F__)
  if constexpr (single && std::is_same_v<Out, c10::Half>)
    return store_bytes(target, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
  if constexpr (single && std::is_same_v<Out, c10::Half>)
    return store_bytes(target, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
  for (int i = 0; i < kLanes<T>; ++i) target[i] = narrow<Out, T>(v[i]);
}

}  // namespace bi_gemm

#endif
