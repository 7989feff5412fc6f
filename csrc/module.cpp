// The Python module _C: what this binary is. Its ops are registered with torch when it is loaded (see */*_torch.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "fused_function.h"

#ifndef NEUROMOD_CUDA_VERSION
#define NEUROMOD_CUDA_VERSION ""
#define NEUROMOD_CUDA_ARCHS ""
#endif

namespace neuromod {
// Defined in common/processor.cpp, common/diagnostics.cpp and manifold_linear/manifold_linear_plan.cpp, whose headers
// would bring in torch's.
std::vector<std::string> cpu_features();
bool torch_product_outruns_tiles();
double tile_seconds(const std::string& dtype, int64_t rows, int64_t cols, int64_t depth, int64_t repeats);
std::map<std::string, std::vector<std::pair<std::string, double>>> explain_manifold_linear(
    const std::string& device, const std::string& dtype, int64_t batch, int64_t tokens, int64_t num_basis,
    int64_t num_local, int64_t out_features, int64_t in_features);
}  // namespace neuromod

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

}  // namespace

// Found in the file without loading it, where loading fails (neuromod_ext/_ops.py).
[[gnu::used]] const char kBuiltAgainst[] = "neuromod_ext built against torch " TORCH_VERSION;

PYBIND11_MODULE(_C, m) {
  using pybind11::arg;
  m.doc() = "Compiled kernels of neuromod_ext.";
  m.def("build_info", &build_info, "What this binary was built against and with.");
  m.def("cpu_features", &neuromod::cpu_features, "Instruction sets of this processor that the CPU kernels can use.");
  m.def("torch_product_outruns_tiles", &neuromod::torch_product_outruns_tiles,
        "Whether torch's matrix product of float32 and float64 is faster here than tiles.");
  m.def("tile_seconds", &neuromod::tile_seconds, arg("dtype"), arg("rows"), arg("cols"), arg("depth"), arg("repeats"),
        "Seconds that one product tile takes on this thread, its operands in cache: the limit of every CPU plan.");
  m.def(
      "explain", &neuromod::explain_manifold_linear, pybind11::kw_only(), arg("device") = "cpu", arg("dtype"),
      arg("batch"), arg("tokens") = 1, arg("num_basis"), arg("num_local") = 0, arg("out_features"), arg("in_features"),
      "Plans of manifold_linear for a problem, by pass, with the seconds the cost model expects of each: on the CPU of "
      "one "
      "thread; on CUDA of the card that its constants describe, for those gradients that one pass yields. The first is "
      "taken, unless NEUROMOD_PLAN (on CUDA, NEUROMOD_CUDA_PLAN) names one that can. num_local is the number of "
      "coefficients of a "
      "sample of manifold_linear_local, 0 for manifold_linear.");
  neuromod::define_fused_function(m);
}
