#include "common/tile_product.h"

// One body, compiled per instruction set and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define NEUROMOD_CLONES __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define NEUROMOD_CLONES
#endif

namespace neuromod::detail {

NEUROMOD_CLONES void double_row_product(int64_t cols, int64_t depth, const double* a, const double* b, int64_t ldb,
                                        double* c) {
  for (int64_t d = 0; d < depth; ++d) {
    const double s = a[d];
    const double* row = b + d * ldb;
    for (int64_t n = 0; n < cols; ++n) c[n] += s * row[n];
  }
}

}  // namespace neuromod::detail

namespace neuromod {

/// Whether the processor multiplies tiles of a half-precision type as such.
bool half_type_tiles(bool bfloat16) { return bfloat16 ? interleaved<at::BFloat16>() : interleaved<at::Half>(); }

}  // namespace neuromod
