// The row operations of hadamard_rotate; compiled once for each instruction set, like common/vector.cpp.
#include "hadamard_rotate/hadamard_rotate_vector.h"

#include "common/vector_registers.h"

#define NEUROMOD_CONCAT_(a, b) a##b
#define NEUROMOD_CONCAT(a, b) NEUROMOD_CONCAT_(a, b)
#define NEUROMOD_HADAMARD_VECTORS NEUROMOD_CONCAT(hadamard_vectors_, NEUROMOD_ISA)

namespace neuromod {
namespace {

/// Sums and differences of neighbours d, 2 d, 4 d ... apart within a register. A product with 1 or -1 is exact, fused
/// or not.
template <class A, int64_t d = 1>
inline Register<A> within(Register<A> v) {
  if constexpr (d < kRegister<A>) {
    Register<A> sign;
    for (int64_t i = 0; i < kRegister<A>; ++i) sign[i] = i & d ? -1 : 1;
    return within<A, 2 * d>(v * sign + exchanged<d>(v));
  }
  return v;
}

/// Levels at once in registers, and neighbours that the first cache holds.
#if defined(__AVX512F__)
constexpr int kMostLevels = 4;
#else
constexpr int kMostLevels = 3;
#endif
constexpr int64_t kNearBytes = 16 << 10;

template <class A>
class Ops final : public HadamardOps<A> {
  static constexpr int64_t kStep = kRegister<A>;

 public:
  void butterflies(int64_t n, int64_t first, A* x) const override {
    constexpr int64_t near = kNearBytes / sizeof(A);
    int64_t h = first;
    if (n < kStep) return few(n, first, x);
    if (h == 1 && n > near) {
      for (int64_t i = 0; i < n; i += near) butterflies(near, 1, x + i);
      h = near;
    } else if (h == 1) {
      for (int64_t i = 0; i < n; i += kStep) store(within<A>(load(x + i)), x + i);
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
        Register<A> v[radix];
        for (int r = 0; r < radix; ++r) v[r] = load(x + j + r * h);
        for (int d = 1; d < radix; d *= 2)
          for (int r = 0; r < radix; ++r)
            if (!(r & d)) {
              const Register<A> a = v[r], b = v[r | d];
              v[r] = a + b, v[r | d] = a - b;
            }
        for (int r = 0; r < radix; ++r) store(v[r], x + j + r * h);
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
