// Kernels with a mistake planted, which the emulator must notice. They compile for a GPU but must not run on one.
#include "common/tensor_core.h"
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

/// y[i] = x[i ^ 33] for two arrays in turn through one buffer: each element is copied by a thread of the other warp.
__global__ void exchange_kernel(ExchangeMistake mistake, const float* x, float* y, int n) {
  NEUROMOD_DYNAMIC_SHARED(float, buffer);
  const int i = threadIdx.x;
  for (int turn = 0; turn < 2; ++turn, x += n, y += n) {
    if (mistake == ExchangeMistake::misaligned_shared) {
      copy_async<8>(&buffer[i | 1], x);
    } else if (mistake == ExchangeMistake::misaligned_global) {
      copy_async<8>(&buffer[i / 2 * 2], x + 1);
    } else {
      copy_async<4>(&buffer[i], x + i);
    }
    if (mistake != ExchangeMistake::no_commit) copy_async_commit();
    if (mistake == ExchangeMistake::wait_for_older) {
      copy_async_wait<1>();
    } else if (mistake != ExchangeMistake::no_wait) {
      copy_async_wait<0>();
    }
    if (mistake != ExchangeMistake::no_barrier) __syncthreads();
    y[i] = buffer[i ^ 33];
    if (mistake != ExchangeMistake::no_barrier_before_reuse) __syncthreads();
  }
  if (mistake == ExchangeMistake::wait_for_older) copy_async_wait<0>();
}

__global__ void product_mistake_kernel(ProductMistake mistake, float* out) {
  NEUROMOD_DYNAMIC_SHARED(uint32_t, buffer);
  const int i = threadIdx.x;
  uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  if (mistake == ProductMistake::misaligned_row) load_matrix(a, &buffer[4 * (i % 32) + 1]);
  if (mistake != ProductMistake::in_branch || i != 7) multiply_add<__nv_bfloat16>(d, a, b);
  out[i] = d[0];
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

void launch_exchange(ExchangeMistake mistake, const float* x, float* y, int n) {
  NEUROMOD_LAUNCH(exchange_kernel, 1, n, n * sizeof(float), nullptr, mistake, x, y, n);
}
void launch_product_mistake(ProductMistake mistake, float* out, unsigned threads) {
  NEUROMOD_LAUNCH(product_mistake_kernel, 1, threads, 136 * sizeof(uint32_t), nullptr, mistake, out);
}

}  // namespace neuromod::emulator_test
