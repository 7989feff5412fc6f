// interpolate_weights on the CPU: the length is cut into chunks that stay in cache; each output chunk is summed over
// its terms in order in the accumulation type and written once.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "common/dispatch.h"
#include "common/tile_product.h"
#include "interpolate_weights/interpolate_weights.h"

namespace neuromod {

void interpolate_weights_cpu(const InterpolateWeightsParams& p) {
  dispatch_dtype<at::Half, at::BFloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = acc_t<T>;
    constexpr int64_t chunk = 1024;
    const int64_t chunks = ceil_div(p.length, chunk);
    at::parallel_for(0, chunks * p.rows, 1, [&](int64_t begin, int64_t end) {
      Acc sum[chunk];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t m = i % p.rows, first = i / p.rows * chunk, n = std::min(chunk, p.length - first);
        std::fill_n(sum, n, Acc(0));
        for (int64_t j = 0; j < p.terms; ++j) {
          const Acc c = *p.mix.at<Acc>(m, j);
          const T* in = p.in.at<T>(j, first);
          for (int64_t l = 0; l < n; ++l) sum[l] += c * Acc(in[l]);
        }
        T* out = p.out.at<T>(m, first);
        for (int64_t l = 0; l < n; ++l) out[l] = T(sum[l]);
      }
    });
  });
}

void interpolate_weights_grad_coeff_cpu(const InterpolateWeightsGradCoeffParams& p) {
  dispatch_dtype<at::Half, at::BFloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = acc_t<T>;
    constexpr int64_t lanes = 32;  // independent partial sums, folded in order at the end
    at::parallel_for(0, p.batch * p.num_basis, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / p.num_basis, k = i % p.num_basis;
        const T* g = p.grad.at<T>(b);
        const T* w = p.basis.at<T>(k);
        Acc sum[lanes] = {};
        int64_t n = 0;
        for (; n + lanes <= p.length; n += lanes)
          for (int64_t l = 0; l < lanes; ++l) sum[l] += Acc(g[n + l]) * Acc(w[n + l]);
        for (int64_t l = 0; n + l < p.length; ++l) sum[l] += Acc(g[n + l]) * Acc(w[n + l]);
        Acc total = 0;
        for (int64_t l = 0; l < lanes; ++l) total += sum[l];
        *p.out.at<Acc>(b, k) = total;
      }
    });
  });
}

}  // namespace neuromod
