// A check prints one line and throws to say why it failed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "emulator/emulator_test.h"

namespace neuromod::emulator_test {

/// Binary formats, their values by definition: the reference for conversions and a way to write test data.
struct Format {
  HalfType type;
  const char* name;
  int exponent_bits, mantissa_bits;

  uint16_t infinity() const { return static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits); }
  double value(uint16_t bits) const;
  uint16_t round(double x) const;
};

inline constexpr Format kFloat16 = {HalfType::float16, "float16", 5, 10};
inline constexpr Format kBFloat16 = {HalfType::bfloat16, "bfloat16", 8, 7};

void check(const std::string& name, const std::function<void()>& body);
void require(bool condition, const std::string& message);
int failures();

void check_half_types();
void check_tensor_core();

/// An array that kernels can reach.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size, T value = T()) : data_(static_cast<T*>(allocate(size * sizeof(T)))), size_(size) {
    std::fill(data_, data_ + size, value);
  }
  ~Buffer() { release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_;
  size_t size_;
};

}  // namespace neuromod::emulator_test
