// manifold_metric on the CPU: fixed chunks of conditions are widened to float64, multiplied by the BLAS, and folded in
// order, so the result does not depend on the number of threads.
#include "common/scratch.h"
#include "common/torch_product.h"
#include "manifold_metric/manifold_metric.h"

namespace neuromod {
namespace {

/// to[n][k] = coeff[first + n][k]
template <class T>
void widen(const View& coeff, int64_t first, int64_t count, int64_t K, double* to) {
  if (coeff.stride[1] == 1 && coeff.stride[0] == K) {
    const T* const from = coeff.at<T>(first);
    for (int64_t i = 0; i < count * K; ++i) to[i] = double(from[i]);
  } else {
    for (int64_t n = 0; n < count; ++n)
      for (int64_t k = 0; k < K; ++k) to[n * K + k] = double(*coeff.at<T>(first + n, k));
  }
}

}  // namespace

void manifold_metric_cpu(const ManifoldMetricParams& p) {
  dispatch_wide(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int64_t chunk = 1024;
    const int64_t K = p.num_basis, chunks = ceil_div(p.count, chunk);
    const Scratch<double> partial(std::max<int64_t>(chunks, 1) * K * K);
    parallel_products(chunks, [&](int64_t i) {
      const int64_t first = i * chunk, count = std::min(chunk, p.count - first);
      const Scratch<double> rows(K * count), weighted(p.weight ? K * count : 0);
      widen<T>(p.coeff, first, count, K, rows.data());
      for (int64_t n = 0; n < count && p.weight; ++n)
        for (int64_t k = 0; k < K; ++k) weighted[n * K + k] = double(*p.weight.at<T>(first + n)) * rows[n * K + k];
      const Matrix<double> right = matrix(rows.data(), count, K, K);
      torch_product(matrix(partial.data() + i * K * K, K, K, K),
                    p.weight ? matrix(weighted.data(), count, K, K).t() : right.t(), right, false);
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
