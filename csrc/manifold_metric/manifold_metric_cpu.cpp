// manifold_metric on the CPU: fixed chunks of conditions are widened to float64, multiplied as rows, and folded in
// order, so the result does not depend on the number of threads.
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/vector.h"
#include "manifold_metric/manifold_metric.h"

namespace neuromod {

void manifold_metric_cpu(const ManifoldMetricParams& p) {
  dispatch_dtype<Float16, BFloat16>(p.dtype, [&](auto tag) {
    using T = acc_t<typename decltype(tag)::type>;
    constexpr int64_t chunk = 256;
    const int64_t K = p.num_basis, chunks = ceil_div(p.count, chunk);
    const Scratch<double> partial(std::max<int64_t>(chunks, 1) * K * K);
    parallel_ranges(chunks, 1e-10 * double(chunk * K * (K + 8)), [&](int64_t begin, int64_t end) {
      const Scratch<double> rows(K * chunk), weighted(K * chunk);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * chunk, count = std::min(chunk, p.count - first);
        for (int64_t n = 0; n < count; ++n) {
          const double w = p.weight ? double(*p.weight.at<T>(first + n)) : 1.0;
          for (int64_t k = 0; k < K; ++k) {
            const double c = double(*p.coeff.at<T>(first + n, k));
            rows[k * chunk + n] = c;
            weighted[k * chunk + n] = w * c;
          }
        }
        for (int64_t j = 0; j < K; ++j)
          for (int64_t k = 0; k <= j; ++k)
            partial[(i * K + j) * K + k] = vectors<double>().dot(count, &weighted[j * chunk], &rows[k * chunk]);
      }
    });
    const double scale = p.weight ? 1.0 : 1.0 / static_cast<double>(p.count);
    for (int64_t j = 0; j < K; ++j) {
      for (int64_t k = 0; k <= j; ++k) {
        double total = 0;
        for (int64_t i = 0; i < chunks; ++i) total += partial[(i * K + j) * K + k];
        *p.out.at<T>(j, k) = *p.out.at<T>(k, j) = T(total * scale);
      }
    }
  });
}

}  // namespace neuromod
