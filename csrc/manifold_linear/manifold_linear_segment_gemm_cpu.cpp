// Plan expand_gemm of manifold_linear on the CPU with local support, float32 and float64: rows are sorted into
// segments, and torch's matrix product takes, for each basis point, the rows on which it acts. 2 L B O I flop a
// product.
//
// An entry is a row and one of its L basis points; entries are sorted by basis point, then by row, and their products
// stored: x P_k^T forward, g P_k for dx and dc. Each row is then mixed from its entries. For dP_k = (c g)^T x, entries
// hold c g.
// Sums: as torch's product takes them, then over the entries of a row, or the tokens of a sample, upwards.
#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/torch_product.h"
#include "manifold_linear/manifold_linear_rows.h"

namespace neuromod {
namespace {

template <class A>
class SegmentGemm {
  /// Neighbouring positions on which one basis point acts.
  struct Range {
    int64_t point, first, count, entry;  // its first position, and entry
  };

 public:
  explicit SegmentGemm(const ManifoldLinearParams& p)
      : p_(p), rows_(p, 1), N_(p.rows()), L_(p.num_local), O_(p.out_features), I_(p.in_features) {
    start_.resize(rows_.segments().size() * L_);
    int64_t entries = 0;
    for (int64_t k = 0; k < p.num_basis; ++k) {
      for (size_t s = 0; s < rows_.segments().size(); ++s) {
        const auto& segment = rows_.segments()[s];
        const int64_t l = rows_.entry(int64_t(s), k);
        if (l >= L_ || segment.count == 0) continue;
        start_[s * L_ + l] = entries - segment.first;
        if (!ranges_.empty() && ranges_.back().point == k &&
            ranges_.back().first + ranges_.back().count == segment.first)
          ranges_.back().count += segment.count;
        else
          ranges_.push_back({k, segment.first, segment.count, entries});
        entries += segment.count;
      }
    }
  }

  void forward() const {
    const Scratch<A> x(N_ * I_), products(N_ * L_ * O_);
    gather(p_.input, I_, x.data());
    parallel_products(int64_t(ranges_.size()), [&](int64_t i) {
      const Range& r = ranges_[i];
      torch_product(of_entries(products.data(), r, O_), of_rows(x.data(), r, I_), point(p_.basis, r.point).t(), false);
    });
    each_row([&](int64_t s, int64_t position, int64_t row) {
      const Mixture m(*this, s, position, row, products.data(), O_);
      A* const y = p_.output.template at<A>(row);
      vectors<A>().mix(O_, L_, m.c.data(), m.terms.data(), y);
      for (int64_t l = 0; l < L_ && p_.bias; ++l)
        vectors<A>().add_scaled(O_, m.c[l], p_.bias.template at<A>(p_.basis_point(row / p_.tokens, l)), y);
    });
  }

  void backward(const ManifoldLinearBackwardParams& q) const {
    const Scratch<A> g(N_ * O_);
    gather(p_.output, O_, g.data());
    if (q.grad_input || q.grad_coeff) rows_pass(q, g.data());
    if (q.grad_basis || q.grad_bias) basis_pass(q, g.data());
  }

 private:
  /// What a row is mixed from: its coefficients and entries.
  struct Mixture {
    Mixture(const SegmentGemm& of, int64_t s, int64_t position, int64_t row, const A* entries, int64_t cols)
        : c(of.L_), terms(of.L_) {
      for (int64_t l = 0; l < of.L_; ++l) {
        c[l] = *of.p_.coeff.template at<A>(row / of.p_.tokens, l);
        terms[l] = entries + (of.start_[s * of.L_ + l] + position) * cols;
      }
    }
    const Scratch<A> c;
    const Scratch<const A*> terms;
  };

