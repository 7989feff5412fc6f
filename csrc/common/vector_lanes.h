// Elements and registers of the row operations: conversions between element types and the types of their sums, and 64
// bytes of sums at a time. For vector.cpp alone, which compiles it once for each instruction set: all of it has
// internal linkage.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/vector.h"

namespace neuromod {
namespace {

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

inline double wide(double x) { return x; }
inline float wide(float x) { return x; }
inline float wide(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
/// The exponent is rebiased by a multiplication, exact for subnormal numbers too; infinity and NaN keep theirs.
inline float wide(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13, sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t scaled = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  return bits_as<float>(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled));
}

/// From the type of a sum to an element.
template <class T>
inline T rounded(acc_t<T> x) {
  return x;
}
/// To nearest even: half a unit is added to the bits, less one bit if that keeps an even result even.
template <>
inline BFloat16 rounded<BFloat16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
  return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest >> 16)};
}
/// To nearest even: normal results as for bfloat16, on the rebiased bits; subnormal ones by adding a number whose unit
/// is float16's smallest, so that the processor rounds.
template <>
inline Float16 rounded<Float16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return {uint16_t(result | (bits >> 16 & 0x8000u))};
}

/// 64 bytes of sums; narrower registers hold them in parts.
template <class A>
struct LanesOf {
  typedef A type __attribute__((vector_size(64)));
};
template <class A>
using Lanes = typename LanesOf<A>::type;
template <class A>
constexpr int64_t kLanes = 64 / sizeof(A);

/// What one register holds. GCC keeps wider vectors in memory: sums that are added to many times are parts.
#if defined(__AVX512F__)
constexpr int64_t kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kRegisterBytes = 32;
#else
constexpr int64_t kRegisterBytes = 16;
#endif
template <class A>
struct RegisterOf {
  typedef A type __attribute__((vector_size(kRegisterBytes)));
};
template <class A>
using Register = typename RegisterOf<A>::type;
template <class A>
constexpr int64_t kRegister = kRegisterBytes / sizeof(A);

template <class V, class T>
inline V load_as(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <class T>
inline Lanes<acc_t<T>> load(const T* from) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    typedef uint16_t Narrow __attribute__((vector_size(32)));
    return bits_as<Lanes<float>>(__builtin_convertvector(load_as<Narrow>(from), Lanes<uint32_t>) << 16);
  } else if constexpr (std::is_same_v<T, Float16>) {
    typedef uint16_t Narrow __attribute__((vector_size(32)));
    const Lanes<uint32_t> bits = __builtin_convertvector(load_as<Narrow>(from), Lanes<uint32_t>);
    const Lanes<uint32_t> magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    const auto scaled = bits_as<Lanes<uint32_t>>(bits_as<Lanes<float>>(magnitude) * 0x1p112f);
    const auto not_finite = bits_as<Lanes<uint32_t>>(magnitude >= 0x0f800000u) & 0x7f800000u;
    return bits_as<Lanes<float>>(sign | scaled | not_finite);
  } else {
    return load_as<Lanes<T>>(from);
  }
}

/// Whether so many registers of sums for elements of type T hold the elements at even places in the first of two
/// registers and those at odd places in the second: a shift or a mask takes the place of a conversion between widths.
template <class T, int64_t many>
constexpr bool kInPairs = std::is_same_v<T, BFloat16> && many % 2 == 0;
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

/// So many registers of elements in a row, in the order of sums for type To.
template <class To, int64_t many, class T>
inline void load_lanes(const T* from, Lanes<acc_t<T>>* to) {
  if constexpr (kInPairs<To, many>) {
    static_assert(std::is_same_v<T, To>);
    for (int64_t i = 0; i < many; i += 2) {
      const auto pairs = load_as<Lanes<uint32_t>>(from + i * kLanes<float>);
      to[i] = bits_as<Lanes<float>>(pairs << 16);
      to[i + 1] = bits_as<Lanes<float>>(pairs & 0xffff0000u);
    }
  } else {
    for (int64_t i = 0; i < many; ++i) to[i] = load(from + i * kLanes<acc_t<T>>);
  }
}

/// Lanes are so many registers.
constexpr int64_t kParts = 64 / kRegisterBytes;

/// load_lanes into registers.
template <class To, int64_t many, class T>
inline void load_parts(const T* from, Register<acc_t<T>>* to) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < many * kParts; ++i) to[i] = load_as<Register<T>>(from + i * kRegister<T>);
  } else {
    Lanes<acc_t<T>> lanes[many];
    load_lanes<To, many>(from, lanes);
    __builtin_memcpy(to, lanes, sizeof(lanes));
  }
}

/// So many registers of sums, rounded to elements.
template <int64_t many, class T>
inline void store_lanes(const Lanes<acc_t<T>>* from, T* to) {
  constexpr int64_t lanes = kLanes<acc_t<T>>;
  if constexpr (kInPairs<T, many>) {
    const auto nearest = [](Lanes<float> x) __attribute__((always_inline)) {
      const auto bits = bits_as<Lanes<uint32_t>>(x);
      const Lanes<uint32_t> rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
      return x != x ? Lanes<uint32_t>{} + 0x7fc00000u : rounded;
    };
    for (int64_t i = 0; i < many; i += 2) {
      const Lanes<uint32_t> pairs = (nearest(from[i]) >> 16) | (nearest(from[i + 1]) & 0xffff0000u);
      __builtin_memcpy(to + i * lanes, &pairs, sizeof(pairs));
    }
  } else if constexpr (std::is_same_v<T, acc_t<T>>) {
    for (int64_t i = 0; i < many; ++i) __builtin_memcpy(to + i * lanes, &from[i], sizeof(*from));
  } else {
    acc_t<T> sums[many * lanes];
    __builtin_memcpy(sums, from, sizeof(sums));
    for (int64_t i = 0; i < many * lanes; ++i) to[i] = rounded<T>(sums[i]);
  }
}

/// Writes so many bytes, as aligned, past the caches; other threads may see them after the fence.
constexpr size_t kStreamed = 64;
inline void stream(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(from));
#elif defined(__SSE2__)
  for (int i = 0; i < 4; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, static_cast<const __m128i*>(from)[i]);
#else
  __builtin_memcpy(to, from, kStreamed);
#endif
}
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

/// Halves are added, then quarters: a fixed order, whatever the registers.
inline float sum_of(Lanes<float> v) {
  const auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto quarter =
      __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}
inline double sum_of(Lanes<double> v) {
  const auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  return (half[0] + half[2]) + (half[1] + half[3]);
}

}  // namespace
}  // namespace neuromod
