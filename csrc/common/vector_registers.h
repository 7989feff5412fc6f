// Elements and registers of the row operations: conversions between element types and the types of their sums, and
// registers of sums. For the row operations alone, which are compiled once for each instruction set: all of it has
// internal linkage.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <utility>

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

// Conversions of one number, or of a register of them.
/// float32, of float16's bits. The exponent is rebiased by a multiplication, exact for subnormal numbers too; infinity
/// and NaN keep theirs.
template <class F, class Bits>
inline F from_float16(Bits half) {
  const Bits magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  const Bits scaled = bits_as<Bits>(bits_as<F>(magnitude) * 0x1p112f);
  return bits_as<F>(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled));
}
/// The bits of the nearest bfloat16, the upper halves of these: half a unit is added, less one bit if that keeps an
/// even result even.
template <class Bits, class F>
inline Bits to_bfloat16(F x) {
  const Bits bits = bits_as<Bits>(x), nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
  return x != x ? Bits{} + 0x7fc00000u : nearest;
}
/// The bits of the nearest float16: normal results as for bfloat16, on the rebiased bits; subnormal ones by adding a
/// number whose unit is float16's smallest, so that the processor rounds.
template <class Bits, class F>
inline Bits to_float16(F x) {
  const Bits bits = bits_as<Bits>(x), magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits subnormal = bits_as<Bits>(bits_as<F>(magnitude) + 0.5f) - 0x3f000000u;
  Bits result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? Bits{} + 0x7c00u : result;
  result = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : result;
  return result | (bits >> 16 & 0x8000u);
}

inline double wide(double x) { return x; }
inline float wide(float x) { return x; }
inline float wide(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
inline float wide(Float16 x) { return from_float16<float>(uint32_t(x.bits)); }

/// From the type of a sum to an element.
template <class T>
inline T rounded(acc_t<T> x) {
  return x;
}
template <>
inline BFloat16 rounded<BFloat16>(float x) {
  return {uint16_t(to_bfloat16<uint32_t>(x) >> 16)};
}
template <>
inline Float16 rounded<Float16>(float x) {
  return {uint16_t(to_float16<uint32_t>(x))};
}

/// What one register holds. GCC keeps wider vectors in memory.
#if defined(__AVX512F__)
constexpr int64_t kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kRegisterBytes = 32;
#else
constexpr int64_t kRegisterBytes = 16;
#endif
template <class T>
struct RegisterOf {
  typedef T type __attribute__((vector_size(kRegisterBytes)));
};
template <class T>
using Register = typename RegisterOf<T>::type;
template <class T>
constexpr int64_t kRegister = kRegisterBytes / sizeof(T);

template <class V, class T>
inline V load_as(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

/// As many elements of two bytes as a register has sums.
typedef uint16_t Narrow __attribute__((vector_size(kRegisterBytes / 2)));

/// A register of sums, from elements.
template <class T>
inline Register<acc_t<T>> load(const T* from) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return load_as<Register<T>>(from);
  } else {
    const auto halves = load_as<Narrow>(from);
    const auto bits = __builtin_convertvector(halves, Register<uint32_t>);
    if constexpr (std::is_same_v<T, BFloat16>) return bits_as<Register<float>>(bits << 16);
#if defined(__AVX512F__)
    return Register<float>(_mm512_maskz_cvtph_ps(0xffff, __m256i(halves)));
#elif defined(__F16C__)
    return Register<float>(_mm256_cvtph_ps(__m128i(halves)));
#else
    return from_float16<Register<float>>(bits);
#endif
  }
}

