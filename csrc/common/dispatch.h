// From a run-time DType to a compile-time element type. Torch-free: each backend brings its own half-precision types.
#pragma once

#include "common/params.h"

namespace neuromod {

template <class T>
struct TypeTag {
  using type = T;
};

/// Calls f(TypeTag<T>{}) with the element type of `dtype` and hands its result back.
template <class Half, class BFloat16, class F>
auto dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64:
      return f(TypeTag<double>{});
    case DType::float32:
      return f(TypeTag<float>{});
    case DType::bfloat16:
      return f(TypeTag<BFloat16>{});
    case DType::float16:
      break;
  }
  return f(TypeTag<Half>{});
}

}  // namespace neuromod
