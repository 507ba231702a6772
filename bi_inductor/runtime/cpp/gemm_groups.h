// Products of groups, one after the other: each is a product of gemm.h, so its sums are chains of its own k alone.
#ifndef BI_INDUCTOR_GEMM_GROUPS_H
#define BI_INDUCTOR_GEMM_GROUPS_H

#include "gemm.h"

namespace bi_gemm {

// ends (one row): group g spans [ends[g-1], ends[g]) of a length, kept within it and in ascending order.
struct Group {
  int64_t start, end;
};

inline Group next_group(const Group& before, const Matrix<const int32_t>& ends, int64_t group, int64_t length) {
  const int64_t end = std::min<int64_t>(*ends.at(0, group), length);
  return {before.end, std::max(before.end, end)};
}

// Row r of group g times the g-th matrix of b; rows behind the last group are 0. p.batches: the number of groups.
template <class Spec> void run_row_groups(const Product<Spec>& p, const Matrix<const int32_t>& ends, int limit) {
  Group group{0, 0};
  for (int64_t g = 0; g < p.batches; ++g) {
    group = next_group(group, ends, g, p.m);
    const int64_t rows = group.end - group.start;
    run<Spec>({p.a.from(group.start, 0), p.b.select(g), p.bias, p.out.from(group.start, 0), 1, rows, p.n, p.k}, limit);
  }
  for (int64_t r = group.end; r < p.m; ++r)
    for (int64_t c = 0; c < p.n; ++c) *p.out.at(r, c) = typename Spec::Out(0);
}

// The g-th matrix of the output sums over the k of group g. p.batches: the number of groups.
template <class Spec> void run_depth_groups(const Product<Spec>& p, const Matrix<const int32_t>& ends, int limit) {
  Group group{0, 0};
  for (int64_t g = 0; g < p.batches; ++g) {
    group = next_group(group, ends, g, p.k);
    const int64_t depth = group.end - group.start;
    run<Spec>({p.a.from(0, group.start), p.b.from(group.start, 0), p.bias, p.out.select(g), 1, p.m, p.n, depth}, limit);
  }
}

}  // namespace bi_gemm

#endif
