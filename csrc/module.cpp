// The Python module _C: what this binary is. Its ops are registered with torch when it is loaded (see */*_torch.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>
#include <vector>

#ifndef NEUROMOD_CUDA_VERSION
#define NEUROMOD_CUDA_VERSION ""
#define NEUROMOD_CUDA_ARCHS ""
#endif

namespace neuromod {
bool half_type_tiles(bool bfloat16);  // common/tile_product.cpp; its header would bring in torch's
}

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"torch", TORCH_VERSION},
      {"compiler", __VERSION__},
      {"cuda", NEUROMOD_CUDA_VERSION},
      {"cuda_archs", NEUROMOD_CUDA_ARCHS},
      {"cuda_reason", NEUROMOD_CUDA_REASON},
  };
}

/// Instruction sets of this processor that the CPU kernels can use.
std::vector<std::string> cpu_features() {
  std::vector<std::string> features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) features.emplace_back("avx2");
  if (__builtin_cpu_supports("fma")) features.emplace_back("fma");
  if (__builtin_cpu_supports("avx512f")) features.emplace_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) features.emplace_back("avx512bw");
  if (__builtin_cpu_supports("avx512bf16")) features.emplace_back("avx512bf16");
#endif
  if (neuromod::half_type_tiles(true)) features.emplace_back("bfloat16 tiles");
  if (neuromod::half_type_tiles(false)) features.emplace_back("float16 tiles");
  return features;
}

}  // namespace

// Found in the file without loading it, where loading fails (neuromod_ext/_ops.py).
[[gnu::used]] const char kBuiltAgainst[] = "neuromod_ext built against torch " TORCH_VERSION;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of neuromod_ext.";
  m.def("build_info", &build_info, "What this binary was built against and with.");
  m.def("cpu_features", &cpu_features, "Instruction sets of this processor that the CPU kernels can use.");
}
