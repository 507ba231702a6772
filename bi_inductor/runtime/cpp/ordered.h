// Sums and products in canonical order.
//
//   result = the aligned binary tree of adjacent pairs, ((x0 . x1) . (x2 . x3)) . ..., over elements in the order
//            they were pushed, padded with the identity to a power of two; a finished sum gets + 0.0 once,
//            and a NaN is the one quiet NaN, since which operand's payload an addition keeps is up to the compiler.
//
// The order depends on the number of elements alone: not on vector width, on how many elements one push brings,
// nor on where vectors begin. Two accumulators compute it:
//
//   Stream<T, Op>  pushes are consecutive elements of one reduction, one or a vector at a time.
//   Lanes<V, Op>   every push is one element of as many independent reductions as V has lanes.
//
// Both are radix-8 counters. A full block of leaves is reduced by three levels of the tree and its nodes become
// elements of the next block, so at any moment a few partly filled blocks stand for the whole tree. Nothing but
// the counters is initialised: a short row must not pay for the depth that a long one needs. The blocks live in a
// separate object: an accumulator is then nothing but its counters, which compilers keep in registers.
#ifndef BATCHINV_ORDERED_H
#define BATCHINV_ORDERED_H

#include <cstdint>
#include <limits>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__NO_SIGNED_ZEROS__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    defined(__FAST_MATH__)
#error "batchinv: kernels must be compiled without unsafe floating-point optimisations"
#endif

namespace batchinv {

constexpr int kFan = 8; // children of a node: three levels of the binary tree
constexpr int kBlock = kFan * kFan; // elements of a Stream block: what one vector of nodes is made from
constexpr int kLevels = 12; // 8^14 elements fit, more than an address space holds

template <typename T>
inline T one_nan(const T& x) {
  if constexpr (std::is_floating_point_v<T>) {
    return x == x ? x : std::numeric_limits<T>::quiet_NaN();
  } else {
    return T::blendv(T(std::numeric_limits<typename T::value_type>::quiet_NaN()), x, x == x);
  }
}

// Empty reductions and pads. Pads of a sum may be +0.0: only the sign of a zero total depends on it, and
// finish() settles that sign.
struct Add {
  static constexpr int identity = 0;
  template <typename T>
  static T combine(const T& a, const T& b) {
    return a + b;
  }
#if defined(__AVX2__)
  static __m256 combine(__m256 a, __m256 b) {
    return _mm256_add_ps(a, b);
  }
  static __m256d combine(__m256d a, __m256d b) {
    return _mm256_add_pd(a, b);
  }
#endif
  template <typename T>
  static T finish(const T& total) {
    return one_nan(T(total + T(0)));
  }
};

struct Multiply {
  static constexpr int identity = 1;
  template <typename T>
  static T combine(const T& a, const T& b) {
    return a * b;
  }
#if defined(__AVX2__)
  static __m256 combine(__m256 a, __m256 b) {
    return _mm256_mul_ps(a, b);
  }
  static __m256d combine(__m256d a, __m256d b) {
    return _mm256_mul_pd(a, b);
  }
#endif
  template <typename T>
  static T finish(const T& total) {
    return one_nan(total);
  }
};

template <typename Op, typename T>
inline T tree_of_8(const T* x) {
  return Op::combine(
      Op::combine(Op::combine(x[0], x[1]), Op::combine(x[2], x[3])),
      Op::combine(Op::combine(x[4], x[5]), Op::combine(x[6], x[7])));
}

// nodes[i] = tree of block[8 i ... 8 i + 7], i < 8
template <typename Op, typename T>
inline void reduce_block(const T* block, T* nodes) {
  for (int i = 0; i < kFan; ++i) {
    nodes[i] = tree_of_8<Op>(block + kFan * i);
  }
}

#if defined(__AVX2__)
// Adjacent pairs of two vectors: (a0.a1, a2.a3, b0.b1, b2.b3) in each 128-bit half.
template <typename Op>
inline __m256 adjacent_pairs(__m256 a, __m256 b) {
  return Op::combine(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xDD));
}

