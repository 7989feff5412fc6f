// interpolate_weights on the CPU: the length is cut into chunks that stay in cache; each output is summed over its
// terms in order in the accumulation type and written once.
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/vector.h"
#include "interpolate_weights/interpolate_weights.h"

namespace neuromod {
void interpolate_weights_cpu(const InterpolateWeightsParams& p) {
  dispatch_dtype<Float16, BFloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    constexpr int64_t chunk = 2048;
    const int64_t chunks = ceil_div(p.length, chunk);
    const double seconds = 1e-10 * double(std::min(p.length, chunk) * (p.terms + 1));
    parallel_ranges(chunks * p.rows, seconds, [&](int64_t begin, int64_t end) {
      const Scratch<const T*> in(p.terms);
      const Scratch<A> c(p.terms);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t m = i % p.rows, first = i / p.rows * chunk, n = std::min(chunk, p.length - first);
        for (int64_t j = 0; j < p.terms; ++j) {
          in[j] = p.in.at<T>(j, first);
          c[j] = *p.mix.at<A>(m, j);
        }
        mix_large(p.rows * p.length, n, p.terms, c.data(), in.data(), p.out.at<T>(m, first));
      }
    });
  });
}

// A chunk of all gradients meets every basis point, and makes the chunk of the basis points' gradients, while in cache.
// A fixed number of parts take so many chunks after one another; their sums are folded in order.
void interpolate_weights_backward_cpu(const InterpolateWeightsBackwardParams& p) {
  dispatch_dtype<Float16, BFloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    constexpr int64_t cache = 1 << 20, most_parts = 64;
    const int64_t B = p.batch, K = p.num_basis;
    const int64_t fitting = std::min(cache / (B * int64_t(sizeof(T))), ceil_div(p.length, most_parts));
    const int64_t chunk = std::clamp<int64_t>(fitting / 64 * 64, 256, 2048);
    const int64_t chunks = ceil_div(p.length, chunk), parts = std::clamp<int64_t>(chunks, 1, most_parts);
    const Scratch<A> partial(parts * B * K);
    parallel(parts, 1e-10 * double(p.length / parts * B * (2 * K + 1)), [&](int64_t part) {
      A* const sums = partial.data() + part * B * K;
      std::fill_n(sums, B * K, A(0));
      const Scratch<const T*> grads(B);
      const Scratch<A> c(B);
      for (int64_t i = part * chunks / parts; i < (part + 1) * chunks / parts; ++i) {
        const int64_t first = i * chunk, n = std::min(chunk, p.length - first);
        for (int64_t b = 0; b < B; ++b) {
          grads[b] = p.grad.at<T>(b, first);
          for (int64_t k = 0; k < K; ++k) sums[b * K + k] += vectors<T>().dot(n, grads[b], p.basis.at<T>(k, first));
        }
        if (!p.grad_basis) continue;
        for (int64_t k = 0; k < K; ++k) {
          for (int64_t b = 0; b < B; ++b) c[b] = *p.coeff.at<A>(b, k);
          mix_large(K * p.length, n, B, c.data(), grads.data(), p.grad_basis.at<T>(k, first));
        }
      }
    });
    for (int64_t i = 0; i < B * K; ++i) {
      A sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += partial[part * B * K + i];
      static_cast<A*>(p.grad_coeff)[i] = sum;
    }
  });
}

}  // namespace neuromod
