// manifold_linear, host side: schema, checks, allocation, registration.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <cstdlib>
#include <tuple>
#include <utility>
#include <vector>

#include "common/host.h"
#include "common/precision.h"
#include "manifold_linear/manifold_linear.h"
#include "manifold_linear/manifold_linear_cuda_plan.h"
#include "manifold_linear/manifold_linear_gemm_torch.h"
#include "manifold_linear/manifold_linear_segments.h"

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

void check_index(const char* op, const Tensor& index, const Tensor& coeff, int64_t num_basis) {
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, op, ": expected index of dtype int64, got ",
                   dtype_name(index.scalar_type()), "; convert it with .long()");
  TORCH_CHECK_VALUE(index.device() == coeff.device(), op, ": expected index on ", coeff.device().str(),
                    " (where coeff is), got ", index.device().str(), "; move one of them");
  check_shape(op, "index", index, "[B]", {coeff.size(0)});
  TORCH_CHECK_VALUE(coeff.size(1) >= 1 && coeff.size(1) <= num_basis, op,
                    ": expected coeff with 1 <= L <= K = ", num_basis,
                    " coefficients a sample, got L = ", coeff.size(1));
}

/// [B, ..., n] as a matrix [rows, n] whose rows are dense and apart; copied only where it must be.
Tensor as_matrix(const Tensor& t) {
  const int64_t cols = t.size(-1);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  const Tensor matrix = t.reshape({rows, cols});
  const bool dense = (cols <= 1 || matrix.stride(1) == 1) && (matrix.size(0) <= 1 || matrix.stride(0) >= cols);
  return dense ? matrix : matrix.contiguous();
}

/// P with dense rows.
Tensor with_dense_rows(const Tensor& t) {
  const int64_t d = t.dim() - 1;
  const bool dense = (t.size(d) <= 1 || t.stride(d) == 1) && (d < 2 || t.size(1) <= 1 || t.stride(1) >= t.size(2));
  return dense ? t : t.contiguous();
}

/// The view of a matrix; one row may have any stride, and gets that of dense rows.
View matrix_view(const Tensor& t) {
  View v = view(t);
  const int64_t d = t.dim() - 1;
  v.stride[d] = 1;
  if (t.size(d - 1) <= 1) v.stride[d - 1] = t.size(d);
  return v;
}

/// What a call is about, as the kernels take it. Operands that are not there stay empty.
class Call {
 public:
  Call(const Tensor& like, int64_t batch, int64_t num_basis, int64_t num_local, int64_t out_features,
       int64_t in_features) {
    p.dtype = to_dtype(like.scalar_type());
    p.batch = batch;
    p.num_basis = num_basis;
    p.num_local = num_local;
    p.out_features = out_features;
    p.in_features = in_features;
    p.tf32 = p.dtype == DType::float32 && runs_cuda_kernels(like.device()) && tf32_allowed();
  }
  void input(const Tensor& t) { rows(tensors.input = as_matrix(t), p.input); }
  void output(const Tensor& t) { rows(tensors.output = as_matrix(t), p.output); }
  void basis(const Tensor& t) { p.basis = matrix_view(tensors.basis = with_dense_rows(t)); }
  void coeff(const Tensor& t) { p.coeff = view(tensors.coeff = t); }
  void bias(const OptionalTensor& t) {
    if (t) p.bias = matrix_view(tensors.bias = with_dense_rows(*t));
  }
  void index(const Tensor* t) {
    if (t) p.index = view(*t);
  }

  ManifoldLinearParams p{};
  ManifoldLinearTensors tensors;

 private:
  void rows(const Tensor& t, View& v) {
    v = matrix_view(t);
    p.tokens = t.size(0) / std::max<int64_t>(p.batch, 1);
  }
};

void check_forced_plan(const char* op) {
  CudaPlan plan{};
  const char* const forced = std::getenv("NEUROMOD_CUDA_PLAN");
  TORCH_CHECK_VALUE(!forced || forced[0] == '\0' || forced_cuda_plan(plan), op,
                    ": expected NEUROMOD_CUDA_PLAN to be simt, small, large, fold, expand_gemm or fold_gemm, got ",
                    forced, "; unset it");
}

/// Memory that CUDA kernels use between them; none for the CPU's. Freed to torch's allocator when the call returns,
/// which keeps it from other streams until the kernels are through.
Tensor cuda_workspace(const Tensor& like, int64_t bytes) {
  return bytes > 0 ? at::empty({bytes}, like.options().dtype(at::kByte)) : Tensor();
}

