// The inner product of every CPU kernel: one tile C = A B through torch's brgemm (oneDNN: AVX2, AVX-512, AMX), half
// types as float32 where they have no products of their own; for float64, and where oneDNN is not there, by a product
// of ours.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "common/params.h"
#include "common/processor.h"
#include "common/scratch.h"
#include "common/vector.h"

namespace neuromod {

/// Rows of A, and columns of B, in a product tile; B whose columns are packed rows is cut narrower, which is faster.
constexpr int64_t kTile = 64;
constexpr int64_t kNarrowTile = 32;

inline int64_t tile_size(int64_t tile, int64_t total) { return std::min(kTile, total - tile * kTile); }

namespace detail {
template <class T>
struct TorchType {
  using type = T;
};
template <>
struct TorchType<BFloat16> {
  using type = at::BFloat16;
};
template <>
struct TorchType<Float16> {
  using type = at::Half;
};
}  // namespace detail

/// Whether tiles are multiplied by AMX.
template <class T>
bool has_matrix_unit() {
  if constexpr (is_half_type<T>)
    return half_tiles<T>() == HalfTiles::matrix_unit;
  else
    return false;
}

/// Whether B's depth is interleaved in pairs.
template <class T>
bool interleaved() {
  if constexpr (is_half_type<T>)
    return half_tiles<T>() != HalfTiles::widened;
  else
    return false;
}

/// The least depth of a product: even where pairs are interleaved.
template <class T>
int64_t even_depth(int64_t depth) {
  return interleaved<T>() ? (depth + 1) / 2 * 2 : depth;
}

/// Depth of packed operands: AMX takes 32 at a time, and what is left over slowly.
template <class T>
int64_t packed_depth(int64_t depth) {
  return has_matrix_unit<T>() && depth > 32 ? ceil_div(depth, 32) * 32 : even_depth<T>(depth);
}

/// A tile of an operand as tile_product reads it.
template <class T>
struct Tile {
  const T* data;
  int64_t stride;  // from row to row
};

/// B from its columns, packed: column r of the panel, whose rows are `stride` long, is rows[r], or zeros if that is
/// null.
template <class T>
void pack_rows(int64_t count, int64_t depth, const T* const* rows, T* panel, int64_t stride) {
  if (interleaved<T>()) {
    vectors<T>().transpose_pairs(count, depth, rows, panel, stride);
  } else {
    vectors<T>().transpose(count, depth, rows, panel, stride);
  }
}

/// B from its rows, packed: row d of the panel is rows[d], or zeros if that is null; columns past `cols` hold anything.
template <class T>
void pack_columns(int64_t count, const T* const* rows, int64_t cols, T* panel) {
  if (interleaved<T>()) {
    for (int64_t d = 0; d < count; d += 2)
      vectors<T>().interleave(cols, rows[d], d + 1 < count ? rows[d + 1] : nullptr, panel + d * kTile);
  } else {
    for (int64_t d = 0; d < count; ++d) {
      if (rows[d]) {
        std::copy_n(rows[d], cols, panel + d * kTile);
      } else {
        std::fill_n(panel + d * kTile, cols, T{});
      }
    }
  }
}

/// Zeros for what packed_depth adds to a panel of `depth` packed rows, `stride` long.
template <class T>
void complete_panel(int64_t depth, T* panel, int64_t stride) {
  std::fill(panel + even_depth<T>(depth) * stride, panel + packed_depth<T>(depth) * stride, T{});
}

/// Each thread calls this when its products are done: oneDNN may hold the core's matrix unit configured.
template <class T>
void release_tiles() {
  if constexpr (!std::is_same_v<T, double>) at::native::cpublas::brgemm_release(interleaved<T>());
}

/// Rows [d, d + length) of B, of which d is even, as float32, rows of `cols`.
template <class T>
void widen_right(int64_t d, int64_t length, int64_t cols, Tile<T> b, float* to) {
  if (!interleaved<T>()) {
    for (int64_t i = 0; i < length; ++i) vectors<T>().widen(cols, b.data + (d + i) * b.stride, to + i * cols);
    return;
  }
  const Scratch<float> pairs(2 * cols);
  for (int64_t i = 0; i < length; i += 2) {  // b's depth is even
    vectors<T>().widen(2 * cols, b.data + (d + i) * b.stride, pairs.data());
    for (int64_t n = 0; n < cols; ++n) {
      to[i * cols + n] = pairs[2 * n];
      to[(i + 1) * cols + n] = pairs[2 * n + 1];
    }
  }
}

template <class T>
void tile_product(int64_t rows, int64_t cols, int64_t depth, Tile<T> a, Tile<T> b, acc_t<T>* c, int64_t ldc,
                  bool accumulate);

/// tile_product of half types as float32, so deep at a time that the copies stay in cache; an interleaved depth is
/// even.
template <class T>
void widened_product(int64_t rows, int64_t cols, int64_t depth, Tile<T> a, Tile<T> b, float* c, int64_t ldc,
                     bool accumulate) {
  constexpr int64_t most = 256, stride = most + 16;  // rows off powers of two
  const Scratch<float> left(rows * stride), right(most * cols);
  for (int64_t d = 0; d < depth; d += most) {
    const int64_t length = std::min(most, depth - d);
    for (int64_t r = 0; r < rows; ++r) vectors<T>().widen(length, a.data + r * a.stride + d, left.data() + r * stride);
    widen_right(d, length, cols, b, right.data());
    tile_product<float>(rows, cols, length, {left.data(), stride}, {right.data(), cols}, c, ldc, accumulate || d > 0);
  }
}

/// C[rows, cols] (rows of `ldc`) = or += A B, both of even_depth(depth).
template <class T>
void tile_product(int64_t rows, int64_t cols, int64_t depth, Tile<T> a, Tile<T> b, acc_t<T>* c, int64_t ldc,
                  bool accumulate) {
  if (depth == 0) {
    for (int64_t r = 0; r < rows && !accumulate; ++r) std::fill_n(c + r * ldc, cols, acc_t<T>(0));
    return;
  }
  const bool torch = torch_has_tiles();
  if constexpr (is_half_type<T>) {
    if (!torch || !interleaved<T>()) return widened_product(rows, cols, even_depth<T>(depth), a, b, c, ldc, accumulate);
  } else if (!torch || std::is_same_v<T, double>) {
    return vectors<T>().product(rows, cols, depth, a.data, a.stride, 1, b.data, b.stride, c, ldc, accumulate);
  }
  if constexpr (!std::is_same_v<T, double>) {
    using Torch = typename detail::TorchType<T>::type;
    at::native::cpublas::brgemm(rows, cols, even_depth<T>(depth), a.stride, b.stride, ldc, accumulate,
                                reinterpret_cast<const Torch*>(a.data), reinterpret_cast<const Torch*>(b.data), c,
                                interleaved<T>());
  }
}

}  // namespace neuromod
