// Dot products of rows with rows, in blocks whose sums stay in registers. For vector.cpp alone, as vector_registers.h.
#pragma once

#include <utility>

#include "common/vector_registers.h"

namespace neuromod {
namespace {

// So many rows of A, and terms, as there is room for; half types take two registers each.
#if defined(__AVX512F__)
constexpr int64_t kDotRows = 8;
#else
constexpr int64_t kDotRows = 4;
#endif
template <class T>
constexpr int64_t kDotTerms = is_half_type<T> ? 2 : 3;

/// The sums of as many vectors as they have elements, in the first: neighbours `d` apart are added, then half as far.
template <int64_t d, class V>
inline void add_apart(V* v) {
  if constexpr (d > 0) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < d; ++i) v[i] = upper<d>(v[i], v[i + d]) + lower<d>(v[i], v[i + d]);
    add_apart<d / 2>(v);
  }
}

/// to[i] += the sum of v[i], for kDotRows of them.
template <class A>
inline void add_sums(const Register<A>* v, A* to) {
  constexpr int64_t side = kRegister<A> < kDotRows ? kRegister<A> : kDotRows, parts = kRegister<A> / side;
  typedef A Part __attribute__((vector_size(side * sizeof(A))));
  struct Parts {
    Part part[parts];
  };
  for (int64_t first = 0; first < kDotRows; first += side) {
    Part sum[side];
#pragma GCC unroll 8
    for (int64_t i = 0; i < side; ++i) {
      const auto each = bits_as<Parts>(v[first + i]);
      sum[i] = each.part[0];
      if constexpr (parts == 2) sum[i] += each.part[1];
    }
    static_assert(parts <= 2);
    add_apart<side / 2>(sum);
    sum[0] += load_as<Part>(to + first);
    __builtin_memcpy(to + first, &sum[0], sizeof(Part));
  }
}

/// The last elements of a row, less than `step` of them, with zeros: after others of the row, or before nothing.
template <int64_t step, class T>
inline void last_of(const T* row, int64_t depth, T* to) {
  using Word = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  typedef Word Words __attribute__((vector_size(step * sizeof(T))));
  Words kept = {};
  if (depth < step) {
    __builtin_memcpy(&kept, row, size_t(depth) * sizeof(T));
  } else {
    Words place;
    for (int64_t i = 0; i < step; ++i) place[i] = Word(i);
    kept = load_as<Words>(row + depth - step) & (Words)(place >= Word(step - depth % step));
  }
  __builtin_memcpy(to, &kept, sizeof(kept));
}

/// At most kDotRows rows of A, and as many others that are fetched meanwhile, if there are others.
template <class T>
struct DotRows {
  const T* a;
  int64_t lda, count, depth;
  const T* next;
};

/// So many blocks of so many terms: to[first + i] += sum_d a[i][d] row[d].
template <class T, int64_t many>
[[gnu::noinline]] void dot_blocks(const DotRows<T>& rows, int64_t blocks, const DotTerm<T>* terms, int64_t first) {
  using A = acc_t<T>;
  constexpr int64_t registers = is_half_type<T> ? 2 : 1, step = registers * kRegister<A>;
  const int64_t depth = rows.depth;
  const T* left[kDotRows];
  for (int64_t i = 0; i < kDotRows; ++i) left[i] = rows.a + (i < rows.count ? i : 0) * rows.lda;
  const int64_t share = blocks < kDotRows ? 2 : 1;  // as slowly as will do: a processor fetches few lines at once
  for (int64_t fetched = 0; blocks > 0; --blocks, terms += many, fetched += share) {
    const T *right[many], *next[2];
    for (int64_t j = 0; j < many; ++j) right[j] = terms[j].row;
    const bool fetches = rows.next && fetched < kDotRows;
    for (int64_t j = 0; j < 2; ++j) next[j] = fetches && j < share ? rows.next + (fetched + j) * rows.lda : rows.a;
    Register<A> sum[many][kDotRows] = {};
    const auto add_step = [&](auto a_of, auto b_of) __attribute__((always_inline)) {
      Register<A> y[many][registers];
#pragma GCC unroll 8
      for (int64_t j = 0; j < many; ++j) load_row<T, registers>(b_of(j), y[j]);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kDotRows; ++i) {
        Register<A> x[registers];
        load_row<T, registers>(a_of(i), x);
#if defined(__AVX512F__)
        for (int64_t r = 0; r < registers; ++r) asm("" : "+v"(x[r]));  // or GCC reads it once for each product
#endif
#pragma GCC unroll 8
        for (int64_t j = 0; j < many; ++j)
#pragma GCC unroll 8
          for (int64_t r = 0; r < registers; ++r) sum[j][i] += x[r] * y[j][r];
      }
    };
    int64_t d = 0;
    for (; d + step <= depth; d += step) {
      __builtin_prefetch(next[0] + d);
      __builtin_prefetch(next[1] + d);
      add_step([&](int64_t i) { return left[i] + d; }, [&](int64_t j) { return right[j] + d; });
    }
    if (d < depth) {
      alignas(64) T x[kDotRows][step], y[many][step];
      for (int64_t i = 0; i < kDotRows; ++i) last_of<step>(left[i], depth, x[i]);
      for (int64_t j = 0; j < many; ++j) last_of<step>(right[j], depth, y[j]);
      add_step([&](int64_t i) { return x[i]; }, [&](int64_t j) { return y[j]; });
    }
#pragma GCC unroll 8
    for (int64_t j = 0; j < many; ++j) add_sums<A>(sum[j], terms[j].to + first);
  }
}

/// The same for blocks of any number of terms up to kDotTerms.
template <class T, size_t... many>
void dot_blocks(std::index_sequence<many...>, int64_t width, const DotRows<T>& rows, int64_t blocks,
                const DotTerm<T>* terms, int64_t first) {
  static constexpr void (*of[])(const DotRows<T>&, int64_t, const DotTerm<T>*, int64_t) = {dot_blocks<T, many + 1>...};
  of[width - 1](rows, blocks, terms, first);
}

/// All rows of A with all terms, in blocks of these as equal as can be.
template <class T>
void dots_of(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* next, int64_t count,
             const DotTerm<T>* terms) {
  if (count == 0) return;
  constexpr auto kinds = std::make_index_sequence<kDotTerms<T>>();
  const int64_t blocks = (count + kDotTerms<T> - 1) / kDotTerms<T>, width = count / blocks, wider = count % blocks;
  for (int64_t i = 0; i < rows; i += kDotRows) {
    const int64_t here = rows - i < kDotRows ? rows - i : kDotRows;
    const T* const following = i + here < rows ? a + (i + here) * lda : next;
    const bool first = 2 * wider > blocks;  // of both kinds of blocks the more fetch what follows
    const DotRows<T> block = {a + i * lda, lda, here, depth, nullptr},
                     fetching = {a + i * lda, lda, here, depth, following};
    if (wider > 0) dot_blocks<T>(kinds, width + 1, first ? fetching : block, wider, terms, i);
    dot_blocks<T>(kinds, width, first ? block : fetching, blocks - wider, terms + wider * (width + 1), i);
  }
}

}  // namespace
}  // namespace neuromod
