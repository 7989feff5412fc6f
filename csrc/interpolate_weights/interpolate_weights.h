// interpolate_weights: W[b] = sum_k c[b,k] P[k], one weight a sample, and its gradients.
//
// The form sum c[b,k] P[k,n] g[b,n] has two kinds of contraction: a mixture (W, and dP with the coefficients
// transposed) and inner products (dc). One pass over g yields both gradients.
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

/// grad_coeff[b,k] = sum_n grad[b,n] basis[k,n], and grad_basis[k,n] = sum_b coeff[b,k] grad[b,n] if it is there
struct InterpolateWeightsBackwardParams {
  DType dtype;        // of grad, basis and grad_basis
  int64_t batch;      // b
  int64_t num_basis;  // k
  int64_t length;     // n
  View grad;          // [batch, length], last stride 1
  View basis;         // [num_basis, length], last stride 1
  View coeff;         // [batch, num_basis], accumulation type; null without grad_basis
  View grad_basis;    // [num_basis, length], last stride 1, or null
  void* grad_coeff;   // [batch, num_basis], accumulation type, dense
  void* workspace;    // CUDA only: [interpolate_weights_parts, batch, num_basis], accumulation type
};

/// Into how many partial sums the CUDA kernel cuts an inner product over `length` elements of the dtype: four warps in
/// each block, a block for each tile of 2 KB, at most two blocks for each multiprocessor of an H100.
inline int64_t interpolate_weights_parts(DType dtype, int64_t length) {
  const int64_t bytes = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  const int64_t tiles = ceil_div(length * bytes, 2048), most = 264;
  return 4 * (tiles < most ? tiles : most);
}

void interpolate_weights_cpu(const InterpolateWeightsParams& p);
void interpolate_weights_backward_cpu(const InterpolateWeightsBackwardParams& p);

int launch_interpolate_weights(const InterpolateWeightsParams& p, stream_t stream);
int launch_interpolate_weights_backward(const InterpolateWeightsBackwardParams& p, stream_t stream);

}  // namespace neuromod
