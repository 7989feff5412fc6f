// What this processor, and torch's libraries on it, do fast: what packing and plans depend on.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace neuromod {

/// How tiles of a half type are multiplied.
enum class HalfTiles : int8_t {
  widened,      ///< as float32: brgemm would take them number by number
  pairs,        ///< by AVX-512's dot products of pairs, B's depth interleaved in pairs
  matrix_unit,  ///< by AMX, from the same layout, 32 deep
};

/// Found out once: how operands are packed does not follow a switch that another thread may turn meanwhile.
template <class T>
HalfTiles half_tiles();
template <>
HalfTiles half_tiles<BFloat16>();
template <>
HalfTiles half_tiles<Float16>();

/// Whether torch's brgemm is oneDNN's now: else it is torch's matrix product, which takes threads of its own.
bool torch_has_tiles();

/// Whether torch's matrix product of float32 and float64 is faster than tiles: MKL uses all of AVX-512 on Intel's
/// processors, elsewhere half, and no more than tiles do without it; other libraries than oneDNN have no tiles.
bool torch_product_outruns_tiles();

}  // namespace neuromod
