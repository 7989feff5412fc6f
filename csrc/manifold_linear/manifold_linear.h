// manifold_linear: y[r,o] = sum_l c[b,l] (sum_i P[k,o,i] x[r,i] + beta[k,o]), and its gradients. Row r belongs to
// sample b = r / tokens; its l-th coefficient is that of basis point k = (index[b] + l) mod K, or k = l without an
// index.
//
// Each gradient is a contraction of the same form, F(c, P, x, g) = sum c[b,l] g[r,o] P[k,o,i] x[r,i]: it reads three of
// the operands and writes the fourth. The struct therefore names the operands once, whichever of them is written.
#pragma once

#include "common/params.h"

namespace neuromod {

struct ManifoldLinearParams {
  DType dtype;           // of input, basis, bias and output
  int64_t batch;         // B: samples, each with one condition
  int64_t tokens;        // T: rows that share their sample's condition
  int64_t num_basis;     // K
  int64_t num_local;     // L: coefficients of a sample; K without an index
  int64_t out_features;  // O
  int64_t in_features;   // I
  View input;            // x     [B T, I], unit stride in a row, rows apart
  View basis;            // P     [K, O, I], unit stride in a row, rows apart
  View coeff;            // c     [B, L], accumulation type
  View index;            // first basis point [B], int64, or null; any integer, counted modulo K
  View output;           // y, g  [B T, O], unit stride in a row, rows apart
  View bias;             // beta  [K, O], unit stride in a row, or null
  bool tf32;             // CUDA, float32: products may round their operands to tf32
  void* workspace;       // CUDA only: as much as manifold_linear_cuda_plan.h says
  int64_t* order;        // CUDA only: room for manifold_linear_segments.h to sort the samples by index, or null

  NEUROMOD_HOST_DEVICE int64_t rows() const { return batch * tokens; }
  /// The basis point of a sample's first coefficient.
  NEUROMOD_HOST_DEVICE int64_t first_basis(int64_t b) const {
    const int64_t k = index ? *index.at<int64_t>(b) % num_basis : 0;
    return k < 0 ? k + num_basis : k;
  }
  /// The basis point of its l-th.
  NEUROMOD_HOST_DEVICE int64_t basis_point(int64_t b, int64_t l) const { return (first_basis(b) + l) % num_basis; }
  /// Which coefficient of a sample belongs to basis point k; L or more if none does.
  NEUROMOD_HOST_DEVICE int64_t entry(int64_t b, int64_t k) const { return entry_from(first_basis(b), k); }
  NEUROMOD_HOST_DEVICE int64_t entry_from(int64_t first, int64_t k) const {
    return k >= first ? k - first : k - first + num_basis;
  }
};

/// Gradients, those that are not null: p holds input, basis, coeff and the gradient of the output (as output).
struct ManifoldLinearBackwardParams {
  ManifoldLinearParams p;
  View grad_input;  // [B T, I]
  View grad_basis;  // [K, O, I]
  View grad_coeff;  // [B, L]
  View grad_bias;   // [K, O]
  bool accumulate;  // add to grad_basis instead of writing it
};

// Each kernel writes every element of its results exactly once, in an order of summation that does not depend on the
// number of threads (plans fold_gemm and expand_gemm: but for what torch's matrix product does with more threads).
void manifold_linear_forward_cpu(const ManifoldLinearParams& p);  // writes output
void manifold_linear_backward_cpu(const ManifoldLinearBackwardParams& q);

// The same on the given stream; each returns a cudaError_t, 0 for success.
int launch_manifold_linear_forward(const ManifoldLinearParams& p, stream_t stream);
int launch_manifold_linear_backward(const ManifoldLinearBackwardParams& q, stream_t stream);

}  // namespace neuromod
