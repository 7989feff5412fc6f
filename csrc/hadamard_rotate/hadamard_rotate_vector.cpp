// The row operations of hadamard_rotate; compiled once for each instruction set, like common/vector.cpp.
#include "hadamard_rotate/hadamard_rotate_vector.h"

#include "common/vector_lanes.h"

#define NEUROMOD_CONCAT_(a, b) a##b
#define NEUROMOD_CONCAT(a, b) NEUROMOD_CONCAT_(a, b)
#define NEUROMOD_HADAMARD_VECTORS NEUROMOD_CONCAT(hadamard_vectors_, NEUROMOD_ISA)

namespace neuromod {
namespace {

template <class A>
inline void store(A* to, Lanes<A> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

/// Sums and differences of neighbours 1, 2, 4 ... apart within 64 bytes. A product with 1 or -1 is exact, fused or not.
inline Lanes<float> within(Lanes<float> v) {
  const Lanes<float> one = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
  const Lanes<float> two = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
  const Lanes<float> four = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
  const Lanes<float> eight = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
  v = v * one + __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  v = v * two + __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  v = v * four + __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  return v * eight + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}
inline Lanes<double> within(Lanes<double> v) {
  const Lanes<double> one = {1, -1, 1, -1, 1, -1, 1, -1};
  const Lanes<double> two = {1, 1, -1, -1, 1, 1, -1, -1};
  const Lanes<double> four = {1, 1, 1, 1, -1, -1, -1, -1};
  v = v * one + __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
  v = v * two + __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return v * four + __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
}

/// Levels at once in registers, and neighbours that the first cache holds.
#if defined(__AVX512F__)
constexpr int kMostLevels = 4;
#else
constexpr int kMostLevels = 2;
#endif
constexpr int64_t kNearBytes = 16 << 10;

template <class A>
class Ops final : public HadamardOps<A> {
  static constexpr int64_t kStep = kLanes<A>;

 public:
  void butterflies(int64_t n, int64_t first, A* x) const override {
    constexpr int64_t near = kNearBytes / sizeof(A);
    int64_t h = first;
    if (n < kStep) return few(n, first, x);
    if (h == 1 && n > near) {
      for (int64_t i = 0; i < n; i += near) butterflies(near, 1, x + i);
      h = near;
    } else if (h == 1) {
      for (int64_t i = 0; i < n; i += kStep) store(x + i, within(load(x + i)));
      h = kStep;
    }
    while (h < n) {
      int left = 0;
      while (h << left < n) ++left;
      const int passes = (left + kMostLevels - 1) / kMostLevels;
      h <<= pass<kMostLevels>((left + passes - 1) / passes, n, h, x);
    }
  }

  void flip(int64_t n, const int8_t* signs, A scale, const A* from, A* to) const override {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i] * (A(signs[i]) * scale);
  }

 private:
  /// Less than a register.
  static void few(int64_t n, int64_t first, A* x) {
    for (int64_t h = first; h < n; h *= 2)
      for (int64_t i = 0; i < n; i += 2 * h)
        for (int64_t j = i; j < i + h; ++j) {
          const A a = x[j], b = x[j + h];
          x[j] = a + b, x[j + h] = a - b;
        }
  }

  /// As many levels from h on, in one pass; and how many.
  template <int levels>
  static int pass(int wanted, int64_t n, int64_t h, A* x) {
    if constexpr (levels > 1) {
      if (wanted < levels) return pass<levels - 1>(wanted, n, h, x);
    }
    constexpr int radix = 1 << levels;
    for (int64_t i = 0; i < n; i += radix * h)
      for (int64_t j = i; j < i + h; j += kStep) {
        Lanes<A> v[radix];
        for (int r = 0; r < radix; ++r) v[r] = load(x + j + r * h);
        for (int d = 1; d < radix; d *= 2)
          for (int r = 0; r < radix; ++r)
            if (!(r & d)) {
              const Lanes<A> a = v[r], b = v[r | d];
              v[r] = a + b, v[r | d] = a - b;
            }
        for (int r = 0; r < radix; ++r) store(x + j + r * h, v[r]);
      }
    return levels;
  }
};

const Ops<double> float64;
const Ops<float> float32;

}  // namespace

extern const HadamardVectors NEUROMOD_HADAMARD_VECTORS;
const HadamardVectors NEUROMOD_HADAMARD_VECTORS = {&float64, &float32};

}  // namespace neuromod
