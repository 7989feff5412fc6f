// manifold_metric in CUDA. G[j,k] = sum_n w[n] c[n,j] c[n,k]; one block an element, summed in float64 as on the CPU:
// threads stride over n, then a fixed tree. Cost: N K^2 multiply-adds.
#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "manifold_metric/manifold_metric.h"

namespace neuromod {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGrid = 65535;

template <class T>
__global__ void __launch_bounds__(kThreads) manifold_metric_kernel(ManifoldMetricParams p) {
  const double scale = p.weight ? 1.0 : 1.0 / static_cast<double>(p.count);
  for (int64_t j = blockIdx.y; j < p.num_basis; j += gridDim.y) {
    const int64_t k = blockIdx.x;
    double sum = 0;
    for (int64_t n = threadIdx.x; n < p.count; n += kThreads) {
      const double w = p.weight ? double(*p.weight.at<T>(n)) : 1.0;
      sum += w * double(*p.coeff.at<T>(n, j)) * double(*p.coeff.at<T>(n, k));
    }
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) *p.out.at<T>(j, k) = T(sum * scale);
  }
}

}  // namespace

int launch_manifold_metric(const ManifoldMetricParams& p, stream_t stream) {
  const int64_t rows = p.num_basis < kMaxGrid ? p.num_basis : kMaxGrid;
  const dim3 grid(static_cast<unsigned>(p.num_basis), static_cast<unsigned>(rows));
  if (p.dtype == DType::float64) {
    NEUROMOD_LAUNCH((manifold_metric_kernel<double>), grid, dim3(kThreads), 0, stream, p);
  } else {
    NEUROMOD_LAUNCH((manifold_metric_kernel<float>), grid, dim3(kThreads), 0, stream, p);
  }
  return launch_status();
}

}  // namespace neuromod
