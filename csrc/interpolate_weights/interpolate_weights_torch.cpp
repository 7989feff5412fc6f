// interpolate_weights, host side: schema, checks, allocation, registration.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "common/host.h"
#include "interpolate_weights/interpolate_weights.h"

namespace neuromod {
namespace {

using at::Tensor;

std::vector<int64_t> shape_with_first(int64_t first, at::IntArrayRef sizes) {
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape[0] = first;
  return shape;
}

/// out[m] = sum_j mix[m,j] in[j], for in [J, ...]
Tensor mixture(const char* op, const Tensor& mix, const Tensor& in) {
  const Tensor out = empty_result(shape_with_first(mix.size(0), in.sizes()), in.options());
  if (out.numel() == 0) return out;
  if (in.size(0) == 0) return out.zero_();
  const Tensor in_rows = as_rows(in), out_rows = as_rows(out);
  InterpolateWeightsParams p{};
  p.dtype = to_dtype(in.scalar_type());
  p.rows = mix.size(0);
  p.terms = mix.size(1);
  p.length = in_rows.size(1);
  p.mix = view(mix);
  p.in = view(in_rows);
  p.out = mutable_view(out_rows);
  run(op, in.device(), NEUROMOD_KERNEL(interpolate_weights), p);
  return out;
}

Tensor interpolate_weights(const Tensor& basis, const Tensor& coeff) {
  constexpr auto op = "interpolate_weights";
  check_floating(op, "basis", basis);
  check_min_rank(op, "basis", basis, 1, "[K, ...]");
  check_num_basis(op, "basis", basis.size(0));
  check_accumulation_like(op, "coeff", coeff, "basis", basis);
  check_rank(op, "coeff", coeff, 2, "[B, K]");
  check_shape(op, "coeff", coeff, "[B, K]", {coeff.size(0), basis.size(0)});
  return mixture(op, coeff, basis);
}

Tensor interpolate_weights_grad_basis(const Tensor& grad_output, const Tensor& coeff) {
  constexpr auto op = "interpolate_weights_grad_basis";
  check_floating(op, "grad_output", grad_output);
  check_min_rank(op, "grad_output", grad_output, 1, "[B, ...]");
  check_accumulation_like(op, "coeff", coeff, "grad_output", grad_output);
  check_rank(op, "coeff", coeff, 2, "[B, K]");
  check_shape(op, "coeff", coeff, "[B, K]", {grad_output.size(0), coeff.size(1)});
  return mixture(op, coeff.t(), grad_output);
}

/// What the gradients have in common: the checks of grad_output [B, ...] and basis [K, ...].
void check_operands(const char* op, const Tensor& grad_output, const Tensor& basis) {
  check_floating(op, "grad_output", grad_output);
  check_min_rank(op, "grad_output", grad_output, 1, "[B, ...]");
  check_like(op, "basis", basis, "grad_output", grad_output);
  check_min_rank(op, "basis", basis, 1, "[K, ...]");
  check_shape(op, "basis", basis, "[K, ...]", shape_with_first(basis.size(0), grad_output.sizes()));
}

/// grad_coeff and, if it is defined, grad_basis, in one pass over grad_output.
Tensor inner_products(const char* op, const Tensor& grad_output, const Tensor& basis, const Tensor& coeff,
                      const Tensor& grad_basis) {
  const auto options = basis.options().dtype(accumulation_type(basis.scalar_type()));
  const Tensor out = at::empty({grad_output.size(0), basis.size(0)}, options);
  if (grad_output.numel() == 0 || basis.numel() == 0) {
    if (grad_basis.defined()) grad_basis.zero_();
    return out.zero_();
  }
  const Tensor g = as_rows(grad_output), rows = as_rows(basis);
  InterpolateWeightsBackwardParams p{};
  p.dtype = to_dtype(basis.scalar_type());
  p.batch = g.size(0);
  p.num_basis = rows.size(0);
  p.length = rows.size(1);
  p.grad = view(g);
  p.basis = view(rows);
  if (grad_basis.defined()) {
    p.coeff = view(coeff);
    p.grad_basis = mutable_view(as_rows(grad_basis));
  }
  p.grad_coeff = out.mutable_data_ptr();
  Tensor workspace;
  if (runs_cuda_kernels(basis.device())) {
    workspace = at::empty({interpolate_weights_parts(p.dtype, p.length), p.batch, p.num_basis}, options);
    p.workspace = workspace.mutable_data_ptr();
  }
  run(op, basis.device(), NEUROMOD_KERNEL(interpolate_weights_backward), p);
  return out;
}

Tensor interpolate_weights_grad_coeff(const Tensor& grad_output, const Tensor& basis) {
  constexpr auto op = "interpolate_weights_grad_coeff";
  check_operands(op, grad_output, basis);
  return inner_products(op, grad_output, basis, {}, {});
}

std::tuple<Tensor, Tensor> interpolate_weights_backward(const Tensor& grad_output, const Tensor& basis,
                                                        const Tensor& coeff, std::array<bool, 2> needed) {
  constexpr auto op = "interpolate_weights_backward";
  check_operands(op, grad_output, basis);
  check_accumulation_like(op, "coeff", coeff, "grad_output", grad_output);
  check_shape(op, "coeff", coeff, "[B, K]", {grad_output.size(0), basis.size(0)});
  Tensor grad_basis, grad_coeff;
  if (needed[0] && needed[1]) {
    grad_basis = empty_result(basis.sizes(), basis.options());
    grad_coeff = inner_products(op, grad_output, basis, coeff, grad_basis);
  } else if (needed[0]) {
    grad_basis = mixture(op, coeff.t(), grad_output);
  } else if (needed[1]) {
    grad_coeff = inner_products(op, grad_output, basis, {}, {});
  }
  const auto or_empty = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, basis.options()); };
  return {or_empty(grad_basis), or_empty(grad_coeff)};
}

TORCH_LIBRARY_FRAGMENT(NEUROMOD_LIBRARY, library) {
  library.def("interpolate_weights(Tensor basis, Tensor coeff) -> Tensor");
  library.def(
      "interpolate_weights_backward(Tensor grad_output, Tensor basis, Tensor coeff, bool[2] needed) "
      "-> (Tensor, Tensor)");
  library.def("interpolate_weights_grad_basis(Tensor grad_output, Tensor coeff) -> Tensor");
  library.def("interpolate_weights_grad_coeff(Tensor grad_output, Tensor basis) -> Tensor");
}
NEUROMOD_IMPL("interpolate_weights", &interpolate_weights)
NEUROMOD_IMPL("interpolate_weights_backward", &interpolate_weights_backward)
NEUROMOD_IMPL("interpolate_weights_grad_basis", &interpolate_weights_grad_basis)
NEUROMOD_IMPL("interpolate_weights_grad_coeff", &interpolate_weights_grad_coeff)

}  // namespace
}  // namespace neuromod
