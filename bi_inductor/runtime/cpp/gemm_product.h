// One product as a value: operands, epilogue and the store of finished sums, for gemm.h.
#ifndef BI_INDUCTOR_GEMM_PRODUCT_H
#define BI_INDUCTOR_GEMM_PRODUCT_H

#include "gemm_pack.h"

namespace bi_gemm {

// Spec: types In, Acc, Bias, Out; constexpr functions has_bias, bias_is_start, scale_product, scale_bias (bool), alpha,
// beta (double). A bias that is the start is what each accumulator holds before k = 0; it is not added at the end.
template <class Spec> struct Product {
  using In = typename Spec::In;
  using Acc = typename Spec::Acc;
  using Bias = typename Spec::Bias;
  using Out = typename Spec::Out;
  static constexpr int lanes = kLanes<Acc>;

  Matrix<const In> a, b;
  Matrix<const Bias> bias;
  Matrix<Out> out;
  int64_t batches, m, n, k;

  Product select(int64_t b) const {
    return {a.select(b), this->b.select(b), bias.select(b), out.select(b), 1, m, n, k};
  }

  // The same sums with the roles of a and b exchanged (a product commutes exactly).
  Product transposed() const {
    return {b.transposed(), a.transposed(), bias.transposed(), out.transposed(), batches, n, m, k};
  }

  // What rows x cols accumulators at (row, col) of the first batch hold before k = 0; lanes up to `width` are zero.
  void load_start(int64_t row, int64_t col, int64_t rows, int64_t cols, int64_t width, Acc* sums, int64_t ld) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < width; ++c)
        sums[r * ld + c] = c < cols ? widen<Acc>(*bias.at(row + r, col + c)) : Acc(0);
  }

  // Store round(alpha * sum + beta * bias) for rows x cols elements at (row, col) of the first batch.
  void write(int64_t row, int64_t col, int64_t rows, int64_t cols, const Acc* sums, int64_t ld) const {
    const auto vector_bias = [](const Bias* from) { return load_widened<Acc>(from); };
    const auto scalar_bias = [](const Bias* from) { return broadcast<Acc>(widen<Acc>(*from)); };
    for (int64_t r = 0; r < rows; ++r) {
      const Acc* sum = sums + r * ld;
      Out* to = out.at(row + r, col);
      const Bias* from = bias.at(row + r, col);
      int64_t c = 0;
      if (out.col == 1 && (!Spec::has_bias() || bias.col == 1))
        for (; c + lanes <= cols; c += lanes)
          store_narrowed<Out, Acc>(to + c, finished(load<Acc>(sum + c), from + c, vector_bias));
      for (; c < cols; ++c)
        to[c * out.col] = narrow<Out, Acc>(finished(broadcast<Acc>(sum[c]), from + c * bias.col, scalar_bias)[0]);
    }
  }

  // alpha * sum + beta * bias: the multiplies and the add round separately.
  template <class LoadBias>
  static BI_INLINE Vector<Acc> finished(Vector<Acc> sum, const Bias* bias, LoadBias load_bias) {
    if constexpr (Spec::scale_product()) sum = sum * broadcast<Acc>(static_cast<Acc>(Spec::alpha()));
    if constexpr (Spec::has_bias() && !Spec::bias_is_start()) {
      Vector<Acc> addend = load_bias(bias);
      if constexpr (Spec::scale_bias()) addend = addend * broadcast<Acc>(static_cast<Acc>(Spec::beta()));
      sum = sum + addend;
    }
    return with_one_nan<Acc>(sum);
  }
};

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Buffers of one thread; they grow and stay, since fresh pages cost more than a small product.
class Workspace {
 public:
  ~Workspace() { std::free(data_); }
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, size_);
      if (data_ == nullptr) throw std::bad_alloc();
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bi_gemm

#endif
