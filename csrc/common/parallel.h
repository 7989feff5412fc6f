// Loops over torch's threads (torch.set_num_threads), as many as the work is worth.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace neuromod {

/// Runs f(begin, end) over ranges of [0, count), in parallel if each thread gets work worth its start; `seconds` is
/// what one item takes, roughly. Whoever is done takes the next range, ever shorter ones: items may differ in work,
/// and threads in speed.
template <class F>
void parallel_ranges(int64_t count, double seconds, F f) {
  constexpr double worth = 1e-5;
  const auto grain = static_cast<int64_t>(std::clamp(worth / std::max(seconds, 1e-12), 1.0, 1e9));
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (count + grain - 1) / grain);
  if (threads <= 1 || at::in_parallel_region()) {
    if (count > 0) f(int64_t(0), count);
    return;
  }
  std::atomic<int64_t> next = 0;
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next.load(); begin < count;) {
      const int64_t end = begin + std::max(std::min(grain, count - begin), (count - begin) / (2 * threads));
      if (!next.compare_exchange_weak(begin, end)) continue;
      f(begin, end);
      begin = next.load();
    }
  });
}

/// The same for f(item).
template <class F>
void parallel(int64_t count, double seconds, F f) {
  parallel_ranges(count, seconds, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace neuromod