// (a0.a1, b0.b1, a2.a3, b2.b3)
template <typename Op>
inline __m256d adjacent_pairs(__m256d a, __m256d b) {
  return Op::combine(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
}

template <typename Op>
inline void reduce_block(const float* block, float* nodes) {
  __m256 pairs[4], quads[2];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = adjacent_pairs<Op>(_mm256_loadu_ps(block + 16 * i), _mm256_loadu_ps(block + 16 * i + 8));
  }
  for (int i = 0; i < 2; ++i) {
    quads[i] = adjacent_pairs<Op>(pairs[2 * i], pairs[2 * i + 1]);
  }
  // The low halves hold the left quads of the eight nodes, the high halves their right quads.
  __m256 left = _mm256_permute2f128_ps(quads[0], quads[1], 0x20);
  __m256 right = _mm256_permute2f128_ps(quads[0], quads[1], 0x31);
  _mm256_storeu_ps(nodes, Op::combine(left, right));
}

template <typename Op>
inline void reduce_block(const double* block, double* nodes) {
  for (int half = 0; half < 2; ++half) {
    __m256d quads[2]; // (left quad, right quad) of two nodes each
    for (int i = 0; i < 2; ++i) {
      const double* x = block + 32 * half + 16 * i;
      __m256d first = adjacent_pairs<Op>(_mm256_loadu_pd(x), _mm256_loadu_pd(x + 4));
      __m256d second = adjacent_pairs<Op>(_mm256_loadu_pd(x + 8), _mm256_loadu_pd(x + 12));
      quads[i] = Op::combine(
          _mm256_permute2f128_pd(first, second, 0x20), _mm256_permute2f128_pd(first, second, 0x31));
    }
    __m256d swapped = adjacent_pairs<Op>(quads[0], quads[1]); // nodes 0, 2, 1, 3
    _mm256_storeu_pd(nodes + 4 * half, _mm256_permute4x64_pd(swapped, 0xD8));
  }
}
#endif

#define BATCHINV_INLINE inline __attribute__((always_inline))

template <typename T>
struct StreamBlocks {
  static constexpr int kSlack = 64; // a vector may be stored at the last element of a block
  alignas(64) T leaves[kBlock + kSlack];
  alignas(64) T nodes[kLevels][kBlock];
};

template <typename T, typename Op>
class Stream {
 public:
  using Blocks = StreamBlocks<T>;

  Stream() = default;
  BATCHINV_INLINE explicit Stream(Blocks& blocks) : leaves_(blocks.leaves), nodes_(blocks.nodes) {}

  BATCHINV_INLINE void push(T x) {
    leaves_[count_++] = x;
    if (count_ == kBlock) {
      close_block();
    }
  }

#if INDUCTOR_USE_VECTOR_TYPES()
  BATCHINV_INLINE void push(const at::vec::Vectorized<T>& x) {
    push(x, at::vec::Vectorized<T>::size());
  }

  // The first `length` lanes of x, all of them or a tail.
  BATCHINV_INLINE void push(const at::vec::Vectorized<T>& x, int64_t length) {
    x.store(leaves_ + count_);
    count_ += length;
    if (count_ >= kBlock) {
      at::vec::Vectorized<T> beyond = at::vec::Vectorized<T>::loadu(leaves_ + kBlock);
      int64_t left = count_ - kBlock;
      close_block();
      beyond.store(leaves_);
      count_ = left;
    }
  }

  template <int N>
  BATCHINV_INLINE void push(const at::vec::VectorizedN<T, N>& x) {
    for (int i = 0; i < N; ++i) {
      push(x[i]);
    }
  }

  template <int N>
  BATCHINV_INLINE void push(const at::vec::VectorizedN<T, N>& x, int64_t length) {
    constexpr int64_t width = at::vec::Vectorized<T>::size();
    for (int i = 0; i < N && length > 0; ++i, length -= width) {
      push(x[i], length < width ? length : width);
    }
  }
#endif

  BATCHINV_INLINE T total() {
    return Op::finish(root());
  }

