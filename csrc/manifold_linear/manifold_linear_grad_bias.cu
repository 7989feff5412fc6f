// The gradient of manifold_linear's bias in CUDA, for every dtype and plan:
//
//   dbeta[k,o] = sum_r c[r,k] g[r,o]
//
// Grid: x tiles of 32 outputs, y splits of the rows, z groups of kGroup basis points (strided). A block takes its rows
// kRows at a time: a thread a row looks up the group's coefficients, then warp w adds rows w, w + kWarps, ... in order,
// for all of the group from one read of g. The warps' sums are added in order; so are those of splits, partial sums
// [splits, K O], by sum_parts_kernel.
//
// Reads g once for each group, c once for each tile; writes dbeta once, rounded once. No atomics. 2 B T K O flop, B T O
// elements at least. Error: B T / splits + kWarps + splits roundings of the accumulation type, and that of the result.
// Floor, predicted from 3.0 TB/s of an H100 and not measured: 11 us for B = O = 4096 in bfloat16.
#include "common/columns.h"
#include "common/dispatch.h"
#include "manifold_linear/manifold_linear_tiles.h"

namespace neuromod {
namespace {

constexpr int kWarps = 8, kRows = 64, kGroup = kBiasGroup;

template <class T, class Acc>
__global__ void __launch_bounds__(32 * kWarps)
    manifold_linear_grad_bias_kernel(ManifoldLinearParams p, View out, Acc* parts) {
  __shared__ Acc coeff[kRows][kGroup];
  __shared__ unsigned acts[kRows];  // of a row: which of the group act on it
  __shared__ Acc sums[kWarps][kGroup][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t o = int64_t(blockIdx.x) * 32 + lane, all = p.rows();
  const int64_t begin = all * blockIdx.y / gridDim.y, end = all * (blockIdx.y + 1) / gridDim.y;
  for (int64_t k = int64_t(blockIdx.z) * kGroup; k < p.num_basis; k += int64_t(gridDim.z) * kGroup) {
    Acc sum[kGroup] = {};
    for (int64_t first = begin; first < end; first += kRows) {
      if (threadIdx.x < kRows) {
        const int64_t row = first + threadIdx.x, b = row < end ? row / p.tokens : 0, start = p.first_basis(b);
        unsigned who = 0;
        for (int j = 0; j < kGroup; ++j) {
          const bool there = row < end && k + j < p.num_basis;
          const int64_t l = there ? p.entry_from(start, k + j) : p.num_local;
          coeff[threadIdx.x][j] = l < p.num_local ? *p.coeff.at<Acc>(b, l) : Acc(0);
          who |= static_cast<unsigned>(l < p.num_local) << j;
        }
        acts[threadIdx.x] = who;
      }
      __syncthreads();
      T g[kRows / kWarps];
#pragma unroll
      for (int i = 0; i < kRows / kWarps; ++i) {
        const int64_t row = first + warp + i * kWarps;
        g[i] = row < end && o < p.out_features ? *p.output.at<T>(row, o) : from_acc<T>(Acc(0));
      }
#pragma unroll
      for (int i = 0; i < kRows / kWarps; ++i) {
        const int row = warp + i * kWarps;
#pragma unroll
        for (int j = 0; j < kGroup; ++j)
          if (acts[row] >> j & 1u) sum[j] += coeff[row][j] * to_acc<Acc>(g[i]);
      }
      __syncthreads();
    }
    for (int j = 0; j < kGroup; ++j) sums[warp][j][lane] = sum[j];
    __syncthreads();
    if (warp < kGroup && k + warp < p.num_basis && o < p.out_features) {
      Acc total = 0;
      for (int i = 0; i < kWarps; ++i) total += sums[i][warp][lane];
      if (parts) {
        parts[(blockIdx.y * p.num_basis + k + warp) * p.out_features + o] = total;
      } else {
        *out.at<T>(k + warp, o) = from_acc<T>(total);
      }
    }
    __syncthreads();
  }
}

}  // namespace

int launch_grad_bias(const ManifoldLinearBackwardParams& q, stream_t stream) {
  const ManifoldLinearParams& p = q.p;
  const int64_t splits = cuda_bias_splits(p), groups = ceil_div(p.num_basis, kGroup);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.out_features, 32)), static_cast<unsigned>(splits),
                  static_cast<unsigned>(groups < 65535 ? groups : 65535));
  dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulator_t<T>;
    Acc* const parts = splits > 1 ? static_cast<Acc*>(p.workspace) : nullptr;
    NEUROMOD_LAUNCH((manifold_linear_grad_bias_kernel<T, Acc>), grid, dim3(32 * kWarps), 0, stream, p, q.grad_bias,
                    parts);
    if (parts)
      launch_sum_parts<Acc, T>(parts, splits, p.num_basis * p.out_features, Acc(1), q.grad_bias.at<T>(0), stream);
  });
  return launch_status();
}

}  // namespace neuromod
