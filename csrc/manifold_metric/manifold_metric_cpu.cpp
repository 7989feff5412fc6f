// manifold_metric on the CPU: fixed chunks of conditions are widened to float64, multiplied, and folded in order, so
// the result does not depend on the number of threads.
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/vector.h"
#include "manifold_metric/manifold_metric.h"

namespace neuromod {
namespace {

constexpr int64_t kChunk = 256;
constexpr int64_t kWidth = 16;  // columns of a product at a time
constexpr int64_t kLeast = 8;   // to which they are completed

/// to[n][k] = c[first + n][k] w[first + n], without a weight w = 1
template <class T>
void widen(const View& coeff, const View& weight, int64_t first, int64_t count, int64_t K, double* to) {
  const bool dense = coeff.stride[1] == 1 && coeff.stride[0] == K;
  if (dense) vectors<T>().to_float64(count * K, coeff.at<T>(first), to);
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t k = 0; k < K && !dense; ++k) to[n * K + k] = double(*coeff.at<T>(first + n, k));
    for (int64_t k = 0; k < K && weight; ++k) to[n * K + k] *= double(*weight.at<T>(first + n));
  }
}

/// sum[j][k] = sum_n w_n c_n,j c_n,k over the conditions from `first` on, k <= j; other columns hold anything.
template <class T>
void chunk_product(const ManifoldMetricParams& p, int64_t first, double* sum, int64_t stride) {
  const int64_t K = p.num_basis, count = std::min(kChunk, p.count - first);
  const Scratch<double> c(count * K + kLeast), weighted(p.weight ? count * K : 0);
  widen<T>(p.coeff, {}, first, count, K, c.data());
  std::fill_n(c.data() + count * K, kLeast, 0.0);  // what the last row's columns are followed by
  if (p.weight) widen<T>(p.coeff, p.weight, first, count, K, weighted.data());
  const double* const left = p.weight ? weighted.data() : c.data();
  std::fill_n(sum, K * stride, 0.0);
  for (int64_t k = 0; k < K; k += kWidth)
    vectors<double>().product(K - k, std::min(kWidth, stride - k), count, left + k, 1, K, &c[k], K,
                              sum + k * stride + k, stride, false);
}

}  // namespace

void manifold_metric_cpu(const ManifoldMetricParams& p) {
  dispatch_dtype<Float16, BFloat16>(p.dtype, [&](auto tag) {
    using T = acc_t<typename decltype(tag)::type>;
    const int64_t K = p.num_basis, chunks = ceil_div(p.count, kChunk), stride = ceil_div(K, kLeast) * kLeast;
    const Scratch<double> partial(std::max<int64_t>(chunks, 1) * K * stride);
    parallel(chunks, 5e-11 * double(kChunk * K * (stride + 16)),
             [&](int64_t i) { chunk_product<T>(p, i * kChunk, partial.data() + i * K * stride, stride); });
    const double scale = p.weight ? 1.0 : 1.0 / static_cast<double>(p.count);
    for (int64_t j = 0; j < K; ++j) {
      for (int64_t k = 0; k <= j; ++k) {
        double total = 0;
        for (int64_t i = 0; i < chunks; ++i) total += partial[(i * K + j) * stride + k];
        *p.out.at<T>(j, k) = *p.out.at<T>(k, j) = T(total * scale);
      }
    }
  });
}

}  // namespace neuromod
