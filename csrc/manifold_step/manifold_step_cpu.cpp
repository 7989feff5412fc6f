// manifold_step_ on the CPU: chunks of the K basis points' gradients are mixed in cache and applied at once. Every
// element of param and buffer is read and written once; the order of the sum over k is fixed. So many rows are read
// side by side that the processor does not foresee them: while a chunk is mixed and applied, the next one is fetched, a
// row at a time.
#include <algorithm>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/prefetch.h"
#include "common/scratch.h"
#include "common/vector.h"
#include "manifold_step/manifold_step.h"

namespace neuromod {
namespace {

constexpr int64_t kChunk = 256;  // elements: a few of each basis point lie in the first level of cache

template <class T>
void step(const ManifoldStepTensor& t, const ManifoldStepNumbers& numbers) {
  using A = acc_t<T>;
  const int64_t K = t.num_basis, chunks = ceil_div(t.length, kChunk);
  const auto apply = [&](int64_t j, int64_t first, int64_t n, int64_t terms, const A* c, const T* const* rows) {
    vectors<T>().step(numbers, n, terms, c, rows, t.param.at<T>(j, first),
                      t.buffer ? t.buffer.at<T>(j, first) : nullptr);
  };
  if (!t.metric_inverse) {
    parallel_ranges(K * chunks, 1e-10 * double(kChunk), [&](int64_t begin, int64_t end) {
      const A one = 1;
      while (begin < end) {  // as far as the basis point goes
        const int64_t j = begin / chunks, first = begin % chunks * kChunk;
        const int64_t last = std::min(end, (j + 1) * chunks),
                      n = std::min((last - j * chunks) * kChunk, t.length) - first;
        const T* const row = t.grad.at<T>(j, first);
        apply(j, first, n, 1, &one, &row);
        begin = last;
      }
    });
    return;
  }
  parallel_ranges(chunks, 1e-10 * double(kChunk * K * K), [&](int64_t begin, int64_t end) {
    const Scratch<const T*> rows(K);
    const Scratch<A> c(K);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kChunk, n = std::min(kChunk, t.length - first);
      const int64_t next = first + n, fetched = std::min(kChunk, t.length - next);
      for (int64_t k = 0; k < K; ++k) rows[k] = t.grad.at<T>(k, first);
      for (int64_t j = 0; j < K; ++j) {
        prefetch(t.grad.at<const T>(j, next), fetched);
        prefetch(t.param.at<T>(j, next), fetched);
        if (t.buffer) prefetch(t.buffer.at<T>(j, next), fetched);
        for (int64_t k = 0; k < K; ++k) c[k] = *t.metric_inverse.at<A>(j, k);
        apply(j, first, n, K, c.data(), rows.data());
      }
    }
  });
}

}  // namespace

void manifold_step_cpu(const ManifoldStepParams& p) {
  dispatch_dtype<Float16, BFloat16>(p.dtype, [&](auto tag) {
    for (int64_t i = 0; i < p.count; ++i) step<typename decltype(tag)::type>(p.tensors[i], p.numbers);
  });
}

}  // namespace neuromod
