// The row operations of fly_hash; compiled once for each instruction set, like common/vector.cpp.
#include "fly_hash/fly_hash_vector.h"

#include "common/vector_lanes.h"

#define NEUROMOD_CONCAT_(a, b) a##b
#define NEUROMOD_CONCAT(a, b) NEUROMOD_CONCAT_(a, b)
#define NEUROMOD_FLY_HASH_VECTORS NEUROMOD_CONCAT(fly_hash_vectors_, NEUROMOD_ISA)

namespace neuromod {
namespace {

/// Rows of sums that stay in registers beside what is added to them: 32 registers of a row's half, or 16 of a quarter.
#if defined(__AVX512F__)
constexpr int64_t kRows = 10;
#else
constexpr int64_t kRows = 2;
#endif

/// One row of a block.
template <class A>
struct Row {
  Lanes<A> half[2];

  static Row at(const A* from) { return {{load(from), load(from + kLanes<A>)}}; }
  void store(A* to) const {  // each by itself, or it would go by way of the stack
    __builtin_memcpy(to, &half[0], sizeof(half[0]));
    __builtin_memcpy(to + kLanes<A>, &half[1], sizeof(half[1]));
  }
  Row& operator+=(const Row& other) {
    half[0] += other.half[0];
    half[1] += other.half[1];
    return *this;
  }
  Row& operator-=(const Row& other) {
    half[0] -= other.half[0];
    half[1] -= other.half[1];
    return *this;
  }
  Row operator*(A scale) const { return {{half[0] * scale, half[1] * scale}}; }
  /// Itself where `h` > 0 or is NaN, else 0.
  Row where_active(const Row& h) const {
    const Lanes<A> zero = {};
    return {{h.half[0] <= 0 ? zero : half[0], h.half[1] <= 0 ? zero : half[1]}};
  }
};

template <class A>
class Ops final : public FlyHashOps<A> {
  static constexpr int64_t kBlock = kFlyBlock<A>;
  static_assert(kBlock == 2 * kLanes<A>);

 public:
  bool narrow(int64_t n, const int64_t* index, int64_t limit, int32_t* to) const override {
    uint64_t most = 0;  // what is negative counts as large
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t value = uint64_t(index[i]);
      most = value > most ? value : most;
      to[i] = int32_t(value);
    }
    return n == 0 || most < uint64_t(limit);
  }

  bool within(int64_t n, const int32_t* index, int64_t limit) const override {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; ++i) most = uint32_t(index[i]) > most ? uint32_t(index[i]) : most;
    return n == 0 || most < uint64_t(limit);
  }

  void weighted_sum(int64_t inputs, const A* count, const A* x, A* to) const override {
    Row<A> sum = {};
    for (int64_t i = 0; i < inputs; ++i)
      if (count[i] != 0) sum += Row<A>::at(x + i * kBlock) * count[i];
    sum.store(to);
  }

  void hash(int64_t units, int64_t arity, const int32_t* index, const A* x, const A* mean, const A* gain,
            A* to) const override {
    const Row<A> centre = Row<A>::at(mean);
    if (arity == 7) {  // the paper's: unrolled
      hash_of([] { return 7; }, units, index, x, centre, gain, to);
    } else {
      hash_of([=] { return arity; }, units, index, x, centre, gain, to);
    }
  }

  void read_out(int64_t units, int64_t outputs, const A* readout, int64_t stride, const A* h, A* sum) const override {
    int64_t o = 0;
    for (; o + kRows <= outputs; o += kRows)
      read_out_rows<kRows>(units, readout + o * stride, stride, h, sum + o * kBlock);
    for (; o + 2 <= outputs; o += 2) read_out_rows<2>(units, readout + o * stride, stride, h, sum + o * kBlock);
    for (; o < outputs; ++o) read_out_rows<1>(units, readout + o * stride, stride, h, sum + o * kBlock);
  }

