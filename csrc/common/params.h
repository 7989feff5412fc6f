// What a kernel is told: plain structs, no torch, no CUDA, so that every compiler in the house can read them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define NEUROMOD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NEUROMOD_HOST_DEVICE inline __attribute__((always_inline))  // compiled for several instruction sets
#endif

struct CUstream_st;

namespace neuromod {

/// A CUDA stream's raw handle; null is the default stream (and the only one of the emulator).
using stream_t = CUstream_st*;

/// Element types of inputs, basis points and outputs. Sums, coefficients and metrics are float64 for
/// float64 and float32 for all others.
enum class DType : int8_t { float64, float32, bfloat16, float16 };

NEUROMOD_HOST_DEVICE int64_t element_bytes(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

/// A strided tensor of up to three dimensions. Strides count elements and may be zero or negative.
struct View {
  void* data = nullptr;
  int64_t stride[3] = {0, 0, 0};

  template <class T>
  NEUROMOD_HOST_DEVICE T* at(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return static_cast<T*>(data) + i * stride[0] + j * stride[1] + k * stride[2];
  }
  NEUROMOD_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

NEUROMOD_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace neuromod
