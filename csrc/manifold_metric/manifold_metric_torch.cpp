// manifold_metric, host side: schema, checks, allocation, registration.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/host.h"
#include "manifold_metric/manifold_metric.h"

namespace neuromod {
namespace {

using at::Tensor;

Tensor manifold_metric(const Tensor& coeff, const std::optional<Tensor>& weight) {
  constexpr auto op = "manifold_metric";
  check_accumulation_floating(op, "coeff", coeff);
  check_rank(op, "coeff", coeff, 2, "[N, K]");
  if (weight) {
    check_like(op, "weight", *weight, "coeff", coeff);
    check_shape(op, "weight", *weight, "[N]", {coeff.size(0)});
  } else {
    TORCH_CHECK_VALUE(coeff.size(0) >= 1, op, ": expected coeff of at least one condition (N >= 1), got N = 0");
  }

  const Tensor out = at::empty({coeff.size(1), coeff.size(1)}, coeff.options());
  if (out.numel() == 0) return out;
  if (coeff.size(0) == 0) return out.zero_();  // an empty weight's pointer is null, which kernels read as none given
  ManifoldMetricParams p{};
  p.dtype = to_dtype(coeff.scalar_type());
  p.count = coeff.size(0);
  p.num_basis = coeff.size(1);
  p.coeff = view(coeff);
  if (weight) p.weight = view(*weight);
  p.out = mutable_view(out);
  Tensor workspace;
  if (runs_cuda_kernels(coeff.device()) && manifold_metric_parts(p.count) > 1) {
    workspace =
        at::empty({manifold_metric_parts(p.count), p.num_basis, p.num_basis}, coeff.options().dtype(at::kDouble));
    p.workspace = workspace.mutable_data_ptr<double>();
  }
  run(op, coeff.device(), NEUROMOD_KERNEL(manifold_metric), p);
  return out;
}

TORCH_LIBRARY_FRAGMENT(NEUROMOD_LIBRARY, library) {
  library.def("manifold_metric(Tensor coeff, Tensor? weight=None) -> Tensor");
}
NEUROMOD_IMPL("manifold_metric", &manifold_metric)

}  // namespace
}  // namespace neuromod
