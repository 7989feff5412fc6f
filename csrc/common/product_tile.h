// Tiles of 16-bit matrices: from memory to shared memory to the tensor cores (common/tensor_core.h).
//
// A block of Shape::kThreads threads multiplies [kM, kDepth] by [kDepth, kN], one slice of the depth after another;
// each of its kWarpsM x kWarpsN warps sums [kM / kWarpsM, kN / kWarpsN] of the result in registers. In memory either
// dimension of an operand may be the dense one, and so it is in shared memory: `Along` means rows along the depth (a
// row is dense in depth), `Across` rows across it. Sums run in float32, slice by slice, depth ascending.
#pragma once

#include <cstring>

#include "common/params.h"
#include "common/tensor_core.h"

namespace neuromod {

template <int M, int N, int WarpsM, int WarpsN, int Stages>
struct ProductShape {
  static constexpr int kM = M, kN = N, kDepth = 32, kWarpsM = WarpsM, kWarpsN = WarpsN, kStages = Stages;
  static constexpr int kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kWarpRows = M / WarpsM, kWarpCols = N / WarpsN;  // of the result, a warp's part
};

constexpr int kChunk = 8;  // 16-bit elements in 16 bytes, the unit of copies and of ldmatrix

/// Where element (row, col) of a tile with dense rows of Cols elements is kept, col a multiple of kChunk. Chunks are
/// permuted within their row so that the eight rows of an ldmatrix, and neighbours in a copy, lie in different banks.
template <int Cols>
__device__ __forceinline__ int swizzled(int row, int col) {
  static_assert(Cols % 32 == 0 && (Cols & (Cols - 1)) == 0);
  constexpr int chunks = Cols / kChunk;
  const int twist = chunks >= 8 ? row % 8 : row / (8 / chunks) % chunks;
  return row * Cols + (col / kChunk ^ twist) * kChunk;
}

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
  static_assert(Rows * Cols / kChunk % Threads == 0);
#pragma unroll
  for (int i = 0; i < Rows * Cols / kChunk / Threads; ++i) {
    const int unit = threadIdx.x + i * Threads, row = unit / (Cols / kChunk), col = unit % (Cols / kChunk) * kChunk;
    const int64_t left = row < from.rows && keep(row) ? from.cols - col : 0;
    const int valid = left < 0 ? 0 : left < kChunk ? static_cast<int>(left) : kChunk;
    const T* const source = from.data + row * from.stride + col;
    T* const to = tile + swizzled<Cols>(row, col);
    if (from.aligned) {
      copy_async<16>(to, valid > 0 ? source : from.data, valid * 2);
    } else {
      const T zero = from_acc<T>(0.0f);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) to[j] = j < valid ? source[j] : zero;
    }
  }
}

/// The four registers of an A fragment [16, 16] at (m, d) of a tile.
template <bool Along, class Shape, class T>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const T* tile, int m, int d) {
  const int matrix = threadIdx.x % 32 / 8, i = threadIdx.x % 8;
  if constexpr (Along) {
    load_matrix(a, tile + swizzled<Shape::kDepth>(m + i + matrix % 2 * 8, d + matrix / 2 * 8));
  } else {
    load_matrix_transposed(a, tile + swizzled<Shape::kM>(d + i + matrix / 2 * 8, m + matrix % 2 * 8));
  }
}

/// Two B fragments [16, 8] side by side, at (d, n) and (d, n + 8).
template <bool Along, class Shape, class T>
__device__ __forceinline__ void load_right(uint32_t (&b)[2][2], const T* tile, int d, int n) {
  const int matrix = threadIdx.x % 32 / 8, i = threadIdx.x % 8;
  uint32_t four[4];
  if constexpr (Along) {
    load_matrix(four, tile + swizzled<Shape::kDepth>(n + i + matrix / 2 * 8, d + matrix % 2 * 8));
  } else {
    load_matrix_transposed(four, tile + swizzled<Shape::kN>(d + i + matrix % 2 * 8, n + matrix / 2 * 8));
  }
  for (int j = 0; j < 4; ++j) b[j / 2][j % 2] = four[j];
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

  /// += left right over one slice of the depth. scale(b, d) may change a B fragment that begins at depth d.
  template <bool LeftAlong, bool RightAlong, class T, class Scale>
  __device__ __forceinline__ void add(const T* left, const T* right, Scale scale) {
#pragma unroll
    for (int d = 0; d < Shape::kDepth; d += 16) {
      uint32_t a[kRowParts][4], b[kColParts / 2][2][2];
#pragma unroll
      for (int i = 0; i < kRowParts; ++i) load_left<LeftAlong, Shape>(a[i], left, warp_row() + 16 * i, d);
#pragma unroll
      for (int j = 0; j < kColParts / 2; ++j) {
        load_right<RightAlong, Shape>(b[j], right, d, warp_col() + 16 * j);
        scale(b[j][0], d);
        scale(b[j][1], d);
      }
#pragma unroll
      for (int i = 0; i < kRowParts; ++i)
#pragma unroll
        for (int j = 0; j < kColParts; ++j) multiply_add<T>(at[i][j], a[i], b[j / 2][j % 2]);
    }
  }
};

/// A fragment's register as two numbers, and back, rounded once.
template <class T>
__device__ __forceinline__ float2 widen_pair(uint32_t pair) {
  T two[2];
  memcpy(two, &pair, sizeof(pair));
  return make_float2(to_acc<float>(two[0]), to_acc<float>(two[1]));
}
template <class T>
__device__ __forceinline__ uint32_t round_pair(float first, float second) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 two = __floats2half2_rn(first, second);
    memcpy(&pair, &two, sizeof(pair));
  } else {
    const __nv_bfloat162 two = __floats2bfloat162_rn(first, second);
    memcpy(&pair, &two, sizeof(pair));
  }
  return pair;
}

/// Writes two neighbours of a row, of which `left` are there: as one where that is aligned.
template <class T>
__device__ __forceinline__ void store_pair(T* to, float first, float second, int64_t left) {
  if (left >= 2 && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(to) = round_pair<T>(first, second);
  } else {
    if (left >= 1) to[0] = from_acc<T>(first);
    if (left >= 2) to[1] = from_acc<T>(second);
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
