// Kernels with a mistake planted, which the emulator must notice. They compile for a GPU but must not run on one.
#include "common/cuda_kernel.h"
#include "emulator/emulator_test.h"

namespace neuromod::emulator_test {
namespace {

__global__ void order_of_arrival_kernel(int* order, int* counter) { order[atomicAdd(counter, 1)] = threadIdx.x; }

__global__ void uninitialised_shared_kernel(float* out) {
  NEUROMOD_DYNAMIC_SHARED(float, buffer);
  out[threadIdx.x] = buffer[threadIdx.x];
}

/// y[i] = x[i - 1] through shared memory. Right by luck if lanes run in ascending order.
__global__ void shift_without_barrier_kernel(const float* x, float* y) {
  NEUROMOD_DYNAMIC_SHARED(float, buffer);
  const int i = threadIdx.x;
  buffer[i] = x[i];
  y[i] = i == 0 ? 0.0f : buffer[i - 1];
}

__global__ void barrier_in_branch_kernel(int* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void two_barriers_in_branches_kernel(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void shuffle_in_branch_kernel(int* out) {
  if (threadIdx.x != 5) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, static_cast<int>(threadIdx.x), 1);
}

__global__ void mixed_barriers_kernel(int* out) {
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void partial_mask_kernel(int* out) {
  out[threadIdx.x] = __shfl_down_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 1);
}

__global__ void failed_check_kernel(int* out) {
  NEUROMOD_DEVICE_CHECK(threadIdx.x < 40, "an index out of bounds");
  out[threadIdx.x] = 1;
}

}  // namespace

void launch_order_of_arrival(int* order, int* counter, unsigned threads) {
  NEUROMOD_LAUNCH(order_of_arrival_kernel, 1, threads, 0, nullptr, order, counter);
}
void launch_uninitialised_shared(float* out) {
  NEUROMOD_LAUNCH(uninitialised_shared_kernel, 1, 64, 64 * sizeof(float), nullptr, out);
}
void launch_shift_without_barrier(const float* x, float* y, int n) {
  NEUROMOD_LAUNCH(shift_without_barrier_kernel, 1, n, n * sizeof(float), nullptr, x, y);
}
void launch_barrier_in_branch(int* out) { NEUROMOD_LAUNCH(barrier_in_branch_kernel, 1, 64, 0, nullptr, out); }
void launch_two_barriers_in_branches(int* out) {
  NEUROMOD_LAUNCH(two_barriers_in_branches_kernel, 1, 64, 0, nullptr, out);
}
void launch_shuffle_in_branch(int* out) { NEUROMOD_LAUNCH(shuffle_in_branch_kernel, 4, 64, 0, nullptr, out); }
void launch_mixed_barriers(int* out) { NEUROMOD_LAUNCH(mixed_barriers_kernel, 1, 64, 0, nullptr, out); }
void launch_partial_mask(int* out) { NEUROMOD_LAUNCH(partial_mask_kernel, 1, 64, 0, nullptr, out); }
void launch_failed_check(int* out) { NEUROMOD_LAUNCH(failed_check_kernel, 1, 64, 0, nullptr, out); }
void launch_too_many_threads(int* out) { NEUROMOD_LAUNCH(barrier_in_branch_kernel, 1, 1025, 0, nullptr, out); }

}  // namespace neuromod::emulator_test
