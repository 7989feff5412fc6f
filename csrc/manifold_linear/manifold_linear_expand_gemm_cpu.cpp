// Plan expand_gemm of manifold_linear on the CPU, samples of one row without local support: torch's matrix product of
// all rows with P as it lies. It comes closer to the machine than tiles do where a layer is large, and starts faster.
// Of bfloat16, whose products are rounded, updates alone: there only C is rounded, as in plan expand, and what is
// added.
//
// Forward: the products x P_k^T of a block of rows, side by side, mixed row by row.
// Backward: with C = (c_k g) side by side, dP = C^T x and dx = C P; if dc is asked for, Z = g P_k instead, which yields
// both dx += c_k Z and dc_k = <Z, x>. 2 K B O I flop a product; products and C are written and read once.
// Sums: as torch's product takes them, then over k, or blocks of samples, upwards.
#include <vector>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/torch_product.h"
#include "common/vector.h"
#include "manifold_linear/manifold_linear_plan.h"

namespace neuromod {
namespace {

constexpr int64_t kMiB = int64_t(1) << 20;
constexpr int64_t kFewestRows = 512;

template <class T>
class ExpandGemm {
  using A = acc_t<T>;

 public:
  explicit ExpandGemm(const ManifoldLinearParams& p) : p_(p), K_(p.num_basis), O_(p.out_features), I_(p.in_features) {}

  void forward() const {
    // What is written of a block stays in cache, unless its rows are so few that P is packed too often.
    each_block(kMiB, K_ * O_, [&](Rows rows) {
      const Scratch<T> products(rows.count * K_ * O_);
      for (const Points& points : points_of(p_.basis))
        torch_product(columns(products.data(), rows, points), of_rows(p_.input, rows, I_), points.matrix.t(), false);
      parallel_ranges(rows.count, 2e-10 * double(K_ * O_),
                      [&](int64_t begin, int64_t end) { mix(rows, begin, end, products.data()); });
    });
  }

  void backward(const ManifoldLinearBackwardParams& q) const {
    each_block(8 * kMiB, std::max(K_ * O_, I_), [&](Rows rows) {
      const bool add = rows.first > 0;
      if (q.grad_coeff) products_pass(q, rows);
      if (q.grad_bias) bias_pass(q, rows, add);
      const bool input = q.grad_input && !q.grad_coeff;
      if (!input && !q.grad_basis) return;
      const Scratch<T> scaled(rows.count * K_ * O_);
      scale(rows, scaled.data());
      if (q.grad_basis) basis_pass(q, rows, scaled.data(), q.accumulate || add);
      if (input)
        for (const Points& points : points_of(p_.basis))
          torch_product(of_rows(q.grad_input, rows, I_), columns(scaled.data(), rows, points), points.matrix,
                        points.first > 0);
    });
  }

  /// All samples at once, whose sum is rounded once.
  void update(const ManifoldLinearBackwardParams& q) const {
    const Rows rows{0, p_.batch};
    const Scratch<T> scaled(rows.count * K_ * O_);
    scale(rows, scaled.data());
    basis_pass(q, rows, scaled.data(), true);
  }

 private:
  struct Rows {
    int64_t first, count;
  };
  /// Basis points [first, first + count), one below the other.
  struct Points {
    int64_t first, count;
    Matrix<T> matrix;  // [count O, I]
  };

  /// All at once, or one by one if they lie apart.
  std::vector<Points> points_of(const View& basis) const {
    const int64_t count = basis.stride[0] == O_ * basis.stride[1] ? K_ : 1;
    std::vector<Points> points;
    for (int64_t k = 0; k < K_; k += count)
      points.push_back({k, count, matrix(basis.at<T>(k), count * O_, I_, basis.stride[1])});
    return points;
  }

  /// Their columns of a matrix that has O for each basis point.
  Matrix<T> columns(const T* data, Rows rows, const Points& points) const {
    return matrix(data + points.first * O_, rows.count, points.count * O_, K_ * O_);
  }
  Matrix<T> of_rows(const View& from, Rows rows, int64_t cols) const {
    return matrix(from.at<T>(rows.first), rows.count, cols, from.stride[0]);
  }

  /// Calls f for blocks of samples, `cols` numbers of each of which take about so much memory.
  template <class F>
  void each_block(int64_t bytes, int64_t cols, F f) const {
    const int64_t most = std::max(kFewestRows, bytes / std::max<int64_t>(1, cols * int64_t(sizeof(T))));
    const int64_t size = ceil_div(p_.batch, ceil_div(p_.batch, most));
    for (int64_t first = 0; first < p_.batch; first += size) f(Rows{first, std::min(size, p_.batch - first)});
  }

