// The inner product of every CPU kernel: one tile C = A B through torch's brgemm (oneDNN: AVX2, AVX-512, AMX; a plain
// matmul where those are missing), and the packing it wants. float64, which brgemm lacks, runs on a loop of our own.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "common/params.h"

namespace neuromod {

/// Rows and columns of a product tile.
constexpr int64_t kTile = 64;

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr bool is_half_type = std::is_same_v<T, at::BFloat16> || std::is_same_v<T, at::Half>;

/// Cache-line aligned, uninitialised scratch memory.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(count), std::align_val_t{64}))) {}
  T* data() const { return data_.get(); }

 private:
  struct Release {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Release> data_;
};

/// Whether brgemm wants B's depth interleaved in pairs (AMX and AVX-512 dot products of half-precision pairs).
template <class T>
bool interleaved() {
  if constexpr (is_half_type<T>) {
    static const bool value = at::native::cpublas::could_pack(c10::CppTypeToScalarType<T>::value);
    return value;
  } else {
    return false;
  }
}

/// Depth of packed operands: even where pairs are interleaved.
template <class T>
int64_t packed_depth(int64_t depth) {
  return interleaved<T>() ? (depth + 1) / 2 * 2 : depth;
}

/// A[rows, depth], row-major with packed_depth columns. read(row, d) is one element.
template <class T, class Read>
void pack_left(T* panel, int64_t rows, int64_t depth, Read read) {
  const int64_t stride = packed_depth<T>(depth);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < depth; ++d) panel[r * stride + d] = read(r, d);
    if (stride != depth) panel[r * stride + depth] = T(0);
  }
}

/// B[depth, cols] with rows of kTile, its depth in pairs where interleaved. `step_depth` and `step_col` are strides.
template <class T>
void pack_right(T* panel, int64_t depth, int64_t cols, const T* source, int64_t step_depth, int64_t step_col) {
  const int64_t pair = interleaved<T>() ? 2 : 1;
  const auto place = [&](int64_t d, int64_t n) -> T& { return panel[(d / pair) * kTile * pair + n * pair + d % pair]; };
  if (step_depth == 1) {  // walk the source along its unit stride
    for (int64_t n = 0; n < cols; ++n)
      for (int64_t d = 0; d < depth; ++d) place(d, n) = source[d + n * step_col];
  } else {
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t n = 0; n < cols; ++n) place(d, n) = source[d * step_depth + n * step_col];
  }
  for (int64_t d = depth; d < packed_depth<T>(depth); ++d)
    for (int64_t n = 0; n < cols; ++n) place(d, n) = T(0);
}

namespace detail {

/// c[cols] += a[depth] b[depth, cols], rows of b kTile apart.
void double_row_product(int64_t cols, int64_t depth, const double* a, const double* b, double* c);

}  // namespace detail

/// C[rows, cols] (rows of `ldc`) = or += A B, for packed operands; `lda` elements from row to row of A.
template <class T>
void tile_product(int64_t rows, int64_t cols, int64_t depth, const T* a, int64_t lda, const T* b, acc_t<T>* c,
                  int64_t ldc, bool accumulate) {
  const int64_t padded = packed_depth<T>(depth);
  if (!accumulate && (depth == 0 || std::is_same_v<T, double>)) {
    for (int64_t r = 0; r < rows; ++r) std::fill_n(c + r * ldc, cols, acc_t<T>(0));
  }
  if (depth == 0) return;
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t r = 0; r < rows; ++r) detail::double_row_product(cols, depth, a + r * lda, b, c + r * ldc);
  } else {
    at::native::cpublas::brgemm(rows, cols, padded, lda, kTile, ldc, accumulate, a, b, c, interleaved<T>());
  }
}

/// Each thread calls this when its products are done: oneDNN may hold the core's matrix unit configured.
template <class T>
void release_tiles() {
  if constexpr (!std::is_same_v<T, double>) at::native::cpublas::brgemm_release(interleaved<T>());
}

}  // namespace neuromod
