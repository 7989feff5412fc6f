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

/// The update of one element, shared by every backend.
template <class Acc>
struct ManifoldStepRule {
  Acc lr, momentum, undamped, weight_decay;
  bool nesterov, maximize, first_step;

  NEUROMOD_HOST_DEVICE explicit ManifoldStepRule(const ManifoldStepParams& p)
      : lr(Acc(p.lr)),
        momentum(Acc(p.momentum)),
        undamped(Acc(1 - p.dampening)),
        weight_decay(Acc(p.weight_decay)),
        nesterov(p.nesterov),
        maximize(p.maximize),
        first_step(p.first_step) {}

  /// `d` is the preconditioned gradient; `m` the element of the buffer, or null.
  NEUROMOD_HOST_DEVICE void apply(Acc d, Acc& param, Acc* m) const {
    d = (maximize ? -d : d) + weight_decay * param;
    if (m) {
      *m = first_step ? d : momentum * *m + undamped * d;
      d = nesterov ? d + momentum * *m : *m;
    }
    param -= lr * d;
  }
};

}  // namespace neuromod
