// Tiles of a matrix whose rows are taken in another order than they lie in memory; else as TileSource
// (common/product_tile.h).
#pragma once

#include "common/product_tile.h"

namespace neuromod {

/// Starts to copy a chunk of 16 bytes, of which `count` elements are there, the rest being zeros.
template <class T>
__device__ __forceinline__ void fetch_chunk(T* to, const T* from, int count, bool aligned) {
  if (aligned) {
    copy_async<16>(to, from, count * static_cast<int>(sizeof(T)));
  } else {
    for (int j = 0; j < kChunk<T>; ++j) to[j] = j < count ? from[j] : from_acc<T>(0.0f);
  }
}

template <class T>
__device__ __forceinline__ int chunk_count(int64_t left) {
  return left < 0 ? 0 : left < kChunk<T> ? static_cast<int>(left) : kChunk<T>;
}

/// Rows along the depth, the same in all tiles down the depth.
template <int Rows, int Cols, int Threads, class T>
class RowSource {
 public:
  /// row_of(i): the matrix's row in row i of the tile; negative for none.
  template <class RowOf>
  __device__ __forceinline__ RowSource(const T* data, int64_t stride, bool aligned, RowOf row_of) : aligned_(aligned) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t row = row_of(threadIdx.x / kInRow + i * kStep);
      there_[i] = row >= 0;
      from_[i] = data + (row >= 0 ? row * stride : 0) + col();
    }
  }

  /// Starts to fill a tile from `offset` elements beyond the rows' begin, where `depth` is left of the matrix.
  __device__ __forceinline__ void fetch(T* tile, int64_t offset, int64_t depth) const {
    const int count = chunk_count<T>(depth - col());
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      fetch_chunk(tile + swizzled<Cols, T>(threadIdx.x / kInRow + i * kStep, col()), from_[i] + offset,
                  there_[i] ? count : 0, aligned_);
  }

 private:
  static constexpr int kInRow = Cols / kChunk<T>, kStep = Threads / kInRow, kCount = Rows / kStep;
  static_assert(kCount * kStep == Rows);
  static __device__ __forceinline__ int col() { return threadIdx.x % kInRow * kChunk<T>; }

  bool aligned_, there_[kCount];
  const T* from_[kCount];
};

/// Rows down the depth, others in each tile.
template <int Rows, int Cols, int Threads, class T>
class DepthSource {
 public:
  /// From `data` on, `extent` columns are left.
  __device__ __forceinline__ DepthSource(const T* data, int64_t stride, int64_t extent, bool aligned)
      : data_(data + col()), stride_(stride), count_(chunk_count<T>(extent - col())), aligned_(aligned) {}

  /// rows[i]: the matrix's row in row i of the tile; negative for none.
  __device__ __forceinline__ void fetch(T* tile, const int64_t* rows) const {
#pragma unroll
    for (int i = 0; i < Rows / kStep; ++i) {
      const int at = threadIdx.x / kInRow + i * kStep;
      const int64_t row = rows[at];
      fetch_chunk(tile + swizzled<Cols, T>(at, col()), data_ + (row >= 0 ? row * stride_ : 0), row >= 0 ? count_ : 0,
                  aligned_);
    }
  }

 private:
  static constexpr int kInRow = Cols / kChunk<T>, kStep = Threads / kInRow;
  static_assert(Rows % kStep == 0);
  static __device__ __forceinline__ int col() { return threadIdx.x % kInRow * kChunk<T>; }

  const T* data_;
  int64_t stride_;
  int count_;
  bool aligned_;
};

}  // namespace neuromod
