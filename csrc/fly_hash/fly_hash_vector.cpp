// The row operations of fly_hash; compiled once for each instruction set, like common/vector.cpp.
#include "fly_hash/fly_hash_vector.h"

#include <type_traits>

#include "common/vector_registers.h"

#define NEUROMOD_CONCAT_(a, b) a##b
#define NEUROMOD_CONCAT(a, b) NEUROMOD_CONCAT_(a, b)
#define NEUROMOD_FLY_HASH_VECTORS NEUROMOD_CONCAT(fly_hash_vectors_, NEUROMOD_ISA)

namespace neuromod {
namespace {

/// Rows of sums that stay in registers beside what is added to them.
#if defined(__AVX512F__)
constexpr int64_t kRows = 10;
#elif defined(__AVX__)
constexpr int64_t kRows = 2;
#else
constexpr int64_t kRows = 1;
#endif

/// max(x, 0), and NaN for NaN.
template <class A>
inline Register<A> relu(Register<A> x) {
  const Register<A> zero = {};
#if defined(__AVX512F__)  // one instruction; the compiler makes two of a comparison
  if constexpr (sizeof(A) == 8)
    return Register<A>(_mm512_maskz_max_pd(0xff, __m512d(zero), __m512d(x)));
  else
    return Register<A>(_mm512_maskz_max_ps(0xffff, __m512(zero), __m512(x)));
#else
  return zero > x ? zero : x;
#endif
}

/// One row of a block.
template <class A>
struct Row {
  static constexpr int64_t parts = kFlyBlock<A> / kRegister<A>;
  Register<A> part[parts];

  static Row at(const A* from) {
    return of([=](int64_t i) { return load(from + i * kRegister<A>); });
  }
  void store(A* to) const {
#pragma GCC unroll 8
    for (int64_t i = 0; i < parts; ++i) neuromod::store(part[i], to + i * kRegister<A>);
  }
  Row& operator+=(const Row& other) { return *this = *this + other; }
  Row& operator-=(const Row& other) {
    return *this = of([&](int64_t i) { return part[i] - other.part[i]; });
  }
  Row operator+(const Row& other) const {
    return of([&](int64_t i) { return part[i] + other.part[i]; });
  }
  Row operator*(const Row& other) const {
    return of([&](int64_t i) { return part[i] * other.part[i]; });
  }
  Row operator*(A scale) const {
    return of([&](int64_t i) { return part[i] * scale; });
  }
  Row operator/(A divisor) const {
    return of([&](int64_t i) { return part[i] / divisor; });
  }
  Row active() const {
    return of([&](int64_t i) { return relu<A>(part[i]); });
  }
  /// Itself where `h` > 0 or is NaN, else 0.
  Row where_active(const Row& h) const {
    const Register<A> zero = {};
    return of([&](int64_t i) { return h.part[i] <= 0 ? zero : part[i]; });
  }

 private:
  template <class F>
  static Row of(F f) {
    Row row;
#pragma GCC unroll 8
    for (int64_t i = 0; i < parts; ++i) row.part[i] = f(i);
    return row;
  }
};

template <class A>
class Ops final : public FlyHashOps<A> {
  static constexpr int64_t kBlock = kFlyBlock<A>;

 public:
  bool offsets(int64_t n, const int64_t* index, int64_t limit, uint32_t* to) const override {
    return offsets_of<uint64_t>(n, index, limit, to);
  }
  bool offsets(int64_t n, const int32_t* index, int64_t limit, uint32_t* to) const override {
    return offsets_of<uint32_t>(n, index, limit, to);
  }

  void centre(int64_t inputs, const A* count, A terms, A* x) const override {
    Row<A> sum = {};
    for (int64_t i = 0; i < inputs; ++i)
      if (count[i] != 0) sum += Row<A>::at(x + i * kBlock) * count[i];
    const Row<A> mean = sum / terms;
    for (int64_t i = 0; i < inputs; ++i) {
      if (count[i] == 0) continue;
      Row<A> value = Row<A>::at(x + i * kBlock);
      value -= mean;
      value.store(x + i * kBlock);
    }
  }

  void hash(int64_t units, int64_t arity, const uint32_t* index, const A* x, const A* gain, A* to) const override {
    with_arity(arity, [&](auto n) {
      for (int64_t u = 0; u < units; ++u, index += n(), to += kBlock) {
        const Row<A> h = unit(n, index, x);
        (gain ? h * gain[u] : h).store(to);
      }
    });
  }

