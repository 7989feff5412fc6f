// dP and dc of manifold_linear for samples of many tokens, on tensor cores, from one product for each sample:
//
//   G_b[o,i] = sum_t g[b,t,o] x[b,t,i]
//   dP[k,o,i] = (accumulate ? dP[k,o,i] : 0) + sum_b c[b,k] G_b[o,i]
//   dots[tile,b,k] = sum_(o,i in the tile) G_b[o,i] P[k,o,i]
//
// Grid: x tiles of (o, i) (TileIndex) for each group of kGroup basis points, y splits of the samples. A block walks its
// samples' tokens in slices, kStages - 1 on their way by cp.async; G_b stays in registers and is spread, in float32, to
// the group's dP, in registers too, and multiplied with the group's tiles of P, which wait in shared memory.
//
// Reads g and x once a tile and group, P once; writes dP once, rounded once, or with splits partial sums [splits, K, O,
// partial_cols(I)] for manifold_linear_sum_splits; dots [tiles, B, L] once. No atomics: samples in order.
//
// Cost: 2 B T O I ceil(K / kGroup) flop and 4 B K O I; B T (O + I) + 2 K O I elements at least. Error: T + B + splits
// roundings of float32 for dP and that of the result; T, and the sum over O I in parts, for dc. Oracle:
// manifold_linear.cu.
//
// Floor, predicted and not measured, on an H100: B = 64, T = 256, 1024 x 1024, K = 3: L2 delivers 12 KB for 0.5 Mflop,
// 0.8 GB in all, 150 us at 5.5 TB/s.
#include "common/fold_outer_tile.h"
#include "manifold_linear/manifold_linear_splits.h"
#include "manifold_linear/manifold_linear_tiles.h"

namespace neuromod {
namespace {

template <class T>
using OuterShape = ProductShape<HalfMath<T>, kFoldOuterRows, kFoldOuterCols, 4, 2, 4>;
constexpr int kGroup = kFoldOuterGroup;

struct FoldOuterParams {
  ManifoldLinearParams p;
  CudaProduct product;
  View out;        // [K, O, I], or null
  float* partial;  // with splits, instead of out
  float* dots;     // or null
  bool accumulate;
  bool output_aligned, input_aligned, basis_aligned;
};

/// The operands of a block's product (common/fold_outer_tile.h).
template <class Shape>
class LinearOuter {
 public:
  using T = typename Shape::Element;

  __device__ __forceinline__ explicit LinearOuter(const FoldOuterParams& q)
      : q_(q),
        tile_(blockIdx.x % tiles()),
        at_(TileIndex::of(tile_, q.product.tiles_down, q.product.tiles_across)),
        first_k_(blockIdx.x / tiles() * kGroup),
        row_(at_.down * Shape::kM),
        col_(at_.across * Shape::kN),
        left_source_(q.p.output.at<T>(0, row_), q.p.output.stride[0], q.p.out_features - row_, q.output_aligned),
        right_source_(q.p.input.at<T>(0, col_), q.p.input.stride[0], q.p.in_features - col_, q.input_aligned) {}

  __device__ __forceinline__ int64_t begin() const { return q_.p.batch * blockIdx.y / gridDim.y; }
  __device__ __forceinline__ int64_t end() const { return q_.p.batch * (blockIdx.y + 1) / gridDim.y; }
  __device__ __forceinline__ int64_t slices() const { return ceil_div(q_.p.tokens, Shape::kDepth); }
  __device__ __forceinline__ int group() const {
    const int64_t left = q_.p.num_basis - first_k_;
    return left < kGroup ? static_cast<int>(left) : kGroup;
  }
  __device__ __forceinline__ bool wants_basis() const { return bool(q_.out); }
  __device__ __forceinline__ bool wants_dots() const { return q_.dots != nullptr; }

  __device__ __forceinline__ void fetch(int64_t b, int64_t slice, T* left, T* right) const {
    const ManifoldLinearParams& p = q_.p;
    const int64_t t = slice * Shape::kDepth, row = b * p.tokens + t;
    left_source_.fetch(left, row * p.output.stride[0], p.tokens - t);
    right_source_.fetch(right, row * p.input.stride[0], p.tokens - t);
  }

