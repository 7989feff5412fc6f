// The row operations. This file is compiled once for each instruction set, which NEUROMOD_ISA names: it includes
// nothing whose functions another file could share, and all of it but the tables has internal linkage.
//
// Plain loops where the compiler vectorises them well, vectors of the compiler's where it does not.
#include "common/vector.h"

#include "common/vector_dots.h"
#include "common/vector_product.h"
#include "common/vector_registers.h"
#include "common/vector_transpose.h"

#define NEUROMOD_CONCAT_(a, b) a##b
#define NEUROMOD_CONCAT(a, b) NEUROMOD_CONCAT_(a, b)
#define NEUROMOD_VECTOR_SET NEUROMOD_CONCAT(vector_set_, NEUROMOD_ISA)
#define NEUROMOD_FLY_HASH_VECTORS NEUROMOD_CONCAT(fly_hash_vectors_, NEUROMOD_ISA)
#define NEUROMOD_HADAMARD_VECTORS NEUROMOD_CONCAT(hadamard_vectors_, NEUROMOD_ISA)

namespace neuromod {
namespace {

template <class T>
class Ops final : public VectorOps<T> {
 public:
  using A = acc_t<T>;

  void to_float64(int64_t n, const T* from, double* to) const override {
    for (int64_t i = 0; i < n; ++i) to[i] = double(wide(from[i]));
  }

  void widen(int64_t n, const T* from, A* to) const override {
    int64_t i = by_registers(n, [&](int64_t i) { store(load(from + i), to + i); });
    for (; i < n; ++i) to[i] = wide(from[i]);
  }

  void narrow(int64_t n, const A* from, T* to) const override {
    int64_t i = by_registers(n, [&](int64_t i) { store(load(from + i), to + i); });
    for (; i < n; ++i) to[i] = rounded<T>(from[i]);
  }

  void mix(int64_t n, int64_t terms, const A* c, const T* const* rows, T* to) const override {
    mix_to<false>(n, terms, c, rows, to);
  }
  void mix_streamed(int64_t n, int64_t terms, const A* c, const T* const* rows, T* to) const override {
    if (reinterpret_cast<uintptr_t>(to) % kRegisterBytes != 0) return mix_to<false>(n, terms, c, rows, to);
    mix_to<true>(n, terms, c, rows, to);
    stream_fence();
  }
  void mix_wide(int64_t n, int64_t terms, const A* c, const T* const* rows, A* to) const override {
    mix_to<false>(n, terms, c, rows, to);
  }

  void add(int64_t n, const A* from, T* to) const override {
    int64_t i = by_registers(n, [&](int64_t i) { store(load(to + i) + load(from + i), to + i); });
    for (; i < n; ++i) to[i] = rounded<T>(wide(to[i]) + from[i]);
  }

  void add_scaled(int64_t n, A c, const T* from, A* to) const override {
    int64_t i = by_registers(n, [&](int64_t i) { store(load(to + i) + c * load(from + i), to + i); });
    for (; i < n; ++i) to[i] += c * wide(from[i]);
  }

  A dot(int64_t n, const T* a, const T* b) const override { return wide_dot(n, a, b); }

  void add_dots(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* next, int64_t count,
                const DotTerm<T>* terms) const override {
    dots_of(rows, depth, a, lda, next, count, terms);
  }

  void product(int64_t rows, int64_t cols, int64_t depth, const A* a, int64_t row, int64_t step, const A* b,
               int64_t ldb, A* c, int64_t ldc, bool add) const override {
    product_of<A>(rows, cols, {depth, a, row, step, b, ldb, c, ldc, add});
  }

  void transpose(int64_t rows, int64_t depth, const T* const* from, T* to, int64_t stride) const override {
    if constexpr (is_half_type<T>) {
      const auto target = [=](int64_t d) { return reinterpret_cast<uint16_t*>(to + d * stride); };
      constexpr int64_t slice = 128;
      for (int64_t d = 0; d < depth; d += slice)
        transpose_halves(rows, d, depth - d < slice ? depth : d + slice, [=](int64_t r) { return from[r]; }, target);
    } else {
      transpose_wide(rows, depth, from, to, stride);
    }
  }

