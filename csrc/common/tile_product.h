// The inner product of every CPU kernel: one tile C = A B through torch's brgemm (oneDNN: AVX2, AVX-512, AMX; a plain
// matmul where those are missing). float64, which brgemm lacks, runs on a loop of our own.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

#include "common/params.h"

namespace neuromod {

/// Rows and columns of a product tile.
constexpr int64_t kTile = 64;

inline int64_t tile_size(int64_t tile, int64_t total) { return std::min(kTile, total - tile * kTile); }

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

/// A tile of an operand as tile_product reads it.
template <class T>
struct Tile {
  const T* data;
  int64_t stride;  // from row to row
};

/// Each thread calls this when its products are done: oneDNN may hold the core's matrix unit configured.
template <class T>
void release_tiles() {
  if constexpr (!std::is_same_v<T, double>) at::native::cpublas::brgemm_release(interleaved<T>());
}

namespace detail {

/// c[cols] += a[depth] b[depth, cols].
void double_row_product(int64_t cols, int64_t depth, const double* a, const double* b, int64_t ldb, double* c);

}  // namespace detail

/// C[rows, cols] (rows of `ldc`) = or += A B.
template <class T>
void tile_product(int64_t rows, int64_t cols, int64_t depth, Tile<T> a, Tile<T> b, acc_t<T>* c, int64_t ldc,
                  bool accumulate) {
  if (!accumulate && (depth == 0 || std::is_same_v<T, double>)) {
    for (int64_t r = 0; r < rows; ++r) std::fill_n(c + r * ldc, cols, acc_t<T>(0));
  }
  if (depth == 0) return;
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t r = 0; r < rows; ++r)
      detail::double_row_product(cols, depth, a.data + r * a.stride, b.data, b.stride, c + r * ldc);
  } else {
    at::native::cpublas::brgemm(rows, cols, packed_depth<T>(depth), a.stride, b.stride, ldc, accumulate, a.data, b.data,
                                c, interleaved<T>());
  }
}

}  // namespace neuromod