/// Room for the order of a call's samples, where CUDA kernels sort them; freed likewise.
Tensor cuda_order(const Tensor& like, CudaPlan first, CudaPlan second, ManifoldLinearParams& p) {
  if (!cuda_sorts(p) || !(takes_order(first) || takes_order(second))) return {};
  const Tensor order = at::empty({cuda_order_elements(p)}, like.options().dtype(at::kLong));
  p.order = order.mutable_data_ptr<int64_t>();
  return order;
}

Tensor forward(const char* op, const Tensor& input, const Tensor& basis, const Tensor* index, const Tensor& coeff,
               const OptionalTensor& bias) {
  check_floating(op, "input", input);
  check_min_rank(op, "input", input, 2, "[B, ..., I]");
  check_basis(op, basis, "input", input);
  check_coeff(op, coeff, "input", input);
  const int64_t K = basis.size(0), O = basis.size(1), I = basis.size(2), B = input.size(0), L = coeff.size(1);
  check_shape(op, "input", input, "[B, ..., I]", any_middle(B, I));
  if (index) {
    check_shape(op, "coeff", coeff, "[B, L]", {B, L});
    check_index(op, *index, coeff, K);
  } else {
    check_shape(op, "coeff", coeff, "[B, K]", {B, K});
  }
  if (bias) {
    check_like(op, "bias", *bias, "input", input);
    check_shape(op, "bias", *bias, "[K, O]", {K, O});
  }

  const Tensor output = empty_result(shape_with_last(input.sizes(), O), input.options());
  if (output.numel() == 0) return output;
  Call call(input, B, K, L, O, I);
  call.input(input);
  call.basis(basis);
  call.coeff(coeff);
  call.bias(bias);
  call.index(index);
  call.tensors.output = as_matrix(output);
  call.p.output = mutable_view(call.tensors.output);
  Tensor workspace, order;
  if (runs_cuda_kernels(input.device())) {
    check_forced_plan(op);
    const CudaPlan plan = cuda_plan(call.p, CudaPass::forward, torch_products_allowed());
    if (plan == CudaPlan::expand_gemm || plan == CudaPlan::fold_gemm) {
      const c10::DeviceGuard guard(input.device());
      (plan == CudaPlan::expand_gemm ? expand_gemm_forward : fold_gemm_forward)(op, call.tensors, call.p);
      return output;
    }
    order = cuda_order(input, plan, plan, call.p);
    workspace = cuda_workspace(input, cuda_forward_workspace(call.p));
    if (workspace.defined()) call.p.workspace = workspace.mutable_data_ptr();
  }
  run(op, input.device(), NEUROMOD_KERNEL(manifold_linear_forward), call.p);
  return output;
}

Tensor manifold_linear(const Tensor& input, const Tensor& basis, const Tensor& coeff, const OptionalTensor& bias) {
  return forward("manifold_linear", input, basis, nullptr, coeff, bias);
}

Tensor manifold_linear_local(const Tensor& input, const Tensor& basis, const Tensor& index, const Tensor& coeff,
                             const OptionalTensor& bias) {
  return forward("manifold_linear_local", input, basis, &index, coeff, bias);
}

struct Gradients {
  Tensor input, basis, coeff, bias;
};

/// Computes those gradients for which a plan with torch's products was chosen, and takes them from q.
void by_torch(const char* op, const Call& call, const Gradients& results, ManifoldLinearBackwardParams& q) {
  const CudaBackwardPlan plan = cuda_backward_plan(q, torch_products_allowed());
  const c10::DeviceGuard guard(call.tensors.output.device());
  if (q.grad_input && (plan.rows == CudaPlan::expand_gemm || plan.rows == CudaPlan::fold_gemm)) {
    const auto product = plan.rows == CudaPlan::expand_gemm ? expand_gemm_grad_input : fold_gemm_grad_input;
    product(op, call.tensors, call.p, as_matrix(results.input));
    q.grad_input = {};
  }
  if (q.grad_basis && plan.basis == CudaPlan::expand_gemm) {
    expand_gemm_grad_basis(op, call.tensors, call.p, results.basis, q.accumulate);
    q.grad_basis = {};
  }
}