  void transpose_wide(int64_t rows, int64_t depth, const T* const* from, A* to, int64_t stride) const override {
    using Word = word_t<A>;
    const auto target = [=](int64_t d) { return reinterpret_cast<Word*>(to + d * stride); };
    if constexpr (std::is_same_v<T, A>) {
      transpose_words<Word, 128>(rows, depth, [=](int64_t r) { return from[r]; }, target);
    } else {
      constexpr int64_t chunk = 64;
      A buffer[Block<Word>::side][chunk];
      for (int64_t r = 0; r < rows; r += Block<Word>::side) {
        const int64_t count = rows - r < Block<Word>::side ? rows - r : Block<Word>::side;
        for (int64_t d = 0; d < depth; d += chunk) {
          const int64_t length = depth - d < chunk ? depth - d : chunk;
          for (int64_t i = 0; i < count; ++i)
            if (from[r + i]) widen(length, from[r + i] + d, buffer[i]);
          transpose_words<Word, 128>(
              count, length, [&](int64_t i) { return from[r + i] ? buffer[i] : nullptr; },
              [=](int64_t i) { return target(d + i) + r; });
        }
      }
    }
  }

  void transpose_pairs(int64_t rows, int64_t depth, const T* const* from, T* to, int64_t stride) const override {
    if constexpr (is_half_type<T>) {
      transpose_words<uint32_t, 128>(
          rows, depth / 2, [=](int64_t r) { return from[r]; },
          [=](int64_t d) { return reinterpret_cast<uint32_t*>(to + d * 2 * stride); });
      if (depth % 2 == 0) return;
      T* const last = to + (depth - 1) * stride;
      for (int64_t r = 0; r < rows; ++r) {
        last[2 * r] = from[r] ? from[r][depth - 1] : T{};
        last[2 * r + 1] = T{};
      }
    }
  }

  void interleave(int64_t n, const T* even, const T* odd, T* to) const override {
    if constexpr (is_half_type<T>) {
      static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
      const auto pairs = [=](auto low, auto high) __attribute__((always_inline)) {
        for (int64_t i = 0; i < n; ++i) {
          const uint32_t pair = low(i) | high(i) << 16;
          __builtin_memcpy(to + 2 * i, &pair, sizeof(pair));
        }
      };
      const auto zero = [](int64_t) { return uint32_t(0); };
      const auto first = [=](int64_t i) { return uint32_t(even[i].bits); };
      const auto second = [=](int64_t i) { return uint32_t(odd[i].bits); };
      if (even && odd) {
        pairs(first, second);
      } else if (even) {
        pairs(first, zero);
      } else if (odd) {
        pairs(zero, second);
      } else {
        pairs(zero, zero);
      }
    }
  }

  void scale(int64_t n, const A* c, const A* from, T* to) const override {
    int64_t i = by_registers(n, [&](int64_t i) { store(load(c + i) * load(from + i), to + i); });
    for (; i < n; ++i) to[i] = rounded<T>(c[i] * from[i]);
  }

  void mix_columns(int64_t rows, int64_t cols, int64_t stride, const A* product, const A* c, const A* bias, A* sum,
                   bool add) const override {
    for (int64_t n = 0; n < cols; n += kRegister<A>) {
      const Register<A> scale = load(c + n);
      for (int64_t r = 0; r < rows; ++r) {
        Register<A> value = load(product + r * stride + n);
        if (bias) value += bias[r];
        value *= scale;
        if (add) value += load(sum + r * stride + n);
        store(value, sum + r * stride + n);
      }
    }
  }

  void mix_rows(int64_t rows, int64_t cols, int64_t stride, const A* product, const A* c, A* sum,
                bool add) const override {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < cols; n += kRegister<A>) {
        Register<A> value = load(product + r * stride + n) * c[r];
        if (add) value += load(sum + r * stride + n);
        store(value, sum + r * stride + n);
      }
    }
  }

