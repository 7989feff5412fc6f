// The one header of every kernel file. nvcc compiles kernels for a GPU; a host compiler given NEUROMOD_EMULATED
// compiles the same source to run on the CPU (csrc/emulator). Kernels use what stands here and plain CUDA C++, nothing
// else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(NEUROMOD_EMULATED)
#include "emulator/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

/// NEUROMOD_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...), a statement. A kernel with template
/// arguments goes in parentheses: NEUROMOD_LAUNCH((blend_kernel<float, 128>), ...). On the GPU the outcome is
/// launch_status(); the emulator has finished the launch when the statement is done, or thrown std::runtime_error.
///
/// NEUROMOD_DYNAMIC_SHARED(T, name): `name` points to the block's `shared_bytes` of dynamic shared memory, aligned to
/// 128 bytes. Every use in a kernel names the same memory.
///
/// NEUROMOD_DEVICE_CHECK(condition, message): tested in the emulator, costs nothing on the GPU.
#if defined(NEUROMOD_EMULATED)

#define NEUROMOD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::neuromod::emulator::configure(kernel, #kernel, grid, block, shared_bytes, stream)(__VA_ARGS__)

#define NEUROMOD_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::neuromod::emulator::dynamic_shared())

#define NEUROMOD_DEVICE_CHECK(condition, message) \
  ((condition) ? void() : ::neuromod::emulator::fail(message, ::neuromod::emulator::CallSite::here()))

#else

#define NEUROMOD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)          \
  do {                                                                           \
    const std::size_t neuromod_shared_bytes = (shared_bytes);                    \
    ::neuromod::allow_dynamic_shared(kernel, neuromod_shared_bytes);             \
    (kernel)<<<(grid), (block), neuromod_shared_bytes, (stream)>>>(__VA_ARGS__); \
  } while (false)

#define NEUROMOD_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(128) unsigned char neuromod_shared_[]; \
  T* const name = reinterpret_cast<T*>(neuromod_shared_)

#define NEUROMOD_DEVICE_CHECK(condition, message) ((void)0)

#endif

namespace neuromod {

/// Shared memory that a block may have on every card from sm_80 on; on sm_86, sm_89 and sm_120 it is no more.
constexpr std::size_t kSharedPerBlock = 99 << 10;

#if defined(NEUROMOD_EMULATED)
inline int launch_status() { return 0; }
#else
/// The cudaError of this thread's last launch, which is thereby cleared; 0 is success.
inline int launch_status() { return static_cast<int>(cudaGetLastError()); }

/// A kernel gets more than 48 KiB of shared memory only on request. The request is always for all there is, not for
/// `bytes`: it belongs to the kernel, and a smaller one by another host thread could come before this thread's launch.
template <class Kernel>
void allow_dynamic_shared(Kernel* kernel, std::size_t bytes) {
  if (bytes == 0) return;
  cudaFuncAttributes attributes;
  int device = 0, most = 0;
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return;
  constexpr std::size_t given = 48 << 10;  // to static and dynamic memory together
  const bool asked = static_cast<std::size_t>(attributes.maxDynamicSharedSizeBytes) > given;
  if (asked || bytes + attributes.sharedSizeBytes <= given) return;
  if (cudaGetDevice(&device) != cudaSuccess) return;
  if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return;
  most -= static_cast<int>(attributes.sharedSizeBytes);
  cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}
#endif

/// The type sums over T are taken in: double for double, float for all others.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename Accumulator<T>::type;

/// Widens an element to the type it is summed in; exact unless a double is narrowed on purpose.
template <class Acc, class T>
__device__ __forceinline__ Acc to_acc(T value) {
  if constexpr (std::is_same_v<T, __half>) {
    return static_cast<Acc>(__half2float(value));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return static_cast<Acc>(__bfloat162float(value));
  } else {
    return static_cast<Acc>(value);
  }
}

/// Rounds a sum to an element, once, to nearest even.
template <class T, class Acc>
__device__ __forceinline__ T from_acc(Acc value) {
  static_assert(std::is_same_v<Acc, float> || std::is_same_v<Acc, double>);
  constexpr bool wide = std::is_same_v<Acc, double>;
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (wide) {
      return __double2half(value);
    } else {
      return __float2half_rn(value);
    }
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (wide) {
      return __double2bfloat16(value);
    } else {
      return __float2bfloat16_rn(value);
    }
  } else {
    return static_cast<T>(value);
  }
}

/// The thread's position in its block, x fastest: warps are consecutive runs of 32 of these.
__device__ __forceinline__ int thread_rank() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

/// Sum over a full warp, the same in every lane. All 32 lanes must call it. Pairs 16, 8, 4, 2, 1 lanes apart are added,
/// in this order always; addition commutes, so both lanes of a pair get the same bits.
template <class Acc>
__device__ __forceinline__ Acc warp_sum(Acc value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

/// Sum over a block of exactly `Threads` threads, valid in the thread of rank 0. All threads must call it. Fixed order
/// (warp_sum of each warp, then warp_sum of the warps' sums), so the same bits each time. At most 10
/// roundings on any path: |error| <= 10u·Σ|value| to first order. Costs two block barriers; calls may follow one
/// another.
template <int Threads, class Acc>
__device__ __forceinline__ Acc block_sum(Acc value) {
  static_assert(Threads % 32 == 0 && Threads >= 32 && Threads <= 1024, "whole warps");
  NEUROMOD_DEVICE_CHECK(blockDim.x * blockDim.y * blockDim.z == Threads, "block_sum: Threads is not the block's size");
  value = warp_sum(value);
  if constexpr (Threads > 32) {
    constexpr int warps = Threads / 32;
    __shared__ Acc warp_sums[warps];
    const int rank = thread_rank();
    if (rank % 32 == 0) warp_sums[rank / 32] = value;
    __syncthreads();
    if (rank < 32) value = warp_sum(rank < warps ? warp_sums[rank] : Acc(0));
    __syncthreads();  // the next call writes warp_sums again
  }
  return value;
}

}  // namespace neuromod
