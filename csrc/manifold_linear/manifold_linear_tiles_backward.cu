// The gradients of manifold_linear in tiles: dx and dc by the kernel of manifold_linear_mix.h, and
//
//   dP[k,o,i] = (accumulate ? dP[k,o,i] : 0) + sum_r c[r,k] g[r,o] x[r,i]
//
// a product over the rows for each basis point, whose right operand is x with c multiplied in: in float32, and rounded
// once to the operands' dtype, in the fragment. Rows on which k does not act are neither read nor added; where
// rows are taken in order of their index (manifold_linear_segments.h), slices of such rows are left out.
//
// Grid: x tiles of dP_k (TileIndex) for each k, y splits of the rows. Reads g and x once a tile and c once a slice;
// writes dP once, rounded once, or with splits partial sums [splits, K, O, partial_cols(I)] for
// manifold_linear_sum_splits. No atomics.
//
// Cost: 2 B T K O I flop; B T (O + I) + K O I elements at least. Error: B T + splits roundings of float32, one of c x
// to the operands' dtype, one of the result. Oracle: manifold_linear.cu. Floor, predicted and not measured, on an H100:
// as the forward pass.
#include <algorithm>

#include "manifold_linear/manifold_linear_mix.h"
#include "manifold_linear/manifold_linear_tiles.h"

namespace neuromod {
namespace {

struct OuterParams {
  ManifoldLinearParams p;
  CudaProduct product;
  View out;        // [K, O, I]
  float* partial;  // with splits, instead of out
  bool accumulate;
  bool output_aligned, input_aligned;
};

template <class Shape>
constexpr size_t outer_shared_bytes() {
  return sizeof(typename Shape::Element) * Shape::kStages * (Shape::kLeft + Shape::kRight);
}

/// Of the rows in each slice that is on its way: their coefficients, and where they lie; -1 where k does not act.
template <class Shape>
struct OuterRows {
  static constexpr int kSlices = Shape::kStages + 1;
  float coeff[kSlices][Shape::kDepth];
  int64_t rows[kSlices][Shape::kDepth];
};

/// The work of one block.
template <class Shape>
class OuterProduct {
 public:
  using T = typename Shape::Element;

  __device__ __forceinline__ OuterProduct(const OuterParams& q, OuterRows<Shape>& rows, T* shared)
      : q_(q),
        rows_(rows),
        left_(shared),
        right_(shared + Shape::kStages * Shape::kLeft),
        tile_(TileIndex::of(blockIdx.x % tiles(), q.product.tiles_down, q.product.tiles_across)),
        k_(blockIdx.x / tiles()),
        row_(tile_.down * Shape::kM),
        col_(tile_.across * Shape::kN),
        slices_(acting_slices(q.p, k_, Shape::kDepth)),
        left_source_(q.p.output.at<T>(0, row_), q.p.output.stride[0], q.p.out_features - row_, q.output_aligned),
        right_source_(q.p.input.at<T>(0, col_), q.p.input.stride[0], q.p.in_features - col_, q.input_aligned) {
    const int64_t total = slices_.total(), split = blockIdx.y, splits = gridDim.y;
    begin_ = total * split / splits;
    end_ = total * (split + 1) / splits;
  }

  __device__ __forceinline__ void run() {
    for (int stage = 0; stage < Shape::kStages; ++stage) prepare(begin_ + stage, stage);
    __syncthreads();
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) fetch(begin_ + stage, stage, stage);
    ProductSums<Shape> sum;
    sum.clear();
    int stage = 0, slot = 0;  // of this slice: in the tiles' memory and in rows_
    for (int64_t step = begin_; step < end_; ++step) {
      copy_async_wait<Shape::kStages - 2>();
      __syncthreads();
      fetch(step + Shape::kStages - 1, before(stage, Shape::kStages), before(before(slot, kSlices), kSlices));
      prepare(step + Shape::kStages, before(slot, kSlices));
      sum.template add<false, false>(left_ + stage * Shape::kLeft, right_ + stage * Shape::kRight,
                                     static_cast<const float*>(rows_.coeff[slot]));
      stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
      slot = slot + 1 == kSlices ? 0 : slot + 1;
    }
    store(sum);
  }