 private:
  T* leaves_ = nullptr;
  T (*nodes_)[kBlock] = nullptr;
  int64_t count_ = 0; // leaves waiting for their block to fill
  int64_t closed_ = 0; // blocks of leaves reduced so far

  BATCHINV_INLINE void close_block() {
    reduce_block<Op>(leaves_, nodes_[0] + kFan * (closed_ % kFan));
    count_ = 0;
    ++closed_;
    int64_t closed = closed_;
    for (int level = 0; closed % kFan == 0; ++level) {
      closed /= kFan;
      reduce_block<Op>(nodes_[level], nodes_[level + 1] + kFan * ((closed - 1) % kFan));
    }
  }

  static void pad(T* block, int64_t filled, int64_t end) {
    for (; filled % kFan != 0; ++filled) {
      block[filled] = T(Op::identity);
    }
    for (; filled < end; filled += kFan) {
      for (int i = 0; i < kFan; ++i) {
        block[filled + i] = T(Op::identity);
      }
    }
  }

  static T root_of(T* block, int64_t filled) {
    if (filled <= kFan) {
      pad(block, filled, kFan); // an empty reduction is one block of identities
      return tree_of_8<Op>(block);
    }
    T nodes[kFan];
    pad(block, filled, kBlock);
    reduce_block<Op>(block, nodes);
    return tree_of_8<Op>(nodes);
  }

  BATCHINV_INLINE T root() {
    if (closed_ == 0) {
      return root_of(leaves_, count_);
    }
    T* block = leaves_;
    int64_t filled = count_;
    int64_t closed = closed_;
    for (int level = 0;; ++level) {
      int64_t above = kFan * (closed % kFan);
      if (filled > 0) {
        pad(block, filled, kBlock);
        reduce_block<Op>(block, nodes_[level] + above);
        above += kFan;
      }
      block = nodes_[level];
      filled = above;
      closed /= kFan;
      if (closed == 0) {
        return root_of(block, filled);
      }
    }
  }
};

#if INDUCTOR_USE_VECTOR_TYPES()
template <typename V>
struct LaneBlocks {
  alignas(64) typename V::value_type slots[kLevels][kFan][V::size()];
};

template <typename V, typename Op>
class Lanes {
 public:
  using Blocks = LaneBlocks<V>;

  BATCHINV_INLINE explicit Lanes(Blocks& blocks) : slots_(blocks.slots) {}

  BATCHINV_INLINE void push(const V& x) {
    x.store(slots_[0][count_ % kFan]);
    ++count_;
    int64_t closed = count_;
    for (int level = 0; closed % kFan == 0; ++level) {
      closed /= kFan;
      node_of(level).store(slots_[level + 1][(closed - 1) % kFan]);
    }
  }

  BATCHINV_INLINE V total() {
    return Op::finish(root());
  }

 private:
  typename V::value_type (*slots_)[kFan][V::size()];
  int64_t count_ = 0;

  BATCHINV_INLINE V node_of(int level) {
    V x[kFan];
    for (int i = 0; i < kFan; ++i) {
      x[i] = V::loadu(slots_[level][i]);
    }
    return tree_of_8<Op>(x);
  }

  BATCHINV_INLINE V padded_node_of(int level, int64_t filled) {
    for (int64_t i = filled; i < kFan; ++i) {
      V(typename V::value_type(Op::identity)).store(slots_[level][i]);
    }
    return node_of(level);
  }

  BATCHINV_INLINE V root() {
    int64_t closed = count_;
    int64_t carried = 0; // 1 if a partly filled lower level has put its node behind the closed ones
    for (int level = 0;; ++level) {
      int64_t filled = closed % kFan + carried;
      closed /= kFan;
      if (closed == 0) {
        return padded_node_of(level, filled);
      }
      carried = filled > 0;
      if (carried) {
        padded_node_of(level, filled).store(slots_[level + 1][closed % kFan]);
      }
    }
  }
};
#endif

} // namespace batchinv

#endif // BATCHINV_ORDERED_H
