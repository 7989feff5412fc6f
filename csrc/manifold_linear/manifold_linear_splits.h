// What the tensor-core kernels of manifold_linear share: tile shapes, writing a tile of dP, and the second pass that
// adds the partial sums of a product's splits.
#pragma once

#include "common/dispatch.h"
#include "common/product_tile.h"
#include "manifold_linear/manifold_linear_cuda_plan.h"

namespace neuromod {

template <class Math>
using SmallShape = ProductShape<Math, 64, 64, 2, 2, 4>;
template <class Math>
using LargeShape = ProductShape<Math, 128, 128, 2, 4, 4>;

/// Calls f with a tag of the 16-bit element type.
template <class F>
void dispatch_half(DType dtype, F&& f) {
  dtype == DType::bfloat16 ? f(TypeTag<__nv_bfloat16>{}) : f(TypeTag<__half>{});
}

/// Likewise, or with float's.
template <class F>
void dispatch_narrow(DType dtype, F&& f) {
  dtype == DType::float32 ? f(TypeTag<float>{}) : dispatch_half(dtype, f);
}

/// Calls f with a tag of the shape that plans small and large have for a dtype.
template <class F>
void dispatch_shape(const ManifoldLinearParams& p, CudaPlan plan, F&& f) {
  const auto by_plan = [&](auto math) {
    using Math = typename decltype(math)::type;
    plan == CudaPlan::large ? f(TypeTag<LargeShape<Math>>{}) : f(TypeTag<SmallShape<Math>>{});
  };
  if (p.dtype == DType::float32) {
    p.tf32 ? by_plan(TypeTag<Tf32Math>{}) : by_plan(TypeTag<PlainMath<float>>{});
  } else {
    dispatch_half(p.dtype, [&](auto tag) { by_plan(TypeTag<HalfMath<typename decltype(tag)::type>>{}); });
  }
}

/// Where pairs of neighbours of dP [K, O, I] go: into it, added to it, or into this split's partial sums.
template <class T>
struct OuterStore {
  View out;
  float* partial;
  bool accumulate;
  int64_t num_basis, rows, cols;

  __device__ __forceinline__ void pair(int64_t k, int64_t row, int64_t col, float first, float second) const {
    if (row >= rows || col >= cols) return;
    if (partial) {
      const int64_t at = ((blockIdx.y * num_basis + k) * rows + row) * partial_cols(cols) + col;
      *reinterpret_cast<float2*>(partial + at) = make_float2(first, second);
      return;
    }
    T* const to = out.at<T>(k, row, col);
    if (accumulate) {
      first += to_acc<float>(to[0]);
      if (col + 1 < cols) second += to_acc<float>(to[1]);
    }
    store_pair(to, first, second, cols - col);
  }
};

// out = the splits' partial sums, added in order; or out += them. [rows, cols], a matrix for each batch.
// Grid: x pairs of columns and rows, 256 a block. Reads partial sums once, writes out once: 4 splits + 2 bytes an
// element. Floor, predicted and not measured, on an H100: about a launch, since splits only fill a card: their sums
// have at most 13 MB, 2 us at 5.5 TB/s of L2.
template <class T>
__global__ void __launch_bounds__(256)
    manifold_linear_sum_splits_kernel(const float* partial, int64_t splits, View out, int64_t batches, int64_t rows,
                                      int64_t cols, bool accumulate) {
  const int64_t pairs = partial_cols(cols) / 2, all = batches * rows * pairs;
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= all) return;
  const int64_t col = i % pairs * 2, row = i / pairs;
  float2 sum = reinterpret_cast<const float2*>(partial)[i];
  for (int64_t split = 1; split < splits; ++split) {
    const float2 next = reinterpret_cast<const float2*>(partial)[split * all + i];
    sum.x += next.x;
    sum.y += next.y;
  }
  T* const to = out.at<T>(row / rows, row % rows, col);
  if (accumulate) {
    sum.x += to_acc<float>(to[0]);
    if (col + 1 < cols) sum.y += to_acc<float>(to[1]);
  }
  store_pair(to, sum.x, sum.y, cols - col);
}

/// out [batches, rows, cols] from its partial sums.
inline int launch_sum_splits(DType dtype, const float* partial, int64_t splits, const View& out, int64_t batches,
                             int64_t rows, int64_t cols, bool accumulate, stream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(batches * rows * partial_cols(cols) / 2, 256)));
  dispatch_narrow(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    NEUROMOD_LAUNCH(manifold_linear_sum_splits_kernel<T>, grid, dim3(256), 0, stream, partial, splits, out, batches,
                    rows, cols, accumulate);
  });
  return launch_status();
}

}  // namespace neuromod
