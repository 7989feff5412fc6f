// The emulated functions of common/tensor_core.h, which says what each does and how a warp's lanes hold a matrix.
//
// The sum of a product: d + a b is added up in float32 (tf32 and half types; the products are exact) or by fused
// multiply-adds (double), k ascending. Hardware adds several products at once, and may cut bits where this rounds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/device_functions.h"
#include "emulator/device_runtime.h"
#include "emulator/half_types.h"

namespace neuromod {

template <int Bytes>
void copy_async(void* shared, const void* global, int valid = Bytes,
                emulator::CallSite site = emulator::CallSite::here()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if (reinterpret_cast<uintptr_t>(shared) % Bytes != 0) emulator::fail("cp.async to a misaligned address", site);
  if (reinterpret_cast<uintptr_t>(global) % Bytes != 0) emulator::fail("cp.async from a misaligned address", site);
  if (valid < 0 || valid > Bytes) emulator::fail("cp.async of fewer than 0 or more bytes than it copies", site);
  emulator::start_copy(shared, global, Bytes, static_cast<unsigned>(valid), site);
}

inline void copy_async_commit() { emulator::commit_copies(); }

template <int Newest>
void copy_async_wait() {
  static_assert(Newest >= 0);
  emulator::wait_for_copies(Newest);
}

namespace emulator {

struct MatrixRow {
  uint16_t element[8];
};

/// Each lane's row is read as the lane arrives, not as others leave: what is written after the instruction, without a
/// barrier, is not seen.
inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed, CallSite site) {
  const unsigned lane = linear_thread_index() % warpSize, g = lane / 4, t = lane % 4;
  MatrixRow mine;
  if (reinterpret_cast<uintptr_t>(row) % sizeof(MatrixRow) != 0) fail("ldmatrix of a misaligned row", site);
  std::memcpy(&mine, row, sizeof(mine));
  const WarpExchange<MatrixRow> warp(mine, "ldmatrix", site);
  if (!warp.has(warpSize - 1)) fail("ldmatrix in a warp of fewer than 32 threads", site);
  for (unsigned m = 0; m < 4; ++m) {
    const uint32_t low = transposed ? warp[8 * m + 2 * t].element[g] : warp[8 * m + g].element[2 * t];
    const uint32_t high = transposed ? warp[8 * m + 2 * t + 1].element[g] : warp[8 * m + g].element[2 * t + 1];
    to[m] = low | high << 16;
  }
}

struct ProductOperands {
  uint32_t a[4], b[2];
  float* d;
};

/// d += a b with a [16, Depth], b [Depth, 8]. place(a, b, lane, operands) puts a lane's registers where they belong.
/// The warp's first lane does it for all, whose registers d are theirs again only when they go on.
template <int Depth, class Place>
void multiply_fragments(const ProductOperands& mine, Place place, CallSite site) {
  const WarpExchange<ProductOperands> warp(mine, "mma.sync", site);
  if (!warp.has(warpSize - 1)) fail("mma.sync in a warp of fewer than 32 threads", site);
  if (!first_of_warp()) return;
  float a[16][Depth], b[Depth][8], d[16][8];
  float* registers[warpSize];
  const auto each_sum = [&](auto visit) {
    for (unsigned lane = 0; lane < warpSize; ++lane)
      for (unsigned r = 0; r < 4; ++r) visit(d[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2], registers[lane][r]);
  };
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    const ProductOperands operands = warp[lane];
    registers[lane] = operands.d;
    place(a, b, lane, operands);
  }
  each_sum([](float& sum, float value) { sum = value; });
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < Depth; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  each_sum([](float sum, float& value) { value = sum; });
}

template <class T>
float half_of(uint32_t pair, unsigned which) {
  T value;
  value.bits = static_cast<uint16_t>(pair >> (16 * which));
  return static_cast<float>(value);
}

}  // namespace emulator

inline void load_matrix(uint32_t (&to)[4], const void* row, emulator::CallSite site = emulator::CallSite::here()) {
  emulator::load_matrices(to, row, false, site);
}

inline void load_matrix_transposed(uint32_t (&to)[4], const void* row,
                                   emulator::CallSite site = emulator::CallSite::here()) {
  emulator::load_matrices(to, row, true, site);
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  emulator::CallSite site = emulator::CallSite::here()) {
  const auto place = [](float (&a)[16][16], float (&b)[16][8], unsigned lane, const emulator::ProductOperands& from) {
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned h = 0; h < 2; ++h) {
      for (unsigned r = 0; r < 4; ++r) a[g + 8 * (r % 2)][2 * t + h + 8 * (r / 2)] = emulator::half_of<T>(from.a[r], h);
      for (unsigned r = 0; r < 2; ++r) b[2 * t + h + 8 * r][g] = emulator::half_of<T>(from.b[r], h);
    }
  };
  emulator::multiply_fragments<16>({{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, d}, place, site);
}

inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              emulator::CallSite site = emulator::CallSite::here()) {
  const auto place = [](float (&a)[16][8], float (&b)[8][8], unsigned lane, const emulator::ProductOperands& from) {
    const unsigned g = lane / 4, t = lane % 4, mask = ~0x1fffu;
    for (unsigned r = 0; r < 4; ++r) a[g + 8 * (r % 2)][t + 4 * (r / 2)] = __uint_as_float(from.a[r] & mask);
    for (unsigned r = 0; r < 2; ++r) b[t + 4 * r][g] = __uint_as_float(from.b[r] & mask);
  };
  emulator::multiply_fragments<8>({{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, d}, place, site);
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

}  // namespace neuromod