/// A register of sums, rounded to elements.
template <class T>
inline void store(const Register<acc_t<T>>& from, T* to) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    __builtin_memcpy(to, &from, sizeof(from));
  } else {
    Narrow halves;
    if constexpr (std::is_same_v<T, BFloat16>) {
      halves = __builtin_convertvector(to_bfloat16<Register<uint32_t>>(from) >> 16, Narrow);
    } else {
#if defined(__AVX512F__)
      halves = Narrow(_mm512_maskz_cvtps_ph(0xffff, __m512(from), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
      halves = Narrow(_mm256_cvtps_ph(__m256(from), _MM_FROUND_TO_NEAREST_INT));
#else
      halves = __builtin_convertvector(to_float16<Register<uint32_t>>(from), Narrow);
#endif
    }
    __builtin_memcpy(to, &halves, sizeof(halves));
  }
}

/// Whether so many registers of sums for elements of type T hold the elements at even places in the first of two
/// registers and those at odd places in the second: a shift or a mask takes the place of a conversion between widths.
template <class T, int64_t many>
constexpr bool kInPairs = std::is_same_v<T, BFloat16> && many % 2 == 0;
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

/// So many registers of elements in a row, in the order of sums for type To.
template <class To, int64_t many, class T>
inline void load_row(const T* from, Register<acc_t<T>>* to) {
  if constexpr (kInPairs<To, many>) {
    static_assert(std::is_same_v<T, To>);
#pragma GCC unroll 8
    for (int64_t i = 0; i < many; i += 2) {
      const auto pairs = load_as<Register<uint32_t>>(from + i * kRegister<float>);
      to[i] = bits_as<Register<float>>(pairs << 16);
      to[i + 1] = bits_as<Register<float>>(pairs & 0xffff0000u);
    }
  } else {
#pragma GCC unroll 8
    for (int64_t i = 0; i < many; ++i) to[i] = load(from + i * kRegister<acc_t<T>>);
  }
}

/// So many registers of sums in that order, rounded to elements.
template <int64_t many, class T>
inline void store_row(const Register<acc_t<T>>* from, T* to) {
  constexpr int64_t lanes = kRegister<acc_t<T>>;
  if constexpr (kInPairs<T, many>) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < many; i += 2) {
      const auto pairs = (to_bfloat16<Register<uint32_t>>(from[i]) >> 16) |
                         (to_bfloat16<Register<uint32_t>>(from[i + 1]) & 0xffff0000u);
      __builtin_memcpy(to + i * lanes, &pairs, sizeof(pairs));
    }
  } else {
#pragma GCC unroll 8
    for (int64_t i = 0; i < many; ++i) store(from[i], to + i * lanes);
  }
}

/// Writes a register, as aligned, past the caches; other threads may see it after the fence.
inline void stream(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), load_as<__m512i>(static_cast<const char*>(from)));
#elif defined(__AVX__)
  _mm256_stream_si256(static_cast<__m256i*>(to), load_as<__m256i>(static_cast<const char*>(from)));
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(to), load_as<__m128i>(static_cast<const char*>(from)));
#else
  __builtin_memcpy(to, from, kRegisterBytes);
#endif
}
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class V>
using Places = std::make_index_sequence<sizeof(V) / sizeof(std::declval<V&>()[0])>;

/// v[i ^ d] at i
template <int64_t d, class V, size_t... i>
inline V exchanged(V v, std::index_sequence<i...>) {
  return __builtin_shufflevector(v, v, (i ^ d)...);
}
template <int64_t d, class V>
inline V exchanged(V v) {
  return exchanged<d>(v, Places<V>());
}

/// Two rows of a matrix whose blocks of d x d are transposed: at i the first is i & d ? b[i ^ d] : a[i], the second
/// i & d ? b[i] : a[i ^ d].
template <int64_t d, class V, size_t... i>
inline V upper(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (i & d ? (i ^ d) + sizeof...(i) : i)...);
}
template <int64_t d, class V, size_t... i>
inline V lower(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (i & d ? i + sizeof...(i) : (i ^ d))...);
}
template <int64_t d, class V>
inline V upper(V a, V b) {
  return upper<d>(a, b, Places<V>());
}
template <int64_t d, class V>
inline V lower(V a, V b) {
  return lower<d>(a, b, Places<V>());
}

/// Halves are added, then quarters.
template <class A, int64_t d = kRegister<A> / 2>
inline A sum_of(Register<A> v) {
  if constexpr (d == 0) {
    return v[0];
  } else {
    return sum_of<A, d / 2>(v + exchanged<d>(v));
  }
}

}  // namespace
}  // namespace neuromod
