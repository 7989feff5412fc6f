// How a warp multiplies parts of two tiles in shared memory, and how tiles lie there. Used by common/product_tile.h.
//
// Every Math has its Element, the type Acc of its sums, a depth kStep, how many steps are unrolled, and add(at, left,
// right, m, n, d, factors): at += A (factors B) for the rows from m on, the columns from n on, and kStep of the depth
// from d on. For all of them a thread's sums are those of mma.sync's result fragments, 16 x 8 each: at[i][j][2 h + e]
// is row 16 i + 8 h + g, column 8 j + 2 t + e of the warp's part, for lane 4 g + t.
#pragma once

#include <cstring>

#include "common/dispatch.h"
#include "common/tensor_core.h"

namespace neuromod {

/// Elements in 16 bytes, the unit of copies and of ldmatrix.
template <class T>
constexpr int kChunk = 16 / sizeof(T);

/// Where element (row, col) of a tile with dense rows of Cols elements is kept, col a multiple of kChunk. Chunks are
/// permuted within their row so that what a warp reads at a time lies in different banks: one chunk of eight rows, or,
/// of 32-bit elements across the depth, two chunks of four.
template <int Cols, class T>
__device__ __forceinline__ int swizzled(int row, int col) {
  constexpr int chunks = Cols / kChunk<T>;
  static_assert((chunks & (chunks - 1)) == 0 && chunks >= 4);
  const int twist = chunks < 8 ? row / (8 / chunks) % chunks : sizeof(T) == 2 ? row % 8 : row % 4 * 2;
  return row * Cols + (col / kChunk<T> ^ twist) * kChunk<T>;
}

/// The same for any column.
template <int Cols, class T>
__device__ __forceinline__ int swizzled_element(int row, int col) {
  return swizzled<Cols, T>(row, col / kChunk<T> * kChunk<T>) + col % kChunk<T>;
}

/// No factors along the depth; else a pointer to the slice's, in shared memory.
struct NoFactors {};

template <class Factors>
constexpr bool kHasFactors = !std::is_same_v<Factors, NoFactors>;

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

/// The elements of 16 bytes of shared memory, widened; and back, rounded once.
template <class T, class Acc>
__device__ __forceinline__ void load_chunk(const T* from, Acc (&to)[kChunk<T>]) {
  if constexpr (sizeof(T) == 2) {
    const uint4 chunk = *reinterpret_cast<const uint4*>(from);
    const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = widen_pair<T>(pairs[i]);
      to[2 * i] = two.x, to[2 * i + 1] = two.y;
    }
  } else if constexpr (sizeof(T) == 4) {
    const float4 chunk = *reinterpret_cast<const float4*>(from);
    to[0] = chunk.x, to[1] = chunk.y, to[2] = chunk.z, to[3] = chunk.w;
  } else {
    const double2 chunk = *reinterpret_cast<const double2*>(from);
    to[0] = chunk.x, to[1] = chunk.y;
  }
}
template <class T, class Acc>
__device__ __forceinline__ void store_chunk(T* to, const Acc (&from)[kChunk<T>]) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint4*>(to) = make_uint4(round_pair<T>(from[0], from[1]), round_pair<T>(from[2], from[3]),
                                               round_pair<T>(from[4], from[5]), round_pair<T>(from[6], from[7]));
  } else if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
    *reinterpret_cast<double2*>(to) = make_double2(from[0], from[1]);
  }
}

/// 16-bit elements on tensor cores. A factor multiplies in float32, and the product is rounded once to T.
template <class T>
struct HalfMath {
  using Element = T;
  using Acc = float;
  static constexpr int kStep = 16, kStepsAtOnce = 2;

  template <bool LeftAlong, bool RightAlong, class Shape, int Rows, int Cols, class Factors>
  static __device__ __forceinline__ void add(float (&at)[Rows][Cols][4], const T* left, const T* right, int m, int n,
                                             int d, Factors factors) {
    uint32_t a[Rows][4], b[Cols / 2][4];  // of b, two fragments side by side
#pragma unroll
    for (int i = 0; i < Rows; ++i) load_left<LeftAlong, Shape>(a[i], left, m + 16 * i, d);
#pragma unroll
    for (int j = 0; j < Cols / 2; ++j) {
      load_right<RightAlong, Shape>(b[j], right, d, n + 16 * j);
      if constexpr (kHasFactors<Factors>) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float2 c = *reinterpret_cast<const float2*>(factors + d + 8 * (r % 2) + threadIdx.x % 4 * 2);
          const float2 x = widen_pair<T>(b[j][r]);
          b[j][r] = round_pair<T>(c.x * x.x, c.y * x.y);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int j = 0; j < Cols; ++j) {
        const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        multiply_add<T>(at[i][j], a[i], pair);
      }
  }

 private:
  /// The A fragment [16, 16] at (m, d) of a tile.
  template <bool Along, class Shape>
  static __device__ __forceinline__ void load_left(uint32_t (&a)[4], const T* tile, int m, int d) {
    const int matrix = threadIdx.x % 32 / 8, i = threadIdx.x % 8;
    if constexpr (Along) {
      load_matrix(a, tile + swizzled<Shape::kDepth, T>(m + i + matrix % 2 * 8, d + matrix / 2 * 8));
    } else {
      load_matrix_transposed(a, tile + swizzled<Shape::kM, T>(d + i + matrix / 2 * 8, m + matrix % 2 * 8));
    }
  }

