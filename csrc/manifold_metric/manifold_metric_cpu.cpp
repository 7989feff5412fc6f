// manifold_metric on the CPU: fixed chunks of conditions are turned over, widened to float64, multiplied row by row,
// and folded in order, so the result does not depend on the number of threads.
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/vector.h"
#include "manifold_metric/manifold_metric.h"

namespace neuromod {
namespace {

constexpr int64_t kChunk = 512;
constexpr int64_t kStride = kChunk + 16;  // of rows: off powers of two, at which they fall into the same lines

/// to[k][n] = c[first + n][k]
template <class T>
void turn_over(const View& coeff, int64_t first, int64_t count, int64_t K, double* to) {
  for (int64_t n = 0; n < count; ++n)
    for (int64_t k = 0; k < K; ++k) to[k * kStride + n] = double(*coeff.at<T>(first + n, k));
}

/// sum[j][k] = sum_n w_n c_n,j c_n,k over the conditions from `first` on, k <= j.
template <class T>
void chunk_product(const ManifoldMetricParams& p, int64_t first, double* sum) {
  const int64_t K = p.num_basis, count = std::min(kChunk, p.count - first);
  const Scratch<double> c(K * kStride), weight(kChunk), weighted(kChunk);
  turn_over<T>(p.coeff, first, count, K, c.data());
  for (int64_t n = 0; n < count && p.weight; ++n) weight[n] = double(*p.weight.at<T>(first + n));
  for (int64_t j = 0; j < K; ++j) {
    const double* left = &c[j * kStride];
    if (p.weight) {
      for (int64_t n = 0; n < count; ++n) weighted[n] = weight[n] * left[n];
      left = weighted.data();
    }
    constexpr int64_t many = 8;
    for (int64_t k = 0; k <= j; k += many) {
      const int64_t found = std::min(many, j + 1 - k);
      const double* rows[many];
      for (int64_t i = 0; i < found; ++i) rows[i] = &c[(k + i) * kStride];
      vectors<double>().dots(count, found, rows, left, sum + j * K + k);
    }
  }
}

}  // namespace

void manifold_metric_cpu(const ManifoldMetricParams& p) {
  dispatch_dtype<Float16, BFloat16>(p.dtype, [&](auto tag) {
    using T = acc_t<typename decltype(tag)::type>;
    const int64_t K = p.num_basis, chunks = ceil_div(p.count, kChunk);
    const Scratch<double> partial(std::max<int64_t>(chunks, 1) * K * K);
    parallel(chunks, 1e-10 * double(kChunk * K * (K + 16)),
             [&](int64_t i) { chunk_product<T>(p, i * kChunk, partial.data() + i * K * K); });
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
