// manifold_linear_local in tiles, on CUDA: samples are taken segment by segment, a segment being those with the same
// first basis point, so that few basis points act on a tile's rows, and few rows' slices on a basis point. The order is
// found on the device, for any index: nothing waits for it, and grids depend on sizes alone.
#pragma once

#include <algorithm>

#include "manifold_linear/manifold_linear.h"
#include "manifold_linear/manifold_linear_cuda_plan.h"

namespace neuromod {

/// Elements of ManifoldLinearParams::order.
inline int64_t cuda_order_elements(const ManifoldLinearParams& p) { return p.batch + p.num_basis + 1; }

/// How many basis points a tile of rows meets: fewer than there are where samples are sorted because the products that
/// are spared take longer than to find the order. Predicted, not measured.
inline int64_t cuda_basis_met(const ManifoldLinearParams& p) {
  if (!p.index || p.dtype == DType::float64 || p.rows() == 0) return p.num_basis;
  constexpr int64_t kTile = 128, kSort = int64_t(1) << 31;  // multiply-adds in the time of a launch of a few blocks
  const int64_t met = std::min(p.num_basis, p.num_local + ceil_div((p.num_basis - 1) * kTile, p.rows()));
  const int64_t spared = (p.num_basis - met) * p.rows() * p.out_features;
  return spared > kSort / std::max<int64_t>(p.in_features, 1) ? met : p.num_basis;
}

/// Whether a call's samples are sorted, in plans that take an order: where it pays; whenever it can be, in a forced
/// plan.
inline bool cuda_sorts(const ManifoldLinearParams& p) {
  if (!p.index || p.num_local == p.num_basis || p.dtype == DType::float64 || p.rows() == 0) return false;
  CudaPlan forced{};
  return forced_cuda_plan(forced) || cuda_basis_met(p) < p.num_basis;
}
inline bool takes_order(CudaPlan plan) { return plan == CudaPlan::small || plan == CudaPlan::large; }

/// Fills p.order.
int launch_segments(const ManifoldLinearParams& p, stream_t stream);

/// The first sample, in order, of those whose first basis point is k or more.
NEUROMOD_HOST_DEVICE int64_t segment_begin(const ManifoldLinearParams& p, int64_t k) { return p.order[p.batch + k]; }

/// The row at a position of all rows in order.
NEUROMOD_HOST_DEVICE int64_t ordered_row(const ManifoldLinearParams& p, int64_t position) {
  if (!p.order) return position;
  return p.order[position / p.tokens] * p.tokens + position % p.tokens;
}

/// Consecutive basis points, modulo K.
struct BasisRange {
  int64_t first, count;

  NEUROMOD_HOST_DEVICE int64_t at(int64_t i, int64_t num_basis) const {
    const int64_t k = first + i;
    return k < num_basis ? k : k - num_basis;
  }
  NEUROMOD_HOST_DEVICE int64_t find(int64_t k, int64_t num_basis) const {
    return k >= first ? k - first : k - first + num_basis;
  }
};

/// Those that act on some of the rows at positions from `first` to `last`.
NEUROMOD_HOST_DEVICE BasisRange acting_basis(const ManifoldLinearParams& p, int64_t first, int64_t last) {
  if (!p.order) return {0, p.num_basis};
  const int64_t begin = p.first_basis(p.order[first / p.tokens]), end = p.first_basis(p.order[last / p.tokens]);
  const int64_t count = end - begin + p.num_local;
  return {begin, count < p.num_basis ? count : p.num_basis};
}

/// Slices of positions that hold all rows on which a basis point acts: some from the first on, then others.
struct SliceRange {
  int64_t head, begin, count;  // slices from 0 on; the first and the number of the others
  NEUROMOD_HOST_DEVICE int64_t total() const { return head + count; }
  NEUROMOD_HOST_DEVICE int64_t at(int64_t i) const { return i < head ? i : begin + i - head; }
};
NEUROMOD_HOST_DEVICE SliceRange acting_slices(const ManifoldLinearParams& p, int64_t k, int64_t depth) {
  if (!p.order) return {0, 0, ceil_div(p.rows(), depth)};
  const int64_t first = k - p.num_local + 1, end = segment_begin(p, k + 1) * p.tokens;
  const bool wraps = first < 0;
  const int64_t begin = segment_begin(p, wraps ? first + p.num_basis : first) * p.tokens;
  const int64_t stop = wraps ? p.rows() : end, head = wraps ? ceil_div(end, depth) : 0;
  const int64_t from = begin / depth > head ? begin / depth : head, to = ceil_div(stop, depth);
  return {head, from, begin < stop && to > from ? to - from : 0};
}

}  // namespace neuromod
