// fly_hash and fly_readout on CUDA: h = relu(m - mean(m)), y = R (v h).
//
// Grid: a block of 256 threads for each sample; a thread takes every 256th unit. The block keeps the sample's inputs in
// shared memory (up to 48 KiB of them) and gathers twice, for the mean and for h, which goes to memory only in
// fly_hash. Reads index, gain and readout once more for each sample, from L2; writes each output element once, no
// atomics. Order: a unit's inputs in order; units by thread, then block_sum. Sums in float, in double for double. Cost
// for each sample: (2 n + 2 O + 4) H flop. Floor, predicted and not measured, on an H100: inputs and outputs once
// through HBM, (I + O) B elements, and (n + O + 1) H words a sample through L2: for 784 -> 7840 -> 10 in float32 about
// 0.56 MB, so about 10 million samples a second at 5.5 TB/s of L2.
#include "fly_hash/fly_hash_cuda.h"

namespace neuromod {
namespace {

template <class T, class Acc, class Index>
__global__ void __launch_bounds__(kFlyThreads) fly_hash_kernel(FlyHashParams p, bool keeps) {
  NEUROMOD_DYNAMIC_SHARED(Acc, shared);
  const int64_t b = blockIdx.x;
  const auto x = load_inputs<T, Acc>(p, b, keeps ? shared : nullptr);
  const Acc mean = fly_mean<T, Acc, Index>(p, x);
  for (int64_t j = thread_rank(); j < p.units; j += kFlyThreads)
    *p.output.at<T>(b, j) = from_acc<T>(rectified(fly_sum<T, Acc, Index>(p, x, j) - mean));
}

template <class T, class Acc, class Index>
__global__ void __launch_bounds__(kFlyThreads) fly_readout_kernel(FlyHashParams p, bool keeps) {
  NEUROMOD_DYNAMIC_SHARED(Acc, shared);
  const int64_t b = blockIdx.x;
  const auto x = load_inputs<T, Acc>(p, b, keeps ? shared : nullptr);
  const Acc mean = fly_mean<T, Acc, Index>(p, x);
  for (int64_t first = 0; first < p.outputs; first += kFlyOutputs) {
    Acc sums[kFlyOutputs] = {};
    for (int64_t j = thread_rank(); j < p.units; j += kFlyThreads) {
      const Acc z = rectified(fly_sum<T, Acc, Index>(p, x, j) - mean) * fly_gain<Acc, T>(p, b, j);
#pragma unroll
      for (int o = 0; o < kFlyOutputs; ++o)
        if (first + o < p.outputs) sums[o] += to_acc<Acc>(*p.readout.at<const T>(first + o, j)) * z;
    }
#pragma unroll
    for (int o = 0; o < kFlyOutputs; ++o) {
      const Acc total = block_sum<kFlyThreads>(sums[o]);
      if (thread_rank() == 0 && first + o < p.outputs) *p.output.at<T>(b, first + o) = from_acc<T>(total);
    }
  }
}

}  // namespace

int launch_fly_hash(const FlyHashParams& p, stream_t stream) {
  return dispatch_fly(p, [&](auto tag, auto index) {
    using T = typename decltype(tag)::type;
    using Index = typename decltype(index)::type;
    using Acc = accumulator_t<T>;
    const int64_t bytes = fly_shared_bytes<Acc>(p);
    const dim3 grid(static_cast<unsigned>(p.batch)), block(kFlyThreads);
    if (p.readout) {
      NEUROMOD_LAUNCH((fly_readout_kernel<T, Acc, Index>), grid, block, bytes, stream, p, bytes > 0);
    } else {
      NEUROMOD_LAUNCH((fly_hash_kernel<T, Acc, Index>), grid, block, bytes, stream, p, bytes > 0);
    }
    return launch_status();
  });
}

}  // namespace neuromod
