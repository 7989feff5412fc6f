// Row operations of the CPU kernels: written once (vector.cpp), compiled for each instruction set, chosen on first use.
#pragma once

#include "common/element.h"
#include "fly_hash/fly_hash_vector.h"
#include "hadamard_rotate/hadamard_rotate_vector.h"
#include "manifold_step/manifold_step.h"

namespace neuromod {

/// A row, and where its products with others go.
template <class T>
struct DotTerm {
  const T* row;
  acc_t<T>* to;
};

/// Operations on rows of unit stride. Sums run in A, the accumulation type of T, and are rounded to T once. A null row
/// stands for zeros.
template <class T>
class VectorOps {
 public:
  using A = acc_t<T>;

  /// to[i] = double(from[i])
  virtual void to_float64(int64_t n, const T* from, double* to) const = 0;
  /// to[i] = A(from[i]) and to[i] = T(from[i])
  virtual void widen(int64_t n, const T* from, A* to) const = 0;
  virtual void narrow(int64_t n, const A* from, T* to) const = 0;
  /// to[i] = T(sum_j c[j] rows[j][i]), j in order; `to` may be one of the rows
  virtual void mix(int64_t n, int64_t terms, const A* c, const T* const* rows, T* to) const = 0;
  /// The same, written past the caches.
  virtual void mix_streamed(int64_t n, int64_t terms, const A* c, const T* const* rows, T* to) const = 0;
  /// The same, not rounded to T.
  virtual void mix_wide(int64_t n, int64_t terms, const A* c, const T* const* rows, A* to) const = 0;
  /// to[i] = T(A(to[i]) + from[i])
  virtual void add(int64_t n, const A* from, T* to) const = 0;
  /// to[i] += c from[i]
  virtual void add_scaled(int64_t n, A c, const T* from, A* to) const = 0;
  /// sum_i a[i] b[i]
  virtual A dot(int64_t n, const T* a, const T* b) const = 0;
  /// to[i] += sum_d a[i][d] row[d] for each of the terms, up to a multiple of 8 rows of A, which lie `lda` apart.
  /// They may come from memory: several are read side by side, which yields more, and others fetched meanwhile, at last
  /// those at `next`, if it is not null.
  virtual void add_dots(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* next, int64_t count,
                        const DotTerm<T>* terms) const = 0;

  /// C[rows, cols] = or += A B, the depth in order. Element (r, d) of A is a[r row + d step].
  virtual void product(int64_t rows, int64_t cols, int64_t depth, const A* a, int64_t row, int64_t step, const A* b,
                       int64_t ldb, A* c, int64_t ldc, bool add) const = 0;

  // Operands of tile products.
  /// to[d][r] = from[r][d], rows of `to` `stride` apart.
  virtual void transpose(int64_t rows, int64_t depth, const T* const* from, T* to, int64_t stride) const = 0;
  /// The same in the accumulation type.
  virtual void transpose_wide(int64_t rows, int64_t depth, const T* const* from, A* to, int64_t stride) const = 0;
  /// to[d / 2][r][d % 2] = from[r][d], pairs of rows of `to` 2 `stride` apart; an odd depth is completed by zeros.
  virtual void transpose_pairs(int64_t rows, int64_t depth, const T* const* from, T* to, int64_t stride) const = 0;
  /// to[2 i] = even[i], to[2 i + 1] = odd[i]
  virtual void interleave(int64_t n, const T* even, const T* odd, T* to) const = 0;
  /// to[i] = T(c[i] from[i])
  virtual void scale(int64_t n, const A* c, const A* from, T* to) const = 0;

  // What becomes of a tile product [rows, cols], rows `stride` apart; sums lie like it. Rows of either, and c of
  // columns, can be read and written up to a multiple of 16 columns.
  /// sum[r][n] = or += c[n] (product[r][n] + bias[r]); no bias if null
  virtual void mix_columns(int64_t rows, int64_t cols, int64_t stride, const A* product, const A* c, const A* bias,
                           A* sum, bool add) const = 0;
  /// sum[r][n] = or += c[r] product[r][n]
  virtual void mix_rows(int64_t rows, int64_t cols, int64_t stride, const A* product, const A* c, A* sum,
                        bool add) const = 0;
  /// to[r][n] = T(sum[r][n] + c[r] product[r][n]); no sum if null
  virtual void mix_last_rows(int64_t rows, int64_t cols, int64_t stride, const A* product, const A* c, const A* sum,
                             T* const* to) const = 0;
  /// out[r] = sum_n product[r][n] x[r][n]
  virtual void dot_rows(int64_t rows, int64_t cols, int64_t stride, const A* product, const T* const* x,
                        A* out) const = 0;
  /// sum_rn product[r][n] x[r][n], rows of x `x_stride` apart
  virtual A dot_tile(int64_t rows, int64_t cols, int64_t stride, const A* product, const T* x,
                     int64_t x_stride) const = 0;
  /// to[n][r] = T(sum[r][n])
  virtual void narrow_transposed(int64_t rows, int64_t cols, int64_t stride, const A* sum, T* const* to) const = 0;

  /// manifold_step_ on n elements of a parameter and its buffer, or null: their preconditioned gradient is
  /// sum_j c[j] rows[j][i], j in order.
  virtual void step(const ManifoldStepNumbers& p, int64_t n, int64_t terms, const A* c, const T* const* rows, T* param,
                    T* buffer) const = 0;

 protected:
  ~VectorOps() = default;
};

/// The operations as compiled for one instruction set.
struct VectorSet {
  const char* isa;
  const VectorOps<double>* float64;
  const VectorOps<float>* float32;
  const VectorOps<BFloat16>* bfloat16;
  const VectorOps<Float16>* float16;
  const FlyHashVectors* fly_hash;
  const HadamardVectors* hadamard;
};

/// Those for this processor.
const VectorSet& vector_set();

template <class T>
const VectorOps<T>& vectors() {
  if constexpr (std::is_same_v<T, double>) {
    return *vector_set().float64;
  } else if constexpr (std::is_same_v<T, float>) {
    return *vector_set().float32;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return *vector_set().bfloat16;
  } else {
    return *vector_set().float16;
  }
}

/// VectorOps::mix for a part of a result of `total` elements: past the caches, if it leaves them before it is read.
template <class T>
void mix_large(int64_t total, int64_t n, int64_t terms, const acc_t<T>* c, const T* const* rows, T* to) {
  constexpr int64_t large = int64_t(4) << 20;
  if (total * int64_t(sizeof(T)) >= large)
    vectors<T>().mix_streamed(n, terms, c, rows, to);
  else
    vectors<T>().mix(n, terms, c, rows, to);
}

/// Those of fly_hash, for elements of type T.
template <class T>
const FlyHashOps<acc_t<T>>& fly_hash_vectors() {
  if constexpr (std::is_same_v<T, double>) {
    return *vector_set().fly_hash->float64;
  } else {
    return *vector_set().fly_hash->float32;
  }
}

/// Those of hadamard_rotate.
template <class A>
const HadamardOps<A>& hadamard_vectors() {
  if constexpr (std::is_same_v<A, double>) {
    return *vector_set().hadamard->float64;
  } else {
    return *vector_set().hadamard->float32;
  }
}

}  // namespace neuromod
