// CUDA's qualifiers and plain types for a host compiler. The types live in this namespace, so that an object file built
// against the real toolkit never shares a symbol with one built against these.
#pragma once

#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__

// One block runs on one operating-system thread from start to end, so a thread_local static has exactly the lifetime
// rule a kernel may rely on: shared by the block's threads, undefined at the block's start.
#define __shared__ static thread_local

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace neuromod::emulator {

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Vectors carry CUDA's alignment: UBSan then reports the misaligned 16-byte access that would trap on a GPU.
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr double2 make_double2(double x, double y) { return {x, y}; }

}  // namespace neuromod::emulator

using neuromod::emulator::dim3;
using neuromod::emulator::double2;
using neuromod::emulator::float2;
using neuromod::emulator::float4;
using neuromod::emulator::int2;
using neuromod::emulator::int4;
using neuromod::emulator::make_double2;
using neuromod::emulator::make_float2;
using neuromod::emulator::make_float4;
using neuromod::emulator::make_int2;
using neuromod::emulator::make_int4;
using neuromod::emulator::make_uint2;
using neuromod::emulator::make_uint4;
using neuromod::emulator::uint2;
using neuromod::emulator::uint3;
using neuromod::emulator::uint4;
