// manifold_metric on the CPU: fixed chunks of conditions are summed in float64 and folded in order, so the result does
// not depend on the number of threads.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "common/dispatch.h"
#include "common/tile_product.h"
#include "manifold_metric/manifold_metric.h"

namespace neuromod {

void manifold_metric_cpu(const ManifoldMetricParams& p) {
  dispatch_dtype<at::Half, at::BFloat16>(p.dtype, [&](auto tag) {
    using T = acc_t<typename decltype(tag)::type>;
    constexpr int64_t chunk = 256;
    const int64_t K = p.num_basis, chunks = ceil_div(p.count, chunk);
    Scratch<double> partial(std::max<int64_t>(chunks, 1) * K * K);
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double* sum = partial.data() + i * K * K;
        std::fill_n(sum, K * K, 0.0);
        for (int64_t n = i * chunk; n < std::min((i + 1) * chunk, p.count); ++n) {
          const double w = p.weight ? double(*p.weight.at<T>(n)) : 1.0;
          for (int64_t j = 0; j < K; ++j) {
            const double wc = w * double(*p.coeff.at<T>(n, j));
            for (int64_t k = 0; k < K; ++k) sum[j * K + k] += wc * double(*p.coeff.at<T>(n, k));
          }
        }
      }
    });
    const double scale = p.weight ? 1.0 : 1.0 / static_cast<double>(p.count);
    for (int64_t j = 0; j < K; ++j) {
      for (int64_t k = 0; k < K; ++k) {
        double total = 0;
        for (int64_t i = 0; i < chunks; ++i) total += partial.data()[i * K * K + j * K + k];
        *p.out.at<T>(j, k) = T(total * scale);
      }
    }
  });
}

}  // namespace neuromod
