// Kernels that try common/tensor_core.h. Each runs as one warp, or a few, of one block.
#include <stdexcept>

#include "common/tensor_core.h"
#include "emulator/emulator_test.h"

namespace neuromod::emulator_test {
namespace {

/// y = x, with what lies beyond `size` bytes of it as zero, through shared memory; thread i copies its neighbour's part
/// out again.
template <int Bytes>
__global__ void copy_kernel(const unsigned char* x, unsigned char* y, int size) {
  NEUROMOD_DYNAMIC_SHARED(unsigned char, buffer);
  const int i = threadIdx.x, begin = i * Bytes, other = (i ^ 1) * Bytes;
  const int left = size - begin, valid = left < 0 ? 0 : left < Bytes ? left : Bytes;
  copy_async<Bytes>(buffer + begin, valid > 0 ? x + begin : x, valid);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  for (int byte = 0; byte < Bytes; ++byte) y[other + byte] = buffer[other + byte];
}

/// Prefix sums over the tiles of x, three copies ahead: groups arrive in order.
__global__ void pipeline_kernel(const float* x, float* y, int tiles) {
  constexpr int stages = 4;
  NEUROMOD_DYNAMIC_SHARED(float, buffer);
  const int i = threadIdx.x, n = blockDim.x;
  const auto fetch = [&](int tile) {
    if (tile < tiles) copy_async<4>(&buffer[tile % stages * n + i], &x[tile * n + i]);
    copy_async_commit();
  };
  for (int tile = 0; tile < stages - 1; ++tile) fetch(tile);
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<stages - 2>();
    __syncthreads();
    sum += buffer[tile % stages * n + (i + tile) % n];
    y[tile * n + i] = sum;
    fetch(tile + stages - 1);
  }
}

/// out [2, 32, 4]: plain and transposed, what each lane got of elements 0, 1, 2, ...
__global__ void matrices_kernel(uint32_t* out) {
  NEUROMOD_DYNAMIC_SHARED(uint16_t, buffer);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) buffer[8 * lane + i] = static_cast<uint16_t>(8 * lane + i);
  __syncwarp();
  uint32_t four[2][4];
  load_matrix(four[0], &buffer[lane * 8]);
  load_matrix_transposed(four[1], &buffer[lane * 8]);
  for (int transposed = 0; transposed < 2; ++transposed)
    for (int m = 0; m < 4; ++m) out[transposed * 128 + lane * 4 + m] = four[transposed][m];
}

/// d [16, 8] += a [16, Depth] b [Depth, 8], each element taken to the register where the PTX manual has it. Pack is the
/// number of elements in a register, and their distance between registers is Depth / 2.
template <int Depth, int Pack, class Element, class Multiply>
__device__ void multiply(const Element* a, const Element* b, float* d, Multiply multiply_add_fragments) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t a_registers[4] = {}, b_registers[2] = {};
  float sum[4];
  for (int h = 0; h < Pack; ++h) {
    for (int r = 0; r < 4; ++r) {
      const int row = r == 1 || r == 3 ? g + 8 : g, column = Pack * t + h + (r >= 2 ? Depth / 2 : 0);
      a_registers[r] |= static_cast<uint32_t>(a[row * Depth + column]) << (16 * h);
    }
    for (int r = 0; r < 2; ++r)
      b_registers[r] |= static_cast<uint32_t>(b[(Pack * t + h + r * Depth / 2) * 8 + g]) << (16 * h);
  }
  for (int r = 0; r < 4; ++r) sum[r] = d[(r < 2 ? g : g + 8) * 8 + 2 * t + r % 2];
  multiply_add_fragments(sum, a_registers, b_registers);
  for (int r = 0; r < 4; ++r) d[(r < 2 ? g : g + 8) * 8 + 2 * t + r % 2] = sum[r];
}

template <class T>
__global__ void multiply_half_kernel(const uint16_t* a, const uint16_t* b, float* d) {
  multiply<16, 2>(a, b, d,
                  [](float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { multiply_add<T>(d, a, b); });
}

__global__ void multiply_tf32_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  multiply<8, 1>(a, b, d,
                 [](float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { multiply_add_tf32(d, a, b); });
}

__global__ void to_tf32_kernel(const float* value, uint32_t* bits, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) bits[i] = to_tf32(value[i]);
}

void require_launched() {
  if (launch_status() != 0) throw std::runtime_error("the launch failed");
}

}  // namespace

void launch_copy(int bytes, const unsigned char* x, unsigned char* y, int size, unsigned threads) {
  const auto launch = [&](auto* kernel) {
    NEUROMOD_LAUNCH(kernel, 1, threads, threads * bytes, nullptr, x, y, size);
    require_launched();
  };
  bytes == 4 ? launch(&copy_kernel<4>) : bytes == 8 ? launch(&copy_kernel<8>) : launch(&copy_kernel<16>);
}

void launch_pipeline(const float* x, float* y, int tiles, unsigned threads) {
  NEUROMOD_LAUNCH(pipeline_kernel, 1, threads, 4 * threads * sizeof(float), nullptr, x, y, tiles);
  require_launched();
}

void launch_matrices(uint32_t* out) {
  NEUROMOD_LAUNCH(matrices_kernel, 1, 32, 256 * sizeof(uint16_t), nullptr, out);
  require_launched();
}

void launch_multiply_half(HalfType type, const uint16_t* a, const uint16_t* b, float* d) {
  if (type == HalfType::float16) {
    NEUROMOD_LAUNCH((multiply_half_kernel<__half>), 1, 32, 0, nullptr, a, b, d);
  } else {
    NEUROMOD_LAUNCH((multiply_half_kernel<__nv_bfloat16>), 1, 32, 0, nullptr, a, b, d);
  }
  require_launched();
}

void launch_multiply_tf32(const uint32_t* a, const uint32_t* b, float* d) {
  NEUROMOD_LAUNCH(multiply_tf32_kernel, 1, 32, 0, nullptr, a, b, d);
  require_launched();
}

void launch_to_tf32(const float* value, uint32_t* bits, int n) {
  NEUROMOD_LAUNCH(to_tf32_kernel, 1, 128, 0, nullptr, value, bits, n);
  require_launched();
}

}  // namespace neuromod::emulator_test
