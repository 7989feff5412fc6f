// Asynchronous copies and tensor cores: every function of common/tensor_core.h against sums in double, and mistakes
// with it that the emulator must notice.
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/emulator_test_support.h"
#if defined(NEUROMOD_EMULATED)
#include "emulator/emulator.h"
#endif

namespace neuromod::emulator_test {
namespace {

void check_copies() {
  const unsigned threads = 64;
  for (const int bytes : {4, 8, 16}) {
    const int whole = static_cast<int>(threads) * bytes;
    for (const int size : {whole, whole - 1, whole / 2 + 3, 0}) {
      Buffer<unsigned char> x(whole), y(whole, 7);
      for (int i = 0; i < whole; ++i) x[i] = static_cast<unsigned char>(1 + i % 255);
      launch_copy(bytes, x.data(), y.data(), size, threads);
      synchronize();
      for (int i = 0; i < whole; ++i)
        require(y[i] == (i < size ? x[i] : 0), std::to_string(bytes) + " bytes, byte " + std::to_string(i));
    }
  }
}

void check_pipeline() {
  const int n = 64, tiles = 9;
  Buffer<float> x(n * tiles), y(n * tiles);
  for (int i = 0; i < n * tiles; ++i) x[i] = static_cast<float>(i * i % 101);
  launch_pipeline(x.data(), y.data(), tiles, n);
  synchronize();
  for (int i = 0; i < n; ++i) {
    float sum = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      sum += x[tile * n + (i + tile) % n];
      require(y[tile * n + i] == sum, "tile " + std::to_string(tile));
    }
  }
}

/// Element e of matrix m, row r, is 64 m + 8 r + e.
void check_matrices() {
  Buffer<uint32_t> out(256);
  launch_matrices(out.data());
  synchronize();
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) {
      const uint32_t row = lane / 4, first = 64 * m + 8 * row + 2 * (lane % 4);
      const uint32_t above = 64 * m + 8 * 2 * (lane % 4) + row;
      require(out[4 * lane + m] == (first | (first + 1) << 16), "lane " + std::to_string(lane));
      require(out[128 + 4 * lane + m] == (above | (above + 8) << 16), "transposed, lane " + std::to_string(lane));
    }
  }
}

/// Multiples of 1/8 up to 2: every sum of 16 products is exact.
double some(int i, int step) { return (i * step % 33 - 16) * 0.125; }

template <class Element>
void check_product(int depth, const std::function<Element(double)>& encode,
                   const std::function<void(const Element*, const Element*, float*)>& launch) {
  const int rows = 16;
  Buffer<Element> a(rows * depth), b(depth * 8);
  Buffer<float> d(rows * 8);
  for (int i = 0; i < rows * depth; ++i) a[i] = encode(some(i, 7));
  for (int i = 0; i < depth * 8; ++i) b[i] = encode(some(i, 5));
  for (int i = 0; i < rows * 8; ++i) d[i] = static_cast<float>(some(i, 11));
  launch(a.data(), b.data(), d.data());
  synchronize();
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < 8; ++column) {
      double expected = some(row * 8 + column, 11);
      for (int k = 0; k < depth; ++k) expected += some(row * depth + k, 7) * some(k * 8 + column, 5);
      require(d[row * 8 + column] == expected, "wrong at " + std::to_string(row) + ", " + std::to_string(column));
    }
  }
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

/// The 13 bits that tf32 does not have are set, and must not matter.
uint32_t tf32_and_noise(double value) { return bits_of(static_cast<float>(value)) | 0x1fffu; }

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

/// Of the two tf32 numbers around a value the nearer one, the larger in magnitude at a tie.
void check_to_tf32() {
  std::mt19937 random(3);
  const int n = 20000;
  Buffer<float> value(n);
  Buffer<uint32_t> bits(n);
  for (int i = 0; i < n; ++i) {
    const uint32_t pattern = (random() % 0x7f000000u) | (random() % 2) << 31;
    value[i] = float_of(i % 3 == 0 ? (pattern & ~0x1fffu) | 0x1000u : pattern);  // a tie
  }
  launch_to_tf32(value.data(), bits.data(), n);
  synchronize();
  for (int i = 0; i < n; ++i) {
    const uint32_t below = bits_of(value[i]) & ~0x1fffu;
    const double down = std::fabs(double(value[i]) - float_of(below));
    const double up = std::fabs(double(float_of(below + 0x2000u)) - value[i]);
    require(bits[i] == (up <= down ? below + 0x2000u : below), std::to_string(value[i]));
  }
}

