// Matrix product with one fixed order of additions.
//
//   out[b,m,n] = round(alpha * chain(b,m,n) + beta * bias[b,m,n])
//   chain      = fma(a[b,m,K-1], w[b,K-1,n], ... fma(a[b,m,1], w[b,1,n], fma(a[b,m,0], w[b,0,n], start)))
//   start      = +0, or what the bias holds if it is the start (then it is not added)
//
// Every output element has one accumulator (float, or double for double inputs) and visits k = 0 ... K-1 in
// ascending order; operands are widened exactly; the multiply and the add of the epilogue round separately; then
// there is one rounding to the output type, and a NaN is written as the one positive quiet NaN. Cutting K into
// blocks is exact: an accumulator is stored and loaded in its own precision. Hence tiles, packing, threads, vector
// width and tails are free: they choose *when* an element is computed, never *how*.
//
// Without a hardware FMA the same chain runs through std::fma: equal bits, slowly.
#ifndef BI_INDUCTOR_GEMM_H
#define BI_INDUCTOR_GEMM_H

#include "gemm_product.h"
#include "gemm_row.h"

namespace bi_gemm {

// Sizes of blocks, as measured on an AMD EPYC (Zen 3) with 32 KiB and 512 KiB caches. None can reach a bit.
constexpr int64_t kDepth = 384;       // steps of k per pass: a panel of b (16 columns) fits the first-level cache
constexpr int64_t kStripRows = 96;    // rows of a that stay in the second-level cache while panels pass by
constexpr int64_t kItemRows = 384;    // rows and columns of the output in one work item
constexpr int64_t kItemCols = 256;
constexpr int64_t kDirectRows = 12;   // up to here packing a row-major b does not pay
constexpr int64_t kDirectDepth = 8;   // rows of b streamed at once then: no more than ways of the first-level cache
constexpr int64_t kDirectCols = 4096; // and columns of a work item

// Rows x (Columns vectors) accumulators walk `depth` steps of k, ascending, from `start` (null: +0) to `target`.
template <class T, int Rows, int Columns>
void chain_tile(
    int64_t depth, const T* __restrict a, int64_t lda, const T* __restrict b, int64_t ldb, const T* start, T* target,
    int64_t ld) {
  Vector<T> sum[Rows][Columns];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Columns; ++v) sum[r][v] = start ? load<T>(start + r * ld + v * kLanes<T>) : Vector<T>{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> right[Columns];
#pragma GCC unroll 8
    for (int v = 0; v < Columns; ++v) right[v] = load<T>(b + k * ldb + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vector<T> left = broadcast<T>(a[r * lda + k]);
#pragma GCC unroll 8
      for (int v = 0; v < Columns; ++v) sum[r][v] = fused_multiply_add<T>(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Columns; ++v) store<T>(target + r * ld + v * kLanes<T>, sum[r][v]);
}

// How the output is cut into work items, and what a thread keeps in which cache. None of it can reach a bit.
struct Blocks {
  int64_t row_parts, col_parts;  // work items per batch
  int64_t rows, cols;            // output elements of an item (cols: a multiple of the tile's width)
  int64_t depth;                 // steps of k per pass
  int64_t strip;                 // rows of a that stay in the second-level cache while panels of b pass by
};

// Enough items for the threads; wide ones first, because an item packs its own columns of b.
inline Blocks choose_blocks(
    int64_t batches, int64_t m, int64_t n, int64_t k, int64_t tile_rows, int64_t width, int64_t most_cols,
    int threads) {
  Blocks blocks;
  blocks.row_parts = ceil_div(m, kItemRows);
  blocks.col_parts = ceil_div(n, most_cols);
  const int64_t wanted = threads == 1 ? 1 : 3 * threads;
  while (batches * blocks.row_parts * blocks.col_parts < wanted) {
    if (n >= blocks.col_parts * 128) ++blocks.col_parts;
    else if (m >= blocks.row_parts * 96) ++blocks.row_parts;
    else if (n > blocks.col_parts * width) ++blocks.col_parts;
    else break;
  }
  blocks.cols = ceil_div(ceil_div(n, blocks.col_parts), width) * width;
  blocks.rows = ceil_div(ceil_div(m, blocks.row_parts), tile_rows) * tile_rows;
  blocks.col_parts = ceil_div(n, blocks.cols);
  blocks.row_parts = ceil_div(m, blocks.rows);
  blocks.depth = std::max<int64_t>(1, ceil_div(k, std::max<int64_t>(1, ceil_div(k, kDepth))));
  blocks.strip = std::max(kStripRows / tile_rows, int64_t(1)) * tile_rows;
  return blocks;
}

// Computes a product in register tiles of at most MaxRows rows and Columns vectors.
template <class Spec, int MaxRows, int Columns> class Engine {
  using In = typename Spec::In;
  using Acc = typename Spec::Acc;
  static constexpr int64_t width = Columns * kLanes<Acc>;
  static constexpr bool kWidens = !std::is_same_v<In, Acc>;

  // Accumulator-typed rows in memory: packed, or the operand itself.
  struct Rows {
    const Acc* data;
    int64_t ld;
  };

  // A block of the output and the buffers of the thread that computes it.
  struct Item {
    Product<Spec> p;  // of one batch
    int64_t row, col, rows, cols;
    Acc *packed_a, *packed_b, *sums;
    int64_t sums_ld;
  };

  const Product<Spec>& p_;
  bool pack_a_, pack_b_, several_passes_;
  Blocks blocks_;

 public:
  Engine(const Product<Spec>& p, int threads)
      : p_(p),
        pack_a_(kWidens || p.a.col != 1),
        pack_b_(kWidens || p.b.col != 1 || p.m > kDirectRows),
        blocks_(choose_blocks(
            p.batches, p.m, p.n, p.k, MaxRows, width, pack_b_ ? kItemCols : kDirectCols, threads)) {
    // Taller tiles do more per element of b than a missed line costs, and prefer fewer passes.
    if (!pack_b_) blocks_.depth = std::min(blocks_.depth, MaxRows <= 3 ? kDirectDepth : 4 * kDirectDepth);
    several_passes_ = p.k > blocks_.depth;
  }

  void run(int threads) const {
    const int64_t items = p_.batches * blocks_.row_parts * blocks_.col_parts;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t index = 0; index < items; ++index) {
      static thread_local Workspace workspace;
      run_item(make_item(index, workspace));
    }
  }

 private:
  Item make_item(int64_t index, Workspace& workspace) const {
    Item item{p_.select(index / (blocks_.row_parts * blocks_.col_parts))};
    item.row = index % blocks_.row_parts * blocks_.rows;
    item.col = index / blocks_.row_parts % blocks_.col_parts * blocks_.cols;
    item.rows = std::min(blocks_.rows, p_.m - item.row);
    item.cols = std::min(blocks_.cols, p_.n - item.col);
    item.sums_ld = ceil_div(item.cols, width) * width;
    const int64_t b_size = item.sums_ld * blocks_.depth;
    const int64_t sums_size = several_passes_ ? item.rows * item.sums_ld : 0;
    const int64_t a_size = pack_a_ ? blocks_.strip * packed_a_ld() : 0;
    item.packed_b = static_cast<Acc*>(workspace.reserve((b_size + sums_size + a_size) * sizeof(Acc)));
    item.sums = item.packed_b + b_size;
    item.packed_a = item.sums + sums_size;
    return item;
  }

  // Not a power of two times the line size, which would map all rows to the same few sets of a cache.
  int64_t packed_a_ld() const { return blocks_.depth + 16; }

  void run_item(const Item& item) const {
    for (int64_t k = 0; k == 0 || k < p_.k; k += blocks_.depth) {
      const int64_t depth = std::min(blocks_.depth, p_.k - k);
      for (int64_t strip = 0; strip < item.rows; strip += blocks_.strip) {
        const int64_t rows = std::min(blocks_.strip, item.rows - strip);
        const Rows left = rows_of_a(item, strip, rows, k, depth);
        for (int64_t col = 0; col < item.cols; col += width)
          run_column(item, strip, rows, col, k, depth, left, panel_of_b(item, col, k, depth, strip == 0));
      }
    }
  }

  Rows rows_of_a(const Item& item, int64_t strip, int64_t rows, int64_t k, int64_t depth) const {
    const Matrix<const In> source = item.p.a.from(item.row + strip, k);
    if constexpr (!kWidens)
      if (!pack_a_) return {source.data, source.row};
    pack<Acc>(item.packed_a, packed_a_ld(), source, rows, depth);
    return {item.packed_a, packed_a_ld()};
  }

  // `width` columns of b, padded with zeros: a lane without a column is computed and never stored.
  Rows panel_of_b(const Item& item, int64_t col, int64_t k, int64_t depth, bool first_use) const {
    const Matrix<const In> source = item.p.b.from(k, item.col + col);
    const int64_t cols = std::min(width, item.cols - col);
    if constexpr (!kWidens)
      if (!pack_b_ && cols == width) return {source.data, source.row};
    Acc* panel = item.packed_b + col * blocks_.depth;
    if (first_use) {
      if (cols < width) std::fill_n(panel, depth * width, Acc(0));
      pack<Acc>(panel, width, source, depth, cols);
    }
    return {panel, width};
  }

  // One panel of b against a strip of a, in tiles of nearly equal heights.
  void run_column(
      const Item& item, int64_t strip, int64_t rows, int64_t col, int64_t k, int64_t depth, Rows left,
      Rows right) const {
    const bool first = k == 0, last = k + depth >= p_.k;
    alignas(64) Acc tile[MaxRows * width];
    const int64_t ld = several_passes_ ? item.sums_ld : width;
    for (int64_t r = 0; r < rows;) {
      const int64_t height = ceil_div(rows - r, ceil_div(rows - r, MaxRows));
      Acc* sum = several_passes_ ? item.sums + (strip + r) * ld + col : tile;
      const int64_t row = item.row + strip + r, cols = std::min(width, item.cols - col);
      const Acc* start = first ? nullptr : sum;
      if constexpr (Spec::bias_is_start())
        if (first) {
          item.p.load_start(row, item.col + col, height, cols, width, sum, ld);
          start = sum;
        }
      run_tile<MaxRows>(height, depth, {left.data + r * left.ld, left.ld}, right, start, sum, ld);
      if (last) item.p.write(row, item.col + col, height, cols, sum, ld);
      r += height;
    }
  }

  template <int Height>
  static void run_tile(
      int64_t height, int64_t depth, Rows a, Rows b, const Acc* start, Acc* target, int64_t ld) {
    if constexpr (Height > 1)
      if (height < Height) return run_tile<Height - 1>(height, depth, a, b, start, target, ld);
    chain_tile<Acc, Height, Columns>(depth, a.data, a.ld, b.data, b.ld, start, target, ld);
  }
};

// Height and width (in vectors) of the register tile: as many accumulators as leave room for a row of b and one of a.
constexpr int kTileColumns = kRegisters == 32 && kVectorBytes == 16 ? 4 : 2;
constexpr int kTileRows = kRegisters == 32 && kVectorBytes == 64 ? 12 : 6;

// Threads for a product; a thread is worth waking for about 2^16 multiply-adds (a microsecond or two).
// `limit` is the most to use; 0 follows the caller's setting at run time.
inline int choose_threads(double multiply_adds, int limit) {
  if (omp_in_parallel()) return 1;
  const double most = limit > 0 ? limit : omp_get_max_threads();
  return int(std::max(1.0, std::min(most, multiply_adds / (1 << 16))));
}

template <class Spec> void run(const Product<Spec>& product, int limit) {
  if (product.batches == 0 || product.m == 0 || product.n == 0) return;
  // Vectors run along the columns of the output; a product with few columns is computed as its transpose.
  const bool narrow = product.n < kLanes<typename Spec::Acc> && product.n < product.m;
  const Product<Spec> p = narrow ? product.transposed() : product;
  const int threads = choose_threads(double(p.batches) * double(p.m) * double(p.n) * double(p.k + 8), limit);
  if constexpr (kHasRowKernel<Spec> && !Spec::bias_is_start())
    if (p.m == 1 && p.b.row == 1 && p.b.col != 1) return run_row(p, threads);
  // Few rows: more vectors per row, so that enough chains are in flight to hide the latency of an addition.
  if (p.m == 1) Engine<Spec, 1, 8>(p, threads).run(threads);
  else if (p.m <= 3) Engine<Spec, 3, 4>(p, threads).run(threads);
  else Engine<Spec, kTileRows, kTileColumns>(p, threads).run(threads);
}

}  // namespace bi_gemm

#endif
