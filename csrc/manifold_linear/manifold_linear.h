// manifold_linear: y[b,t,o] = sum_k c[b,k] (sum_i P[k,o,i] x[b,t,i] + beta[k,o]), and its three gradients.
//
// All four are contractions of one form, F(c, P, x, g) = sum c[b,k] g[b,t,o] P[k,o,i] x[b,t,i]: each reads three of the
// operands and writes the fourth. The struct therefore names the operands once, whichever of them is written.
#pragma once

#include "common/params.h"

namespace neuromod {

struct ManifoldLinearParams {
  DType dtype;           // of input, basis, bias and output
  int64_t batch;         // B: samples, each with one condition
  int64_t tokens;        // T: rows that share their sample's condition
  int64_t num_basis;     // K
  int64_t out_features;  // O
  int64_t in_features;   // I
  View input;            // x     [B, T, I]
  View basis;            // P     [K, O, I]
  View coeff;            // c     [B, K], accumulation type
  View output;           // y, g  [B, T, O]
  View bias;             // beta  [K, O], or null
  void* workspace;       // grad_coeff only: [B * T, K], accumulation type
};

// Each of these writes every element of its result exactly once, in an order of summation that does not depend on the
// number of threads.
void manifold_linear_forward_cpu(const ManifoldLinearParams& p);     // writes output
void manifold_linear_grad_input_cpu(const ManifoldLinearParams& p);  // writes input, reads output as the gradient
void manifold_linear_grad_basis_cpu(const ManifoldLinearParams& p);  // writes basis
void manifold_linear_grad_coeff_cpu(const ManifoldLinearParams& p);  // writes coeff

// The same on the given stream; each returns a cudaError_t, 0 for success.
int launch_manifold_linear_forward(const ManifoldLinearParams& p, stream_t stream);
int launch_manifold_linear_grad_input(const ManifoldLinearParams& p, stream_t stream);
int launch_manifold_linear_grad_basis(const ManifoldLinearParams& p, stream_t stream);
int launch_manifold_linear_grad_coeff(const ManifoldLinearParams& p, stream_t stream);

}  // namespace neuromod
