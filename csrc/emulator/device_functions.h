// CUDA's device functions that the kernels use: barriers, warp shuffles and votes, integer atomics, a little
// arithmetic.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/device_runtime.h"

namespace neuromod::emulator {

// ---- Barriers and fences

inline void __syncthreads(CallSite site = CallSite::here()) { wait_for_block("__syncthreads", site); }

inline void require_full_mask(unsigned mask, CallSite site) {
  if (mask != 0xffffffffu) fail("a warp operation with a partial mask; only 0xffffffff is supported", site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, CallSite site = CallSite::here()) {
  require_full_mask(mask, site);
  wait_for_warp("__syncwarp", site);
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- Shuffles: the lane arithmetic of PTX's shfl.sync, for widths that are powers of two

template <class T>
T shuffle(unsigned mask, T value, int source, bool in_range, int width, const char* operation, CallSite site) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles no other sizes");
  require_full_mask(mask, site);
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0) {
    fail("a shuffle's width must be a power of two up to 32", site);
  }
  const WarpExchange<T> warp(value, operation, site);
  return in_range ? warp[static_cast<unsigned>(source)] : value;
}

inline int lane_index() { return static_cast<int>(linear_thread_index() % warpSize); }
inline int segment_begin(int width) { return lane_index() & ~(width - 1); }
inline int segment_last(int width) { return segment_begin(width) | (width - 1); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, CallSite site = CallSite::here()) {
  const int lane = segment_begin(width) | (source & (width - 1));
  return shuffle(mask, value, lane, true, width, "__shfl_sync", site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CallSite site = CallSite::here()) {
  const int lane = lane_index() - static_cast<int>(delta & 31u);
  return shuffle(mask, value, lane, lane >= segment_begin(width), width, "__shfl_up_sync", site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CallSite site = CallSite::here()) {
  const int lane = lane_index() + static_cast<int>(delta & 31u);
  return shuffle(mask, value, lane, lane <= segment_last(width), width, "__shfl_down_sync", site);
}

/// Unlike the other three, xor may read an earlier segment; only a later one is out of range.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, CallSite site = CallSite::here()) {
  const int lane = lane_index() ^ (lane_mask & 31);
  return shuffle(mask, value, lane, lane <= segment_last(width), width, "__shfl_xor_sync", site);
}

// ---- Votes: lanes the block does not have neither vote nor count

/// One bit for each lane whose `predicate` equals `wanted`.
inline unsigned vote(unsigned mask, bool predicate, bool wanted, const char* operation, CallSite site) {
  require_full_mask(mask, site);
  const WarpExchange<bool> warp(predicate, operation, site);
  unsigned lanes = 0;
  for (unsigned lane = 0; lane < static_cast<unsigned>(warpSize); ++lane) {
    if (warp.has(lane) && warp[lane] == wanted) lanes |= 1u << lane;
  }
  return lanes;
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CallSite site = CallSite::here()) {
  return vote(mask, predicate != 0, true, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int predicate, CallSite site = CallSite::here()) {
  return vote(mask, predicate != 0, true, "__any_sync", site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CallSite site = CallSite::here()) {
  return vote(mask, predicate != 0, false, "__all_sync", site) == 0;
}

// ---- Atomics: int and unsigned only. A floating-point sum by atomics depends on the order of arrival, which is why
// this library has none: those overloads are deleted.

template <class T>
inline constexpr bool is_atomic_v = std::is_same_v<T, int> || std::is_same_v<T, unsigned>;
template <class T>
using atomic_t = std::enable_if_t<is_atomic_v<T>, T>;
template <class T>
struct Same {
  using type = T;
};

/// Replaces *address by update(*address) and returns the old value.
template <class T, class Update>
T atomic_update(T* address, Update update) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, update(old), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

// Same<T> keeps the operand out of type deduction, so that atomicAdd(&an_unsigned, 1) compiles as it does under nvcc.
template <class T>
atomic_t<T> atomicAdd(T* address, typename Same<T>::type value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
atomic_t<T> atomicSub(T* address, typename Same<T>::type value) {
  return __atomic_fetch_sub(address, value, __ATOMIC_RELAXED);
}
template <class T>
atomic_t<T> atomicOr(T* address, typename Same<T>::type value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
template <class T>
atomic_t<T> atomicAnd(T* address, typename Same<T>::type value) {
  return __atomic_fetch_and(address, value, __ATOMIC_RELAXED);
}
template <class T>
atomic_t<T> atomicExch(T* address, typename Same<T>::type value) {
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}
template <class T>
atomic_t<T> atomicMax(T* address, typename Same<T>::type value) {
  return atomic_update(address, [value](T old) { return old > value ? old : value; });
}
template <class T>
atomic_t<T> atomicMin(T* address, typename Same<T>::type value) {
  return atomic_update(address, [value](T old) { return old < value ? old : value; });
}
template <class T>
atomic_t<T> atomicCAS(T* address, typename Same<T>::type expected, typename Same<T>::type value) {
  return atomic_update(address, [expected, value](T old) { return old == expected ? value : old; });
}
float atomicAdd(float*, float) = delete;
double atomicAdd(double*, double) = delete;

// ---- Arithmetic beyond <cmath>, which brings expf, sqrtf, fmaf and the like. The approximations __expf, __logf, ...
// are absent: no kernel of this library trades accuracy for them. rsqrtf is the GPU's only within its error bound (2
// ulp).

template <class T>
constexpr T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a < b ? b : a;
}

template <class To, class From>
To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}
inline unsigned __float_as_uint(float value) { return bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return bit_cast<float>(bits); }
inline int __float_as_int(float value) { return bit_cast<int>(value); }
inline float __int_as_float(int bits) { return bit_cast<float>(bits); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline double rsqrt(double value) { return 1.0 / std::sqrt(value); }

template <class T>
T __ldg(const T* address) {
  return *address;
}

}  // namespace neuromod::emulator

using neuromod::emulator::__all_sync;
using neuromod::emulator::__any_sync;
using neuromod::emulator::__ballot_sync;
using neuromod::emulator::__clz;
using neuromod::emulator::__ffs;
using neuromod::emulator::__float_as_int;
using neuromod::emulator::__float_as_uint;
using neuromod::emulator::__int_as_float;
using neuromod::emulator::__ldg;
using neuromod::emulator::__popc;
using neuromod::emulator::__shfl_down_sync;
using neuromod::emulator::__shfl_sync;
using neuromod::emulator::__shfl_up_sync;
using neuromod::emulator::__shfl_xor_sync;
using neuromod::emulator::__syncthreads;
using neuromod::emulator::__syncwarp;
using neuromod::emulator::__threadfence;
using neuromod::emulator::__threadfence_block;
using neuromod::emulator::__uint_as_float;
using neuromod::emulator::atomicAdd;
using neuromod::emulator::atomicAnd;
using neuromod::emulator::atomicCAS;
using neuromod::emulator::atomicExch;
using neuromod::emulator::atomicMax;
using neuromod::emulator::atomicMin;
using neuromod::emulator::atomicOr;
using neuromod::emulator::atomicSub;
using neuromod::emulator::max;
using neuromod::emulator::min;
using neuromod::emulator::rsqrt;
using neuromod::emulator::rsqrtf;
