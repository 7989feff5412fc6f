// What stands around torch's matrix product in plan expand_gemm of manifold_linear on CUDA. Torch-free.
#pragma once

#include "manifold_linear/manifold_linear.h"

namespace neuromod {

/// Some of the rows of a call, and of each its products with basis points side by side.
struct ManifoldLinearExpandGemmParams {
  ManifoldLinearParams p;
  int64_t first_row, rows;
  int64_t first_basis, num_basis;
  View products;  // [rows, num_basis O], dense
};

/// p.output[r,o] = sum_k c[b,k] (products[r - first_row, k O + o] + beta[k,o]), for all basis points.
int launch_manifold_linear_mix(const ManifoldLinearExpandGemmParams& q, stream_t stream);

/// products[r - first_row, k O + o] = c[b, first_basis + k] g[r,o]
int launch_manifold_linear_spread(const ManifoldLinearExpandGemmParams& q, stream_t stream);

}  // namespace neuromod
