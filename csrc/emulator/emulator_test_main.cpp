// Tests of the emulator. From csrc/ (a few seconds):
//
//   g++ -std=c++17 -O2 -fopenmp -I. -DNEUROMOD_EMULATED -Wno-unknown-pragmas -o /tmp/emulator_test
//     emulator/emulator*.cpp emulator/fiber.cpp -x c++ emulator/*.cu  &&  /tmp/emulator_test
//
// The same checks on a GPU, but for the planted mistakes:
//
//   nvcc -std=c++17 -arch=sm_80 -I. -o /tmp/gpu_test emulator/emulator_test*.cpp emulator/*.cu  &&  /tmp/gpu_test
#include <cmath>
#include <cstdio>
#include <exception>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "emulator/emulator_test_support.h"
#if defined(NEUROMOD_EMULATED)
#include "emulator/emulator.h"
#endif

namespace neuromod::emulator_test {

static int g_failures = 0;

int failures() { return g_failures; }

void check(const std::string& name, const std::function<void()>& body) {
  std::string reason;
  try {
    body();
  } catch (const std::exception& error) {
    reason = error.what();
    ++g_failures;
  }
  std::printf("%s  %s%s%s\n", reason.empty() ? "ok    " : "FAILED", name.c_str(), reason.empty() ? "" : ": ",
              reason.c_str());
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::logic_error(message);
}

namespace {

// ---- Work

void check_sums() {
  const int64_t each = 5000;
  const unsigned blocks = 7;
  Buffer<float> x(each * blocks), sum(blocks);
  Buffer<double> squares(blocks);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) * 0.25f - 1;
  launch_sums(x.data(), sum.data(), squares.data(), each, blocks);
  synchronize();
  for (unsigned b = 0; b < blocks; ++b) {
    double expected = 0, expected_squares = 0;
    for (int64_t i = b * each; i < (b + 1) * each; ++i) expected += x[i], expected_squares += double(x[i]) * x[i];
    require(sum[b] == expected, "block " + std::to_string(b) + " summed to " + std::to_string(sum[b]));
    require(squares[b] == expected_squares, "squares summed to " + std::to_string(squares[b]));
  }
}

/// The order in which block_sum adds, written down as a loop: its result must have these bits, here and on a GPU.
void check_sum_order() {
  const int64_t each = 4096;
  Buffer<float> x(each), sum(1);
  Buffer<double> squares(1);
  std::mt19937 random(2);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::normal_distribution<float>()(random);
  std::vector<float> partial(kSumThreads, 0.0f);
  for (int64_t i = 0; i < each; ++i) partial[i % kSumThreads] += x[i];
  const auto warp_sum = [](float* lane) {
    for (int distance = 16; distance > 0; distance /= 2) {
      for (int i = 0; i < distance; ++i) lane[i] += lane[i + distance];
    }
    return lane[0];
  };
  std::vector<float> warps(32, 0.0f);
  for (int w = 0; w < kSumThreads / 32; ++w) warps[w] = warp_sum(&partial[32 * w]);
  launch_sums(x.data(), sum.data(), squares.data(), each, 1);
  synchronize();
  require(sum[0] == warp_sum(warps.data()), "the sum differs in its last bits");
}

template <class T>
void check_gemm(int m, int n, int k, T (*encode)(double),
                void (*launch)(const T*, const T*, std::conditional_t<std::is_same_v<T, double>, double, float>*, int,
                               int, int)) {
  Buffer<T> a(m * k), b(k * n);
  Buffer<std::conditional_t<std::is_same_v<T, double>, double, float>> c(m * n, -1);
  const auto a_value = [](int i) { return (i * 7 % 13 - 6) * 0.125; };
  const auto b_value = [](int i) { return (i * 5 % 11 - 5) * 0.25; };
  for (int i = 0; i < m * k; ++i) a[i] = encode(a_value(i));
  for (int i = 0; i < k * n; ++i) b[i] = encode(b_value(i));
  launch(a.data(), b.data(), c.data(), m, n, k);
  synchronize();
  for (int row = 0; row < m; ++row) {
    for (int column = 0; column < n; ++column) {
      double expected = 0;
      for (int l = 0; l < k; ++l) expected += a_value(row * k + l) * b_value(l * n + column);
      require(c[row * n + column] == expected, "wrong at " + std::to_string(row) + ", " + std::to_string(column));
    }
  }
}

void check_reverse() {
  for (const int n : {1, 31, 32, 100, 1024}) {
    Buffer<int> x(n), y(n, -1);
    for (int i = 0; i < n; ++i) x[i] = i * i;
    // Once with more than the 48 KiB that a GPU gives without being asked.
    launch_reverse(x.data(), y.data(), n, n == 1024 ? 99 << 10 : n * sizeof(int));
    synchronize();
    for (int i = 0; i < n; ++i) require(y[i] == x[n - 1 - i], "n = " + std::to_string(n));
  }
}

void check_indices() {
  const unsigned gx = 4, gy = 3, gz = 6, bx = 5, by = 3, bz = 2, total = gx * gy * gz * bx * by * bz;
  Buffer<uint64_t> seen(total);
  Buffer<int> count(1);
  launch_indices(seen.data(), count.data(), gx, gy, gz);
  synchronize();
  size_t i = 0;
  for (unsigned z = 0; z < gz; ++z)
    for (unsigned y = 0; y < gy; ++y)
      for (unsigned x = 0; x < gx; ++x)
        for (unsigned tz = 0; tz < bz; ++tz)
          for (unsigned ty = 0; ty < by; ++ty)
            for (unsigned tx = 0; tx < bx; ++tx)
              require(seen[i++] == (x | y << 4 | z << 8 | tx << 12 | ty << 16 | tz << 20),
                      "a thread saw other indices");
  require(count[0] == static_cast<int>(total), std::to_string(count[0]) + " threads ran");
}

void check_shuffles() {
  const int n = 64;
  Buffer<int> out(kShuffles * n);
  launch_shuffles(out.data(), n);
  synchronize();
  for (int i = 0; i < n; ++i) {
    const int segment = i / 8 * 8, in_segment = i % 8;
    const int expected[kShuffles] = {segment + (in_segment + 3) % 8,
                                     in_segment >= 3 ? i - 3 : i,
                                     in_segment + 3 < 8 ? i + 3 : i,
                                     segment + (in_segment ^ 5),
                                     i ^ 16,
                                     i / 32 * 32 + 7,
                                     segment % 16 == 8 ? i ^ 9 : i};
    for (int kind = 0; kind < kShuffles; ++kind) {
      require(out[kind * n + i] == 100 + expected[kind],
              "shuffle " + std::to_string(kind) + ", lane " + std::to_string(i));
    }
  }
}

void check_votes() {
  const int n = 112;  // three whole warps and half a one
  Buffer<int> predicate(n);
  Buffer<unsigned> out(3 * n);
  for (int i = 0; i < n; ++i) predicate[i] = i < 32 ? i % 3 == 0 : i >= 64;  // mixed, none, all, all of a half
  launch_votes(predicate.data(), out.data(), n);
  synchronize();
  for (int i = 0; i < n; ++i) {
    const int warp = i / 32;
    const unsigned ballot[] = {0x49249249u, 0u, 0xffffffffu, 0x0000ffffu}, any[] = {1, 0, 1, 1}, all[] = {0, 0, 1, 1};
    require(out[i] == ballot[warp] && out[n + i] == any[warp] && out[2 * n + i] == all[warp],
            "thread " + std::to_string(i));
  }
}

void check_atomics() {
  Buffer<int> out(4);
  Buffer<unsigned> flags(2);
  launch_atomics(out.data(), flags.data(), 10);
  synchronize();
  require(out[0] == 960 * 959 / 2 && out[1] == -959 && out[2] == 959, "a sum, minimum or maximum is wrong");
  require(flags[0] == 0xffffffffu && flags[1] >= 1 && flags[1] <= 960 && out[3] == 1, "or / compare-and-swap is wrong");
}

void check_work(const std::string& order) {
  check("block_sum, whole numbers" + order, check_sums);
  check("block_sum, order of summation" + order, check_sum_order);
  check("tiled product, bfloat16, 70 x 52 x 39" + order,
        [] { check_gemm<uint16_t>(70, 52, 39, [](double x) { return kBFloat16.round(x); }, launch_gemm_bfloat16); });
  check("tiled product, double, 33 x 17 x 40" + order,
        [] { check_gemm<double>(33, 17, 40, [](double x) { return x; }, launch_gemm_double); });
  check("dynamic shared memory, reversal" + order, check_reverse);
  check("three-dimensional grid and block" + order, check_indices);
  check("shuffles" + order, check_shuffles);
  check("ballot, any, all" + order, check_votes);
  check("integer atomics" + order, check_atomics);
}

// ---- Planted mistakes

#if defined(NEUROMOD_EMULATED)
using emulator::LaneOrder;
using emulator::set_lane_order;

void require_failure(void (*launch)(int*), const std::string& expected) {
  Buffer<int> out(1100);
  std::string message = "no exception";
  try {
    launch(out.data());
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  require(message.find(expected) != std::string::npos, message);
}

void check_order() {
  for (const bool forward : {true, false}) {
    Buffer<int> order(100), counter(1);
    set_lane_order(forward ? LaneOrder::forward : LaneOrder::reversed);
    launch_order_of_arrival(order.data(), counter.data(), 100);
    for (int i = 0; i < 100; ++i) require(order[i] == (forward ? i : 99 - i), "lanes ran in another order");
  }
}

bool shift_is_right(LaneOrder order) {
  const int n = 96;
  Buffer<float> x(n, 1.0f), y(n);
  set_lane_order(order);
  launch_shift_without_barrier(x.data(), y.data(), n);
  for (int i = 1; i < n; ++i) {
    if (y[i] != x[i - 1]) return false;
  }
  return true;
}

void check_mistakes() {
  check("the lane order is as asked", check_order);
  check("a missing barrier, forward or reversed, gives a wrong result", [] {
    require(!shift_is_right(LaneOrder::forward) || !shift_is_right(LaneOrder::reversed), "right in both orders");
  });
  set_lane_order(LaneOrder::forward);
  check("dynamic shared memory begins as NaN", [] {
    Buffer<float> out(64, 0.0f);
    launch_uninitialised_shared(out.data());
    for (int i = 0; i < 64; ++i) require(std::isnan(out[i]), "a number was read");
  });
  const std::string divergent = "divergent barrier: thread ";
  check("a barrier half the threads skip is noticed",
        [&] { require_failure(launch_barrier_in_branch, divergent + "(0, 0, 0) waits at __syncthreads ("); });
  check("barriers in two branches are noticed",
        [&] { require_failure(launch_two_barriers_in_branches, "while thread (32, 0, 0) waits at __syncthreads ("); });
  check("a shuffle one lane skips is noticed",
        [&] { require_failure(launch_shuffle_in_branch, "while thread (5, 0, 0) has finished"); });
  check("__syncwarp against __syncthreads is noticed", [&] { require_failure(launch_mixed_barriers, divergent); });
  check("a partial mask is refused", [] { require_failure(launch_partial_mask, "partial mask"); });
  check("a failed check reaches the host",
        [] { require_failure(launch_failed_check, "thread (40, 0, 0): an index out of bounds"); });
  check("a launch beyond the limits is refused", [] { require_failure(launch_too_many_threads, "1 to 1024 threads"); });
  check("work goes on after mistakes", check_reverse);
}
#endif

}  // namespace

static void check_everything() {
#if defined(NEUROMOD_EMULATED)
  set_lane_order(LaneOrder::forward);
  check_work("");
  set_lane_order(LaneOrder::reversed);
  check_work(", reversed");
  check_mistakes();
#else
  check_work("");
#endif
  check_half_types();
  check_tensor_core();
}

}  // namespace neuromod::emulator_test

int main() {
  neuromod::emulator_test::check_everything();
  std::printf("%d failed\n", neuromod::emulator_test::failures());
  return neuromod::emulator_test::failures() == 0 ? 0 : 1;
}
