// Transposes of rows, in registers. For vector.cpp alone, as vector_registers.h.
#pragma once

#include "common/vector_registers.h"

namespace neuromod {
namespace {

/// A square of words that is transposed in registers, at most 8 x 8 of four bytes or 4 x 4 of eight.
template <class Word>
struct Block {
  static constexpr int64_t bytes = kRegisterBytes < 32 ? kRegisterBytes : 32, side = bytes / sizeof(Word);
  typedef Word Row __attribute__((vector_size(bytes)));

  /// By exchanging ever larger parts of neighbours.
  template <int64_t d = 1>
  static inline void transpose(Row* r) {
    if constexpr (d < side) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < side; ++i) {
        if (i & d) continue;
        const Row a = r[i], b = r[i + d];
        r[i] = upper<d>(a, b);
        r[i + d] = lower<d>(a, b);
      }
      transpose<2 * d>(r);
    }
  }
};

/// to(d)[r] = from[r][d] for d in [first, last); a null row is zeros. Rows need no alignment.
template <class Word, class From, class To>
inline void transpose_slice(int64_t rows, int64_t first, int64_t last, From from, To to) {
  constexpr int64_t side = Block<Word>::side;
  using Row = typename Block<Word>::Row;
  int64_t r = 0;
  for (; r + side <= rows; r += side) {
    const char* source[side];
    bool all = true;
    for (int64_t i = 0; i < side; ++i) {
      source[i] = reinterpret_cast<const char*>(from(r + i));
      all = all && source[i];
    }
    if (!all) break;
    const char* next[side];  // what follows is fetched meanwhile: of so many rows the processor foresees little
    for (int64_t i = 0; i < side; ++i) {
      const bool more = r + 2 * side <= rows;
      const auto row = reinterpret_cast<const char*>(from(more ? r + side + i : i));
      next[i] = row ? row + (more ? 0 : (last - first) * int64_t(sizeof(Word))) : source[i];
    }
    int64_t d = first;
    for (; d + side <= last; d += side) {
      constexpr int64_t line = 64 / sizeof(Word);
      for (int64_t i = 0; i < side && d % line == 0; ++i) __builtin_prefetch(next[i] + d * int64_t(sizeof(Word)));
      Row block[side];
      for (int64_t i = 0; i < side; ++i) block[i] = load_as<Row>(source[i] + d * int64_t(sizeof(Word)));
      Block<Word>::transpose(block);
      for (int64_t i = 0; i < side; ++i) __builtin_memcpy(to(d + i) + r, &block[i], sizeof(Row));
    }
    for (; d < last; ++d)
      for (int64_t i = 0; i < side; ++i) to(d)[r + i] = load_as<Word>(source[i] + d * int64_t(sizeof(Word)));
  }
  for (; r < rows; ++r) {
    const char* const source = reinterpret_cast<const char*>(from(r));
    for (int64_t d = first; d < last; ++d)
      to(d)[r] = source ? load_as<Word>(source + d * int64_t(sizeof(Word))) : Word(0);
  }
}

/// The same for all d in slices: narrow ones if the rows of `to` lie far apart, wide ones if those of `from` do.
template <class Word, int64_t slice, class From, class To>
inline void transpose_words(int64_t rows, int64_t depth, From from, To to) {
  for (int64_t d = 0; d < depth; d += slice)
    transpose_slice<Word>(rows, d, d + slice < depth ? d + slice : depth, from, to);
}

/// even[0], odd[0], even[1] ... as words
template <class Halves, size_t... i>
inline Block<uint32_t>::Row woven(Halves even, Halves odd, std::index_sequence<i...>) {
  return bits_as<Block<uint32_t>::Row>(__builtin_shufflevector(even, odd, (i % 2 * (sizeof...(i) / 2) + i / 2)...));
}

/// to(d)[r] = from(r)[d] of two bytes each, for d in [first, last): neighbouring rows are woven into words, and those
/// transposed.
template <class From, class To>
inline void transpose_halves(int64_t rows, int64_t first, int64_t last, From from, To to) {
  using Row = Block<uint32_t>::Row;
  constexpr int64_t side = Block<uint32_t>::side;
  typedef uint16_t Halves __attribute__((vector_size(2 * side)));
  const auto element = [](const char* row, int64_t d) { return load_as<uint16_t>(row + 2 * d); };
  int64_t r = 0;
  for (; r + 2 * side <= rows; r += 2 * side) {
    const char* source[2 * side];
    bool all = true;
    for (int64_t i = 0; i < 2 * side; ++i) {
      source[i] = reinterpret_cast<const char*>(from(r + i));
      all = all && source[i];
    }
    if (!all) break;
    int64_t d = first;
    for (; d + side <= last; d += side) {
      Row block[side];
      for (int64_t i = 0; i < side; ++i) {
        const auto even = load_as<Halves>(source[2 * i] + 2 * d), odd = load_as<Halves>(source[2 * i + 1] + 2 * d);
        block[i] = woven(even, odd, std::make_index_sequence<2 * side>());
      }
      Block<uint32_t>::transpose(block);
      for (int64_t i = 0; i < side; ++i) __builtin_memcpy(to(d + i) + r, &block[i], sizeof(Row));
    }
    for (; d < last; ++d)
      for (int64_t i = 0; i < 2 * side; ++i) to(d)[r + i] = element(source[i], d);
  }
  for (; r < rows; ++r) {
    const char* const source = reinterpret_cast<const char*>(from(r));
    for (int64_t d = first; d < last; ++d) to(d)[r] = source ? element(source, d) : uint16_t(0);
  }
}

template <class A>
using word_t = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;

}  // namespace
}  // namespace neuromod