void check_products(const std::string& order) {
  check("cp.async of 4, 8 and 16 bytes, zeros beyond the end" + order, check_copies);
  check("cp.async in a pipeline of groups" + order, check_pipeline);
  check("ldmatrix, plain and transposed" + order, check_matrices);
  for (const Format& format : {kFloat16, kBFloat16}) {
    check(std::string("mma.sync m16n8k16, ") + format.name + order, [&] {
      check_product<uint16_t>(
          16, [&](double x) { return format.round(x); },
          [&](const uint16_t* a, const uint16_t* b, float* d) { launch_multiply_half(format.type, a, b, d); });
    });
  }
  check("mma.sync m16n8k8, tf32" + order, [] { check_product<uint32_t>(8, tf32_and_noise, launch_multiply_tf32); });
  check("float rounds to tf32" + order, check_to_tf32);
}

#if defined(NEUROMOD_EMULATED)
using emulator::LaneOrder;
using emulator::set_lane_order;

/// d + a b in float32, k ascending: the order README.md states.
void check_order_of_sums() {
  std::mt19937 random(4);
  Buffer<uint16_t> a(256), b(128);
  Buffer<float> d(128);
  const auto draw = [&] { return kBFloat16.round(std::normal_distribution<double>()(random)); };
  for (size_t i = 0; i < a.size(); ++i) a[i] = draw();
  for (size_t i = 0; i < b.size(); ++i) b[i] = draw();
  launch_multiply_half(HalfType::bfloat16, a.data(), b.data(), d.data());
  for (int i = 0; i < 128; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k)
      sum += static_cast<float>(kBFloat16.value(a[i / 8 * 16 + k])) *
             static_cast<float>(kBFloat16.value(b[k * 8 + i % 8]));
    require(d[i] == sum, "the sum differs in its last bits");
  }
}

std::string failure_of(const std::function<void()>& launch) {
  try {
    launch();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no exception";
}

void require_words(const std::string& message, const std::string& expected) {
  require(message.find(expected) != std::string::npos, message);
}

/// Whether every copy was read as it should, in one lane order.
bool exchange_is_right(ExchangeMistake mistake, LaneOrder order) {
  const int n = 64;
  Buffer<float> x(2 * n), y(2 * n);
  for (int i = 0; i < 2 * n; ++i) x[i] = static_cast<float>(i);
  set_lane_order(order);
  launch_exchange(mistake, x.data(), y.data(), n);
  for (int i = 0; i < 2 * n; ++i) {
    if (y[i] != x[i ^ 33]) return false;
  }
  return true;
}

void check_mistakes() {
  const auto right_in = [](ExchangeMistake mistake) {
    return int(exchange_is_right(mistake, LaneOrder::forward)) + int(exchange_is_right(mistake, LaneOrder::reversed));
  };
  check("the exchange without a mistake is right", [&] { require(right_in(ExchangeMistake::none) == 2, "wrong"); });
  check("a group that is waited for too late gives NaN",
        [&] { require(right_in(ExchangeMistake::wait_for_older) == 0, "right"); });
  check("a missing barrier after the wait gives NaN",
        [&] { require(right_in(ExchangeMistake::no_barrier) == 0, "right"); });
  check("a missing barrier before a buffer's second use gives a wrong result",
        [&] { require(right_in(ExchangeMistake::no_barrier_before_reuse) == 0, "right"); });
  set_lane_order(LaneOrder::forward);
  Buffer<float> x(128, 1.0f), y(128);
  const auto words = [&](ExchangeMistake mistake, const std::string& expected) {
    require_words(failure_of([&] { launch_exchange(mistake, x.data(), y.data(), 64); }), expected);
  };
  check("a missing wait is noticed", [&] { words(ExchangeMistake::no_wait, "no wait has completed"); });
  check("a missing commit is noticed", [&] { words(ExchangeMistake::no_commit, "no wait has completed"); });
  check("a misaligned destination is noticed",
        [&] { words(ExchangeMistake::misaligned_shared, "cp.async to a misaligned address"); });
  check("a misaligned source is noticed",
        [&] { words(ExchangeMistake::misaligned_global, "cp.async from a misaligned address"); });
  Buffer<float> out(64);
  const auto multiply = [&](ProductMistake mistake, unsigned threads, const std::string& expected) {
    require_words(failure_of([&] { launch_product_mistake(mistake, out.data(), threads); }), expected);
  };
  check("a misaligned row of ldmatrix is noticed",
        [&] { multiply(ProductMistake::misaligned_row, 32, "ldmatrix of a misaligned row"); });
  check("mma.sync in a branch is noticed",
        [&] { multiply(ProductMistake::in_branch, 32, "divergent barrier: thread "); });
  check("mma.sync in half a warp is noticed",
        [&] { multiply(ProductMistake::none, 48, "mma.sync in a warp of fewer than 32 threads"); });
  check("the order of an mma.sync's sums", check_order_of_sums);
}
#endif

}  // namespace

void check_tensor_core() {
#if defined(NEUROMOD_EMULATED)
  set_lane_order(LaneOrder::forward);
  check_products("");
  set_lane_order(LaneOrder::reversed);
  check_products(", reversed");
  check_mistakes();
  set_lane_order(LaneOrder::forward);
#else
  check_products("");
#endif
}

}  // namespace neuromod::emulator_test
