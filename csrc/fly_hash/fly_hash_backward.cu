// The gradients of fly_hash and fly_readout on CUDA; h is gathered anew.
//
// Means: a block for each sample, as in the forward pass; they go to memory, [B].
// Gain and readout: a thread for each unit, through all samples in order, so that nothing is added up across threads.
// With tasks, each thread adds to its own column of sums [T, H].
// Input: a block for each sample in turn. It writes the gradient dm of each unit to a row in memory, and sums for each
// input the units that have it, in order (the index transposed by the host), less their mean.
//
// Everything is written once, no atomics. Sums in float, in double for double. Floor, predicted and not measured, on an
// H100: words a sample through L2, n H for the means, (2 n + O) H for the gain's gradient, (2 n + 1) H for the
// readout's and (4 n + O + 2) H for the input's, dm and the transposed index being read as well. For 784 -> 7840 -> 10
// in float32 0.22, 0.75, 0.47 and 1.25 MB: 25, 7, 11 and 4 million samples a second at 5.5 TB/s.
#include "fly_hash/fly_hash_cuda.h"

namespace neuromod {
namespace {

// Blocks a multiprocessor, for 64 registers a thread: left to itself ptxas takes fewer and spills some of those.
constexpr int kUnitThreads = 64, kUnitBlocks = 16, kInputBlocks = 4;

template <class T, class Acc, class Index>
__global__ void __launch_bounds__(kFlyThreads) fly_hash_mean_kernel(FlyHashBackwardParams p, bool keeps) {
  NEUROMOD_DYNAMIC_SHARED(Acc, shared);
  const int64_t b = blockIdx.x;
  const auto x = load_inputs<T, Acc>(p.forward, b, keeps ? shared : nullptr);
  const Acc mean = fly_mean<T, Acc, Index>(p.forward, x);
  if (thread_rank() == 0) static_cast<Acc*>(p.mean)[b] = mean;
}

/// r = sum_o R[o,j] g[b,o]
template <class T, class Acc>
__device__ __forceinline__ Acc signal(const FlyHashBackwardParams& p, int64_t b, int64_t j) {
  Acc sum = 0;
  for (int64_t o = 0; o < p.forward.outputs; ++o)
    sum += to_acc<Acc>(*p.forward.readout.at<const T>(o, j)) * to_acc<Acc>(*p.grad.at<const T>(b, o));
  return sum;
}

template <class T, class Acc, class Index>
__device__ __forceinline__ Acc activity(const FlyHashBackwardParams& p, int64_t b, int64_t j) {
  const FlyInputs<T, Acc> x = {p.forward.input.at<const T>(b), nullptr, p.forward.inputs};
  return rectified(fly_sum<T, Acc, Index>(p.forward, x, j) - static_cast<const Acc*>(p.mean)[b]);
}

template <class T, class Acc, class Index>
__device__ void grad_gain(const FlyHashBackwardParams& p, int64_t j) {
  const FlyHashParams& f = p.forward;
  if (!f.task) {
    Acc sum = 0;
    for (int64_t b = 0; b < f.batch; ++b) sum += activity<T, Acc, Index>(p, b, j) * signal<T, Acc>(p, b, j);
    *p.grad_gain.at<T>(0, j) = from_acc<T>(sum);
    return;
  }
  Acc* const sums = static_cast<Acc*>(p.sums) + j;
  for (int64_t t = 0; t < f.tasks; ++t) sums[t * f.units] = 0;
  for (int64_t b = 0; b < f.batch; ++b) {
    const int64_t t = *f.task.at<const int64_t>(b);
    if (t < 0 || t >= f.tasks) continue;  // its output was NaN
    sums[t * f.units] += activity<T, Acc, Index>(p, b, j) * signal<T, Acc>(p, b, j);
  }
  for (int64_t t = 0; t < f.tasks; ++t) *p.grad_gain.at<T>(t, j) = from_acc<T>(sums[t * f.units]);
}

template <class T, class Acc, class Index>
__device__ void grad_readout(const FlyHashBackwardParams& p, int64_t j) {
  const FlyHashParams& f = p.forward;
  for (int64_t first = 0; first < f.outputs; first += kFlyOutputs) {
    Acc sums[kFlyOutputs] = {};
    for (int64_t b = 0; b < f.batch; ++b) {
      const Acc z = activity<T, Acc, Index>(p, b, j) * fly_gain<Acc, T>(f, b, j);
#pragma unroll
      for (int o = 0; o < kFlyOutputs; ++o)
        if (first + o < f.outputs) sums[o] += to_acc<Acc>(*p.grad.at<const T>(b, first + o)) * z;
    }
#pragma unroll
    for (int o = 0; o < kFlyOutputs; ++o)
      if (first + o < f.outputs) *p.grad_readout.at<T>(first + o, j) = from_acc<T>(sums[o]);
  }
}

template <class T, class Acc, class Index>
__global__ void __launch_bounds__(kUnitThreads, kUnitBlocks) fly_readout_parameters_kernel(FlyHashBackwardParams p) {
  const int64_t j = int64_t(blockIdx.x) * kUnitThreads + thread_rank();
  if (j >= p.forward.units) return;
  if (p.grad_gain) grad_gain<T, Acc, Index>(p, j);
  if (p.grad_readout) grad_readout<T, Acc, Index>(p, j);
}

template <class T, class Acc, class Index>
__global__ void __launch_bounds__(kFlyThreads, kInputBlocks)
    fly_hash_input_kernel(FlyHashBackwardParams p, bool keeps) {
  NEUROMOD_DYNAMIC_SHARED(Acc, shared);
  const FlyHashParams& f = p.forward;
  Acc* const row = static_cast<Acc*>(p.rows) + blockIdx.x * f.units;
  for (int64_t b = blockIdx.x; b < f.batch; b += gridDim.x) {
    const auto x = load_inputs<T, Acc>(f, b, keeps ? shared : nullptr);
    const Acc centre = static_cast<const Acc*>(p.mean)[b];
    Acc sum = 0;
    for (int64_t j = thread_rank(); j < f.units; j += kFlyThreads) {
      const Acc h = rectified(fly_sum<T, Acc, Index>(f, x, j) - centre);
      Acc grad =
          f.readout ? signal<T, Acc>(p, b, j) * fly_gain<Acc, T>(f, b, j) : to_acc<Acc>(*p.grad.at<const T>(b, j));
      if (h <= 0) grad = 0;
      row[j] = grad;
      sum += grad;
    }
    const Acc mean = block_total(sum) / static_cast<Acc>(f.units);  // a barrier, too: the row is written
    for (int64_t i = thread_rank(); i < f.inputs; i += kFlyThreads) {
      const int64_t begin = p.starts[i], end = p.starts[i + 1];
      Acc total = 0;
      for (int64_t k = begin; k < end; ++k) total += row[p.members[k]];
      if (end > begin) total -= static_cast<Acc>(end - begin) * mean;
      *p.grad_input.at<T>(b, i) = from_acc<T>(total);
    }
    __syncthreads();  // the row is read
  }
}

}  // namespace

int launch_fly_hash_backward(const FlyHashBackwardParams& p, stream_t stream) {
  const FlyHashParams& f = p.forward;
  return dispatch_fly(f, [&](auto tag, auto index) {
    using T = typename decltype(tag)::type;
    using Index = typename decltype(index)::type;
    using Acc = accumulator_t<T>;
    const int64_t bytes = fly_shared_bytes<Acc>(f);
    const dim3 block(kFlyThreads);
    NEUROMOD_LAUNCH((fly_hash_mean_kernel<T, Acc, Index>), dim3(static_cast<unsigned>(f.batch)), block, bytes, stream,
                    p, bytes > 0);
    if (const int status = launch_status()) return status;
    if (p.grad_gain || p.grad_readout) {
      const dim3 grid(static_cast<unsigned>(ceil_div(f.units, kUnitThreads)));
      NEUROMOD_LAUNCH((fly_readout_parameters_kernel<T, Acc, Index>), grid, dim3(kUnitThreads), 0, stream, p);
      if (const int status = launch_status()) return status;
    }
    if (p.grad_input) {
      const dim3 grid(static_cast<unsigned>(fly_hash_rows(f.batch)));
      NEUROMOD_LAUNCH((fly_hash_input_kernel<T, Acc, Index>), grid, block, bytes, stream, p, bytes > 0);
    }
    return launch_status();
  });
}

}  // namespace neuromod
