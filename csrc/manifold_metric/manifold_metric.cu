// manifold_metric in CUDA: bound by the launch for a batch's conditions, by memory for millions of them. SIMT, summed
// in float64. Oracle: the einsum of python_tests/op_entries.py.
#include "common/columns.h"
#include "common/dispatch.h"
#include "manifold_metric/manifold_metric.h"

namespace neuromod {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 4;  // of a square of G

// G[j,k] = sum_n w[n] c[n,j] c[n,k], w = 1/N where there is none. Grid: x parts of the sum, y squares of 4 x 4 elements
// of G on and below the diagonal (others are their mirror images), folded. Block: 256 threads, each of every 256th
// condition of its part. Reads c once for each square of a row and of a column of squares: once from memory if K <= 4,
// the rest from cache; no wide accesses, since a row of c has few elements, and neighbours' share its sectors.
// Order: a thread's conditions in order, the lanes (warp_sums), the warps in order, the parts (sum_parts_kernel); a
// matter of N alone. error <= u S + (N + 2) 2^-53 S. N K (K + 1) flop, N (K + 1) elements. Symmetric to the bit.
// Floor, predicted from 3.0 TB/s of an H100 and not measured: 5 us for N = 1,000,000, K = 3 in float32.
template <class T>
__global__ void __launch_bounds__(kThreads) manifold_metric_kernel(ManifoldMetricParams p) {
  constexpr int kSums = kSide * kSide;
  __shared__ double warps[kThreads / 32][kSums];
  const int64_t K = p.num_basis, squares = ceil_div(K, kSide), step = int64_t(gridDim.x) * kThreads;
  const double scale = p.weight ? 1.0 : 1.0 / static_cast<double>(p.count);
  for (int64_t square = blockIdx.y; square < squares * squares; square += gridDim.y) {
    const int64_t first_j = square / squares * kSide, first_k = square % squares * kSide;
    if (first_k > first_j) continue;
    double sums[kSums] = {};
#pragma unroll 2
    for (int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x; n < p.count; n += step) {
      const double w = p.weight ? static_cast<double>(*p.weight.at<T>(n)) : 1.0;
      double left[kSide], right[kSide];
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        left[i] = first_j + i < K ? w * static_cast<double>(*p.coeff.at<T>(n, first_j + i)) : 0.0;
        right[i] = first_k + i < K ? static_cast<double>(*p.coeff.at<T>(n, first_k + i)) : 0.0;
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += left[i / kSide] * right[i % kSide];
    }
    const double of_warp = warp_sums(sums);
    const int lane = threadIdx.x % 32;
    if (lane < kSums) warps[threadIdx.x / 32][lane] = of_warp;
    __syncthreads();
    const int64_t j = first_j + threadIdx.x / kSide, k = first_k + threadIdx.x % kSide;
    if (threadIdx.x < kSums && j < K && k <= j) {
      double sum = 0;
      for (int i = 0; i < kThreads / 32; ++i) sum += warps[i][threadIdx.x];
      if (p.workspace) {
        double* const part = p.workspace + int64_t(blockIdx.x) * K * K;
        part[j * K + k] = part[k * K + j] = sum;
      } else {
        *p.out.at<T>(j, k) = *p.out.at<T>(k, j) = static_cast<T>(sum * scale);
      }
    }
    __syncthreads();  // the next square writes `warps` again
  }
}

}  // namespace

int launch_manifold_metric(const ManifoldMetricParams& p, stream_t stream) {
  const int64_t parts = manifold_metric_parts(p.count), squares = ceil_div(p.num_basis, kSide);
  const dim3 grid(static_cast<unsigned>(parts), block_count(squares * squares));
  const auto launch = [&](auto tag) {
    using T = typename decltype(tag)::type;
    NEUROMOD_LAUNCH((manifold_metric_kernel<T>), grid, dim3(kThreads), 0, stream, p);
    const int status = launch_status();
    if (status || !p.workspace) return status;
    const double scale = p.weight ? 1.0 : 1.0 / static_cast<double>(p.count);
    const double* const workspace = p.workspace;
    launch_sum_parts(workspace, parts, p.num_basis * p.num_basis, scale, p.out.at<T>(0, 0), stream);
    return launch_status();
  };
  return p.dtype == DType::float64 ? launch(TypeTag<double>{}) : launch(TypeTag<float>{});
}

}  // namespace neuromod
