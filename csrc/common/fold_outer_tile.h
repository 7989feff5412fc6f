// A tile of the gradients of blends W_b = sum_k c[b,k] P_k, from those of the W_b, which never exist in memory:
//
//   G_b[m,n] = sum_d left_b[d,m] right_b[d,n]
//   dP_k[m,n] = sum_b c[b,k] G_b[m,n]          dots[b,k] = sum_(m,n in the tile) G_b[m,n] P_k[m,n]
//
// A block walks its samples' depth in slices, kStages - 1 on their way by cp.async; G_b stays in registers and is
// spread to the dP of up to Group basis points, in registers too, and multiplied with their tiles of P, which wait in
// shared memory. Samples in order, depth ascending; a dot adds a thread's elements, its warp's, then the warps'.
//
// The Operands say what is multiplied:
//   begin(), end(), slices()  the block's samples; slices of the depth of each, at least one
//   group()                   basis points, at most Group
//   wants_basis(), wants_dots()  which results are asked for
//   fetch(b, slice, left, right), fetch_basis(j, tile)  start this thread's copies of tiles, [depth, kM], [depth, kN]
//                             and [kM, kN]; tiles of a slice in order
//   has_row(row), has_col(col)  whether G has that row or column: elsewhere an infinity times padding may stand
//   acts(b, j, c)             whether the group's j-th basis point acts on sample b, and then its coefficient
//   dot(b, j, total), store(j, row, col, first, second)  take the results
#pragma once

#include "common/product_tile.h"

namespace neuromod {

template <class Shape, int Group>
constexpr size_t fold_outer_shared_bytes() {
  return sizeof(typename Shape::Element) *
         (Shape::kStages * (Shape::kLeft + Shape::kRight) + Group * Shape::kM * Shape::kN);
}

/// Warps' shares of a sample's dot products; of two samples, since threads that are ahead begin the next one's.
template <class Shape, int Group>
struct FoldOuterSides {
  typename Shape::Acc dots[2][Group][Shape::kThreads / 32];
};

template <class Shape, int Group, class Operands>
class FoldOuter {
 public:
  using T = typename Shape::Element;
  using Acc = typename Shape::Acc;
  using Sums = ProductSums<Shape>;
  using Sides = FoldOuterSides<Shape, Group>;

  __device__ __forceinline__ FoldOuter(Operands& operands, Sides& sides, T* shared)
      : operands_(operands),
        sides_(sides),
        left_(shared),
        right_(shared + Shape::kStages * Shape::kLeft),
        basis_(shared + Shape::kStages * (Shape::kLeft + Shape::kRight)),
        slices_(operands.slices()),
        fetched_sample_(operands.begin()) {}

  __device__ __forceinline__ void run() {
    const int64_t begin = operands_.begin(), end = operands_.end();
    const bool dots = operands_.wants_dots(), basis = operands_.wants_basis();
    for (int j = 0; dots && j < operands_.group(); ++j) operands_.fetch_basis(j, basis_ + j * kTile);
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) fetch(stage);
    const Mask mask(operands_);
    Sums outer, sums[Group];
    outer.clear();
#pragma unroll
    for (int j = 0; j < Group; ++j) sums[j].clear();
    int stage = 0;
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t slice = 0; slice < slices_; ++slice) {
        copy_async_wait<Shape::kStages - 2>();
        __syncthreads();
        fetch(stage == 0 ? Shape::kStages - 1 : stage - 1);
        if (dots && slice == 0 && b != begin) flush_dots(b - 1);
        outer.template add<false, false>(left_ + stage * Shape::kLeft, right_ + stage * Shape::kRight, NoFactors{});
        stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
      }
      mask.apply(outer);
      if (dots) dot(b, outer);
      if (basis) spread(b, outer, sums);
      outer.clear();
    }
    if (dots) {
      __syncthreads();
      flush_dots(end - 1);
    }
    if (!basis) return;