  /// y[b] = sum_k c[b,k] (products[b,k] + beta[k]) for rows [begin, end) of a block.
  void mix(Rows rows, int64_t begin, int64_t end, const T* products) const {
    const Scratch<A> c(K_);
    const Scratch<const T*> terms(K_);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = rows.first + r;
      for (int64_t k = 0; k < K_; ++k) c[k] = *p_.coeff.at<A>(b, k), terms[k] = products + (r * K_ + k) * O_;
      vectors<T>().mix(O_, K_, c.data(), terms.data(), p_.output.at<T>(b));
      for (int64_t k = 0; k < K_ && p_.bias; ++k)
        vectors<T>().add_scaled(O_, c[k], p_.bias.at<T>(k), p_.output.at<T>(b));
    }
  }

  /// dP = C^T x
  void basis_pass(const ManifoldLinearBackwardParams& q, Rows rows, const T* scaled, bool add) const {
    for (const Points& points : points_of(q.grad_basis))
      torch_product(points.matrix, columns(scaled, rows, points).t(), of_rows(p_.input, rows, I_), add);
  }

  /// dbeta = c^T g
  void bias_pass(const ManifoldLinearBackwardParams& q, Rows rows, bool add) const {
    const Scratch<T> c(rows.count * K_);
    for (int64_t r = 0; r < rows.count; ++r)
      for (int64_t k = 0; k < K_; ++k) c[r * K_ + k] = *p_.coeff.at<A>(rows.first + r, k);
    torch_product(matrix(q.grad_bias.at<T>(0), K_, O_, q.grad_bias.stride[0]), matrix(c.data(), rows.count, K_, K_).t(),
                  of_rows(p_.output, rows, O_), add);
  }

  /// to[b,k] = c[b,k] g[b]
  void scale(Rows rows, T* to) const {
    parallel(rows.count, 2e-10 * double(K_ * O_), [&](int64_t r) {
      const T* const g = p_.output.at<T>(rows.first + r);
      for (int64_t k = 0; k < K_; ++k)
        vectors<T>().mix(O_, 1, p_.coeff.at<A>(rows.first + r, k), &g, to + (r * K_ + k) * O_);
    });
  }

  /// dc, and dx.
  void products_pass(const ManifoldLinearBackwardParams& q, Rows rows) const {
    const Scratch<T> products(rows.count * I_);
    const Matrix<T> grad = of_rows(p_.output, rows, O_), product = matrix(products.data(), rows.count, I_, I_);
    for (int64_t k = 0; k < K_; ++k) {
      torch_product(product, grad, matrix(p_.basis.at<T>(k), O_, I_, p_.basis.stride[1]), false);
      parallel(rows.count, 4e-10 * double(I_), [&](int64_t r) {
        const int64_t b = rows.first + r;
        const T* const row = &products[r * I_];
        A dot = vectors<T>().dot(I_, row, p_.input.at<T>(b));
        if (p_.bias) dot += vectors<T>().dot(O_, p_.output.at<T>(b), p_.bias.at<T>(k));
        *q.grad_coeff.at<A>(b, k) = dot;
        if (!q.grad_input) return;
        T* const dx = q.grad_input.at<T>(b);
        k == 0 ? vectors<T>().mix(I_, 1, p_.coeff.at<A>(b, k), &row, dx)
               : vectors<T>().add_scaled(I_, *p_.coeff.at<A>(b, k), row, dx);
      });
    }
  }

  const ManifoldLinearParams& p_;
  const int64_t K_, O_, I_;
};

}  // namespace

void manifold_linear_expand_gemm_forward(const ManifoldLinearParams& p) {
  if (p.index) return manifold_linear_segment_gemm_forward(p);
  dispatch_wide(p.dtype, [&](auto tag) { ExpandGemm<typename decltype(tag)::type>(p).forward(); });
}

void manifold_linear_expand_gemm_backward(const ManifoldLinearBackwardParams& q) {
  if (q.p.index) return manifold_linear_segment_gemm_backward(q);
  if (q.p.dtype == DType::bfloat16) return ExpandGemm<BFloat16>(q.p).update(q);
  dispatch_wide(q.p.dtype, [&](auto tag) { ExpandGemm<typename decltype(tag)::type>(q.p).backward(q); });
}

}  // namespace neuromod