  /// The B fragments [16, 8] at (d, n) and (d, n + 8).
  template <bool Along, class Shape>
  static __device__ __forceinline__ void load_right(uint32_t (&b)[4], const T* tile, int d, int n) {
    const int matrix = threadIdx.x % 32 / 8, i = threadIdx.x % 8;
    if constexpr (Along) {
      load_matrix(b, tile + swizzled<Shape::kDepth, T>(n + i + matrix / 2 * 8, d + matrix % 2 * 8));
    } else {
      load_matrix_transposed(b, tile + swizzled<Shape::kN, T>(d + i + matrix % 2 * 8, n + matrix / 2 * 8));
    }
  }
};

/// float32 on tensor cores: both operands, after a factor, are rounded to tf32's 11 bits.
struct Tf32Math {
  using Element = float;
  using Acc = float;
  static constexpr int kStep = 8, kStepsAtOnce = 2;

  template <bool LeftAlong, bool RightAlong, class Shape, int Rows, int Cols, class Factors>
  static __device__ __forceinline__ void add(float (&at)[Rows][Cols][4], const float* left, const float* right, int m,
                                             int n, int d, Factors factors) {
    uint32_t a[Rows][4], b[Cols / 2][4];
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
      load<LeftAlong, Shape::kDepth, Shape::kM>(a[i], left, m + 16 * i, d, true);
#pragma unroll
      for (int r = 0; r < 4; ++r) a[i][r] = to_tf32(__uint_as_float(a[i][r]));
    }
#pragma unroll
    for (int j = 0; j < Cols / 2; ++j) {
      load<RightAlong, Shape::kDepth, Shape::kN>(b[j], right, n + 16 * j, d, false);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float x = __uint_as_float(b[j][r]);
        if constexpr (kHasFactors<Factors>) x *= factors[d + 4 * (r % 2) + threadIdx.x % 4];
        b[j][r] = to_tf32(x);
      }
    }
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int j = 0; j < Cols; ++j) {
        const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        multiply_add_tf32(at[i][j], a[i], pair);
      }
  }

 private:
  /// Four 8 x 4 blocks of a tile: rows (columns, of a right operand) from m and m + 8 on, depths from d and d + 4 on.
  /// Of a left fragment the next rows come first, of two right ones the next depths.
  template <bool Along, int Depth, int Extent>
  static __device__ __forceinline__ void load(uint32_t (&to)[4], const float* tile, int m, int d, bool is_left) {
    const int lane = threadIdx.x % 32;
    if constexpr (Along) {  // a row of an ldmatrix holds four of them
      const int block = lane / 8, down = is_left ? block % 2 : block / 2, deeper = is_left ? block / 2 : block % 2;
      load_matrix(to, tile + swizzled<Depth, float>(m + lane % 8 + 8 * down, d + 4 * deeper));
    } else {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int down = is_left ? r % 2 : r / 2, deeper = is_left ? r / 2 : r % 2;
        const int at = swizzled_element<Extent, float>(d + lane % 4 + 4 * deeper, m + lane / 4 + 8 * down);
        to[r] = __float_as_uint(tile[at]);
      }
    }
  }
};

/// float and double by multiply-adds: each thread takes its rows and columns, two deep at a time, of which its
/// registers just hold two.
template <class T>
struct PlainMath {
  using Element = T;
  using Acc = T;
  static constexpr int kStep = 2, kStepsAtOnce = 2;

  template <bool LeftAlong, bool RightAlong, class Shape, int Rows, int Cols, class Factors>
  static __device__ __forceinline__ void add(T (&at)[Rows][Cols][4], const T* left, const T* right, int m, int n, int d,
                                             Factors factors) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    T b[Cols][2][kStep];
#pragma unroll
    for (int j = 0; j < Cols; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        load<RightAlong, Shape::kDepth, Shape::kN>(b[j][e], right, n + 8 * j + 2 * t + e, d);
        if constexpr (kHasFactors<Factors>) {
#pragma unroll
          for (int deep = 0; deep < kStep; ++deep) b[j][e][deep] *= factors[d + deep];
        }
      }
#pragma unroll
    for (int i = 0; i < 2 * Rows; ++i) {
      T a[kStep];
      load<LeftAlong, Shape::kDepth, Shape::kM>(a, left, m + 8 * i + g, d);
#pragma unroll
      for (int j = 0; j < Cols; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int deep = 0; deep < kStep; ++deep) at[i / 2][j][i % 2 * 2 + e] += a[deep] * b[j][e][deep];
    }
  }

 private:
  template <bool Along, int Depth, int Extent>
  static __device__ __forceinline__ void load(T (&to)[kStep], const T* tile, int m, int d) {
    if constexpr (Along) {
      using Two = std::conditional_t<sizeof(T) == 4, float2, double2>;
      const Two two = *reinterpret_cast<const Two*>(tile + swizzled_element<Depth, T>(m, d));
      to[0] = two.x, to[1] = two.y;
    } else {
#pragma unroll
      for (int deep = 0; deep < kStep; ++deep) to[deep] = tile[swizzled_element<Extent, T>(d + deep, m)];
    }
  }
};

/// Calls f with a tag of the Math that a dtype gets.
template <class F>
void dispatch_math(DType dtype, bool tf32, F&& f) {
  dispatch_dtype<__half, __nv_bfloat16>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 2) {
      f(TypeTag<HalfMath<T>>{});
    } else {
      if constexpr (sizeof(T) == 4) {
        if (tf32) return f(TypeTag<Tf32Math>{});
      }
      f(TypeTag<PlainMath<T>>{});
    }
  });
}

}  // namespace neuromod
