// Loops over torch's threads (torch.set_num_threads), as many as the work is worth.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace neuromod {

/// Runs f(begin, end) over ranges of [0, count), in parallel if each thread gets work worth its start; `seconds` is
/// what one item takes, roughly.
template <class F>
void parallel_ranges(int64_t count, double seconds, F f) {
  constexpr double worth = 1e-5;
  const auto grain = static_cast<int64_t>(std::clamp(worth / std::max(seconds, 1e-12), 1.0, 1e9));
  at::parallel_for(0, count, grain, f);
}

/// The same for f(item).
template <class F>
void parallel(int64_t count, double seconds, F f) {
  parallel_ranges(count, seconds, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace neuromod
