// One implementation per elementary function, whatever kernel a value is computed in.
//
// The vector implementation defines the function: a scalar is computed as a lane of a vector, so that a vector
// body, a masked tail, a scalar tail and a kernel that is never vectorised agree in every bit. That needs
// functions whose lanes do not look at each other; near() makes such a function of one that does.
#ifndef BATCHINV_ELEMENTARY_H
#define BATCHINV_ELEMENTARY_H

#include <cstdint>
#include <limits>

namespace batchinv {

// x - floor(x / y) y, exactly, with the sign of y.
template <typename T>
inline T remainder(T x, T y) {
  T r = std::fmod(x, y);
  return r != 0 && (r < 0) != (y < 0) ? r + y : r;
}

#if INDUCTOR_USE_VECTOR_TYPES()
template <typename F, typename T, typename... Ts>
inline T in_lane(F f, T x, Ts... rest) {
  using V = at::vec::Vectorized<T>;
  alignas(64) T lanes[V::size()];
  f(V(x), V(static_cast<T>(rest))...).store(lanes);
  return lanes[0];
}

// Conversion as vectors convert: c10's scalars differ in the bits of NaNs and in out-of-range integers.
template <typename To, typename From>
inline To convert_in_lane(From x) {
  constexpr int n_from = sizeof(From) > sizeof(float) ? 2 : 1;
  alignas(64) To lanes[at::vec::Vectorized<To>::size()];
  at::vec::VectorizedN<To, 1>(at::vec::convert<To, 1, From, n_from>(at::vec::VectorizedN<From, n_from>(x))).store(lanes);
  return lanes[0];
}

// f as a function of each lane alone. Sleef's trigonometric functions reduce the arguments of all lanes in the
// way that the largest one needs; below `bound` they all take the same way, and beyond it lanes go one by one.
template <typename F, typename T>
inline at::vec::Vectorized<T> near(F f, const at::vec::Vectorized<T>& x, double bound) {
  using V = at::vec::Vectorized<T>;
  if (at::vec::VecMask<T, 1>(x.abs() < V(static_cast<T>(bound))).all_masked()) {
    return f(x);
  }
  alignas(64) T lanes[V::size()];
  x.store(lanes);
  for (int i = 0; i < V::size(); ++i) {
    lanes[i] = in_lane(f, lanes[i]);
  }
  return V::loadu(lanes);
}

template <typename F, typename T, int N>
inline at::vec::VectorizedN<T, N> near(F f, const at::vec::VectorizedN<T, N>& x, double bound) {
  at::vec::VectorizedN<T, N> result;
  for (int i = 0; i < N; ++i) {
    result[i] = near(f, x[i], bound);
  }
  return result;
}
#endif

} // namespace batchinv

#endif // BATCHINV_ELEMENTARY_H
