// __half and __nv_bfloat16 for a host compiler: storage and correctly rounded conversions, no arithmetic. Kernels
// compute in the accumulation type, so nothing else is needed, and an accidental half-precision sum does not compile.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulator/cuda_types.h"

namespace neuromod::emulator {

/// Rounds to nearest, ties to even, into a binary format of `kExponentBits` and `kMantissaBits` (sign bit on top).
/// Subnormals and infinities are kept; every NaN becomes 0x7fff, the one CUDA's conversions return. Taking a double
/// serves both sources: float to double is exact, so float sources are rounded once as well.
template <int kExponentBits, int kMantissaBits>
uint16_t round_to_bits(double value) {
  static_assert(1 + kExponentBits + kMantissaBits == 16);
  constexpr int kDoubleMantissaBits = 52, kDoubleBias = 1023;
  constexpr int kBias = (1 << (kExponentBits - 1)) - 1, kSmallestExponent = 1 - kBias;
  constexpr uint32_t kInfinity = ((1u << kExponentBits) - 1) << kMantissaBits;

  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = static_cast<uint32_t>(bits >> 63) << 15;
  bits &= ~uint64_t{0} >> 1;
  const int exponent = static_cast<int>(bits >> kDoubleMantissaBits) - kDoubleBias;
  if (bits > uint64_t{0x7ff} << kDoubleMantissaBits) return 0x7fff;
  if (exponent > kBias) return static_cast<uint16_t>(sign | kInfinity);

  const bool subnormal = exponent < kSmallestExponent;
  const int drop = kDoubleMantissaBits - kMantissaBits + (subnormal ? kSmallestExponent - exponent : 0);
  // Below half of the smallest subnormal. Subnormal doubles end here too, so the leading one below is always there.
  if (drop > kDoubleMantissaBits + 1) return static_cast<uint16_t>(sign);
  const uint64_t leading = uint64_t{1} << kDoubleMantissaBits;
  const uint64_t significand = leading | (bits & (leading - 1));
  const uint64_t nearly_half = (uint64_t{1} << (drop - 1)) - 1, odd = (significand >> drop) & 1;
  const uint32_t rounded = static_cast<uint32_t>((significand + nearly_half + odd) >> drop);

  // Adding, not or-ing: the leading one, or the carry of the rounding, steps the exponent, up to infinity if need be.
  const int biased = subnormal ? 1 : exponent + kBias;
  return static_cast<uint16_t>(sign | ((static_cast<uint32_t>(biased - 1) << kMantissaBits) + rounded));
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float value) : bits(round_to_bits<5, 10>(value)) {}
  explicit __half(double value) : bits(round_to_bits<5, 10>(value)) {}
  explicit operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 1023u;
    if (exponent == 31) return mantissa != 0 ? float_from_bits(0x7fffffffu) : float_from_bits(sign | 0x7f800000u);
    if (exponent == 0) return (sign != 0 ? -0x1p-24f : 0x1p-24f) * static_cast<float>(mantissa);
    return float_from_bits(sign | ((exponent + 127 - 15) << 23) | (mantissa << 13));
  }
};

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) : bits(round_to_bits<8, 7>(value)) {}
  explicit __nv_bfloat16(double value) : bits(round_to_bits<8, 7>(value)) {}
  explicit operator float() const { return float_from_bits(static_cast<uint32_t>(bits) << 16); }
};

struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half(float value) { return __half(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline __half __double2half(double value) { return __half(value); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float2 __half22float2(__half2 value) { return {static_cast<float>(value.x), static_cast<float>(value.y)}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half value;
  value.bits = bits;
  return value;
}

inline float __bfloat162float(__nv_bfloat16 value) { return static_cast<float>(value); }
inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __double2bfloat16(double value) { return __nv_bfloat16(value); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 value) {
  return {static_cast<float>(value.x), static_cast<float>(value.y)};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 value;
  value.bits = bits;
  return value;
}

}  // namespace neuromod::emulator

// The functions above are found through their arguments' namespace or, where an argument is a plain number, through:
using neuromod::emulator::__double2bfloat16;
using neuromod::emulator::__double2half;
using neuromod::emulator::__float2bfloat16;
using neuromod::emulator::__float2bfloat16_rn;
using neuromod::emulator::__float2half;
using neuromod::emulator::__float2half_rn;
using neuromod::emulator::__floats2bfloat162_rn;
using neuromod::emulator::__floats2half2_rn;
using neuromod::emulator::__half;
using neuromod::emulator::__half2;
using neuromod::emulator::__nv_bfloat16;
using neuromod::emulator::__nv_bfloat162;
using neuromod::emulator::__ushort_as_bfloat16;
using neuromod::emulator::__ushort_as_half;
