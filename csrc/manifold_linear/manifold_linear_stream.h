// Plan stream of manifold_linear on the CPU: P is read once from memory, in order, and each row does all its work while
// it is in cache. 2 R L O I flop a contraction, as row operations.
#pragma once

#include <algorithm>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/vector.h"
#include "manifold_linear/manifold_linear.h"

namespace neuromod {

/// y[r,o] = sum_k c (<P[k,o], x[r]> + beta[k,o]), k upwards. Eight rows of P are read side by side: memory
/// yields more to several readers.
template <class T>
void manifold_linear_stream_forward(const ManifoldLinearParams& p) {
  using A = acc_t<T>;
  constexpr int64_t height = 8;
  const int64_t R = p.rows(), blocks = ceil_div(p.out_features, height);
  const double seconds = 1e-10 * double(height * p.num_basis * p.in_features);
  parallel_ranges(blocks, seconds, [&](int64_t begin, int64_t end) {
    const Scratch<A> sums(R * height);
    A value[height], bias[height] = {};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * height, outs = std::min(height, p.out_features - first);
      std::fill_n(sums.data(), R * height, A(0));
      for (int64_t k = 0; k < p.num_basis; ++k) {
        const T* rows[height];
        for (int64_t o = 0; o < outs; ++o) rows[o] = p.basis.at<T>(k, first + o);
        if (p.bias) vectors<T>().widen(outs, p.bias.at<T>(k, first), bias);
        for (int64_t r = 0; r < R; ++r) {
          const int64_t b = r / p.tokens, l = p.entry(b, k);
          if (l >= p.num_local) continue;
          vectors<T>().dots(p.in_features, outs, rows, p.input.at<T>(r), value);
          const A c = *p.coeff.at<A>(b, l);
          for (int64_t o = 0; o < outs; ++o) sums[r * height + o] += c * (value[o] + bias[o]);
        }
      }
      for (int64_t r = 0; r < R; ++r) vectors<T>().narrow(outs, &sums[r * height], p.output.at<T>(r, first));
    }
  });
}

/// One walk over the rows of P and dP serves all gradients. Blocks of outputs, as many for any number of threads, have
/// partial sums of dx and dc of their own.
template <class T>
void manifold_linear_stream_backward(const ManifoldLinearBackwardParams& q) {
  using A = acc_t<T>;
  const ManifoldLinearParams& p = q.p;
  const int64_t I = p.in_features, R = p.rows(), L = p.num_local, K = p.num_basis;
  const int64_t blocks = std::min<int64_t>(16, p.out_features),
                height = ceil_div(p.out_features, std::max<int64_t>(1, blocks));
  const Scratch<A> dx(q.grad_input ? blocks * R * I : 0), dc(blocks * R * L);
  std::fill_n(dx.data(), q.grad_input ? blocks * R * I : 0, A(0));
  std::fill_n(dc.data(), blocks * R * L, A(0));
  parallel(blocks, 1e-10 * double(height * K * I), [&](int64_t block) {
    const Scratch<A> sum(I), bias(K), c(R);
    const Scratch<const T*> rows(R);
    A g;
    for (int64_t o = block * height; o < std::min((block + 1) * height, p.out_features); ++o) {
      std::fill_n(bias.data(), K, A(0));
      for (int64_t k = 0; k < K; ++k) {
        const T* const basis = p.basis.at<T>(k, o);
        int64_t terms = 0;
        for (int64_t r = 0; r < R; ++r) {
          const int64_t b = r / p.tokens, l = p.entry(b, k);
          if (l >= L) continue;
          vectors<T>().widen(1, p.output.at<T>(r, o), &g);
          const A scaled = g * *p.coeff.at<A>(b, l);
          bias[k] += scaled;
          if (q.grad_coeff) {
            A value = vectors<T>().dot(I, basis, p.input.at<T>(r));
            if (p.bias) vectors<T>().add_scaled(1, A(1), p.bias.at<T>(k, o), &value);
            dc[(block * R + r) * L + l] += g * value;
          }
          if (q.grad_input) vectors<T>().add_scaled(I, scaled, basis, &dx[(block * R + r) * I]);
          c[terms] = scaled, rows[terms++] = p.input.at<T>(r);
        }
        if (q.grad_basis && q.accumulate) {
          vectors<T>().mix_wide(I, terms, c.data(), rows.data(), sum.data());
          vectors<T>().add(I, sum.data(), q.grad_basis.at<T>(k, o));
        } else if (q.grad_basis) {
          mix_large(K * p.out_features * I, I, terms, c.data(), rows.data(), q.grad_basis.at<T>(k, o));
        }
        if (q.grad_bias) vectors<T>().narrow(1, &bias[k], q.grad_bias.at<T>(k, o));
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

}  // namespace neuromod
