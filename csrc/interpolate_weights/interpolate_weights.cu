// interpolate_weights in CUDA: SIMT, every dtype.
#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "interpolate_weights/interpolate_weights.h"

namespace neuromod {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGrid = 65535;

// out[m,n] = sum_j mix[m,j] in[j,n]; one thread an element, j in order. Grid: x along n, y along m (strided).
// Floor: (terms + rows) length elements of memory; `in` is re-read from cache for each row.
template <class T, class Acc>
__global__ void __launch_bounds__(kThreads) interpolate_weights_kernel(InterpolateWeightsParams p) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= p.length) return;
  for (int64_t m = blockIdx.y; m < p.rows; m += gridDim.y) {
    Acc sum = 0;
    for (int64_t j = 0; j < p.terms; ++j) sum += *p.mix.at<Acc>(m, j) * to_acc<Acc>(*p.in.at<T>(j, n));
    *p.out.at<T>(m, n) = from_acc<T>(sum);
  }
}

// out[b,k] = sum_n grad[b,n] basis[k,n]; one block an element: threads stride over n, then a fixed tree.
template <class T, class Acc>
__global__ void __launch_bounds__(kThreads) interpolate_weights_grad_coeff_kernel(InterpolateWeightsGradCoeffParams p) {
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const int64_t k = blockIdx.x;
    Acc sum = 0;
    for (int64_t n = threadIdx.x; n < p.length; n += kThreads)
      sum += to_acc<Acc>(*p.grad.at<T>(b, n)) * to_acc<Acc>(*p.basis.at<T>(k, n));
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) *p.out.at<Acc>(b, k) = sum;
  }
}

unsigned bounded(int64_t n) { return static_cast<unsigned>(n < kMaxGrid ? n : kMaxGrid); }

}  // namespace

int launch_interpolate_weights(const InterpolateWeightsParams& p, stream_t stream) {
  dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>(ceil_div(p.length, kThreads)), bounded(p.rows));
    NEUROMOD_LAUNCH((interpolate_weights_kernel<T, accumulator_t<T>>), grid, dim3(kThreads), 0, stream, p);
  });
  return launch_status();
}

int launch_interpolate_weights_grad_coeff(const InterpolateWeightsGradCoeffParams& p, stream_t stream) {
  dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>(p.num_basis), bounded(p.batch));
    NEUROMOD_LAUNCH((interpolate_weights_grad_coeff_kernel<T, accumulator_t<T>>), grid, dim3(kThreads), 0, stream, p);
  });
  return launch_status();
}

}  // namespace neuromod
