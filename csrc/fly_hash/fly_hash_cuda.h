// What the CUDA kernels of fly_hash share: a sample's inputs, a unit's sum, the mean over the units.
#pragma once

#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "fly_hash/fly_hash.h"

namespace neuromod {

constexpr int kFlyThreads = 256;
constexpr int kFlyOutputs = 10;           // outputs summed at a time, in registers
constexpr int64_t kFlyShared = 48 << 10;  // bytes of inputs that a block may keep

/// NaN, which is what an index or a task out of range reads.
template <class Acc>
__device__ __forceinline__ Acc not_a_number() {
  return static_cast<Acc>(__int_as_float(0x7fc00000));
}

/// The inputs of one sample, in shared memory where they fit.
template <class T, class Acc>
struct FlyInputs {
  const T* global;
  const Acc* shared;  // or null
  int64_t inputs;

  __device__ __forceinline__ Acc operator[](int64_t i) const {
    if (static_cast<uint64_t>(i) >= static_cast<uint64_t>(inputs)) return not_a_number<Acc>();
    return shared ? shared[i] : to_acc<Acc>(global[i]);
  }
};

/// m: the sum of a unit's inputs, in order.
template <class T, class Acc, class Index>
__device__ __forceinline__ Acc fly_sum(const FlyHashParams& p, const FlyInputs<T, Acc>& x, int64_t unit) {
  const Index* const index = p.index.at<const Index>(unit);
  Acc sum = 0;
  for (int64_t k = 0; k < p.arity; ++k) sum += x[index[k]];
  return sum;
}

/// NaN passes.
template <class Acc>
__device__ __forceinline__ Acc rectified(Acc a) {
  return a <= 0 ? Acc(0) : a;
}

template <class Acc, class T>
__device__ __forceinline__ Acc fly_gain(const FlyHashParams& p, int64_t sample, int64_t unit) {
  const int64_t t = p.task ? *p.task.at<const int64_t>(sample) : 0;
  if (t < 0 || t >= p.tasks) return not_a_number<Acc>();
  return to_acc<Acc>(*p.gain.at<const T>(t, unit));
}

/// Called by a whole block: copies a sample's inputs into shared memory, if that is there.
template <class T, class Acc>
__device__ __forceinline__ FlyInputs<T, Acc> load_inputs(const FlyHashParams& p, int64_t sample, Acc* shared) {
  const FlyInputs<T, Acc> x = {p.input.at<const T>(sample), shared, p.inputs};
  if (shared) {
    __syncthreads();  // the last sample's readers are done
    for (int64_t i = thread_rank(); i < p.inputs; i += kFlyThreads) shared[i] = to_acc<Acc>(x.global[i]);
    __syncthreads();
  }
  return x;
}

/// Called by a whole block: a sum over its threads, in all of them.
template <class Acc>
__device__ __forceinline__ Acc block_total(Acc value) {
  __shared__ Acc total;
  value = block_sum<kFlyThreads>(value);
  if (thread_rank() == 0) total = value;
  __syncthreads();
  value = total;
  __syncthreads();
  return value;
}

/// Called by a whole block: the mean over the units.
template <class T, class Acc, class Index>
__device__ __forceinline__ Acc fly_mean(const FlyHashParams& p, const FlyInputs<T, Acc>& x) {
  Acc sum = 0;
  for (int64_t j = thread_rank(); j < p.units; j += kFlyThreads) sum += fly_sum<T, Acc, Index>(p, x, j);
  return block_total(sum) / static_cast<Acc>(p.units);
}

/// Bytes of shared memory for a sample's inputs, or 0 if they do not fit.
template <class Acc>
int64_t fly_shared_bytes(const FlyHashParams& p) {
  const int64_t bytes = p.inputs * static_cast<int64_t>(sizeof(Acc));
  return bytes <= kFlyShared ? bytes : 0;
}

/// Calls f with the element type, and with the type of the index.
template <class F>
int dispatch_fly(const FlyHashParams& p, F f) {
  return dispatch_dtype<__half, __nv_bfloat16>(
      p.dtype, [&](auto tag) { return p.long_index ? f(tag, TypeTag<int64_t>{}) : f(tag, TypeTag<int32_t>{}); });
}

}  // namespace neuromod