  void read_out(int64_t units, int64_t arity, const uint32_t* index, const A* x, int64_t outputs, const A* readout,
                A* sum) const override {
    if (outputs == kRows) {  // a unit stays in registers, and loads go on while sums are formed
      with_arity(arity, [&](auto n) { read_out_hash(n, units, index, x, readout, sum); });
      return;
    }
    FlyChunk<A> h;
    in_chunks(units, [&](int64_t first, int64_t some) {
      hash(some, arity, index + first * arity, x, nullptr, h.at);
      in_rows(outputs, [&](auto rows, int64_t o) {
        read_out_rows<rows()>(some, readout + first * outputs + o * kFlyChunk, nullptr, h.at, sum + o * kBlock);
      });
    });
  }

  void read_out_each(int64_t units, int64_t outputs, const A* readout, const A* gain, const A* h,
                     A* sum) const override {
    in_rows(outputs, [&](auto rows, int64_t o) {
      read_out_rows<rows()>(units, readout + o * kFlyChunk, gain, h, sum + o * kBlock);
    });
  }

  void signal(int64_t units, int64_t outputs, const A* readout, const A* grad, A* to) const override {
    if (outputs == 0) __builtin_memset(to, 0, sizeof(A) * units * kBlock);
    in_rows(outputs, [&](auto rows, int64_t o) {
      signal_of<rows()>(units, readout + o * kFlyChunk, grad + o * kBlock, to, o > 0);
    });
  }

  void add_products(int64_t units, int64_t arity, const uint32_t* index, const A* x, int64_t outputs, const A* readout,
                    const A* grad, A* sum) const override {
    if (outputs == kRows) {
      with_arity(arity, [&](auto n) { add_hash_products(n, units, index, x, readout, grad, sum); });
      return;
    }
    FlyChunk<A> h, to;
    in_chunks(units, [&](int64_t first, int64_t some) {
      hash(some, arity, index + first * arity, x, nullptr, h.at);
      signal(some, outputs, readout + first * outputs, grad, to.at);
      for (int64_t u = 0; u < some; ++u)
        add_product(Row<A>::at(h.at + u * kBlock), Row<A>::at(to.at + u * kBlock), sum + (first + u) * kBlock / 2);
    });
  }

  void mask(int64_t units, const A* h, const A* gain, A* signal) const override {
    for (int64_t u = 0; u < units; ++u, h += kBlock, signal += kBlock) {
      Row<A> value = Row<A>::at(signal);
      if (gain) value = value * gain[u];
      value.where_active(Row<A>::at(h)).store(signal);
    }
  }

  void scatter(int64_t units, int64_t arity, const uint32_t* index, const A* grad, A* x, A* total) const override {
    Row<A> all = Row<A>::at(total);
    for (int64_t u = 0; u < units; ++u, grad += kBlock, index += arity) {
      const Row<A> value = Row<A>::at(grad);
      all += value;
      for (int64_t k = 0; k < arity; ++k) {
        A* const to = row(x, index[k]);
        Row<A> sum = Row<A>::at(to);
        sum += value;
        sum.store(to);
      }
    }
    all.store(total);
  }

  void subtract(int64_t inputs, const A* count, const A* mean, A* x) const override {
    const Row<A> centre = Row<A>::at(mean);
    for (int64_t i = 0; i < inputs; ++i) {
      if (count[i] == 0) continue;
      Row<A> value = Row<A>::at(x + i * kBlock);
      value -= centre * count[i];
      value.store(x + i * kBlock);
    }
  }

 private:
  template <class Unsigned, class Index>
  static bool offsets_of(int64_t n, const Index* index, int64_t limit, uint32_t* to) {
    Unsigned most = 0;  // what is negative counts as large
    for (int64_t i = 0; i < n; ++i) {
      const auto value = Unsigned(index[i]);
      most = value > most ? value : most;
      to[i] = uint32_t(kFlyStep) * uint32_t(value);
    }
    return n == 0 || most < uint64_t(limit);
  }

  template <class Element>
  static Element* row(Element* x, uint32_t offset) {
    return reinterpret_cast<Element*>(reinterpret_cast<uintptr_t>(x) + 8 * uintptr_t(offset));
  }

  /// f(a function that yields the arity): the paper's 7 as a constant, so that loops over it are unrolled.
  template <class F>
  static void with_arity(int64_t arity, F f) {
    if (arity == 7) {
      f([] { return int64_t(7); });
    } else {
      f([=] { return arity; });
    }
  }

  /// f(from which, how many) of units.
  template <class F>
  static void in_chunks(int64_t units, F f) {
    for (int64_t first = 0; first < units; first += kFlyChunk)
      f(first, units - first < kFlyChunk ? units - first : kFlyChunk);
  }

  /// f(how many, from which) of outputs whose sums stay in registers.
  template <class F>
  static void in_rows(int64_t outputs, F f) {
    int64_t o = 0;
    for (; o + kRows <= outputs; o += kRows) f(std::integral_constant<int64_t, kRows>(), o);
    for (; o + 2 <= outputs; o += 2) f(std::integral_constant<int64_t, 2>(), o);
    for (; o < outputs; ++o) f(std::integral_constant<int64_t, 1>(), o);
  }

