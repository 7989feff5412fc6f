// Tiles of matrices: from memory to shared memory to the tensor cores (common/tensor_core.h) or plain multiply-adds.
//
// A block of Shape::kThreads threads multiplies [kM, kDepth] by [kDepth, kN], one slice of the depth after another;
// each of its kWarpsM x kWarpsN warps sums [kM / kWarpsM, kN / kWarpsN] of the result in registers, in float32. In
// memory either dimension of an operand may be the dense one, and so it is in shared memory: `Along` means rows along
// the depth (a row is dense in depth), else across it. Shape::Math says how fragments are multiplied
// (common/product_math.h).
#pragma once

#include "common/params.h"
#include "common/product_math.h"

namespace neuromod {

template <class MathOfElements, int M, int N, int WarpsM, int WarpsN, int Stages>
struct ProductShape {
  using Math = MathOfElements;
  using Element = typename Math::Element;
  static constexpr int kDepth = 64 / sizeof(Element);  // so that all tiles have rows of 64 bytes along the depth
  static constexpr int kM = M, kN = N, kWarpsM = WarpsM, kWarpsN = WarpsN, kStages = Stages;
  static constexpr int kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kWarpRows = M / WarpsM, kWarpCols = N / WarpsN;  // of the result, a warp's part
  static constexpr int kLeft = kM * kDepth, kRight = kN * kDepth;       // elements of a slice
};

/// Part of a matrix with dense rows, from `data` on: `rows` and `cols` are what is left of it, perhaps nothing.
template <class T>
struct Part {
  const T* data;
  int64_t stride;
  int64_t rows, cols;
  bool aligned;  // data and stride, to 16 bytes
};

/// Whether every row of a view begins at a multiple of 16 bytes.
inline bool rows_are_aligned(const View& v, int dimensions, int64_t element_bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
  for (int d = 0; d + 1 < dimensions; ++d) aligned = aligned && v.stride[d] * element_bytes % 16 == 0;
  return aligned;
}

/// Starts to fill a tile [Rows, Cols]; zeros where the matrix has no element or `keep(row)` is false. By cp.async where
/// rows are aligned, else element by element. The caller commits, waits and passes a barrier in either case.
template <int Rows, int Cols, int Threads, class T, class Keep>
__device__ __forceinline__ void fetch_tile(T* tile, const Part<T>& from, Keep keep) {
  constexpr int chunk = kChunk<T>;
  static_assert(Rows * Cols / chunk % Threads == 0);
#pragma unroll
  for (int i = 0; i < Rows * Cols / chunk / Threads; ++i) {
    const int unit = threadIdx.x + i * Threads, row = unit / (Cols / chunk), col = unit % (Cols / chunk) * chunk;
    const int64_t left = row < from.rows && keep(row) ? from.cols - col : 0;
    const int valid = left < 0 ? 0 : left < chunk ? static_cast<int>(left) : chunk;
    const T* const source = from.data + row * from.stride + col;
    T* const to = tile + swizzled<Cols, T>(row, col);
    if (from.aligned) {
      copy_async<16>(to, valid > 0 ? source : from.data, valid * static_cast<int>(sizeof(T)));
    } else {
      const T zero = from_acc<T>(0.0f);
#pragma unroll
      for (int j = 0; j < chunk; ++j) to[j] = j < valid ? source[j] : zero;
    }
  }
}

/// This thread's elements of a result tile.
template <class Shape>
struct ProductSums {
  static constexpr int kRowParts = Shape::kWarpRows / 16, kColParts = Shape::kWarpCols / 8;
  float at[kRowParts][kColParts][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRowParts; ++i)
#pragma unroll
      for (int j = 0; j < kColParts; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) at[i][j][r] = 0;
  }

  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 / Shape::kWarpsN * Shape::kWarpRows; }
  static __device__ __forceinline__ int warp_col() { return threadIdx.x / 32 % Shape::kWarpsN * Shape::kWarpCols; }
  /// The tile's row of at[i][..][2 h] and at[i][..][2 h + 1], and the column of at[..][j][2 h]; the next is beside it.
  static __device__ __forceinline__ int row(int i, int h) { return warp_row() + 16 * i + 8 * h + threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int col(int j) { return warp_col() + 8 * j + threadIdx.x % 4 * 2; }

  /// += left (factors right) over one slice, depth ascending: NoFactors, or the number that multiplies each row of
  /// right.
  template <bool LeftAlong, bool RightAlong, class T, class Factors>
  __device__ __forceinline__ void add(const T* left, const T* right, Factors factors) {
#pragma unroll
    for (int d = 0; d < Shape::kDepth; d += Shape::Math::kStep)
      Shape::Math::template add<LeftAlong, RightAlong, Shape>(at, left, right, warp_row(), warp_col(), d, factors);
  }
};

/// Writes two neighbours of a row, of which `left` are there: as one where that is aligned.
template <class T>
__device__ __forceinline__ void store_pair(T* to, float first, float second, int64_t left) {
  if (left >= 2 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0) {
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<uint32_t*>(to) = round_pair<T>(first, second);
    } else {
      *reinterpret_cast<float2*>(to) = make_float2(first, second);
    }
  } else {
    if (left >= 1) to[0] = from_acc<T>(first);
    if (left >= 2) to[1] = from_acc<T>(second);
  }
}

/// Two neighbours of a tile's row, the first in an even column.
template <int Cols, class T>
__device__ __forceinline__ float2 tile_pair(const T* tile, int row, int col) {
  const T* const pair = tile + swizzled<Cols, T>(row, col / kChunk<T> * kChunk<T>) + col % kChunk<T>;
  if constexpr (sizeof(T) == 2) {
    return widen_pair<T>(*reinterpret_cast<const uint32_t*>(pair));
  } else {
    return *reinterpret_cast<const float2*>(pair);
  }
}

/// A block's tile of `down` x `across` tiles, in an order in which blocks that run at one time share operands: groups
/// of eight tiles down, column by column.
struct TileIndex {
  int64_t down, across;

  static __device__ __forceinline__ TileIndex of(int64_t block, int64_t down, int64_t across) {
    constexpr int64_t kGroup = 8;
    const int64_t first = block / (kGroup * across) * kGroup, in_group = block % (kGroup * across);
    const int64_t height = down - first < kGroup ? down - first : kGroup;
    return {first + in_group % height, in_group / height};
  }
};

}  // namespace neuromod
