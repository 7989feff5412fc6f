// Plan stream of manifold_linear on the CPU: P is read once from memory, where it lies, and its rows do all their work
// while they are in cache: nothing is packed. 2 R L O I flop a contraction.
#pragma once

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/prefetch.h"
#include "common/scratch.h"
#include "common/vector.h"
#include "manifold_linear/manifold_linear.h"

namespace neuromod {

/// The rows on which each basis point acts, one after the other.
class StreamRows {
 public:
  explicit StreamRows(const ManifoldLinearParams& p) : first_(p.num_basis + 1), rows_(p.rows() * p.num_local) {
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t l = 0; l < p.num_local; ++l) first_[p.basis_point(b, l) + 1] += p.tokens;
    for (int64_t k = 0; k < p.num_basis; ++k) first_[k + 1] += first_[k];
    std::vector<int64_t> next(first_);
    for (int64_t r = 0; r < p.rows(); ++r)
      for (int64_t l = 0; l < p.num_local; ++l) rows_[next[p.basis_point(r / p.tokens, l)]++] = r;
  }
  int64_t count(int64_t k) const { return first_[k + 1] - first_[k]; }
  const int64_t* of(int64_t k) const { return rows_.data() + first_[k]; }

 private:
  std::vector<int64_t> first_, rows_;
};

/// y[r,o] = sum_k c (<P[k,o], x[r]> + beta[k,o]), k upwards, as dot products of rows of P with rows of x.
template <class T>
void manifold_linear_stream_forward(const ManifoldLinearParams& p) {
  using A = acc_t<T>;
  constexpr int64_t step = 16, tallest = 64;
  const int64_t R = p.rows(), I = p.in_features, jobs = 4 * at::get_num_threads();
  const int64_t height = std::clamp(ceil_div(p.out_features, jobs * step) * step, step, tallest);  // outputs at a time
  const int64_t blocks = ceil_div(p.out_features, height);
  const int64_t most = R <= 2 ? I : 2048 / int64_t(sizeof(T));  // of a row at a time, which stays in cache for others
  const StreamRows rows(p);
  const double seconds = 2e-11 * double(height * p.num_local * I) * double(R);
  parallel_ranges(blocks, seconds, [&](int64_t begin, int64_t end) {
    const Scratch<A> sums(R * height), products(R * height), bias(height), c(R);
    const Scratch<DotTerm<T>> terms(R);
    std::fill_n(bias.data(), height, A(0));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * height, outs = std::min(height, p.out_features - first);
      std::fill_n(sums.data(), R * height, A(0));
      for (int64_t k = 0; k < p.num_basis; ++k) {
        const int64_t count = rows.count(k), *const row = rows.of(k);
        if (p.bias) vectors<T>().widen(outs, p.bias.at<T>(k, first), bias.data());
        for (int64_t i = 0; i < count; ++i) {
          const int64_t b = row[i] / p.tokens;
          c[i] = *p.coeff.at<A>(b, p.entry(b, k));
          terms[i] = {p.input.at<T>(row[i]), &products[i * height]};
          std::copy_n(bias.data(), height, terms[i].to);
        }
        for (int64_t d = 0; d < I; d += most) {
          const bool deeper = d + most < I, more = deeper || k + 1 < p.num_basis;
          const T* const next = more ? p.basis.at<T>(deeper ? k : k + 1, first, deeper ? d + most : 0) : nullptr;
          vectors<T>().add_dots(outs, std::min(most, I - d), p.basis.at<T>(k, first, d), p.basis.stride[1], next, count,
                                terms.data());
          for (int64_t i = 0; i < count; ++i) terms[i].row += most;
        }
        for (int64_t i = 0, n; i < count; i += n) {  // rows that lie side by side
          for (n = 1; i + n < count && row[i + n] == row[i] + n;) ++n;
          vectors<T>().mix_rows(n, outs, height, &products[i * height], &c[i], &sums[row[i] * height], true);
        }
      }
      for (int64_t r = 0; r < R; ++r) vectors<T>().narrow(outs, &sums[r * height], p.output.at<T>(r, first));
    }
  });
}