/// Writes the tensors that are there. Of the operands, those may be missing that no gradient needs.
void backward(const char* op, Call& call, const Gradients& results, const Tensor& grad_output,
              bool accumulate = false) {
  const ManifoldLinearParams& p = call.p;
  const bool nothing = p.rows() == 0 || p.out_features == 0;
  if (nothing || (p.in_features == 0 && !results.coeff.defined() && !results.bias.defined())) {
    for (const Tensor& t : {results.input, results.basis, results.coeff, results.bias})
      if (t.defined() && !accumulate) t.zero_();
    return;
  }
  ManifoldLinearBackwardParams q{p, {}, {}, {}, {}, accumulate};
  if (results.input.defined() && results.input.numel() > 0) q.grad_input = mutable_view(as_matrix(results.input));
  if (results.basis.defined() && results.basis.numel() > 0) q.grad_basis = mutable_view(results.basis);
  if (results.coeff.defined()) q.grad_coeff = mutable_view(results.coeff);
  if (results.bias.defined()) q.grad_bias = mutable_view(results.bias);
  Tensor workspace, order;
  if (runs_cuda_kernels(grad_output.device())) {
    check_forced_plan(op);
    by_torch(op, call, results, q);
    if (!q.grad_input && !q.grad_basis && !q.grad_coeff && !q.grad_bias) return;
    const CudaBackwardPlan plan = cuda_backward_plan(q, false);
    order = cuda_order(grad_output, plan.rows, plan.basis, q.p);
    workspace = cuda_workspace(grad_output, cuda_backward_workspace(q));
    if (workspace.defined()) q.p.workspace = workspace.mutable_data_ptr();
  }
  run(op, grad_output.device(), NEUROMOD_KERNEL(manifold_linear_backward), q);
}

at::TensorOptions accumulation_options(const Tensor& t) {
  return t.options().dtype(accumulation_type(t.scalar_type()));
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

  Call call(grad_output, B, K, K, O, I);
  call.output(grad_output);
  call.basis(basis);
  call.coeff(coeff);
  const Tensor grad_input = empty_result(shape_with_last(grad_output.sizes(), I), grad_output.options());
  backward(op, call, {grad_input, {}, {}, {}}, grad_output);
  return grad_input;
}

/// The checks of the two ops that sum c g x^T over samples.
void check_outer(const char* op, const Tensor& grad_output, const Tensor& input, const Tensor& coeff) {
  check_floating(op, "grad_output", grad_output);
  check_min_rank(op, "grad_output", grad_output, 2, "[B, ..., O]");
  check_like(op, "input", input, "grad_output", grad_output);
  check_coeff(op, coeff, "grad_output", grad_output);
  const int64_t I = input.dim() > 0 ? input.size(-1) : 0, K = coeff.size(1);
  check_shape(op, "input", input, "[B, ..., I]", shape_with_last(grad_output.sizes(), I));
  check_shape(op, "coeff", coeff, "[B, K]", {grad_output.size(0), K});
  check_num_basis(op, "coeff", K);
}

void outer(const char* op, const Tensor& grad_output, const Tensor& input, const Tensor& coeff, const Tensor& basis,
           bool accumulate) {
  const int64_t K = coeff.size(1);
  Call call(grad_output, grad_output.size(0), K, K, grad_output.size(-1), input.size(-1));
  call.output(grad_output);
  call.input(input);
  call.coeff(coeff);
  backward(op, call, {{}, basis, {}, {}}, grad_output, accumulate);
}

Tensor manifold_linear_grad_basis(const Tensor& grad_output, const Tensor& input, const Tensor& coeff) {
  constexpr auto op = "manifold_linear_grad_basis";
  check_outer(op, grad_output, input, coeff);
  const Tensor grad_basis = empty_result({coeff.size(1), grad_output.size(-1), input.size(-1)}, grad_output.options());
  outer(op, grad_output, input, coeff, grad_basis, false);
  return grad_basis;
}

void manifold_linear_update_(const Tensor& basis, const Tensor& grad_output, const Tensor& input, const Tensor& coeff) {
  constexpr auto op = "manifold_linear_update_";
  check_outer(op, grad_output, input, coeff);
  const int64_t K = coeff.size(1), O = grad_output.size(-1), I = input.size(-1);
  check_like(op, "basis", basis, "grad_output", grad_output);
  check_shape(op, "basis", basis, "[K, O, I]", {K, O, I});
  check_not_expanded(op, "basis", basis);
  check_apart(op, "grad_output", grad_output, "basis", basis);
  check_apart(op, "input", input, "basis", basis);
  check_apart(op, "coeff", coeff, "basis", basis);
  const Tensor rows = with_dense_rows(basis);
  outer(op, grad_output.resolve_neg(), input.resolve_neg(), coeff.resolve_neg(), rows, true);
  if (!rows.is_same(basis)) basis.copy_(rows);
  mark_written(basis);
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

  Call call(grad_output, B, K, K, O, I);
  call.output(grad_output);
  call.input(input);
  call.basis(basis);
  const Tensor grad_coeff = at::empty({B, K}, accumulation_options(grad_output));
  call.p.coeff = view(grad_coeff);  // read by no kernel of this gradient alone
  backward(op, call, {{}, {}, grad_coeff, {}}, grad_output);
  return grad_coeff;
}

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

