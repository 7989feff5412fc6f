// What torch's user wants products to be.
#pragma once

#include <ATen/Context.h>
#include <torch/version.h>

namespace neuromod {

/// Whether torch lets float32 products on CUDA round their operands to tf32, as its user has said in either way it
/// knows.
inline bool tf32_allowed() {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
#else
  return at::globalContext().allowTF32CuBLAS();
#endif
}

/// Whether torch's products may be taken. Those of cuBLAS refuse to run where its user asks for deterministic
/// algorithms; those for the CPU, which stand in for them in the emulated library, are.
inline bool torch_products_allowed() {
#if defined(NEUROMOD_EMULATED)
  return true;
#else
  return !at::globalContext().deterministicAlgorithms();
#endif
}

}  // namespace neuromod
