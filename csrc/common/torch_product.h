// torch's matrix product (MKL, OpenBLAS, oneDNN) on the kernels' operands.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/tile_product.h"

// The BLAS that torch is linked to, if its library lets others call it. Small products take less time than tensors that
// would carry them to it.
extern "C" {
[[gnu::weak]] void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                          const int*, const float*, const int*, const float*, float*, const int*);
[[gnu::weak]] void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*, const double*,
                          const int*, const double*, const int*, const double*, double*, const int*);
}

namespace neuromod {

/// A matrix of dense rows that somebody else owns, or with `transposed` the transpose of one.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, stride;
  bool transposed = false;

  Matrix t() const { return {data, cols, rows, stride, !transposed}; }
};

template <class T>
Matrix<T> matrix(const T* data, int64_t rows, int64_t cols, int64_t stride) {
  return {const_cast<T*>(data), rows, cols, stride};
}

namespace detail {

template <class T>
at::Tensor borrowed(const Matrix<T>& m) {
  constexpr auto dtype = c10::CppTypeToScalarType<typename TorchType<T>::type>::value;
  if (m.transposed) return at::from_blob(m.data, {m.rows, m.cols}, {1, m.stride}, dtype);
  return at::from_blob(m.data, {m.rows, m.cols}, {m.stride, 1}, dtype);
}

/// From row to row, as BLAS wants it: no less than a row is long, even if it is the only one; 0 if rows overlap.
template <class T>
int64_t step(const Matrix<T>& m) {
  const int64_t rows = m.transposed ? m.cols : m.rows, cols = m.transposed ? m.rows : m.cols;
  if (rows == 1) return cols;
  return m.stride < cols ? 0 : m.stride;
}

/// Whether the BLAS computed out (+)= a b; out is not transposed.
template <class T>
bool blas_product(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b, bool add) {
  const auto gemm = [] {
    if constexpr (std::is_same_v<T, float>)
      return &sgemm_;
    else
      return &dgemm_;
  }();
  constexpr int64_t most = std::numeric_limits<int>::max();
  const int64_t sizes[] = {out.rows, out.cols, a.cols}, steps[] = {step(b), step(a), step(out)};
  for (const int64_t size : sizes)
    if (size < 1 || size > most) return false;
  for (const int64_t each : steps)
    if (each < 1 || each > most) return false;
  if (!gemm) return false;
  // BLAS counts by columns: our rows are its columns, so it computes out^T = b^T a^T.
  const int rows = int(out.cols), cols = int(out.rows), depth = int(a.cols);
  const int strides[] = {int(steps[0]), int(steps[1]), int(steps[2])};
  const T one = 1, keep = add;
  gemm(b.transposed ? "T" : "N", a.transposed ? "T" : "N", &rows, &cols, &depth, &one, b.data, &strides[0], a.data,
       &strides[1], &keep, out.data, &strides[2]);
  return true;
}

}  // namespace detail

/// Calls f(TypeTag<T>{}) with a type whose products are as exact as its sums.
template <class F>
void dispatch_wide(DType dtype, F f) {
  dtype == DType::float64 ? f(TypeTag<double>{}) : f(TypeTag<float>{});
}

/// out = a b, or with `add` out += a b; out is not transposed.
template <class T>
void torch_product(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b, bool add) {
  if constexpr (!is_half_type<T>)
    if (detail::blas_product(out, a, b, add)) return;
  at::Tensor to = detail::borrowed(out);
  at::cpu::addmm_(to, detail::borrowed(a), detail::borrowed(b), add ? 1 : 0, 1);
}

/// Runs f(job) for jobs that call torch_product, each on one thread: so that threads are at work if there are any,
/// there are at least two, since outside of them torch's product would take several threads itself.
template <class F>
void parallel_products(int64_t jobs, F f) {
  parallel_ranges(std::max<int64_t>(jobs, 2), 1.0, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < std::min(end, jobs); ++job) f(job);
  });
}

}  // namespace neuromod
