#include "manifold_linear/manifold_linear_gemm_torch.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "common/host.h"
#include "interpolate_weights/interpolate_weights.h"
#include "manifold_linear/manifold_linear_cuda_plan.h"
#include "manifold_linear/manifold_linear_expand_gemm.h"

namespace neuromod {
namespace {

/// The basis points as one matrix [K O, I].
at::Tensor stacked(const at::Tensor& basis) { return basis.reshape({basis.size(0) * basis.size(1), basis.size(2)}); }

/// out[b] = sum_k c[b,k] in[k] of some samples.
void interpolate(const char* op, const at::Tensor& coeff, const at::Tensor& in, const at::Tensor& out) {
  const at::Tensor rows = as_rows(in);
  const InterpolateWeightsParams p{to_dtype(in.scalar_type()),
                                   out.size(0),
                                   in.size(0),
                                   rows.size(1),
                                   view(coeff),
                                   view(rows),
                                   mutable_view(out.view({out.size(0), rows.size(1)}))};
  run(op, in.device(), NEUROMOD_CUDA_KERNEL(interpolate_weights), p);
}

/// Calls f(first, count) for one chunk after another.
template <class F>
void for_chunks(int64_t all, int64_t most, F&& f) {
  for (int64_t first = 0; first < all; first += most) f(first, std::min(most, all - first));
}

}  // namespace

void expand_gemm_forward(const char* op, const ManifoldLinearTensors& t, const ManifoldLinearParams& p) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor points = stacked(t.basis).t();
  const int64_t most = cuda_expand_gemm_rows(p, p.out_features);
  const at::Tensor products = at::empty({most, points.size(1)}, t.input.options());
  for_chunks(p.rows(), most, [&](int64_t first, int64_t rows) {
    at::Tensor some = products.narrow(0, 0, rows);
    at::mm_out(some, t.input.narrow(0, first, rows), points);
    const ManifoldLinearExpandGemmParams q{p, first, rows, 0, p.num_basis, view(some)};
    run(op, t.input.device(), NEUROMOD_CUDA_KERNEL(manifold_linear_mix), q);
  });
}

void expand_gemm_grad_input(const char* op, const ManifoldLinearTensors& t, const ManifoldLinearParams& p,
                            const at::Tensor& grad_input) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor points = stacked(t.basis);
  const int64_t most = cuda_expand_gemm_rows(p, p.out_features);
  const at::Tensor spread = at::empty({most, points.size(0)}, t.output.options());
  for_chunks(p.rows(), most, [&](int64_t first, int64_t rows) {
    const at::Tensor some = spread.narrow(0, 0, rows);
    const ManifoldLinearExpandGemmParams q{p, first, rows, 0, p.num_basis, mutable_view(some)};
    run(op, t.output.device(), NEUROMOD_CUDA_KERNEL(manifold_linear_spread), q);
    at::Tensor to = grad_input.narrow(0, first, rows);
    at::mm_out(to, some, points);
  });
}

void expand_gemm_grad_basis(const char* op, const ManifoldLinearTensors& t, const ManifoldLinearParams& p,
                            const at::Tensor& grad_basis, bool accumulate) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor spread = at::empty({p.rows(), p.out_features}, t.output.options());
  for (int64_t k = 0; k < p.num_basis; ++k) {
    const ManifoldLinearExpandGemmParams q{p, 0, p.rows(), k, 1, mutable_view(spread)};
    run(op, t.output.device(), NEUROMOD_CUDA_KERNEL(manifold_linear_spread), q);
    at::Tensor to = grad_basis.select(0, k);
    if (accumulate) {
      at::addmm_out(to, to, spread.t(), t.input);
    } else {
      at::mm_out(to, spread.t(), t.input);
    }
  }
}

void fold_gemm_forward(const char* op, const ManifoldLinearTensors& t, const ManifoldLinearParams& p) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t B = p.batch, T = p.tokens, O = p.out_features, most = cuda_fold_gemm_samples(p);
  const at::Tensor x = t.input.unflatten(0, {B, T}), y = t.output.unflatten(0, {B, T});
  const at::Tensor weights = at::empty({most, O, p.in_features}, t.input.options());
  for_chunks(B, most, [&](int64_t first, int64_t samples) {
    const at::Tensor coeff = t.coeff.narrow(0, first, samples), some = weights.narrow(0, 0, samples);
    interpolate(op, coeff, t.basis, some);
    at::Tensor to = y.narrow(0, first, samples);
    const at::Tensor from = x.narrow(0, first, samples);
    if (t.bias.defined()) {
      const at::Tensor bias = at::empty({samples, 1, O}, t.input.options());
      interpolate(op, coeff, t.bias, bias);
      at::baddbmm_out(to, bias.expand({samples, T, O}), from, some.mT());
    } else {
      at::bmm_out(to, from, some.mT());
    }
  });
}

void fold_gemm_grad_input(const char* op, const ManifoldLinearTensors& t, const ManifoldLinearParams& p,
                          const at::Tensor& grad_input) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t B = p.batch, T = p.tokens, most = cuda_fold_gemm_samples(p);
  const at::Tensor g = t.output.unflatten(0, {B, T}), dx = grad_input.unflatten(0, {B, T});
  const at::Tensor weights = at::empty({most, p.out_features, p.in_features}, t.output.options());
  for_chunks(B, most, [&](int64_t first, int64_t samples) {
    const at::Tensor some = weights.narrow(0, 0, samples);
    interpolate(op, t.coeff.narrow(0, first, samples), t.basis, some);
    at::Tensor to = dx.narrow(0, first, samples);
    at::bmm_out(to, g.narrow(0, first, samples), some);
  });
}

}  // namespace neuromod
