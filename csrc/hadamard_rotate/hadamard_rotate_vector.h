// Row operations of hadamard_rotate on the CPU, written once (hadamard_rotate_vector.cpp) and compiled for each
// instruction set.
#pragma once

#include <cstdint>

namespace neuromod {

template <class A>
class HadamardOps {
 public:
  /// The levels of a transform of n elements, a power of two, that add and subtract what lies first, 2 first, ...
  /// apart. `first` is 1 or a multiple of 64 bytes.
  virtual void butterflies(int64_t n, int64_t first, A* x) const = 0;
  /// to[i] = from[i] (signs[i] scale); from may be to
  virtual void flip(int64_t n, const int8_t* signs, A scale, const A* from, A* to) const = 0;

 protected:
  ~HadamardOps() = default;
};

/// The operations as compiled for one instruction set.
struct HadamardVectors {
  const HadamardOps<double>* float64;
  const HadamardOps<float>* float32;
};

}  // namespace neuromod