  /// Z = g P_k: dx = sum_l c_l Z_l, dc_l = sum over tokens of <Z_l, x> + <g, beta_k>.
  void rows_pass(const ManifoldLinearBackwardParams& q, const A* g) const {
    const Scratch<A> products(N_ * L_ * I_), dots(q.grad_coeff ? N_ * L_ : 0);
    parallel_products(int64_t(ranges_.size()), [&](int64_t i) {
      const Range& r = ranges_[i];
      torch_product(of_entries(products.data(), r, I_), of_rows(g, r, O_), point(p_.basis, r.point), false);
    });
    each_row([&](int64_t s, int64_t position, int64_t row) {
      const Mixture m(*this, s, position, row, products.data(), I_);
      if (q.grad_input) vectors<A>().mix(I_, L_, m.c.data(), m.terms.data(), q.grad_input.template at<A>(row));
      for (int64_t l = 0; l < L_ && q.grad_coeff; ++l) {
        A& dot = dots[row * L_ + l];
        dot = vectors<A>().dot(I_, m.terms[l], p_.input.template at<A>(row));
        if (p_.bias)
          dot += vectors<A>().dot(O_, g + position * O_, p_.bias.template at<A>(p_.basis_point(row / p_.tokens, l)));
      }
    });
    for (int64_t b = 0; b < p_.batch && q.grad_coeff; ++b) {
      for (int64_t l = 0; l < L_; ++l) {
        A sum = 0;
        for (int64_t t = 0; t < p_.tokens; ++t) sum += dots[(b * p_.tokens + t) * L_ + l];
        *q.grad_coeff.template at<A>(b, l) = sum;
      }
    }
  }

  /// dP_k = (c g)^T x and dbeta_k = sum of c g, over the entries of basis point k.
  void basis_pass(const ManifoldLinearBackwardParams& q, const A* g) const {
    const Scratch<A> x(q.grad_basis ? N_ * I_ : 0), scaled(N_ * L_ * O_);
    if (q.grad_basis) gather(p_.input, I_, x.data());
    each_row([&](int64_t s, int64_t position, int64_t row) {
      const A* const from = g + position * O_;
      for (int64_t l = 0; l < L_; ++l)
        vectors<A>().mix(O_, 1, p_.coeff.template at<A>(row / p_.tokens, l), &from,
                         scaled.data() + (start_[s * L_ + l] + position) * O_);
    });
    parallel_products(p_.num_basis, [&](int64_t k) {
      bool add = q.accumulate;
      if (q.grad_bias) std::fill_n(q.grad_bias.template at<A>(k), O_, A(0));
      for (const Range& r : ranges_) {
        if (r.point != k) continue;
        const Matrix<A> entries = of_entries(scaled.data(), r, O_);
        if (q.grad_basis) torch_product(point(q.grad_basis, k), entries.t(), of_rows(x.data(), r, I_), add);
        for (int64_t i = 0; i < r.count && q.grad_bias; ++i)
          vectors<A>().add(O_, entries.data + i * O_, q.grad_bias.template at<A>(k));
        add = true;
      }
      for (int64_t o = 0; o < O_ && q.grad_basis && !add; ++o) std::fill_n(q.grad_basis.template at<A>(k, o), I_, A(0));
    });
  }

  Matrix<A> point(const View& basis, int64_t k) const {
    return matrix(basis.template at<A>(k), O_, I_, basis.stride[1]);
  }
  static Matrix<A> of_rows(const A* sorted, const Range& r, int64_t cols) {
    return matrix(sorted + r.first * cols, r.count, cols, cols);
  }
  static Matrix<A> of_entries(const A* entries, const Range& r, int64_t cols) {
    return matrix(entries + r.entry * cols, r.count, cols, cols);
  }

  /// Rows in the order of segments.
  void gather(const View& matrix, int64_t cols, A* to) const {
    parallel(N_, 1e-10 * double(cols), [&](int64_t i) {
      const A* row;
      rows_.pointers(matrix, i, 1, 0, &row);
      std::copy_n(row, cols, to + i * cols);
    });
  }

  /// Calls f(segment, position, row) for every row.
  template <class F>
  void each_row(F f) const {
    const auto& segments = rows_.segments();
    parallel_ranges(N_, 2e-10 * double(L_ * std::max(O_, I_)), [&](int64_t begin, int64_t end) {
      int64_t s = 0;
      for (int64_t i = begin; i < end; ++i) {
        while (i >= segments[s].end) ++s;
        f(s, i, rows_.row(i));
      }
    });
  }

  const ManifoldLinearParams& p_;
  const RowOrder rows_;
  const int64_t N_, L_, O_, I_;
  std::vector<Range> ranges_;
  std::vector<int64_t> start_;  // of a segment's l-th entries, less its first position
};

}  // namespace

void manifold_linear_segment_gemm_forward(const ManifoldLinearParams& p) {
  dispatch_wide(p.dtype, [&](auto tag) { SegmentGemm<typename decltype(tag)::type>(p).forward(); });
}

void manifold_linear_segment_gemm_backward(const ManifoldLinearBackwardParams& q) {
  dispatch_wide(q.p.dtype, [&](auto tag) { SegmentGemm<typename decltype(tag)::type>(q.p).backward(q); });
}

}  // namespace neuromod
