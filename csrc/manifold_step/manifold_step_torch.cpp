// manifold_step_ and manifold_step_foreach_, host side: schema, checks, registration.
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "common/host.h"
#include "manifold_step/manifold_step.h"

namespace neuromod {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// A parameter and what belongs to it; `suffix` ends the names of its arguments.
struct Operands {
  Tensor param, grad;
  OptionalTensor momentum_buffer, metric_inverse;
  std::string suffix;
};

/// Without a pending negation: torch carries out neither those of an op in place nor those in a list of optional
/// tensors.
OptionalTensor resolved(const OptionalTensor& t) { return t ? OptionalTensor(t->resolve_neg()) : t; }

void check_number(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value), op, ": expected ", name, " to be finite, got ", value);
}

void check_numbers(const char* op, const ManifoldStepNumbers& numbers) {
  check_number(op, "lr", numbers.lr);
  check_number(op, "momentum", numbers.momentum);
  check_number(op, "dampening", numbers.dampening);
  check_number(op, "weight_decay", numbers.weight_decay);
}

void check_operands(const char* op, const Operands& all, double momentum) {
  const std::string param = "param" + all.suffix, grad = "grad" + all.suffix;
  const Tensor& P = all.param;
  check_floating(op, param.c_str(), P);
  check_min_rank(op, param.c_str(), P, 1, "[K, ...]");
  check_like(op, grad.c_str(), all.grad, param.c_str(), P);
  check_shape(op, grad.c_str(), all.grad, "[K, ...]", P.sizes());
  if (all.momentum_buffer) {
    const std::string name = "momentum_buffer" + all.suffix;
    check_like(op, name.c_str(), *all.momentum_buffer, param.c_str(), P);
    check_shape(op, name.c_str(), *all.momentum_buffer, "[K, ...]", P.sizes());
  }
  TORCH_CHECK_VALUE(momentum == 0 || all.momentum_buffer, op,
                    ": expected a momentum_buffer for momentum != 0, got None; pass a tensor like param");
  if (all.metric_inverse) {
    const std::string name = "metric_inverse" + all.suffix;
    check_accumulation_like(op, name.c_str(), *all.metric_inverse, param.c_str(), P);
    check_shape(op, name.c_str(), *all.metric_inverse, "[K, K]", {P.size(0), P.size(0)});
  }
}

/// From where to where a tensor reaches in memory.
struct Span {
  uintptr_t begin, end;
  bool written;
  const char* name;
  const Operands* of;

  std::string text() const { return name + of->suffix; }
};

/// What is written has one place for each element, apart from all else. The spans in order, each is held against the
/// one before it that reaches furthest.
void check_memory(const char* op, const std::vector<Operands>& operands) {
  std::vector<Span> spans;
  const auto add = [&](const Tensor& t, const char* name, bool written, const Operands& of) {
    if (written) check_not_expanded(op, (name + of.suffix).c_str(), t);
    if (t.numel() == 0) return;
    const auto [begin, end] = memory_span(t);
    spans.push_back({begin, end, written, name, &of});
  };
  for (const Operands& all : operands) {
    add(all.param, "param", true, all);
    add(all.grad, "grad", false, all);
    if (all.momentum_buffer) add(*all.momentum_buffer, "momentum_buffer", true, all);
    if (all.metric_inverse) add(*all.metric_inverse, "metric_inverse", false, all);
  }
  std::stable_sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  const Span *furthest = nullptr, *furthest_written = nullptr;
  for (const Span& span : spans) {
    const Span* const other = span.written ? furthest : furthest_written;
    const bool first = span.written && other && !other->written;  // of the two, what is only read is named first
    TORCH_CHECK_VALUE(!other || other->end <= span.begin, op, ": expected ", (first ? *other : span).text(),
                      " in memory of its own, got one that overlaps ", (first ? span : *other).text(), "; clone it");
    if (!furthest || span.end > furthest->end) furthest = &span;
    if (span.written && (!furthest_written || span.end > furthest_written->end)) furthest_written = &span;
  }
}

