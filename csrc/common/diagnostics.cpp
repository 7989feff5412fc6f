// What `_C` tells about the CPU kernels' inner loops.
#include <c10/util/Exception.h>

#include <chrono>
#include <string>

#include "common/dispatch.h"
#include "common/dtype_name.h"
#include "common/scratch.h"
#include "common/tile_product.h"

namespace neuromod {

/// Seconds that one product tile takes on this thread, its operands in cache: the limit of every plan.
double tile_seconds(const std::string& dtype, int64_t rows, int64_t cols, int64_t depth, int64_t repeats) {
  return dispatch_dtype<Float16, BFloat16>(dtype_from_name("tile_seconds", dtype), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t packed = packed_depth<T>(depth);
    const Scratch<T> a(rows * packed), b(packed * cols);
    const Scratch<acc_t<T>> c(rows * cols);
    std::fill_n(a.data(), rows * packed, T{});
    std::fill_n(b.data(), packed * cols, T{});
    const auto product = [&] {
      tile_product<T>(rows, cols, packed, {a.data(), packed}, {b.data(), cols}, c.data(), cols, false);
    };
    product();
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < repeats; ++i) product();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    release_tiles<T>();
    return elapsed.count() / double(repeats);
  });
}

}  // namespace neuromod
