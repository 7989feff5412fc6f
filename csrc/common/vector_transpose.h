// Transposes of rows, in registers. For vector.cpp alone, as vector_lanes.h.
#pragma once

#include "common/vector_lanes.h"

namespace neuromod {
namespace {

// 8 x 8 words, or 4 x 4 of eight bytes, are transposed in registers, by exchanging ever larger parts of neighbours.
template <class Word>
struct Block;
template <>
struct Block<uint32_t> {
  static constexpr int side = 8;
  typedef uint32_t Row __attribute__((vector_size(32)));
  static inline void transpose(Row (&r)[8]) {
    Row t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
      t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        r[i + j] = __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + j + 2] = __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
      }
    for (int j = 0; j < 4; ++j) {
      t[j] = __builtin_shufflevector(r[j], r[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
      t[j + 4] = __builtin_shufflevector(r[j], r[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};
template <>
struct Block<uint64_t> {
  static constexpr int side = 4;
  typedef uint64_t Row __attribute__((vector_size(32)));
  static inline void transpose(Row (&r)[4]) {
    Row t[4];
    for (int i = 0; i < 4; i += 2) {
      t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 4, 2, 6);
      t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 1, 5, 3, 7);
    }
    for (int j = 0; j < 2; ++j) {
      r[j] = __builtin_shufflevector(t[j], t[j + 2], 0, 1, 4, 5);
      r[j + 2] = __builtin_shufflevector(t[j], t[j + 2], 2, 3, 6, 7);
    }
  }
};

/// to(d)[r] = from[r][d] for d in [first, last); a null row is zeros. Rows need no alignment.
template <class Word, class From, class To>
inline void transpose_slice(int64_t rows, int64_t first, int64_t last, From from, To to) {
  constexpr int side = Block<Word>::side;
  using Row = typename Block<Word>::Row;
  int64_t r = 0;
  for (; r + side <= rows; r += side) {
    const char* source[side];
    bool all = true;
    for (int i = 0; i < side; ++i) {
      source[i] = reinterpret_cast<const char*>(from(r + i));
      all = all && source[i];
    }
    if (!all) break;
    const char* next[side];  // what follows is fetched meanwhile: of so many rows the processor foresees little
    for (int i = 0; i < side; ++i) {
      const bool more = r + 2 * side <= rows;
      const auto row = reinterpret_cast<const char*>(from(more ? r + side + i : i));
      next[i] = row ? row + (more ? 0 : (last - first) * int64_t(sizeof(Word))) : source[i];
    }
    int64_t d = first;
    for (; d + side <= last; d += side) {
      constexpr int64_t line = 64 / sizeof(Word);
      for (int i = 0; i < side && d % line == 0; ++i) __builtin_prefetch(next[i] + d * int64_t(sizeof(Word)));
      Row block[side];
      for (int i = 0; i < side; ++i) block[i] = load_as<Row>(source[i] + d * int64_t(sizeof(Word)));
      Block<Word>::transpose(block);
      for (int i = 0; i < side; ++i) __builtin_memcpy(to(d + i) + r, &block[i], sizeof(Row));
    }
    for (; d < last; ++d)
      for (int i = 0; i < side; ++i) to(d)[r + i] = load_as<Word>(source[i] + d * int64_t(sizeof(Word)));
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

/// to(d)[r] = from(r)[d] of two bytes each, for d in [first, last): neighbouring rows are woven into words, and those
/// transposed.
template <class From, class To>
inline void transpose_halves(int64_t rows, int64_t first, int64_t last, From from, To to) {
  typedef uint16_t Halves __attribute__((vector_size(16)));
  typedef uint16_t Woven __attribute__((vector_size(32)));
  using Row = Block<uint32_t>::Row;
  constexpr int side = Block<uint32_t>::side;
  const auto element = [](const char* row, int64_t d) { return load_as<uint16_t>(row + 2 * d); };
  int64_t r = 0;
  for (; r + 2 * side <= rows; r += 2 * side) {
    const char* source[2 * side];
    bool all = true;
    for (int i = 0; i < 2 * side; ++i) {
      source[i] = reinterpret_cast<const char*>(from(r + i));
      all = all && source[i];
    }
    if (!all) break;
    int64_t d = first;
    for (; d + side <= last; d += side) {
      Row block[side];
      for (int i = 0; i < side; ++i) {
        const auto even = load_as<Halves>(source[2 * i] + 2 * d), odd = load_as<Halves>(source[2 * i + 1] + 2 * d);
        const Woven woven = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
        __builtin_memcpy(&block[i], &woven, sizeof(Row));
      }
      Block<uint32_t>::transpose(block);
      for (int i = 0; i < side; ++i) __builtin_memcpy(to(d + i) + r, &block[i], sizeof(Row));
    }
    for (; d < last; ++d)
      for (int i = 0; i < 2 * side; ++i) to(d)[r + i] = element(source[i], d);
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
