// The operands of tile_product. brgemm reads A and B by rows, and half-precision B with its depth in pairs where the
// processor multiplies pairs. A matrix that lies in memory like that is read in place; any other is packed once.
#pragma once

#include <ATen/Parallel.h>

#include "common/tile_product.h"

namespace neuromod {

/// Matrices [rows, cols], `count` of them, `matrix_stride` apart. Their rows may be those of a [outer, inner, cols]
/// array.
template <class T>
struct Matrices {
  const T* data;
  int64_t count, rows, cols, inner;
  int64_t matrix_stride, outer_stride, inner_stride, col_stride;

  /// The K matrices of a [K, rows, cols] array.
  static Matrices stack(const View& v, int64_t count, int64_t rows, int64_t cols) {
    return {v.at<T>(0), count, rows, cols, rows, v.stride[0], 0, v.stride[1], v.stride[2]};
  }
  /// One matrix whose rows are all those of a [B, T, cols] array.
  static Matrices flattened(const View& v, int64_t batch, int64_t tokens, int64_t cols) {
    return {v.at<T>(0), 1, batch * tokens, cols, tokens, 0, v.stride[0], v.stride[1], v.stride[2]};
  }

  const T* row(int64_t k, int64_t r) const {
    return data + k * matrix_stride + r / inner * outer_stride + r % inner * inner_stride;
  }
  /// The distance of neighbouring rows if all are as far apart and none overlap, else 0.
  int64_t row_stride() const {
    const int64_t stride = inner == 1 ? outer_stride : inner_stride;
    const bool uniform = inner == 1 || rows <= inner || outer_stride == inner * inner_stride;
    if (rows <= 1) return std::max(cols, stride);
    return uniform && stride >= cols ? stride : 0;
  }
  /// Whether brgemm can read whole rows as they stand.
  bool dense_rows() const { return (col_stride == 1 || cols == 1) && row_stride() > 0; }
};

/// An operand cut into tiles, in place or packed; operator()(k, tile) is one of them.
template <class T>
class Tiles {
 public:
  /// Tiles of kTile rows of A.
  static Tiles left(const Matrices<T>& m) {
    if (m.dense_rows() && packed_depth<T>(m.cols) == m.cols) {
      return {m.data, m.matrix_stride, kTile * m.row_stride(), m.row_stride()};
    }
    const int64_t stride = packed_depth<T>(m.cols);
    return packed(m.count, ceil_div(m.rows, kTile), kTile * stride, stride, [&](T* panel, int64_t k, int64_t tile) {
      for (int64_t r = 0; r < tile_size(tile, m.rows); ++r) {
        const T* from = m.row(k, tile * kTile + r);
        T* to = panel + r * stride;
        for (int64_t d = 0; d < m.cols; ++d) to[d] = from[d * m.col_stride];
        if (stride != m.cols) to[m.cols] = T(0);
      }
    });
  }

  /// Tiles of kTile columns of B, whose rows are the depth.
  static Tiles right(const Matrices<T>& m) {
    if (m.dense_rows() && !interleaved<T>()) return {m.data, m.matrix_stride, kTile, m.row_stride()};
    const int64_t pair = interleaved<T>() ? 2 : 1, depth = packed_depth<T>(m.rows);
    return packed(m.count, ceil_div(m.cols, kTile), kTile * depth, kTile, [&](T* panel, int64_t k, int64_t tile) {
      const int64_t cols = tile_size(tile, m.cols);
      for (int64_t d = 0; d < depth; ++d) {
        const T* from = d < m.rows ? m.row(k, d) + tile * kTile * m.col_stride : nullptr;
        T* to = panel + d / pair * kTile * pair + d % pair;
        for (int64_t n = 0; n < cols; ++n) to[n * pair] = from ? from[n * m.col_stride] : T(0);
      }
    });
  }

  /// Tiles of kTile columns of B, whose columns are the rows of `m`: a transposition, always packed.
  static Tiles right_from_rows(const Matrices<T>& m) {
    constexpr int64_t block = 16;  // rows at a time: a cache line that is read or written serves several elements
    const int64_t pair = interleaved<T>() ? 2 : 1, depth = packed_depth<T>(m.cols);
    return packed(m.count, ceil_div(m.rows, kTile), kTile * depth, kTile, [&](T* panel, int64_t k, int64_t tile) {
      const int64_t cols = tile_size(tile, m.rows);
      for (int64_t n0 = 0; n0 < cols; n0 += block) {
        const int64_t n1 = std::min(n0 + block, cols);
        const T* from[block];
        for (int64_t n = n0; n < n1; ++n) from[n - n0] = m.row(k, tile * kTile + n);
        for (int64_t d = 0; d < depth; ++d) {
          T* to = panel + d / pair * kTile * pair + d % pair;
          for (int64_t n = n0; n < n1; ++n) to[n * pair] = d < m.cols ? from[n - n0][d * m.col_stride] : T(0);
        }
      }
    });
  }

  Tile<T> operator()(int64_t k, int64_t tile) const {
    return {data_ + k * matrix_stride_ + tile * tile_stride_, row_stride_};
  }

 private:
  Tiles(const T* data, int64_t matrix_stride, int64_t tile_stride, int64_t row_stride)
      : memory_(0), data_(data), matrix_stride_(matrix_stride), tile_stride_(tile_stride), row_stride_(row_stride) {}

  /// pack(panel, k, tile) fills one tile.
  template <class Pack>
  static Tiles packed(int64_t count, int64_t tiles, int64_t tile_stride, int64_t row_stride, Pack pack) {
    Tiles result(nullptr, tiles * tile_stride, tile_stride, row_stride);
    result.memory_ = Scratch<T>(count * tiles * tile_stride);
    T* const panels = result.memory_.data();
    at::parallel_for(0, count * tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack(panels + i * tile_stride, i / tiles, i % tiles);
    });
    result.data_ = panels;
    return result;
  }

  Scratch<T> memory_;
  const T* data_;
  int64_t matrix_stride_, tile_stride_, row_stride_;
};

}  // namespace neuromod
