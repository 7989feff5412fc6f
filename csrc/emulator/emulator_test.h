// Kernels that try the emulator, as host functions. On a GPU build the same functions run on the GPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace neuromod::emulator_test {

enum class HalfType { float16, bfloat16 };

/// Memory that host and kernels can both reach, and the wait for everything launched; both throw on a CUDA error.
void* allocate(size_t bytes);
void release(void* memory);
void synchronize();

// Work a correct emulator does like a GPU, to the bit.
constexpr int kSumThreads = 256;
void launch_sums(const float* x, float* sum, double* sum_of_squares, int64_t each, unsigned blocks);
void launch_gemm_bfloat16(const uint16_t* a, const uint16_t* b, float* c, int m, int n, int k);
void launch_gemm_double(const double* a, const double* b, double* c, int m, int n, int k);
void launch_reverse(const int* x, int* y, int n, size_t shared_bytes);
void launch_indices(uint64_t* seen, int* count, unsigned grid_x, unsigned grid_y, unsigned grid_z);
constexpr int kShuffles = 7;
void launch_shuffles(int* out, unsigned threads);                          // out [kShuffles, threads]
void launch_votes(const int* predicate, unsigned* out, unsigned threads);  // out [3, threads]: ballot, any, all
void launch_atomics(int* out, unsigned* flags, unsigned blocks);           // out [4]: sum, min, max, compare-and-swaps
void launch_widen(HalfType type, const uint16_t* bits, float* value, int n);
void launch_round_float(HalfType type, const float* value, uint16_t* bits, int n);
void launch_round_double(HalfType type, const double* value, uint16_t* bits, int n);

// Tensor cores and the copies that feed them (common/tensor_core.h).
void launch_copy(int bytes, const unsigned char* x, unsigned char* y, int size, unsigned threads);
void launch_pipeline(const float* x, float* y, int tiles, unsigned threads);
void launch_matrices(uint32_t* out);
void launch_multiply_half(HalfType type, const uint16_t* a, const uint16_t* b, float* d);
void launch_multiply_tf32(const uint32_t* a, const uint32_t* b, float* d);
void launch_to_tf32(const float* value, uint32_t* bits, int n);

// What only the emulator has: an order to observe, and mistakes it is to notice.
void launch_order_of_arrival(int* order, int* counter, unsigned threads);
void launch_uninitialised_shared(float* out);
void launch_shift_without_barrier(const float* x, float* y, int n);
void launch_barrier_in_branch(int* out);
void launch_two_barriers_in_branches(int* out);
void launch_shuffle_in_branch(int* out);
void launch_mixed_barriers(int* out);
void launch_partial_mask(int* out);
void launch_failed_check(int* out);
void launch_too_many_threads(int* out);
enum class ExchangeMistake {
  none,
  no_wait,
  no_commit,
  wait_for_older,
  no_barrier,
  no_barrier_before_reuse,
  misaligned_shared,
  misaligned_global
};
void launch_exchange(ExchangeMistake mistake, const float* x, float* y, int n);
enum class ProductMistake { none, misaligned_row, in_branch };
void launch_product_mistake(ProductMistake mistake, float* out, unsigned threads);

}  // namespace neuromod::emulator_test
