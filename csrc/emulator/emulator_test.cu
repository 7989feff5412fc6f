#include <cstdlib>
#include <stdexcept>

#include "common/cuda_kernel.h"
#include "emulator/emulator_test.h"

namespace neuromod::emulator_test {
namespace {

template <int Threads>
__global__ void __launch_bounds__(Threads)
    sums_kernel(const float* __restrict__ x, float* sum, double* sum_of_squares, int64_t each) {
  float value = 0;
  double square = 0;
  for (int64_t i = threadIdx.x; i < each; i += Threads) {
    const float element = x[blockIdx.x * each + i];
    value += element;
    square += static_cast<double>(element) * element;
  }
  value = block_sum<Threads>(value);
  const float again =
      block_sum<Threads>(threadIdx.x == 0 ? value : 0.0f);  // at once: calls must not disturb each other
  square = block_sum<Threads>(square);
  if (threadIdx.x == 0) {
    sum[blockIdx.x] = again;
    sum_of_squares[blockIdx.x] = square;
  }
}

template <class T, class Out, int Tile>
__global__ void __launch_bounds__(Tile* Tile)
    gemm_kernel(const T* __restrict__ a, const T* __restrict__ b, Out* __restrict__ c, int m, int n, int k) {
  using Acc = accumulator_t<T>;
  __shared__ Acc tile_a[Tile][Tile + 1], tile_b[Tile][Tile + 1];
  const int i = threadIdx.y, j = threadIdx.x, row = blockIdx.y * Tile + i, column = blockIdx.x * Tile + j;
  Acc sum = 0;
  for (int begin = 0; begin < k; begin += Tile) {
    const bool a_inside = row < m && begin + j < k, b_inside = column < n && begin + i < k;
    tile_a[i][j] = a_inside ? to_acc<Acc>(a[static_cast<int64_t>(row) * k + begin + j]) : Acc(0);
    tile_b[i][j] = b_inside ? to_acc<Acc>(b[static_cast<int64_t>(begin + i) * n + column]) : Acc(0);
    __syncthreads();
#pragma unroll
    for (int l = 0; l < Tile; ++l) sum += tile_a[i][l] * tile_b[l][j];
    __syncthreads();
  }
  if (row < m && column < n) c[static_cast<int64_t>(row) * n + column] = from_acc<Out>(sum);
}

__global__ void reverse_kernel(const int* x, int* y, int n) {
  NEUROMOD_DYNAMIC_SHARED(int, buffer);
  const int i = threadIdx.x;
  buffer[i] = x[i];
  __syncthreads();
  y[i] = buffer[n - 1 - i];
}

__global__ void indices_kernel(uint64_t* seen, int* count) {
  const uint64_t block = blockIdx.x + gridDim.x * (blockIdx.y + static_cast<uint64_t>(gridDim.y) * blockIdx.z);
  const uint64_t threads = blockDim.x * blockDim.y * blockDim.z;
  const uint64_t packed =
      blockIdx.x | blockIdx.y << 4 | blockIdx.z << 8 | threadIdx.x << 12 | threadIdx.y << 16 | threadIdx.z << 20;
  seen[block * threads + thread_rank()] = packed;
  atomicAdd(count, 1);
}

__global__ void shuffles_kernel(int* out) {
  const int i = threadIdx.x, n = blockDim.x, value = 100 + i;
  constexpr unsigned all = 0xffffffffu;
  out[0 * n + i] = __shfl_sync(all, value, i + 3, 8);
  out[1 * n + i] = __shfl_up_sync(all, value, 3, 8);
  out[2 * n + i] = __shfl_down_sync(all, value, 3, 8);
  out[3 * n + i] = __shfl_xor_sync(all, value, 5, 8);
  out[4 * n + i] = __shfl_xor_sync(all, value, 16);
  out[5 * n + i] = static_cast<int>(__shfl_sync(all, static_cast<double>(value), 7));
  out[6 * n + i] = __shfl_xor_sync(all, value, 9, 8);  // an earlier segment may be read, a later one not
}

__global__ void votes_kernel(const int* predicate, unsigned* out) {
  const int i = threadIdx.x, n = blockDim.x;
  out[0 * n + i] = __ballot_sync(0xffffffffu, predicate[i]);
  out[1 * n + i] = __any_sync(0xffffffffu, predicate[i]) != 0;
  __syncwarp();
  out[2 * n + i] = __all_sync(0xffffffffu, predicate[i]) != 0;
}

__global__ void atomics_kernel(int* out, unsigned* flags) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&out[0], i);
  atomicMin(&out[1], -i);
  atomicMax(&out[2], i);
  atomicOr(&flags[0], 1u << (i % 32));
  if (atomicCAS(&flags[1], 0u, i + 1u) == 0u) atomicAdd(&out[3], 1);
}

