// manifold_step_ in CUDA: one thread owns the K elements at one position n, mixes their gradients by G^-1 and updates
// them. Floor: parameter, gradient and buffer read, parameter and buffer written: 5 K n elements (the gradient's K^2
// reads hit cache). Every element is written once; k in order.
#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "manifold_step/manifold_step.h"

namespace neuromod {
namespace {

constexpr int kThreads = 256;

template <class T, class Acc>
__global__ void __launch_bounds__(kThreads) manifold_step_kernel(ManifoldStepParams p) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= p.length) return;
  const ManifoldStepRule<Acc> rule(p);
  for (int64_t j = 0; j < p.num_basis; ++j) {
    Acc d = 0;
    if (p.metric_inverse) {
      for (int64_t k = 0; k < p.num_basis; ++k) d += *p.metric_inverse.at<Acc>(j, k) * to_acc<Acc>(*p.grad.at<T>(k, n));
    } else {
      d = to_acc<Acc>(*p.grad.at<T>(j, n));
    }
    T* const param = p.param.at<T>(j, n);
    T* const buffer = p.buffer ? p.buffer.at<T>(j, n) : nullptr;
    Acc value = to_acc<Acc>(*param), m = buffer ? to_acc<Acc>(*buffer) : Acc(0);
    rule.apply(d, value, buffer ? &m : nullptr);
    *param = from_acc<T>(value);
    if (buffer) *buffer = from_acc<T>(m);
  }
}

}  // namespace

int launch_manifold_step(const ManifoldStepParams& p, stream_t stream) {
  dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>(ceil_div(p.length, kThreads)));
    NEUROMOD_LAUNCH((manifold_step_kernel<T, accumulator_t<T>>), grid, dim3(kThreads), 0, stream, p);
  });
  return launch_status();
}

}  // namespace neuromod
