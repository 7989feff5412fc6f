// A tile of the product with a blend of L matrices, which is blended tile by tile in shared memory, rounded once to the
// operands' type, and multiplied; it never exists in memory:
//
//   sum[m,n] = sum_d left[m,d] W[d,n],   W = sum_l c_l P_l
//
// A block walks the depth in slices; of a slice it takes the tiles of the L matrices one after another, kStages - 1 on
// their way by cp.async. Whoever copied a chunk of 16 bytes also blends it, in registers, l ascending, so only the
// blended tile needs a barrier; there are two of it, to blend one while the other is multiplied.
//
// The Operands say what is multiplied:
//   kRightAlong             whether tiles of P have rows along the depth (common/product_tile.h)
//   slices(), terms()       of the depth; L
//   coeff(l)                c_l
//   fetch_left(slice, tile), fetch_right(slice, l, tile)
//                           start this thread's copies of a tile, its chunks being those of TileSource; called with
//                           slice, and l within a slice, ascending
//   inside(slice, row, col) how many elements of the chunk there, of P's tile, belong to P: the others count as zero,
//                           which an infinite c would make NaN of
#pragma once

#include "common/product_tile.h"

namespace neuromod {

template <class Shape>
constexpr size_t fold_shared_bytes() {
  return sizeof(typename Shape::Element) * (Shape::kStages * (Shape::kLeft + Shape::kRight) + 2 * Shape::kRight);
}

template <class Shape, class Operands>
class Folder {
 public:
  using T = typename Shape::Element;
  using Acc = typename Shape::Acc;

  __device__ __forceinline__ Folder(Operands& operands, T* shared)
      : operands_(operands),
        left_(shared),
        right_(shared + Shape::kStages * Shape::kLeft),
        blended_(shared + Shape::kStages * (Shape::kLeft + Shape::kRight)),
        slices_(operands.slices()),
        terms_(operands.terms()) {}

  /// The tile's sums. The operands are ready for all threads.
  __device__ __forceinline__ void run(ProductSums<Shape>& sum) {
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) {
      fetch_left(stage, stage);
      fetch_right(stage);
      copy_async_commit();
    }
    sum.clear();
    Blend blend = {};
    int left_stage = 0, stage = 0, half = 0;  // of this slice, of this tile of P, of the blended tiles
    for (int64_t slice = 0; slice < slices_; ++slice) {
      T* const blended = blended_ + half * Shape::kRight;
      for (int64_t l = 0; l < terms_; ++l) {
        copy_async_wait<Shape::kStages - 2>();
        add(blend, right_ + stage * Shape::kRight, operands_.coeff(l));
        if (l + 1 == terms_) {
          round(blend, blended, slice);
          __syncthreads();  // the blended tile and left's slice are there; left's slice before is no longer read
          fetch_left(slice + Shape::kStages - 1, before(left_stage));
        }
        fetch_right(before(stage));
        copy_async_commit();
        stage = after(stage);
      }
      sum.template add<true, Operands::kRightAlong>(left_ + left_stage * Shape::kLeft, blended, NoFactors{});
      left_stage = after(left_stage);
      half = 1 - half;
    }
  }

 private:
  static constexpr int kRightCols = Operands::kRightAlong ? Shape::kDepth : Shape::kN;
  static constexpr int kChunks = Shape::kRight / kChunk<T> / Shape::kThreads;  // of a tile of P, that are this thread's

  struct Blend {
    Acc at[kChunks][kChunk<T>];
  };

  static __device__ __forceinline__ int before(int stage) { return stage == 0 ? Shape::kStages - 1 : stage - 1; }
  static __device__ __forceinline__ int after(int stage) { return stage + 1 == Shape::kStages ? 0 : stage + 1; }
  static __device__ __forceinline__ int chunk_row(int i) {
    return (threadIdx.x + i * Shape::kThreads) / (kRightCols / kChunk<T>);
  }
  static __device__ __forceinline__ int chunk_col(int i) {
    return (threadIdx.x + i * Shape::kThreads) % (kRightCols / kChunk<T>)*kChunk<T>;
  }

  __device__ __forceinline__ void fetch_left(int64_t slice, int stage) {
    if (slice < slices_) operands_.fetch_left(slice, left_ + stage * Shape::kLeft);
  }

  __device__ __forceinline__ void fetch_right(int stage) {
    if (fetched_slice_ == slices_) return;
    operands_.fetch_right(fetched_slice_, fetched_, right_ + stage * Shape::kRight);
    if (++fetched_ == terms_) ++fetched_slice_, fetched_ = 0;
  }

  /// blend += c times this thread's chunks of a tile of P.
  __device__ __forceinline__ void add(Blend& blend, const T* tile, Acc c) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      Acc chunk[kChunk<T>];
      load_chunk(tile + swizzled<kRightCols, T>(chunk_row(i), chunk_col(i)), chunk);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) blend.at[i][j] += c * chunk[j];
    }
  }

  /// Rounds the blend into a tile; begins anew.
  __device__ __forceinline__ void round(Blend& blend, T* tile, int64_t slice) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int row = chunk_row(i), col = chunk_col(i), inside = operands_.inside(slice, row, col);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) blend.at[i][j] = j < inside ? blend.at[i][j] : Acc(0);
      store_chunk(tile + swizzled<kRightCols, T>(row, col), blend.at[i]);
    }
    blend = Blend{};
  }

  Operands& operands_;
  T *left_, *right_, *blended_;
  int64_t slices_, terms_;
  int64_t fetched_slice_ = 0, fetched_ = 0;  // the next tile of P to fetch: its slice and term
};

}  // namespace neuromod
