// hadamard_rotate: rotations of n elements by random signs. R = 2^(-levels / 2) H D rotates 2^levels neighbours, D
// being a diagonal of signs and H[i, j] = (-1)^popcount(i & j) Hadamard's matrix; its inverse is its transpose,
// 2^(-levels / 2) D H. Two of them make y = R_2 R_1 x, R_1 of the first elements and R_2 of the last ones.
#pragma once

#include <cmath>

#include "common/params.h"

namespace neuromod {

/// Consecutive elements of the vectors, dense; `in` may be `out`.
struct HadamardPiece {
  const void* in;  // element `begin` of the first vector
  void* out;
  int64_t in_stride, out_stride;  // from one vector to the next
  int64_t begin, end;
};

/// One rotation of each vector.
struct HadamardRotateParams {
  DType dtype;                  // float64 or float32
  int64_t vectors;              // how many
  int64_t first;                // where in a vector it begins
  int levels;                   // and log2 of how many elements it takes
  const HadamardPiece* pieces;  // in order, together the vectors; on CUDA one
  int64_t num_pieces;
  const int8_t* signs;  // D, a number for each element
  bool inverse;
};

/// What every element is scaled by.
inline double hadamard_scale(const HadamardRotateParams& p) { return std::pow(2.0, -0.5 * p.levels); }

void hadamard_rotate_cpu(const HadamardRotateParams& p);
int launch_hadamard_rotate(const HadamardRotateParams& p, stream_t stream);

}  // namespace neuromod