  void mix_last_rows(int64_t rows, int64_t cols, int64_t stride, const A* product, const A* c, const A* sum,
                     T* const* to) const override {
    for (int64_t r = 0; r < rows; ++r, product += stride, sum += sum ? stride : 0) {
      int64_t n = by_registers(cols, [&](int64_t n) {
        Register<A> value = load(product + n) * c[r];
        if (sum) value += load(sum + n);
        store(value, to[r] + n);
      });
      for (; n < cols; ++n) to[r][n] = rounded<T>(product[n] * c[r] + (sum ? sum[n] : A(0)));
    }
  }

  void dot_rows(int64_t rows, int64_t cols, int64_t stride, const A* product, const T* const* x,
                A* out) const override {
    for (int64_t r = 0; r < rows; ++r) out[r] = x[r] ? wide_dot(cols, product + r * stride, x[r]) : A(0);
  }

  A dot_tile(int64_t rows, int64_t cols, int64_t stride, const A* product, const T* x,
             int64_t x_stride) const override {
    constexpr int64_t many = 4;
    Register<A> sum[many] = {};
    A rest = 0;
    for (int64_t r = 0; r < rows; ++r, product += stride, x += x_stride) {
      int64_t n = 0;
      for (; n + many * kRegister<A> <= cols; n += many * kRegister<A>)
#pragma GCC unroll 8
        for (int64_t i = 0; i < many; ++i)
          sum[i] += load(product + n + i * kRegister<A>) * load(x + n + i * kRegister<A>);
      for (; n < cols; ++n) rest += product[n] * wide(x[n]);
    }
    return sum_of<A>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
  }

  void narrow_transposed(int64_t rows, int64_t cols, int64_t stride, const A* sum, T* const* to) const override {
    using Word = word_t<A>;
    const auto from = [=](int64_t r) { return sum + r * stride; };
    if constexpr (std::is_same_v<T, A>) {
      transpose_words<Word, Block<Word>::side>(rows, cols, from,
                                               [=](int64_t n) { return reinterpret_cast<Word*>(to[n]); });
    } else {
      constexpr int64_t side = 64;
      A buffer[side][side];
      for (int64_t n = 0; n < cols; n += side) {
        const int64_t count = cols - n < side ? cols - n : side;
        for (int64_t r = 0; r < rows; r += side) {
          const int64_t length = rows - r < side ? rows - r : side;
          transpose_words<Word, 128>(
              length, count, [=](int64_t i) { return from(r + i) + n; },
              [&](int64_t i) { return reinterpret_cast<Word*>(buffer[i]); });
          for (int64_t i = 0; i < count; ++i) narrow(length, buffer[i], to[n + i] + r);
        }
      }
    }
  }

  void step(const ManifoldStepNumbers& p, int64_t n, int64_t terms, const A* c, const T* const* rows, T* param,
            T* buffer) const override {
    (buffer ? step_rows<true> : step_rows<false>)(ManifoldStepRule<A>(p), n, terms, c, rows, param, buffer);
  }

 private:
  /// f(i) for all i that begin a register of sums of n; what is left begins where it returns.
  template <class F>
  static int64_t by_registers(int64_t n, F f) {
    int64_t i = 0;
    for (; i + kRegister<A> <= n; i += kRegister<A>) f(i);
    return i;
  }

