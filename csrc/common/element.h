// Element types of the CPU kernels. Half precision is bits only: vector.cpp converts, and torch's types have the same
// bits.
#pragma once

#include <cstdint>
#include <type_traits>

namespace neuromod {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
constexpr bool is_half_type = std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>;

/// The type sums over T are taken in: double for double, float for all others.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace neuromod
