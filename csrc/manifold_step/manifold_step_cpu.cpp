// manifold_step_ on the CPU: chunks of the K basis points' gradients are mixed in cache and applied at once. Every
// element of param and buffer is read and written once; the order of the sum over k is fixed.
#include <algorithm>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/vector.h"
#include "manifold_step/manifold_step.h"

namespace neuromod {
namespace {

constexpr int64_t kChunk = 1024;                 // elements: a few of them in the first level of cache
constexpr int64_t kCached = int64_t(4) << 20;    // bytes of a parameter
constexpr int64_t kPiece = int64_t(32) << 10;    // bytes of a basis point, read from memory in one go,
constexpr int64_t kPieces = int64_t(256) << 10;  // and of all, which stay in cache while they are mixed

/// Elements of each basis point that are mixed at a time: of large parameters many, since every change from one basis
/// point to another is a page that the processor does not foresee.
template <class T>
int64_t mixed_chunk(const ManifoldStepTensor& t) {
  constexpr int64_t size = sizeof(T);
  if (t.num_basis * t.length * size < kCached) return kChunk;
  return std::clamp(kPieces / (t.num_basis * size), kChunk, kPiece / size);
}

template <class T>
void step(const ManifoldStepTensor& t, const ManifoldStepNumbers& numbers) {
  using A = acc_t<T>;
  const int64_t K = t.num_basis, chunk = t.metric_inverse ? mixed_chunk<T>(t) : kChunk;
  const int64_t chunks = ceil_div(t.length, chunk);
  const auto apply = [&](int64_t j, int64_t first, int64_t n, const A* gradient) {
    vectors<T>().step(numbers, n, gradient, t.param.at<T>(j, first), t.buffer ? t.buffer.at<T>(j, first) : nullptr);
  };
  if (!t.metric_inverse) {
    parallel_ranges(K * chunks, 1e-10 * double(chunk), [&](int64_t begin, int64_t end) {
      const Scratch<A> gradient(chunk);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = i / chunks, first = i % chunks * chunk, n = std::min(chunk, t.length - first);
        const T* const row = t.grad.at<T>(j, first);
        if constexpr (std::is_same_v<T, A>) {
          apply(j, first, n, row);
        } else {
          vectors<T>().widen(n, row, gradient.data());
          apply(j, first, n, gradient.data());
        }
      }
    });
    return;
  }
  parallel_ranges(chunks, 1e-10 * double(chunk * K * K), [&](int64_t begin, int64_t end) {
    const Scratch<const T*> rows(K);
    const Scratch<A> c(K), gradient(chunk);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * chunk, n = std::min(chunk, t.length - first);
      for (int64_t k = 0; k < K; ++k) rows[k] = t.grad.at<T>(k, first);
      for (int64_t j = 0; j < K; ++j) {
        for (int64_t k = 0; k < K; ++k) c[k] = *t.metric_inverse.at<A>(j, k);
        vectors<T>().mix_wide(n, K, c.data(), rows.data(), gradient.data());
        apply(j, first, n, gradient.data());
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
