// The product of two matrices, in blocks whose sums stay in registers. For vector.cpp alone, as vector_registers.h.
#pragma once

#include <utility>

#include "common/vector_registers.h"

namespace neuromod {
namespace {

/// C = or += A B, one block of it. Element (r, d) of A is a[r row + d step]; rows of B and C are ldb and ldc apart.
template <class A>
struct ProductBlock {
  int64_t depth;
  const A* a;
  int64_t row, step;
  const A* b;
  int64_t ldb;
  A* c;
  int64_t ldc;
  bool add;
};

// So many rows, and registers of columns, of sums, as there is room for.
#if defined(__AVX512F__)
constexpr int64_t kProductRows = 12, kProductRegisters = 2;
#else
constexpr int64_t kProductRows = 6, kProductRegisters = 2;
#endif

/// So many rows, and registers of columns; the depth in order.
template <class A, int64_t rows, int64_t many>
[[gnu::noinline]] void product_block(const ProductBlock<A>& p) {
  const int64_t row = p.row, step = p.step, ldb = p.ldb;
  const A *const a = p.a, *const b = p.b;
  Register<A> sum[rows][many];
#pragma GCC unroll 16
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int64_t i = 0; i < many; ++i) {
      A* const to = p.c + r * p.ldc + i * kRegister<A>;
      if (!p.add) __builtin_prefetch(to, 1);
      sum[r][i] = p.add ? load_as<Register<A>>(to) : Register<A>{};
    }
  const auto add_step = [&](int64_t d) __attribute__((always_inline)) {
    Register<A> right[many];
    for (int64_t i = 0; i < many; ++i) right[i] = load_as<Register<A>>(b + d * ldb + i * kRegister<A>);
#pragma GCC unroll 16
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int64_t i = 0; i < many; ++i) sum[r][i] += right[i] * a[r * row + d * step];
  };
  constexpr int64_t line = 64 / sizeof(A), ahead = 8 * line;
  int64_t d = 0;
  for (; d + line <= p.depth; d += line) {
    if (step == 1)  // rows may come from memory, and be too many for the processor to foresee
      for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(a + r * row + d + ahead);
    for (int64_t i = 0; i < line; ++i) add_step(d + i);
  }
  for (; d < p.depth; ++d) add_step(d);
#pragma GCC unroll 16
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int64_t i = 0; i < many; ++i)
      __builtin_memcpy(p.c + r * p.ldc + i * kRegister<A>, &sum[r][i], sizeof(sum[r][i]));
}

/// The same for any number of rows up to kProductRows.
template <class A, int64_t many, size_t... rows>
void product_block(std::index_sequence<rows...>, int64_t count, const ProductBlock<A>& p) {
  static constexpr void (*blocks[])(const ProductBlock<A>&) = {product_block<A, rows + 1, many>...};
  blocks[count - 1](p);
}
template <int64_t many, class A>
void product_block(int64_t rows, const ProductBlock<A>& p) {
  product_block<A, many>(std::make_index_sequence<kProductRows>(), rows, p);
}

/// Less than a register of columns, from a copy of B that is completed.
template <class A>
void product_rest(int64_t rows, int64_t cols, const ProductBlock<A>& p) {
  constexpr int64_t slice = 128, lanes = kRegister<A>;
  A right[slice * lanes], sum[kProductRows * lanes];
  for (int64_t d = 0; d == 0 || d < p.depth; d += slice) {
    const int64_t length = p.depth - d < slice ? p.depth - d : slice;
    for (int64_t i = 0; i < length; ++i)
      for (int64_t n = 0; n < lanes; ++n) right[i * lanes + n] = n < cols ? p.b[(d + i) * p.ldb + n] : A(0);
    product_block<1, A>(rows, {length, p.a + d * p.step, p.row, p.step, right, lanes, sum, lanes, false});
    for (int64_t r = 0; r < rows; ++r) {
      A* const to = p.c + r * p.ldc;
      for (int64_t n = 0; n < cols; ++n) to[n] = sum[r * lanes + n] + (p.add || d > 0 ? to[n] : A(0));
    }
  }
}

/// rows x cols of C, in blocks of rows as equal as can be, since few rows leave the processor waiting.
template <class A>
void product_of(int64_t rows, int64_t cols, ProductBlock<A> p) {
  for (int64_t blocks = (rows + kProductRows - 1) / kProductRows; blocks > 0; --blocks) {
    const int64_t count = (rows + blocks - 1) / blocks;
    ProductBlock<A> block = p;
    int64_t left = cols;
    const auto pass = [&](int64_t lanes) {
      left -= lanes * kRegister<A>;
      block.b += lanes * kRegister<A>;
      block.c += lanes * kRegister<A>;
    };
    for (; left >= kProductRegisters * kRegister<A>; pass(kProductRegisters))
      product_block<kProductRegisters>(count, block);
    for (; left >= kRegister<A>; pass(1)) product_block<1>(count, block);
    if (left > 0) product_rest(count, left, block);
    rows -= count;
    p.a += count * p.row;
    p.c += count * p.ldc;
  }
}

}  // namespace
}  // namespace neuromod