#pragma unroll
    for (int j = 0; j < Group; ++j)
      if (j < operands_.group()) store(j, sums[j]);
  }

 private:
  static constexpr int kTile = Shape::kM * Shape::kN;

  /// Which of this thread's sums are G's.
  struct Mask {
    unsigned rows = 0, cols = 0;

    __device__ __forceinline__ explicit Mask(const Operands& operands) {
#pragma unroll
      for (int i = 0; i < 2 * Sums::kRowParts; ++i) rows |= unsigned(operands.has_row(Sums::row(i / 2, i % 2))) << i;
#pragma unroll
      for (int j = 0; j < 2 * Sums::kColParts; ++j) cols |= unsigned(operands.has_col(Sums::col(j / 2) + j % 2)) << j;
    }

    __device__ __forceinline__ void apply(Sums& outer) const {
#pragma unroll
      for (int i = 0; i < 2 * Sums::kRowParts; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * Sums::kColParts; ++j) {
          Acc& sum = outer.at[i / 2][j / 2][i % 2 * 2 + j % 2];
          sum = (rows >> i & cols >> j & 1u) != 0 ? sum : Acc(0);
        }
      }
    }
  };

  /// Starts the copies of the next slice, if there is one; a group in any case.
  __device__ __forceinline__ void fetch(int stage) {
    if (fetched_sample_ < operands_.end()) {
      operands_.fetch(fetched_sample_, fetched_slice_, left_ + stage * Shape::kLeft, right_ + stage * Shape::kRight);
      if (++fetched_slice_ == slices_) ++fetched_sample_, fetched_slice_ = 0;
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void dot(int64_t b, const Sums& outer) const {
    for (int g = 0; g < operands_.group(); ++g) {
      Acc total = 0;
#pragma unroll
      for (int i = 0; i < outer.kRowParts; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int j = 0; j < outer.kColParts; ++j) {
            const auto point = tile_pair<Shape::kN>(basis_ + g * kTile, outer.row(i, h), outer.col(j));
            total += outer.at[i][j][2 * h] * point.x;
            total += outer.at[i][j][2 * h + 1] * point.y;
          }
        }
      }
      total = warp_sum(total);
      if (threadIdx.x % 32 == 0) sides_.dots[b % 2][g][threadIdx.x / 32] = total;
    }
  }

  __device__ __forceinline__ void flush_dots(int64_t b) const {
    const int g = threadIdx.x;
    if (g >= operands_.group()) return;
    Acc total = 0;
    for (int warp = 0; warp < Shape::kThreads / 32; ++warp) total += sides_.dots[b % 2][g][warp];
    operands_.dot(b, g, total);
  }

  /// dP_k += c_k G of those basis points that act on the sample.
  __device__ __forceinline__ void spread(int64_t b, const Sums& outer, Sums (&sums)[Group]) const {
#pragma unroll
    for (int g = 0; g < Group; ++g) {
      Acc c;
      if (g >= operands_.group() || !operands_.acts(b, g, c)) continue;
#pragma unroll
      for (int i = 0; i < outer.kRowParts; ++i)
#pragma unroll
        for (int j = 0; j < outer.kColParts; ++j)
#pragma unroll
          for (int r = 0; r < 4; ++r) sums[g].at[i][j][r] += c * outer.at[i][j][r];
    }
  }

  __device__ __forceinline__ void store(int g, const Sums& sum) const {
#pragma unroll
    for (int i = 0; i < sum.kRowParts; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < sum.kColParts; ++j)
          operands_.store(g, sum.row(i, h), sum.col(j), sum.at[i][j][2 * h], sum.at[i][j][2 * h + 1]);
  }

  Operands& operands_;
  Sides& sides_;
  T *left_, *right_, *basis_;
  int64_t slices_;
  int64_t fetched_sample_, fetched_slice_ = 0;  // the next slice to fetch
};

}  // namespace neuromod
