// The half types, every pattern, against a reference independent of the code under test: values from the formula that
// defines the formats, rounding by search among all values.
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "emulator/emulator_test_support.h"

namespace neuromod::emulator_test {

double Format::value(uint16_t bits) const {
  const int bias = (1 << (exponent_bits - 1)) - 1, exponent = (bits & 0x7fff) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if ((bits & 0x7fff) > infinity()) return std::numeric_limits<double>::quiet_NaN();
  if ((bits & 0x7fff) == infinity()) return sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

/// Nearest, ties to even. Beyond the largest number stands the next power of two, in infinity's place.
uint16_t Format::round(double x) const {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  const uint16_t largest = static_cast<uint16_t>(infinity() - 1);
  const double beyond = 2 * value(static_cast<uint16_t>(infinity() - (1 << mantissa_bits)));
  if (magnitude >= beyond) return static_cast<uint16_t>(sign | infinity());
  int low = 0, high = largest;  // the last pattern whose value does not exceed the magnitude
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (value(static_cast<uint16_t>(middle)) <= magnitude) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const double below = magnitude - value(static_cast<uint16_t>(low));
  const double above = (low == largest ? beyond : value(static_cast<uint16_t>(low + 1))) - magnitude;
  const bool up = above < below || (above == below && low % 2 == 1);
  return static_cast<uint16_t>(sign | (low + up));
}

namespace {

void check_widening(const Format& format) {
  Buffer<uint16_t> bits(65536);
  Buffer<float> value(65536);
  for (int i = 0; i < 65536; ++i) bits[i] = static_cast<uint16_t>(i);
  launch_widen(format.type, bits.data(), value.data(), 65536);
  synchronize();
  for (int i = 0; i < 65536; ++i) {
    const double expected = format.value(bits[i]);
    const bool same = std::isnan(expected) ? std::isnan(value[i])
                                           : value[i] == expected && std::signbit(value[i]) == std::signbit(expected);
    require(same, "pattern " + std::to_string(i) + " became " + std::to_string(value[i]));
  }
}

/// Every value of the format, every midpoint between neighbours, both shifted by the least possible, and random ones.
template <class T>
std::vector<T> values_to_round(const Format& format) {
  std::vector<T> values = {std::numeric_limits<T>::quiet_NaN(),
                           std::numeric_limits<T>::infinity(),
                           std::numeric_limits<T>::max(),
                           std::numeric_limits<T>::min(),
                           std::numeric_limits<T>::denorm_min(),
                           T(65519.996),
                           T(65520),
                           T(65535),
                           T(65536)};
  const T infinity = std::numeric_limits<T>::infinity();
  for (int i = 0; i + 1 < format.infinity(); ++i) {
    const double low = format.value(static_cast<uint16_t>(i)), high = format.value(static_cast<uint16_t>(i + 1));
    for (const double value : {low, low + (high - low) / 2}) {
      const T exact = static_cast<T>(value);
      values.insert(values.end(), {exact, std::nextafter(exact, infinity), std::nextafter(exact, -infinity)});
    }
  }
  std::mt19937_64 random(1);
  for (int i = 0; i < 100000; ++i) {
    const int exponent = static_cast<int>(random() % 300) - 160;
    values.push_back(static_cast<T>(std::ldexp(static_cast<double>(random() % (1u << 30)), exponent - 30)));
  }
  const size_t positive = values.size();
  for (size_t i = 0; i < positive; ++i) values.push_back(-values[i]);
  return values;
}

template <class T, class Launch>
void check_rounding(const Format& format, Launch launch) {
  const std::vector<T> values = values_to_round<T>(format);
  const int n = static_cast<int>(values.size());
  Buffer<T> input(values.size());
  Buffer<uint16_t> bits(values.size());
  std::copy(values.begin(), values.end(), input.data());
  launch(format.type, input.data(), bits.data(), n);
  synchronize();
  for (int i = 0; i < n; ++i) {
    const uint16_t expected = format.round(values[i]);
    require(bits[i] == expected, std::to_string(values[i]) + " became pattern " + std::to_string(bits[i]) + ", not " +
                                     std::to_string(expected));
  }
}

}  // namespace

void check_half_types() {
  for (const Format& format : {kFloat16, kBFloat16}) {
    const std::string name = format.name;
    check(name + ": every pattern widens", [&] { check_widening(format); });
    check(name + ": floats round", [&] { check_rounding<float>(format, launch_round_float); });
    check(name + ": doubles round once", [&] { check_rounding<double>(format, launch_round_double); });
  }
}

}  // namespace neuromod::emulator_test
