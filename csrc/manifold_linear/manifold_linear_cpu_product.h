// torch's matrix product (MKL, oneDNN) on the kernels' operands.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>

#include "common/tile_product.h"

namespace neuromod {

/// A tensor that borrows a matrix.
template <class T>
at::Tensor matrix(const T* data, int64_t rows, int64_t cols, int64_t stride, int64_t col_stride = 1) {
  constexpr auto dtype = c10::CppTypeToScalarType<typename detail::TorchType<T>::type>::value;
  return at::from_blob(const_cast<T*>(data), {rows, cols}, {stride, col_stride}, dtype);
}

/// out = a b, or with `add` out += a b.
inline void torch_product(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool add) {
  at::cpu::addmm_(out, a, b, add ? 1 : 0, 1);
}

}  // namespace neuromod
