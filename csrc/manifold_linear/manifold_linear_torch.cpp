// manifold_linear, host side: schema, checks, allocation, registration.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "common/host.h"
#include "manifold_linear/manifold_linear.h"

namespace neuromod {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// [B, ..., last]
std::vector<int64_t> shape_with_last(at::IntArrayRef sizes, int64_t last) {
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = last;
  return shape;
}

/// [B, ..., last] as an expectation, its middle left open.
std::vector<int64_t> any_middle(int64_t first, int64_t last) { return {first, -1, last}; }

void check_basis(const char* op, const Tensor& basis, const char* like_name, const Tensor& like) {
  check_like(op, "basis", basis, like_name, like);
  check_rank(op, "basis", basis, 3, "[K, O, I]");
  check_num_basis(op, "basis", basis.size(0));
}

void check_coeff(const char* op, const Tensor& coeff, const char* like_name, const Tensor& like) {
  check_accumulation_like(op, "coeff", coeff, like_name, like);
  check_rank(op, "coeff", coeff, 2, "[B, K]");
}

ManifoldLinearParams make_params(const Tensor& like, const Tensor& rows, int64_t num_basis, int64_t out_features,
                                 int64_t in_features) {
  ManifoldLinearParams p{};
  p.dtype = to_dtype(like.scalar_type());
  p.batch = rows.size(0);
  p.tokens = rows.size(1);
  p.num_basis = num_basis;
  p.out_features = out_features;
  p.in_features = in_features;
  return p;
}

Tensor manifold_linear(const Tensor& input, const Tensor& basis, const Tensor& coeff, const OptionalTensor& bias) {
  constexpr auto op = "manifold_linear";
  check_floating(op, "input", input);
  check_min_rank(op, "input", input, 2, "[B, ..., I]");
  check_basis(op, basis, "input", input);
  check_coeff(op, coeff, "input", input);
  const int64_t K = basis.size(0), O = basis.size(1), I = basis.size(2), B = input.size(0);
  check_shape(op, "input", input, "[B, ..., I]", any_middle(B, I));
  check_shape(op, "coeff", coeff, "[B, K]", {B, K});
  if (bias) {
    check_like(op, "bias", *bias, "input", input);
    check_shape(op, "bias", *bias, "[K, O]", {K, O});
  }

  const Tensor output = at::empty(shape_with_last(input.sizes(), O), input.options());
  if (output.numel() == 0) return output;
  const Tensor x = as_tokens(input);
  auto p = make_params(input, x, K, O, I);
  p.input = view(x);
  p.basis = view(basis);
  p.coeff = view(coeff);
  if (bias) p.bias = view(*bias);
  p.output = mutable_view(as_tokens(output));
  run(op, input.device(), NEUROMOD_KERNEL(manifold_linear_forward), p);
  return output;
}

Tensor manifold_linear_grad_input(const Tensor& grad_output, const Tensor& basis, const Tensor& coeff) {
  constexpr auto op = "manifold_linear_grad_input";
  check_floating(op, "grad_output", grad_output);
  check_min_rank(op, "grad_output", grad_output, 2, "[B, ..., O]");
  check_basis(op, basis, "grad_output", grad_output);
  check_coeff(op, coeff, "grad_output", grad_output);
  const int64_t K = basis.size(0), O = basis.size(1), I = basis.size(2), B = grad_output.size(0);
  check_shape(op, "grad_output", grad_output, "[B, ..., O]", any_middle(B, O));
  check_shape(op, "coeff", coeff, "[B, K]", {B, K});

  const Tensor grad_input = at::empty(shape_with_last(grad_output.sizes(), I), grad_output.options());
  if (grad_input.numel() == 0) return grad_input;
  const Tensor g = as_tokens(grad_output);
  auto p = make_params(grad_output, g, K, O, I);
  p.output = view(g);
  p.basis = view(basis);
  p.coeff = view(coeff);
  p.input = mutable_view(as_tokens(grad_input));
  run(op, grad_output.device(), NEUROMOD_KERNEL(manifold_linear_grad_input), p);
  return grad_input;
}

Tensor manifold_linear_grad_basis(const Tensor& grad_output, const Tensor& input, const Tensor& coeff) {
  constexpr auto op = "manifold_linear_grad_basis";
  check_floating(op, "grad_output", grad_output);
  check_min_rank(op, "grad_output", grad_output, 2, "[B, ..., O]");
  check_like(op, "input", input, "grad_output", grad_output);
  check_coeff(op, coeff, "grad_output", grad_output);
  const int64_t B = grad_output.size(0), O = grad_output.size(-1), K = coeff.size(1);
  const int64_t I = input.dim() > 0 ? input.size(-1) : 0;
  check_shape(op, "input", input, "[B, ..., I]", shape_with_last(grad_output.sizes(), I));
  check_shape(op, "coeff", coeff, "[B, K]", {B, K});
  check_num_basis(op, "coeff", K);

  const Tensor grad_basis = at::empty({K, O, I}, grad_output.options());
  if (grad_basis.numel() == 0) return grad_basis;
  const Tensor g = as_tokens(grad_output), x = as_tokens(input);
  auto p = make_params(grad_output, g, K, O, I);
  p.output = view(g);
  p.input = view(x);
  p.coeff = view(coeff);
  p.basis = mutable_view(grad_basis);
  run(op, grad_output.device(), NEUROMOD_KERNEL(manifold_linear_grad_basis), p);
  return grad_basis;
}

Tensor manifold_linear_grad_coeff(const Tensor& grad_output, const Tensor& input, const Tensor& basis) {
  constexpr auto op = "manifold_linear_grad_coeff";
  check_floating(op, "grad_output", grad_output);
  check_min_rank(op, "grad_output", grad_output, 2, "[B, ..., O]");
  check_like(op, "input", input, "grad_output", grad_output);
  check_basis(op, basis, "grad_output", grad_output);
  const int64_t K = basis.size(0), O = basis.size(1), I = basis.size(2), B = grad_output.size(0);
  check_shape(op, "grad_output", grad_output, "[B, ..., O]", any_middle(B, O));
  check_shape(op, "input", input, "[B, ..., I]", shape_with_last(grad_output.sizes(), I));

  const auto accumulation = grad_output.options().dtype(accumulation_type(grad_output.scalar_type()));
  const Tensor grad_coeff = at::empty({B, K}, accumulation);
  if (grad_coeff.numel() == 0) return grad_coeff;
  const Tensor g = as_tokens(grad_output), x = as_tokens(input);
  auto p = make_params(grad_output, g, K, O, I);
  const Tensor workspace = at::empty({p.batch * p.tokens, K}, accumulation);
  p.output = view(g);
  p.input = view(x);
  p.basis = view(basis);
  p.coeff = mutable_view(grad_coeff);
  p.workspace = workspace.mutable_data_ptr();
  run(op, grad_output.device(), NEUROMOD_KERNEL(manifold_linear_grad_coeff), p);
  return grad_coeff;
}

TORCH_LIBRARY_FRAGMENT(NEUROMOD_LIBRARY, library) {
  library.def("manifold_linear(Tensor input, Tensor basis, Tensor coeff, Tensor? bias=None) -> Tensor");
  library.def("manifold_linear_grad_input(Tensor grad_output, Tensor basis, Tensor coeff) -> Tensor");
  library.def("manifold_linear_grad_basis(Tensor grad_output, Tensor input, Tensor coeff) -> Tensor");
  library.def("manifold_linear_grad_coeff(Tensor grad_output, Tensor input, Tensor basis) -> Tensor");
}
NEUROMOD_IMPL("manifold_linear", &manifold_linear)
NEUROMOD_IMPL("manifold_linear_grad_input", &manifold_linear_grad_input)
NEUROMOD_IMPL("manifold_linear_grad_basis", &manifold_linear_grad_basis)
NEUROMOD_IMPL("manifold_linear_grad_coeff", &manifold_linear_grad_coeff)

}  // namespace
}  // namespace neuromod
