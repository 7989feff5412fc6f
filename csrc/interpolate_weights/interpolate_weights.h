// interpolate_weights: W[b] = sum_k c[b,k] P[k], one weight a sample, and its gradients.
//
// The form sum c[b,k] P[k,n] g[b,n] has two kinds of contraction: a mixture (W, and dP with the coefficients
// transposed) and inner products (dc).
#pragma once

#include "common/params.h"

namespace neuromod {

/// out[m,n] = sum_j mix[m,j] in[j,n]
struct InterpolateWeightsParams {
  DType dtype;     // of in and out
  int64_t rows;    // m
  int64_t terms;   // j
  int64_t length;  // n
  View mix;        // [rows, terms], accumulation type
  View in;         // [terms, length], last stride 1
  View out;        // [rows, length], last stride 1
};

/// out[b,k] = sum_n grad[b,n] basis[k,n]
struct InterpolateWeightsGradCoeffParams {
  DType dtype;        // of grad and basis
  int64_t batch;      // b
  int64_t num_basis;  // k
  int64_t length;     // n
  View grad;          // [batch, length], last stride 1
  View basis;         // [num_basis, length], last stride 1
  View out;           // [batch, num_basis], accumulation type
};

void interpolate_weights_cpu(const InterpolateWeightsParams& p);
void interpolate_weights_grad_coeff_cpu(const InterpolateWeightsGradCoeffParams& p);

int launch_interpolate_weights(const InterpolateWeightsParams& p, stream_t stream);
int launch_interpolate_weights_grad_coeff(const InterpolateWeightsGradCoeffParams& p, stream_t stream);

}  // namespace neuromod