FourTensors all_gradients(const char* op, const Tensor& grad_output, const Tensor& input, const Tensor& basis,
                          const Tensor* index, const Tensor& coeff, const OptionalTensor& bias,
                          std::array<bool, 4> needed) {
  check_floating(op, "grad_output", grad_output);
  check_min_rank(op, "grad_output", grad_output, 2, "[B, ..., O]");
  check_like(op, "input", input, "grad_output", grad_output);
  check_basis(op, basis, "grad_output", grad_output);
  check_coeff(op, coeff, "grad_output", grad_output);
  const int64_t K = basis.size(0), O = basis.size(1), I = basis.size(2), B = grad_output.size(0), L = coeff.size(1);
  check_shape(op, "grad_output", grad_output, "[B, ..., O]", any_middle(B, O));
  check_shape(op, "input", input, "[B, ..., I]", shape_with_last(grad_output.sizes(), I));
  if (index) {
    check_shape(op, "coeff", coeff, "[B, L]", {B, L});
    check_index(op, *index, coeff, K);
  } else {
    check_shape(op, "coeff", coeff, "[B, K]", {B, K});
  }
  if (bias) {
    check_like(op, "bias", *bias, "grad_output", grad_output);
    check_shape(op, "bias", *bias, "[K, O]", {K, O});
  }

  Gradients results;
  const auto options = grad_output.options();
  if (needed[0]) results.input = empty_result(input.sizes(), options);
  if (needed[1]) results.basis = empty_result({K, O, I}, options);
  if (needed[2]) results.coeff = at::empty({B, L}, accumulation_options(grad_output));
  if (needed[3]) results.bias = at::empty({K, O}, options);
  Call call(grad_output, B, K, L, O, I);
  call.output(grad_output);
  call.input(input);
  call.basis(basis);
  call.coeff(coeff);
  call.bias(bias);
  call.index(index);
  backward(op, call, results, grad_output);
  const auto or_empty = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, options); };
  return {or_empty(results.input), or_empty(results.basis), or_empty(results.coeff), or_empty(results.bias)};
}

FourTensors manifold_linear_backward(const Tensor& grad_output, const Tensor& input, const Tensor& basis,
                                     const Tensor& coeff, const OptionalTensor& bias, std::array<bool, 4> needed) {
  return all_gradients("manifold_linear_backward", grad_output, input, basis, nullptr, coeff, bias, needed);
}

FourTensors manifold_linear_local_backward(const Tensor& grad_output, const Tensor& input, const Tensor& basis,
                                           const Tensor& index, const Tensor& coeff, const OptionalTensor& bias,
                                           std::array<bool, 4> needed) {
  return all_gradients("manifold_linear_local_backward", grad_output, input, basis, &index, coeff, bias, needed);
}

TORCH_LIBRARY_FRAGMENT(NEUROMOD_LIBRARY, library) {
  library.def("manifold_linear(Tensor input, Tensor basis, Tensor coeff, Tensor? bias=None) -> Tensor");
  library.def(
      "manifold_linear_backward(Tensor grad_output, Tensor input, Tensor basis, Tensor coeff, Tensor? bias, "
      "bool[4] needed) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("manifold_linear_grad_input(Tensor grad_output, Tensor basis, Tensor coeff) -> Tensor");
  library.def("manifold_linear_grad_basis(Tensor grad_output, Tensor input, Tensor coeff) -> Tensor");
  library.def("manifold_linear_grad_coeff(Tensor grad_output, Tensor input, Tensor basis) -> Tensor");
  library.def("manifold_linear_update_(Tensor(a!) basis, Tensor grad_output, Tensor input, Tensor coeff) -> ()");
  library.def(
      "manifold_linear_local(Tensor input, Tensor basis, Tensor index, Tensor coeff, Tensor? bias=None) -> Tensor");
  library.def(
      "manifold_linear_local_backward(Tensor grad_output, Tensor input, Tensor basis, Tensor index, Tensor coeff, "
      "Tensor? bias, bool[4] needed) -> (Tensor, Tensor, Tensor, Tensor)");
}
NEUROMOD_IMPL("manifold_linear", &manifold_linear)
NEUROMOD_IMPL("manifold_linear_backward", &manifold_linear_backward)
NEUROMOD_IMPL("manifold_linear_grad_input", &manifold_linear_grad_input)
NEUROMOD_IMPL("manifold_linear_grad_basis", &manifold_linear_grad_basis)
NEUROMOD_IMPL("manifold_linear_grad_coeff", &manifold_linear_grad_coeff)
NEUROMOD_IMPL_IN_PLACE("manifold_linear_update_", &manifold_linear_update_)
NEUROMOD_IMPL("manifold_linear_local", &manifold_linear_local)
NEUROMOD_IMPL("manifold_linear_local_backward", &manifold_linear_local_backward)

}  // namespace
}  // namespace neuromod
