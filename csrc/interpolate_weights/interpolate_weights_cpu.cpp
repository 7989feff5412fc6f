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
        vectors<T>().mix(n, p.terms, c.data(), in.data(), p.out.at<T>(m, first));
      }
    });
  });
}

namespace {

void grad_coeff_cpu(const InterpolateWeightsBackwardParams& p) {
  dispatch_dtype<Float16, BFloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    constexpr int64_t chunk = 4096;  // of a gradient, which meets every basis point while in cache
    const int64_t K = p.num_basis, chunks = ceil_div(p.length, chunk), parts = std::clamp<int64_t>(chunks, 1, 16);
    const Scratch<A> partial(p.batch * parts * K);
    const double seconds = 1e-10 * double(p.length / parts * (K + 1));
    parallel(p.batch * parts, seconds, [&](int64_t i) {
      const int64_t b = i / parts;
      A* const sum = partial.data() + i * K;
      std::fill_n(sum, K, A(0));
      for (int64_t first = i % parts * chunk; first < p.length; first += parts * chunk)
        for (int64_t k = 0; k < K; ++k)
          sum[k] +=
              vectors<T>().dot(std::min(chunk, p.length - first), p.grad.at<T>(b, first), p.basis.at<T>(k, first));
    });
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t k = 0; k < K; ++k) {
        A sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += partial[(b * parts + part) * K + k];
        static_cast<A*>(p.grad_coeff)[b * K + k] = sum;
      }
    }
  });
}

}  // namespace

void interpolate_weights_backward_cpu(const InterpolateWeightsBackwardParams& p) {
  grad_coeff_cpu(p);
  if (!p.grad_basis) return;
  const View transposed{p.coeff.data, {p.coeff.stride[1], p.coeff.stride[0], 0}};
  interpolate_weights_cpu({p.dtype, p.num_basis, p.batch, p.length, transposed, p.grad, p.grad_basis});
}

}  // namespace neuromod