/// dP and dbeta: a row of dP_k is a mix of rows of x, c g of each; in an update also of what stands there.
template <class T>
void manifold_linear_stream_outer(const ManifoldLinearBackwardParams& q) {
  using A = acc_t<T>;
  constexpr int64_t height = 32;  // rows of dP at a time
  const ManifoldLinearParams& p = q.p;
  const int64_t I = p.in_features, R = p.rows(), O = p.out_features;
  // Of so many columns x stays in cache meanwhile, and few enough lines of dP are fetched at a time.
  const int64_t wide =
      std::clamp<int64_t>(16384 / int64_t(sizeof(T)) / std::max<int64_t>(1, R), 512, 4096 / int64_t(sizeof(T)));
  const int64_t blocks = ceil_div(O, height);
  const StreamRows rows(p);
  parallel(p.num_basis * blocks, 1e-10 * double(height * I) * double(1 + R), [&](int64_t job) {
    const int64_t k = job / blocks, first = job % blocks * height, outs = std::min(height, O - first);
    const int64_t count = rows.count(k), *const row = rows.of(k), terms = count + q.accumulate;
    const Scratch<A> scaled(height * terms);
    const Scratch<const T*> x(count + 1);
    A g[height], bias[height] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = row[i] / p.tokens;
      const A c = *p.coeff.at<A>(b, p.entry(b, k));
      vectors<T>().widen(outs, p.output.at<T>(row[i], first), g);
      for (int64_t o = 0; o < outs; ++o) bias[o] += scaled[o * terms + i] = c * g[o];
    }
    for (int64_t o = 0; o < outs && q.accumulate; ++o) scaled[o * terms + count] = 1;
    if (q.grad_bias) vectors<T>().narrow(outs, bias, q.grad_bias.at<T>(k, first));
    if (!q.grad_basis || (count == 0 && q.accumulate)) return;
    for (int64_t d = 0; d < I; d += wide) {
      for (int64_t i = 0; i < count; ++i) x[i] = p.input.at<T>(row[i], d);
      for (int64_t o = 0; o < outs; ++o) {
        T* const to = q.grad_basis.at<T>(k, first + o, d);
        const int64_t cols = std::min(wide, I - d);
        if (q.accumulate && o + 2 < outs) prefetch(q.grad_basis.at<T>(k, first + o + 2, d), cols);
        x[count] = to;
        vectors<T>().mix(cols, terms, &scaled[o * terms], x.data(), to);
      }
    }
  });
}

/// dx and dc: each row of P meets all rows of x. Blocks of outputs, as many for any number of threads, have partial
/// sums of dx and dc of their own.
template <class T>
void manifold_linear_stream_rows(const ManifoldLinearBackwardParams& q) {
  using A = acc_t<T>;
  const ManifoldLinearParams& p = q.p;
  const int64_t I = p.in_features, R = p.rows(), L = p.num_local, K = p.num_basis;
  const int64_t blocks = std::min<int64_t>(16, p.out_features),
                height = ceil_div(p.out_features, std::max<int64_t>(1, blocks));
  const Scratch<A> dx(q.grad_input ? blocks * R * I : 0), dc(blocks * R * L);
  std::fill_n(dx.data(), q.grad_input ? blocks * R * I : 0, A(0));
  std::fill_n(dc.data(), blocks * R * L, A(0));
  parallel(blocks, 1e-10 * double(height * K * I), [&](int64_t block) {
    A g;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t o = block * height; o < std::min((block + 1) * height, p.out_features); ++o) {
        const T* const basis = p.basis.at<T>(k, o);
        for (int64_t r = 0; r < R; ++r) {
          const int64_t b = r / p.tokens, l = p.entry(b, k);
          if (l >= L) continue;
          vectors<T>().widen(1, p.output.at<T>(r, o), &g);
          const A scaled = g * *p.coeff.at<A>(b, l);
          if (q.grad_coeff) {
            A value = vectors<T>().dot(I, basis, p.input.at<T>(r));
            if (p.bias) vectors<T>().add_scaled(1, A(1), p.bias.at<T>(k, o), &value);
            dc[(block * R + r) * L + l] += g * value;
          }
          if (q.grad_input) vectors<T>().add_scaled(I, scaled, basis, &dx[(block * R + r) * I]);
        }
      }
    }
  });
  for (int64_t r = 0; r < R && q.grad_input; ++r) {
    for (int64_t block = 1; block < blocks; ++block)
      vectors<A>().add_scaled(I, A(1), &dx[(block * R + r) * I], &dx[r * I]);
    vectors<T>().narrow(I, &dx[r * I], q.grad_input.at<T>(r));
  }
  for (int64_t b = 0; b < p.batch && q.grad_coeff; ++b) {
    for (int64_t l = 0; l < L; ++l) {
      A sum = 0;
      for (int64_t t = 0; t < p.tokens; ++t)
        for (int64_t block = 0; block < blocks; ++block) sum += dc[(block * R + b * p.tokens + t) * L + l];
      *q.grad_coeff.at<A>(b, l) = sum;
    }
  }
}

template <class T>
void manifold_linear_stream_backward(const ManifoldLinearBackwardParams& q) {
  if (q.grad_input || q.grad_coeff) manifold_linear_stream_rows<T>(q);
  if (q.grad_basis || q.grad_bias) manifold_linear_stream_outer<T>(q);
}

}  // namespace neuromod