  void signal(int64_t units, int64_t outputs, const A* readout, int64_t stride, const A* grad, A* to) const override {
    int64_t o = 0;
    if (outputs == 0) __builtin_memset(to, 0, sizeof(A) * units * kBlock);
    for (; o + kRows <= outputs; o += kRows)
      signal_of<kRows>(units, readout + o * stride, stride, grad + o * kBlock, to, o > 0);
    for (; o + 2 <= outputs; o += 2) signal_of<2>(units, readout + o * stride, stride, grad + o * kBlock, to, o > 0);
    for (; o < outputs; ++o) signal_of<1>(units, readout + o * stride, stride, grad + o * kBlock, to, o > 0);
  }

  void add_products(int64_t units, const A* h, const A* signal, A* sum) const override {
    for (int64_t u = 0; u < units; ++u, h += kBlock, signal += kBlock, sum += kLanes<A>) {
      Lanes<A> total = load(sum);
      total += load(h) * load(signal);
      total += load(h + kLanes<A>) * load(signal + kLanes<A>);
      __builtin_memcpy(sum, &total, sizeof(total));
    }
  }

  void mask(int64_t units, const A* h, const A* gain, A* signal) const override {
    for (int64_t u = 0; u < units; ++u, h += kBlock, signal += kBlock) {
      Row<A> value = Row<A>::at(signal);
      if (gain) value = value * gain[u];
      value.where_active(Row<A>::at(h)).store(signal);
    }
  }

  void scatter(int64_t units, int64_t arity, const int32_t* index, const A* grad, A* x, A* total) const override {
    Row<A> all = Row<A>::at(total);
    for (int64_t u = 0; u < units; ++u, grad += kBlock, index += arity) {
      const Row<A> value = Row<A>::at(grad);
      all += value;
      for (int64_t k = 0; k < arity; ++k) {
        A* const to = x + index[k] * kBlock;
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
  template <class Arity>
  static void hash_of(Arity arity, int64_t units, const int32_t* index, const A* x, const Row<A>& centre, const A* gain,
                      A* to) {
    for (int64_t u = 0; u < units; ++u, index += arity(), to += kBlock) {
      Row<A> sum = arity() > 0 ? Row<A>::at(x + index[0] * kBlock) : Row<A>{};
      for (int64_t k = 1; k < arity(); ++k) sum += Row<A>::at(x + index[k] * kBlock);
      sum -= centre;
      sum = sum.where_active(sum);
      (gain ? sum * gain[u] : sum).store(to);
    }
  }

  template <int64_t rows>
  static void read_out_rows(int64_t units, const A* readout, int64_t stride, const A* h, A* sum) {
    Row<A> total[rows];
    for (int64_t r = 0; r < rows; ++r) total[r] = Row<A>::at(sum + r * kBlock);
    for (int64_t u = 0; u < units; ++u) {
      const Row<A> value = Row<A>::at(h + u * kBlock);
      for (int64_t r = 0; r < rows; ++r) total[r] += value * readout[r * stride + u];
    }
    for (int64_t r = 0; r < rows; ++r) total[r].store(sum + r * kBlock);
  }

  template <int64_t rows>
  static void signal_of(int64_t units, const A* readout, int64_t stride, const A* grad, A* to, bool add) {
    Row<A> g[rows];
    for (int64_t r = 0; r < rows; ++r) g[r] = Row<A>::at(grad + r * kBlock);
    for (int64_t u = 0; u < units; ++u, to += kBlock) {
      Row<A> sum = add ? Row<A>::at(to) : Row<A>{};
      for (int64_t r = 0; r < rows; ++r) sum += g[r] * readout[r * stride + u];
      sum.store(to);
    }
  }
};

const Ops<double> float64;
const Ops<float> float32;

}  // namespace

extern const FlyHashVectors NEUROMOD_FLY_HASH_VECTORS;
const FlyHashVectors NEUROMOD_FLY_HASH_VECTORS = {&float64, &float32};

}  // namespace neuromod
