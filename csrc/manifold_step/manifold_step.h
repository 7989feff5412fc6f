// manifold_step_: one step of SGD in the metric of the manifold, in place and in one pass:
//   d = G^-1 g + weight_decay P;  m = momentum m + (1 - dampening) d  (m = d in the first step)
//   P -= lr (nesterov ? d + momentum m : m),  without momentum P -= lr d
#pragma once

#include "common/params.h"

namespace neuromod {

struct ManifoldStepParams {
  DType dtype;          // of param, grad and buffer
  int64_t num_basis;    // K
  int64_t length;       // n: elements of one basis point
  View param;           // P [K, n], last stride 1
  View grad;            // g [K, n], last stride 1
  View buffer;          // m [K, n], last stride 1; null without momentum
  View metric_inverse;  // G^-1 [K, K], accumulation type; null for the identity
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize, first_step;
};

void manifold_step_cpu(const ManifoldStepParams& p);
int launch_manifold_step(const ManifoldStepParams& p, stream_t stream);

/// The update of one element from its preconditioned gradient `d`; shared by every backend.
template <class T, class Acc>
NEUROMOD_HOST_DEVICE void manifold_step_element(const ManifoldStepParams& p, int64_t k, int64_t n, Acc d) {
  T* const param = p.param.at<T>(k, n);
  if (p.maximize) d = -d;
  d += Acc(p.weight_decay) * Acc(*param);
  if (p.buffer) {
    T* const buffer = p.buffer.at<T>(k, n);
    const Acc m = p.first_step ? d : Acc(p.momentum) * Acc(*buffer) + Acc(1 - p.dampening) * d;
    *buffer = T(m);
    d = p.nesterov ? d + Acc(p.momentum) * m : m;
  }
  *param = T(Acc(*param) - Acc(p.lr) * d);
}

}  // namespace neuromod
