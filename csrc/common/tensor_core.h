// The tensor cores, and the asynchronous copies that feed them: sm_80's instructions, one small function each. nvcc
// gets PTX; the emulator's functions of the same names stand in emulator/tensor_core.h. Layouts are those of the PTX
// manual, for lane = 4 g + t of a warp, g in 0..7 and t in 0..3.
//
// copy_async<Bytes>(shared, global, valid) starts a copy of 4, 8 or 16 bytes, to which both addresses are aligned. The
//   bytes from `valid` on are not read and become zero. copy_async_commit() makes one group of the thread's copies
//   since the last; copy_async_wait<N>() waits until all groups of the thread but its newest N have arrived. Other
//   threads see them after the next barrier.
//
// load_matrix(to, row) reads four matrices of 8 x 8 16-bit elements from shared memory: lane 8 m + i brings the address
//   of row i of matrix m, aligned to 16 bytes; to[m] becomes elements 2t and 2t + 1 of row g, the first in the low
//   half. load_matrix_transposed: rows 2t and 2t + 1 of column g.
//
// multiply_add<T>(d, a, b), d += a b for T of 16 bits, a [16, 16], b [16, 8], d [16, 8] in float32:
//   a[r]: row g + 8 (r % 2), columns 2t and 2t + 1, + 8 (r / 2)     b[r]: rows 2t and 2t + 1, + 8 r, column g
//   d[r]: row g + 8 (r / 2), column 2t + r % 2
// multiply_add_tf32(d, a, b), a [16, 8] and b [8, 8] of float32 bits whose low 13 count for nothing (see to_tf32):
//   a[r]: row g + 8 (r % 2), column t + 4 (r / 2)                   b[r]: row t + 4 r, column g      d as above
// Products of 16-bit and tf32 numbers are exact in float32. The order and rounding of their sums within an instruction
// are the hardware's own: its error is that of a float32 sum to within a small factor.
#pragma once

#include "common/cuda_kernel.h"

#if defined(NEUROMOD_EMULATED)
#include "emulator/tensor_core.h"
#else

namespace neuromod {

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (Bytes == 16) {  // past L1, which operands of a product would only wash out
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(shared)), "l"(global),
                 "n"(Bytes), "r"(valid)
                 : "memory");
  }
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int Newest>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Newest) : "memory");
}

__device__ __forceinline__ void load_matrix(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

__device__ __forceinline__ void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// The bits of `value` rounded to tf32 (10 bits of mantissa), to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

}  // namespace neuromod

#endif
