// Tiles of matrices: from memory to shared memory to the tensor cores (common/tensor_core.h) or plain multiply-adds.
//
// A block of Shape::kThreads threads multiplies [kM, kDepth] by [kDepth, kN], one slice of the depth after another;
// each of its kWarpsM x kWarpsN warps sums [kM / kWarpsM, kN / kWarpsN] of the result in registers, in Acc. In
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
  using Acc = typename Math::Acc;
  static constexpr int kDepth = 64 / sizeof(Element);  // so that all tiles have rows of 64 bytes along the depth
  static constexpr int kM = M, kN = N, kWarpsM = WarpsM, kWarpsN = WarpsN, kStages = Stages;
  static constexpr int kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kWarpRows = M / WarpsM, kWarpCols = N / WarpsN;  // of the result, a warp's part
  static constexpr int kLeft = kM * kDepth, kRight = kN * kDepth;       // elements of a slice
};

/// Whether every row of a view begins at a multiple of 16 bytes.
inline bool rows_are_aligned(const View& v, int dimensions, int64_t element_bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
  for (int d = 0; d + 1 < dimensions; ++d) aligned = aligned && v.stride[d] * element_bytes % 16 == 0;
  return aligned;
}

/// An operand as a block reads it, tile by tile down the depth: which chunks of each tile this thread copies, and from
/// where. What does not depend on the tile is worked out once, since a copy's address costs more than the copy. Tiles
/// are [Rows, Cols] in memory's order, Along as above: of an `Along` tile the columns run down the depth, else the
/// rows.
template <int Rows, int Cols, bool Along, int Threads, class T>
class TileSource {
 public:
  /// From `data` on, `extent` rows (columns, if not Along) of the matrix are left; `stride` elements from row to row.
  /// `aligned`: each row's address, to 16 bytes.
  __device__ __forceinline__ TileSource(const T* data, int64_t stride, int64_t extent, bool aligned)
      : row_(threadIdx.x / (Cols / kChunk<T>)),
        col_(threadIdx.x % (Cols / kChunk<T>)*kChunk<T>),
        extent_(Along ? limited(extent, Rows) : limited(extent - col_, kChunk<T>)),
        aligned_(aligned),
        first_(data + row_ * stride + col_),
        step_(stride * kStep) {}

  /// Starts to fill a tile from `offset` elements beyond data, where `depth` is left of the matrix; zeros where it has
  /// no element. By cp.async where rows are aligned, else element by element. The caller commits, waits and passes a
  /// barrier in either case.
  __device__ __forceinline__ void fetch(T* tile, int64_t offset, int64_t depth) const {
    const int left = limited(depth, Along ? Cols : Rows), in_row = Along ? limited(left - col_, kChunk<T>) : extent_;
    const T* from = first_ + offset;
    T* to = tile + swizzled<Cols, T>(row_, col_);
    if (aligned_) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        copy_async<16>(to + i * kStep * Cols, from + i * step_, has_row(i, left) ? in_row * kBytes : 0);
    } else {
#pragma unroll 1
      for (int i = 0; i < kCount; ++i, from += step_, to += kStep * Cols)
        for (int j = 0; j < kChunk<T>; ++j) to[j] = has_row(i, left) && j < in_row ? from[j] : from_acc<T>(0.0f);
    }
  }

 private:
  static constexpr int kBytes = sizeof(T);
  static constexpr int kCount = Rows * Cols / kChunk<T> / Threads;  // chunks of a tile that are this thread's
  static constexpr int kStep = Threads / (Cols / kChunk<T>);        // rows between them
  static_assert(kCount * kStep == Rows && kStep % 8 == 0, "swizzling has a period of eight rows");

  static __device__ __forceinline__ int limited(int64_t n, int most) {
    return n < 0 ? 0 : n < most ? static_cast<int>(n) : most;
  }
  __device__ __forceinline__ bool has_row(int i, int left) const { return row_ + i * kStep < (Along ? extent_ : left); }

  int row_, col_;  // in a tile, of the first chunk
  int extent_;     // Along: rows of the tile that are there; else elements of this thread's chunks
  bool aligned_;
  const T* first_;  // the first chunk's place, at offset 0
  int64_t step_;    // elements from chunk to chunk
};

/// This thread's elements of a result tile.
template <class Shape>
struct ProductSums {
  static constexpr int kRowParts = Shape::kWarpRows / 16, kColParts = Shape::kWarpCols / 8;
  typename Shape::Acc at[kRowParts][kColParts][4];

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
#pragma unroll(Shape::Math::kStepsAtOnce)
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

/// Two neighbours of a row in memory, of which `left` are there, else 0; `aligned`: rows begin at a multiple of 16
/// bytes, and the first is in an even column.
template <class T>
__device__ __forceinline__ float2 load_pair(const T* from, int64_t left, bool aligned) {
  if (aligned && left >= 2) {
    if constexpr (sizeof(T) == 2) {
      return widen_pair<T>(*reinterpret_cast<const uint32_t*>(from));
    } else {
      return *reinterpret_cast<const float2*>(from);
    }
  }
  return make_float2(left >= 1 ? to_acc<float>(from[0]) : 0.0f, left >= 2 ? to_acc<float>(from[1]) : 0.0f);
}

/// Two neighbours of a tile's row, the first in an even column.
template <int Cols, class T>
__device__ __forceinline__ auto tile_pair(const T* tile, int row, int col) {
  const T* const pair = tile + swizzled<Cols, T>(row, col / kChunk<T> * kChunk<T>) + col % kChunk<T>;
  if constexpr (sizeof(T) == 2) {
    return widen_pair<T>(*reinterpret_cast<const uint32_t*>(pair));
  } else {
    return *reinterpret_cast<const std::conditional_t<sizeof(T) == 4, float2, double2>*>(pair);
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