template <class T>
struct Bits;
template <>
struct Bits<__half> {
  static __device__ __half from(uint16_t bits) { return __ushort_as_half(bits); }
  static __device__ uint16_t of(__half value) { return __half_as_ushort(value); }
};
template <>
struct Bits<__nv_bfloat16> {
  static __device__ __nv_bfloat16 from(uint16_t bits) { return __ushort_as_bfloat16(bits); }
  static __device__ uint16_t of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }
};

template <class T>
__global__ void widen_kernel(const uint16_t* bits, float* value, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) value[i] = to_acc<float>(Bits<T>::from(bits[i]));
}

template <class T, class Acc>
__global__ void round_kernel(const Acc* value, uint16_t* bits, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) bits[i] = Bits<T>::of(from_acc<T>(value[i]));
}

dim3 blocks_for(int n) { return dim3((n + 255) / 256); }

void require_launched() {
  if (launch_status() != 0) throw std::runtime_error("the launch failed");
}

}  // namespace

#if defined(NEUROMOD_EMULATED)
void* allocate(size_t bytes) { return std::malloc(bytes); }
void release(void* memory) { std::free(memory); }
void synchronize() {}
#else
void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (cudaMallocManaged(&memory, bytes) != cudaSuccess) throw std::runtime_error("no managed memory");
  return memory;
}
void release(void* memory) { cudaFree(memory); }
void synchronize() {
  const cudaError_t status = cudaDeviceSynchronize();
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}
#endif

void launch_sums(const float* x, float* sum, double* sum_of_squares, int64_t each, unsigned blocks) {
  NEUROMOD_LAUNCH((sums_kernel<kSumThreads>), blocks, kSumThreads, 0, nullptr, x, sum, sum_of_squares, each);
  require_launched();
}

void launch_gemm_bfloat16(const uint16_t* a, const uint16_t* b, float* c, int m, int n, int k) {
  NEUROMOD_LAUNCH((gemm_kernel<__nv_bfloat16, float, 16>), dim3((n + 15) / 16, (m + 15) / 16), dim3(16, 16), 0, nullptr,
                  reinterpret_cast<const __nv_bfloat16*>(a), reinterpret_cast<const __nv_bfloat16*>(b), c, m, n, k);
  require_launched();
}

void launch_gemm_double(const double* a, const double* b, double* c, int m, int n, int k) {
  NEUROMOD_LAUNCH((gemm_kernel<double, double, 8>), dim3((n + 7) / 8, (m + 7) / 8), dim3(8, 8), 0, nullptr, a, b, c, m,
                  n, k);
  require_launched();
}

void launch_reverse(const int* x, int* y, int n, size_t shared_bytes) {
  NEUROMOD_LAUNCH(reverse_kernel, 1, n, shared_bytes, nullptr, x, y, n);
  require_launched();
}

void launch_indices(uint64_t* seen, int* count, unsigned grid_x, unsigned grid_y, unsigned grid_z) {
  NEUROMOD_LAUNCH(indices_kernel, dim3(grid_x, grid_y, grid_z), dim3(5, 3, 2), 0, nullptr, seen, count);
  require_launched();
}

void launch_shuffles(int* out, unsigned threads) {
  NEUROMOD_LAUNCH(shuffles_kernel, 1, threads, 0, nullptr, out);
  require_launched();
}

void launch_votes(const int* predicate, unsigned* out, unsigned threads) {
  NEUROMOD_LAUNCH(votes_kernel, 1, threads, 0, nullptr, predicate, out);
  require_launched();
}

void launch_atomics(int* out, unsigned* flags, unsigned blocks) {
  NEUROMOD_LAUNCH(atomics_kernel, blocks, 96, 0, nullptr, out, flags);
  require_launched();
}

void launch_widen(HalfType type, const uint16_t* bits, float* value, int n) {
  if (type == HalfType::float16) {
    NEUROMOD_LAUNCH((widen_kernel<__half>), blocks_for(n), 256, 0, nullptr, bits, value, n);
  } else {
    NEUROMOD_LAUNCH((widen_kernel<__nv_bfloat16>), blocks_for(n), 256, 0, nullptr, bits, value, n);
  }
  require_launched();
}

void launch_round_float(HalfType type, const float* value, uint16_t* bits, int n) {
  if (type == HalfType::float16) {
    NEUROMOD_LAUNCH((round_kernel<__half, float>), blocks_for(n), 256, 0, nullptr, value, bits, n);
  } else {
    NEUROMOD_LAUNCH((round_kernel<__nv_bfloat16, float>), blocks_for(n), 256, 0, nullptr, value, bits, n);
  }
  require_launched();
}

void launch_round_double(HalfType type, const double* value, uint16_t* bits, int n) {
  if (type == HalfType::float16) {
    NEUROMOD_LAUNCH((round_kernel<__half, double>), blocks_for(n), 256, 0, nullptr, value, bits, n);
  } else {
    NEUROMOD_LAUNCH((round_kernel<__nv_bfloat16, double>), blocks_for(n), 256, 0, nullptr, value, bits, n);
  }
  require_launched();
}

}  // namespace neuromod::emulator_test