  template <bool streamed, class To>
  static void mix_to(int64_t n, int64_t terms, const A* c, const T* const* rows, To* to) {
    constexpr int64_t many = 4;
    int64_t first = 0;
    for (; first + many * kRegister<A> <= n; first += many * kRegister<A>)
      mix_row<many, streamed>(first, terms, c, rows, to);
    for (; first + kRegister<A> <= n; first += kRegister<A>) mix_row<1, false>(first, terms, c, rows, to);
    for (; first < n; ++first) to[first] = rounded<To>(mixed(first, terms, c, rows));
  }
  static A mixed(int64_t i, int64_t terms, const A* c, const T* const* rows) {
    A sum = 0;
    for (int64_t j = 0; j < terms; ++j) sum += c[j] * wide(rows[j][i]);
    return sum;
  }
  /// Those of so many registers from `first`, in the order of sums for type To, added.
  template <class To, int64_t many>
  static void add_mixed(int64_t first, int64_t terms, const A* c, const T* const* rows, Register<A>* sum) {
    for (int64_t j = 0; j < terms; ++j) {
      Register<A> values[many];
      load_row<To, many>(rows[j] + first, values);
#pragma GCC unroll 8
      for (int64_t i = 0; i < many; ++i) sum[i] += values[i] * c[j];
    }
  }
  template <int64_t many, bool streamed, class To>
  static void mix_row(int64_t first, int64_t terms, const A* c, const T* const* rows, To* to) {
    Register<A> sum[many] = {};
    add_mixed<To, many>(first, terms, c, rows, sum);
    if constexpr (streamed) {
      To values[many * kRegister<A>];
      store_row<many>(sum, values);
      for (size_t i = 0; i < sizeof(values); i += kRegisterBytes)
        stream(reinterpret_cast<char*>(to + first) + i, reinterpret_cast<const char*>(values) + i);
    } else {
      store_row<many>(sum, to + first);
    }
  }

  template <bool buffered>
  static void step_rows(const ManifoldStepRule<A>& rule, int64_t n, int64_t terms, const A* c, const T* const* rows,
                        T* param, T* buffer) {
    constexpr int64_t many = 2;
    int64_t first = 0;
    for (; first + many * kRegister<A> <= n; first += many * kRegister<A>) {
      Register<A> sum[many] = {}, value[many], m[many];
      add_mixed<T, many>(first, terms, c, rows, sum);
      load_row<T, many>(param + first, value);
      if constexpr (buffered) load_row<T, many>(buffer + first, m);
      for (int64_t i = 0; i < many; ++i) rule.apply(sum[i], value[i], buffered ? &m[i] : nullptr);
      if constexpr (buffered) store_row<many>(m, buffer + first);
      store_row<many>(value, param + first);
    }
    for (; first < n; ++first) {
      A value = wide(param[first]), m = buffered ? wide(buffer[first]) : A(0);
      rule.apply(mixed(first, terms, c, rows), value, buffered ? &m : nullptr);
      if constexpr (buffered) buffer[first] = rounded<T>(m);
      param[first] = rounded<T>(value);
    }
  }

  template <class U>
  static A wide_dot(int64_t n, const U* a, const T* b) {
    constexpr int64_t many = 4;
    Register<A> sum[many] = {};
    int64_t first = 0;
    for (; first + many * kRegister<A> <= n; first += many * kRegister<A>) {
      Register<A> left[many], right[many];
      using Order = std::conditional_t<std::is_same_v<U, T>, T, A>;
      load_row<Order, many>(a + first, left);
      load_row<Order, many>(b + first, right);
#pragma GCC unroll 8
      for (int64_t i = 0; i < many; ++i) sum[i] += left[i] * right[i];
    }
    for (; first + kRegister<A> <= n; first += kRegister<A>) sum[0] += load(a + first) * load(b + first);
    A total = sum_of<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; first < n; ++first) total += wide(a[first]) * wide(b[first]);
    return total;
  }
};

const Ops<double> float64;
const Ops<float> float32;
const Ops<BFloat16> bfloat16;
const Ops<Float16> float16;

#define NEUROMOD_STRING_(a) #a
#define NEUROMOD_STRING(a) NEUROMOD_STRING_(a)

}  // namespace

extern const FlyHashVectors NEUROMOD_FLY_HASH_VECTORS;   // fly_hash/fly_hash_vector.cpp
extern const HadamardVectors NEUROMOD_HADAMARD_VECTORS;  // hadamard_rotate/hadamard_rotate_vector.cpp
extern const VectorSet NEUROMOD_VECTOR_SET;
const VectorSet NEUROMOD_VECTOR_SET = {
    NEUROMOD_STRING(NEUROMOD_ISA), &float64, &float32, &bfloat16, &float16, &NEUROMOD_FLY_HASH_VECTORS,
    &NEUROMOD_HADAMARD_VECTORS};

}  // namespace neuromod
