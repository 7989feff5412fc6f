// manifold_step_, host side: schema, checks, registration.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>

#include "common/host.h"
#include "manifold_step/manifold_step.h"

namespace neuromod {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_number(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value), op, ": expected ", name, " to be finite, got ", value);
}

void manifold_step_(const Tensor& param, const Tensor& grad, const OptionalTensor& momentum_buffer,
                    const OptionalTensor& metric_inverse, double lr, double momentum, double dampening,
                    double weight_decay, bool nesterov, bool maximize, bool first_step) {
  constexpr auto op = "manifold_step_";
  check_floating(op, "param", param);
  check_min_rank(op, "param", param, 1, "[K, ...]");
  check_like(op, "grad", grad, "param", param);
  check_shape(op, "grad", grad, "[K, ...]", param.sizes());
  if (momentum_buffer) {
    check_like(op, "momentum_buffer", *momentum_buffer, "param", param);
    check_shape(op, "momentum_buffer", *momentum_buffer, "[K, ...]", param.sizes());
  }
  TORCH_CHECK_VALUE(momentum == 0 || momentum_buffer, op,
                    ": expected a momentum_buffer for momentum != 0, got None; pass a tensor like param");
  if (metric_inverse) {
    check_accumulation_like(op, "metric_inverse", *metric_inverse, "param", param);
    check_shape(op, "metric_inverse", *metric_inverse, "[K, K]", {param.size(0), param.size(0)});
  }
  check_not_expanded(op, "param", param);
  check_apart(op, "grad", grad, "param", param);
  if (momentum_buffer) {
    check_not_expanded(op, "momentum_buffer", *momentum_buffer);
    check_apart(op, "momentum_buffer", *momentum_buffer, "param", param);
    check_apart(op, "grad", grad, "momentum_buffer", *momentum_buffer);
  }
  if (metric_inverse) check_apart(op, "metric_inverse", *metric_inverse, "param", param);
  check_number(op, "lr", lr);
  check_number(op, "momentum", momentum);
  check_number(op, "dampening", dampening);
  check_number(op, "weight_decay", weight_decay);
  if (param.numel() == 0) return;

  // Layouts without dense rows are worked on as copies and written back whole.
  const Tensor rows = as_rows(param), grad_rows = as_rows(grad);
  const Tensor buffer_rows = momentum_buffer ? as_rows(*momentum_buffer) : Tensor();
  ManifoldStepParams p{};
  p.dtype = to_dtype(param.scalar_type());
  p.num_basis = rows.size(0);
  p.length = rows.size(1);
  p.param = mutable_view(rows);
  p.grad = view(grad_rows);
  if (momentum_buffer) p.buffer = mutable_view(buffer_rows);
  if (metric_inverse) p.metric_inverse = view(*metric_inverse);
  p.lr = lr;
  p.momentum = momentum;
  p.dampening = dampening;
  p.weight_decay = weight_decay;
  p.nesterov = nesterov;
  p.maximize = maximize;
  p.first_step = first_step;
  run(op, param.device(), NEUROMOD_KERNEL(manifold_step), p);
  mark_written(param);
  if (momentum_buffer) mark_written(*momentum_buffer);
  if (!rows.is_alias_of(param)) param.copy_(rows.view(param.sizes()));
  if (momentum_buffer && !buffer_rows.is_alias_of(*momentum_buffer)) {
    momentum_buffer->copy_(buffer_rows.view(param.sizes()));
  }
}

TORCH_LIBRARY_FRAGMENT(NEUROMOD_LIBRARY, library) {
  library.def(
      "manifold_step_(Tensor(a!) param, Tensor grad, Tensor(b!)? momentum_buffer=None, Tensor? metric_inverse=None, *, "
      "float lr, float momentum=0.0, float dampening=0.0, float weight_decay=0.0, bool nesterov=False, "
      "bool maximize=False, bool first_step=False) -> ()");
}
NEUROMOD_IMPL("manifold_step_", &manifold_step_)

}  // namespace
}  // namespace neuromod