  __device__ __forceinline__ void fetch_basis(int j, T* tile) const {
    const View& basis = q_.p.basis;
    const TileSource<Shape::kM, Shape::kN, true, Shape::kThreads, T> source(
        basis.at<T>(first_k_, row_, col_), basis.stride[1], q_.p.out_features - row_, q_.basis_aligned);
    source.fetch(tile, j * basis.stride[0], q_.p.in_features - col_);
  }

  __device__ __forceinline__ bool has_row(int row) const { return row_ + row < q_.p.out_features; }
  __device__ __forceinline__ bool has_col(int col) const { return col_ + col < q_.p.in_features; }

  __device__ __forceinline__ bool acts(int64_t b, int j, float& c) const {
    const int64_t l = q_.p.entry(b, first_k_ + j);
    if (l < q_.p.num_local) c = *q_.p.coeff.template at<float>(b, l);
    return l < q_.p.num_local;
  }

  __device__ __forceinline__ void dot(int64_t b, int j, float total) const {
    const int64_t l = q_.p.entry(b, first_k_ + j);
    if (l < q_.p.num_local) q_.dots[(tile_ * q_.p.batch + b) * q_.p.num_local + l] = total;
  }

  __device__ __forceinline__ void store(int j, int row, int col, float first, float second) const {
    const OuterStore<T> to{q_.out, q_.partial, q_.accumulate, q_.p.num_basis, q_.p.out_features, q_.p.in_features};
    to.pair(first_k_ + j, row_ + row, col_ + col, first, second);
  }

 private:
  __device__ __forceinline__ int64_t tiles() const { return q_.product.tiles_down * q_.product.tiles_across; }

  const FoldOuterParams& q_;
  int64_t tile_;
  TileIndex at_;
  int64_t first_k_, row_, col_;  // the group's first basis point, the tile's first output and input
  TileSource<Shape::kDepth, Shape::kM, false, Shape::kThreads, T> left_source_;
  TileSource<Shape::kDepth, Shape::kN, false, Shape::kThreads, T> right_source_;
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    manifold_linear_fold_outer_kernel(const __grid_constant__ FoldOuterParams q) {
  NEUROMOD_DYNAMIC_SHARED(typename Shape::Element, shared);
  __shared__ FoldOuterSides<Shape, kGroup> sides;
  LinearOuter<Shape> operands(q);
  FoldOuter<Shape, kGroup, LinearOuter<Shape>>(operands, sides, shared).run();
}

}  // namespace

int launch_fold_outer(const ManifoldLinearBackwardParams& q, const CudaBackwardPlan& plan, stream_t stream) {
  const ManifoldLinearParams& p = q.p;
  FoldOuterParams outer{};
  outer.p = p;
  outer.product = cuda_fold_outer(p);
  outer.out = q.grad_basis;
  outer.accumulate = q.accumulate;
  if (outer.product.splits > 1) outer.partial = static_cast<float*>(p.workspace);
  const bool dots = q.grad_coeff && !plan.dots_with_rows;
  if (dots) outer.dots = static_cast<float*>(cuda_dots_begin(q));
  outer.output_aligned = rows_are_aligned(p.output, 2, 2);
  outer.input_aligned = rows_are_aligned(p.input, 2, 2);
  outer.basis_aligned = rows_are_aligned(p.basis, 3, 2);
  const int64_t tiles = outer.product.tiles_down * outer.product.tiles_across;
  const dim3 grid(static_cast<unsigned>(tiles * ceil_div(p.num_basis, kGroup)),
                  static_cast<unsigned>(outer.product.splits));
  dispatch_half(p.dtype, [&](auto tag) {
    using Shape = OuterShape<typename decltype(tag)::type>;
    static_assert(fold_outer_shared_bytes<Shape, kGroup>() + sizeof(FoldOuterSides<Shape, kGroup>) <= kSharedPerBlock);
    NEUROMOD_LAUNCH(manifold_linear_fold_outer_kernel<Shape>, grid, dim3(Shape::kThreads),
                    (fold_outer_shared_bytes<Shape, kGroup>()), stream, outer);
  });
  if (const int status = launch_status()) return status;
  if (q.grad_basis && outer.partial) {
    const int status = launch_sum_splits(p.dtype, outer.partial, outer.product.splits, q.grad_basis, p.num_basis,
                                         p.out_features, p.in_features, q.accumulate, stream);
    if (status != 0) return status;
  }
  return dots ? launch_grad_coeff_sum(q, stream) : 0;
}

}  // namespace neuromod
