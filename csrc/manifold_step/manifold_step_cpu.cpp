// manifold_step_ on the CPU: chunks of the K basis points' gradients are mixed in cache and applied at once. Every
// element of param and buffer is read and written once; the order of the sum over k is fixed.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "common/dispatch.h"
#include "common/tile_product.h"
#include "manifold_step/manifold_step.h"

namespace neuromod {

void manifold_step_cpu(const ManifoldStepParams& p) {
  dispatch_dtype<at::Half, at::BFloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = acc_t<T>;
    constexpr int64_t chunk = 1024;
    at::parallel_for(0, ceil_div(p.length, chunk), 4, [&](int64_t begin, int64_t end) {
      Acc mixed[chunk];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * chunk, n = std::min(chunk, p.length - first);
        for (int64_t j = 0; j < p.num_basis; ++j) {
          if (p.metric_inverse) {
            std::fill_n(mixed, n, Acc(0));
            for (int64_t k = 0; k < p.num_basis; ++k) {
              const Acc c = *p.metric_inverse.at<Acc>(j, k);
              const T* grad = p.grad.at<T>(k, first);
              for (int64_t l = 0; l < n; ++l) mixed[l] += c * Acc(grad[l]);
            }
          } else {
            const T* grad = p.grad.at<T>(j, first);
            for (int64_t l = 0; l < n; ++l) mixed[l] = Acc(grad[l]);
          }
          for (int64_t l = 0; l < n; ++l) manifold_step_element<T>(p, j, first + l, mixed[l]);
        }
      }
    });
  });
}

}  // namespace neuromod
