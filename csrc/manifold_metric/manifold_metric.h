// manifold_metric: G[j,k] = sum_n w[n] c[n,j] c[n,k], the integrated metric (Gram matrix) of conditions' coefficients.
#pragma once

#include "common/params.h"

namespace neuromod {

struct ManifoldMetricParams {
  DType dtype;        // float64 or float32, of all operands
  int64_t count;      // N: conditions
  int64_t num_basis;  // K
  View coeff;         // c [N, K]
  View weight;        // w [N], or null for 1 / N
  View out;           // G [K, K], dense
  double* workspace;  // CUDA only: [manifold_metric_parts, K, K] where there are several parts
};

/// Into how many partial sums the CUDA kernel cuts a sum over `count` conditions: at least 2048 in each.
inline int64_t manifold_metric_parts(int64_t count) {
  const int64_t parts = count / 2048, most = 132;
  return parts < 1 ? 1 : parts < most ? parts : most;
}

void manifold_metric_cpu(const ManifoldMetricParams& p);
int launch_manifold_metric(const ManifoldMetricParams& p, stream_t stream);

}  // namespace neuromod