 private:
  static constexpr int kSlices = OuterRows<Shape>::kSlices;

  static __device__ __forceinline__ int before(int i, int count) { return i == 0 ? count - 1 : i - 1; }
  __device__ __forceinline__ int64_t tiles() const { return q_.product.tiles_down * q_.product.tiles_across; }

  /// The first warp looks up a slice's rows, a barrier before they are fetched: a division for each row of a thread's
  /// copies would cost more than the product.
  __device__ __forceinline__ void prepare(int64_t step, int slot) {
    if (threadIdx.x >= 32) return;
    const ManifoldLinearParams& p = q_.p;
    const int lane = threadIdx.x;
    const int64_t position = slices_.at(step) * Shape::kDepth + lane;
    const bool there = lane < Shape::kDepth && step < end_ && position < p.rows();
    const int64_t row = there ? ordered_row(p, position) : 0, b = row / p.tokens;
    const int64_t l = there ? p.entry(b, k_) : p.num_local;
    const bool acts = l < p.num_local;
    if (lane >= Shape::kDepth) return;
    rows_.coeff[slot][lane] = acts ? *p.coeff.template at<float>(b, l) : 0.0f;
    rows_.rows[slot][lane] = acts ? row : -1;
  }

  __device__ __forceinline__ void fetch(int64_t step, int stage, int slot) {
    if (step < end_) {
      left_source_.fetch(left_ + stage * Shape::kLeft, rows_.rows[slot]);
      right_source_.fetch(right_ + stage * Shape::kRight, rows_.rows[slot]);
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void store(const ProductSums<Shape>& sum) const {
    const OuterStore<T> to{q_.out, q_.partial, q_.accumulate, q_.p.num_basis, q_.p.out_features, q_.p.in_features};
#pragma unroll
    for (int i = 0; i < sum.kRowParts; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < sum.kColParts; ++j)
          to.pair(k_, row_ + sum.row(i, h), col_ + sum.col(j), sum.at[i][j][2 * h], sum.at[i][j][2 * h + 1]);
  }

  const OuterParams& q_;
  OuterRows<Shape>& rows_;
  T *left_, *right_;
  TileIndex tile_;
  int64_t k_, row_, col_;  // the tile's first, in dP_k
  SliceRange slices_;      // of rows
  DepthSource<Shape::kDepth, Shape::kM, Shape::kThreads, T> left_source_;
  DepthSource<Shape::kDepth, Shape::kN, Shape::kThreads, T> right_source_;
  int64_t begin_, end_;  // the block's share of the slices
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    manifold_linear_grad_basis_tiles_kernel(const __grid_constant__ OuterParams q) {
  NEUROMOD_DYNAMIC_SHARED(typename Shape::Element, shared);
  __shared__ __align__(8) OuterRows<Shape> rows;
  OuterProduct<Shape>(q, rows, shared).run();
}

// dc[b,l] = sum of its terms (CudaDots) + sum_(t,o) g[b,t,o] beta[k,o] for k of l. Grid: x pairs (b, l), a block each.
// A thread adds every Threads-th term in order, splits outermost; then block_sum.
template <class T, int Threads>
__global__ void __launch_bounds__(Threads)
    manifold_linear_grad_coeff_sum_kernel(ManifoldLinearParams p, CudaDots terms, const float* dots, View out) {
  for (int64_t pair = blockIdx.x; pair < p.batch * p.num_local; pair += gridDim.x) {
    const int64_t b = pair / p.num_local, l = pair % p.num_local, k = (p.first_basis(b) + l) % p.num_basis;
    float sum = 0;
    for (int64_t split = 0; split < terms.splits; ++split) {
      for (int64_t i = threadIdx.x; i < terms.tiles * terms.each; i += Threads) {
        const int64_t slot = i % terms.tiles * terms.splits + split, t = i / terms.tiles;
        sum += dots[((slot * p.batch + b) * terms.each + t) * p.num_local + l];
      }
    }
    if (p.bias) {  // all (t, o), counted without a division each
      const int64_t rows = Threads / p.out_features, cols = Threads % p.out_features;
      int64_t t = threadIdx.x / p.out_features, o = threadIdx.x % p.out_features;
      while (t < p.tokens) {
        sum +=
            to_acc<float>(*p.output.template at<T>(b * p.tokens + t, o)) * to_acc<float>(*p.bias.template at<T>(k, o));
        t += rows, o += cols;
        if (o >= p.out_features) ++t, o -= p.out_features;
      }
    }
    sum = block_sum<Threads>(sum);
    if (threadIdx.x == 0) *out.at<float>(b, l) = sum;
  }
}

}  // namespace

int launch_grad_coeff_sum(const ManifoldLinearBackwardParams& q, stream_t stream) {
  const ManifoldLinearParams& p = q.p;
  const CudaDots terms = cuda_dots(q);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(p.batch * p.num_local, 1 << 20)));
  const float* const dots = static_cast<const float*>(cuda_dots_begin(q));
  const bool many = terms.tiles * terms.each + (p.bias ? p.tokens * p.out_features : 0) > 512;
  dispatch_narrow(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (many) {
      NEUROMOD_LAUNCH((manifold_linear_grad_coeff_sum_kernel<T, 256>), grid, dim3(256), 0, stream, p, terms, dots,
                      q.grad_coeff);
    } else {
      NEUROMOD_LAUNCH((manifold_linear_grad_coeff_sum_kernel<T, 32>), grid, dim3(32), 0, stream, p, terms, dots,
                      q.grad_coeff);
    }
  });
  return launch_status();
}