  /// In two sums, which wait less for each other.
  template <class Arity>
  static Row<A> unit(Arity arity, const uint32_t* index, const A* x) {
    Row<A> even = {}, odd = {};
    if (arity() > 0) even = Row<A>::at(row(x, index[0]));
    if (arity() > 1) odd = Row<A>::at(row(x, index[1]));
    int64_t k = 2;
    for (; k + 2 <= arity(); k += 2) {
      even += Row<A>::at(row(x, index[k]));
      odd += Row<A>::at(row(x, index[k + 1]));
    }
    if (k < arity()) even += Row<A>::at(row(x, index[k]));
    if (arity() > 1) even += odd;
    return even.active();
  }

  template <class Arity>
  static void read_out_hash(Arity arity, int64_t units, const uint32_t* index, const A* x, const A* readout, A* sum) {
    Row<A> total[kRows];
    for (int64_t r = 0; r < kRows; ++r) total[r] = Row<A>::at(sum + r * kBlock);
    Row<A> next = unit(arity, index, x);
    in_chunks(units, [&](int64_t first, int64_t some) {
      const A* const from = readout + first * kRows;
      for (int64_t u = 0; u < some; ++u) {
        const Row<A> h = next;
        if (first + u + 1 < units) index += arity();
        next = unit(arity, index, x);  // its loads take place while h is multiplied
        for (int64_t r = 0; r < kRows; ++r) total[r] += h * from[r * kFlyChunk + u];
      }
    });
    for (int64_t r = 0; r < kRows; ++r) total[r].store(sum + r * kBlock);
  }

  template <int64_t rows>
  static void read_out_rows(int64_t units, const A* readout, const A* gain, const A* h, A* sum) {
    Row<A> total[rows];
    for (int64_t r = 0; r < rows; ++r) total[r] = Row<A>::at(sum + r * kBlock);
    if (gain) {
      for (int64_t u = 0; u < units; ++u) {
        const Row<A> value = Row<A>::at(h + u * kBlock), each = Row<A>::at(gain + u * kBlock);
        for (int64_t r = 0; r < rows; ++r) total[r] += value * (each * readout[r * kFlyChunk + u]);
      }
    } else {
      for (int64_t u = 0; u < units; ++u) {
        const Row<A> value = Row<A>::at(h + u * kBlock);
        for (int64_t r = 0; r < rows; ++r) total[r] += value * readout[r * kFlyChunk + u];
      }
    }
    for (int64_t r = 0; r < rows; ++r) total[r].store(sum + r * kBlock);
  }

  template <int64_t rows>
  static void signal_of(int64_t units, const A* readout, const A* grad, A* to, bool add) {
    Row<A> g[rows];
    for (int64_t r = 0; r < rows; ++r) g[r] = Row<A>::at(grad + r * kBlock);
    for (int64_t u = 0; u < units; ++u, to += kBlock) {
      Row<A> sum = add ? Row<A>::at(to) : Row<A>{};
      for (int64_t r = 0; r < rows; ++r) sum += g[r] * readout[r * kFlyChunk + u];
      sum.store(to);
    }
  }

  template <class Arity>
  static void add_hash_products(Arity arity, int64_t units, const uint32_t* index, const A* x, const A* readout,
                                const A* grad, A* sum) {
    Row<A> g[kRows];
    for (int64_t r = 0; r < kRows; ++r) g[r] = Row<A>::at(grad + r * kBlock);
    in_chunks(units, [&](int64_t first, int64_t some) {
      const A* const from = readout + first * kRows;
      for (int64_t u = 0; u < some; ++u) {
        Row<A> signal = g[0] * from[u];
        for (int64_t r = 1; r < kRows; ++r) signal += g[r] * from[r * kFlyChunk + u];
        add_product(unit(arity, index + (first + u) * arity(), x), signal, sum + (first + u) * kBlock / 2);
      }
    });
  }

  static void add_product(const Row<A>& h, const Row<A>& signal, A* sum) {
    constexpr int64_t parts = Row<A>::parts / 2;
#pragma GCC unroll 4
    for (int64_t i = 0; i < parts; ++i) {
      Register<A> total = load(sum + i * kRegister<A>);
      total += h.part[i] * signal.part[i];
      total += h.part[i + parts] * signal.part[i + parts];
      store(total, sum + i * kRegister<A>);
    }
  }
};

const Ops<double> float64;
const Ops<float> float32;

}  // namespace

extern const FlyHashVectors NEUROMOD_FLY_HASH_VECTORS;
const FlyHashVectors NEUROMOD_FLY_HASH_VECTORS = {&float64, &float32};

}  // namespace neuromod
