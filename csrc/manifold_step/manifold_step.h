// manifold_step_: one step of SGD in the metric of the manifold, in place and in one pass, for any number of
// parameters:
//   d = G^-1 g + weight_decay P;  m = momentum m + (1 - dampening) d  (m = d in the first step)
//   P -= lr (nesterov ? d + momentum m : m),  without momentum P -= lr d
#pragma once

#include "common/params.h"

namespace neuromod {

/// A parameter, and what belongs to it.
struct ManifoldStepTensor {
  int64_t num_basis;    // K
  int64_t length;       // n: elements of one basis point
  View param;           // P [K, n], last stride 1
  View grad;            // g [K, n], last stride 1
  View buffer;          // m [K, n], last stride 1; null without momentum
  View metric_inverse;  // G^-1 [K, K], accumulation type; null for the identity
};

/// What they share.
struct ManifoldStepNumbers {
  double lr;
  const double* lr_there;  // CUDA: where the kernel finds lr instead, if not null: as it is when the kernel runs
  double momentum, dampening, weight_decay;
  bool nesterov, maximize, first_step;
};

struct ManifoldStepParams {
  DType dtype;  // of all parameters, gradients and buffers
  ManifoldStepNumbers numbers;
  const ManifoldStepTensor* tensors;  // in the host's memory
  int64_t count;
};

void manifold_step_cpu(const ManifoldStepParams& p);
int launch_manifold_step(const ManifoldStepParams& p, stream_t stream);

/// The update of an element, shared by every backend.
template <class Acc>
struct ManifoldStepRule {
  Acc lr, momentum, undamped, weight_decay;
  bool nesterov, maximize, first_step;

  NEUROMOD_HOST_DEVICE explicit ManifoldStepRule(const ManifoldStepNumbers& p)
      : lr(Acc(p.lr_there ? *p.lr_there : p.lr)),
        momentum(Acc(p.momentum)),
        undamped(Acc(1 - p.dampening)),
        weight_decay(Acc(p.weight_decay)),
        nesterov(p.nesterov),
        maximize(p.maximize),
        first_step(p.first_step) {}

  /// `d` is the preconditioned gradient; `m` the element of the buffer, or null. Or registers of many of them.
  template <class Value>
  NEUROMOD_HOST_DEVICE void apply(Value d, Value& param, Value* m) const {
    d = (maximize ? -d : d) + weight_decay * param;
    if (m) {
      *m = first_step ? d : momentum * *m + undamped * d;
      d = nesterov ? d + momentum * *m : *m;
    }
    param -= lr * d;
  }
};

}  // namespace neuromod