int launch_grad_rows_tiles(const ManifoldLinearBackwardParams& q, const CudaBackwardPlan& plan, stream_t stream) {
  const ManifoldLinearParams& p = q.p;
  MixParams mix{};
  mix.p = p;
  mix.product = cuda_grad_rows(p, plan.rows);
  mix.left = p.output;
  mix.out = q.grad_input;
  mix.depth = p.out_features;
  mix.cols = p.in_features;
  if (mix.product.splits > 1) mix.partial = static_cast<float*>(p.workspace);
  const bool dots = q.grad_coeff && plan.dots_with_rows;
  if (dots) {
    mix.dots = static_cast<float*>(cuda_dots_begin(q));
    mix.input_aligned = rows_are_aligned(p.input, 2, element_bytes(p.dtype));
  }
  mix.left_aligned = rows_are_aligned(p.output, 2, element_bytes(p.dtype));
  mix.basis_aligned = rows_are_aligned(p.basis, 3, element_bytes(p.dtype));
  if (const int status = launch_mix_tiles<true>(mix, stream)) return status;
  return dots ? launch_grad_coeff_sum(q, stream) : 0;
}

int launch_grad_basis_tiles(const ManifoldLinearBackwardParams& q, const CudaBackwardPlan& plan, stream_t stream) {
  const ManifoldLinearParams& p = q.p;
  OuterParams outer{};
  outer.p = p;
  outer.product = cuda_grad_basis(p, plan.basis);
  outer.out = q.grad_basis;
  outer.accumulate = q.accumulate;
  if (outer.product.splits > 1) outer.partial = static_cast<float*>(p.workspace);
  outer.output_aligned = rows_are_aligned(p.output, 2, element_bytes(p.dtype));
  outer.input_aligned = rows_are_aligned(p.input, 2, element_bytes(p.dtype));
  const dim3 grid(static_cast<unsigned>(outer.product.tiles_down * outer.product.tiles_across * p.num_basis),
                  static_cast<unsigned>(outer.product.splits));
  dispatch_shape(p, outer.product.plan, [&](auto tag) {
    using Shape = typename decltype(tag)::type;
    static_assert(outer_shared_bytes<Shape>() + sizeof(OuterRows<Shape>) <= kSharedPerBlock);
    NEUROMOD_LAUNCH(manifold_linear_grad_basis_tiles_kernel<Shape>, grid, dim3(Shape::kThreads),
                    outer_shared_bytes<Shape>(), stream, outer);
  });
  if (const int status = launch_status(); status != 0 || !outer.partial) return status;
  return launch_sum_splits(p.dtype, outer.partial, outer.product.splits, q.grad_basis, p.num_basis, p.out_features,
                           p.in_features, q.accumulate, stream);
}

}  // namespace neuromod