/// The step, of arguments that were checked.
void step(const char* op, const std::vector<Operands>& operands, const ManifoldStepNumbers& numbers) {
  struct Rows {
    Tensor param, grad, buffer;
  };
  std::vector<Rows> rows;
  std::vector<ManifoldStepTensor> tensors;
  rows.reserve(operands.size()), tensors.reserve(operands.size());
  for (const Operands& all : operands) {
    // Layouts without dense rows are worked on as copies and written back whole.
    rows.push_back({as_rows(all.param), as_rows(all.grad), {}});
    Rows& t = rows.back();
    if (all.momentum_buffer) t.buffer = as_rows(*all.momentum_buffer);
    if (all.param.numel() == 0) continue;
    ManifoldStepTensor one{t.param.size(0), t.param.size(1), mutable_view(t.param), view(t.grad), {}, {}};
    if (t.buffer.defined()) one.buffer = mutable_view(t.buffer);
    if (all.metric_inverse) one.metric_inverse = view(*all.metric_inverse);
    tensors.push_back(one);
  }
  if (tensors.empty()) return;
  const Tensor& first = operands.front().param;
  const ManifoldStepParams p{to_dtype(first.scalar_type()), numbers, tensors.data(),
                             static_cast<int64_t>(tensors.size())};
  run(op, first.device(), NEUROMOD_KERNEL(manifold_step), p);
  for (size_t i = 0; i < operands.size(); ++i) {
    const Operands& all = operands[i];
    const auto written = [](const Tensor& t, const Tensor& as_rows) {
      mark_written(t);
      if (!as_rows.is_alias_of(t)) t.copy_(as_rows.view(t.sizes()));
    };
    written(all.param, rows[i].param);
    if (all.momentum_buffer) written(*all.momentum_buffer, rows[i].buffer);
  }
}

void manifold_step_(const Tensor& param, const Tensor& grad, const OptionalTensor& momentum_buffer,
                    const OptionalTensor& metric_inverse, double lr, double momentum, double dampening,
                    double weight_decay, bool nesterov, bool maximize, bool first_step) {
  constexpr auto op = "manifold_step_";
  const std::vector<Operands> operands{{param, grad.resolve_neg(), momentum_buffer, resolved(metric_inverse), ""}};
  const ManifoldStepNumbers numbers{lr, nullptr, momentum, dampening, weight_decay, nesterov, maximize, first_step};
  check_operands(op, operands[0], momentum);
  check_memory(op, operands);
  check_numbers(op, numbers);
  step(op, operands, numbers);
}

void check_count(const char* op, const char* name, size_t got, size_t want) {
  TORCH_CHECK_VALUE(got == want, op, ": expected as many ", name, " as params = ", want, ", got ", got);
}

void manifold_step_foreach_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                            const c10::List<OptionalTensor>& metric_inverses, const Tensor& lr, double momentum,
                            double dampening, double weight_decay, bool nesterov, bool maximize, bool first_step) {
  constexpr auto op = "manifold_step_foreach_";
  check_count(op, "grads", grads.size(), params.size());
  if (!momentum_buffers.empty()) check_count(op, "momentum_buffers", momentum_buffers.size(), params.size());
  check_count(op, "metric_inverses", metric_inverses.size(), params.size());
  TORCH_CHECK_TYPE(lr.scalar_type() == at::kDouble, op, ": expected lr of dtype float64, got ",
                   dtype_name(lr.scalar_type()), "; convert it with .double()");
  check_shape(op, "lr", lr, "[]", {});
  if (params.empty()) return;
  std::vector<Operands> operands;
  operands.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const std::string suffix = "s[" + std::to_string(i) + "]";
    operands.push_back({params[i], grads[i], {}, resolved(metric_inverses.get(i)), suffix});
    if (!momentum_buffers.empty()) operands[i].momentum_buffer = momentum_buffers[i];
    if (i > 0) check_like(op, ("param" + suffix).c_str(), params[i], "params[0]", params[0]);
    check_operands(op, operands[i], momentum);
  }
  const auto device = params[0].device();
  TORCH_CHECK_VALUE(lr.is_cpu() || lr.device() == device, op, ": expected lr on ", device.str(), " or on cpu, got ",
                    lr.device().str(), "; move it");
  check_memory(op, operands);
  const bool there = runs_cuda_kernels(device) && lr.device() == device;
  const ManifoldStepNumbers numbers{there ? 0.0 : *lr.const_data_ptr<double>(),
                                    there ? lr.const_data_ptr<double>() : nullptr,
                                    momentum,
                                    dampening,
                                    weight_decay,
                                    nesterov,
                                    maximize,
                                    first_step};
  check_numbers(op, numbers);
  step(op, operands, numbers);
}

TORCH_LIBRARY_FRAGMENT(NEUROMOD_LIBRARY, library) {
  library.def(
      "manifold_step_(Tensor(a!) param, Tensor grad, Tensor(b!)? momentum_buffer=None, Tensor? metric_inverse=None, *, "
      "float lr, float momentum=0.0, float dampening=0.0, float weight_decay=0.0, bool nesterov=False, "
      "bool maximize=False, bool first_step=False) -> ()");
  library.def(
      "manifold_step_foreach_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor?[] metric_inverses, Tensor lr, *, float momentum=0.0, float dampening=0.0, float weight_decay=0.0, "
      "bool nesterov=False, bool maximize=False, bool first_step=False) -> ()");
}
NEUROMOD_IMPL_IN_PLACE("manifold_step_", &manifold_step_)
NEUROMOD_IMPL("manifold_step_foreach_", &manifold_step_foreach_)

}  // namespace
}  // namespace neuromod
