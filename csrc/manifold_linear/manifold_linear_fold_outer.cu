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
#include "manifold_linear/manifold_linear_splits.h"
#include "manifold_linear/manifold_linear_tiles.h"

namespace neuromod {
namespace {

template <class T>
using OuterShape = ProductShape<HalfMath<T>, kFoldOuterRows, kFoldOuterCols, 4, 2, 4>;
constexpr int kGroup = kFoldOuterGroup;
constexpr int kTile = kFoldOuterRows * kFoldOuterCols;

struct FoldOuterParams {
  ManifoldLinearParams p;
  CudaProduct product;
  View out;        // [K, O, I], or null
  float* partial;  // with splits, instead of out
  float* dots;     // or null
  bool accumulate;
  bool output_aligned, input_aligned, basis_aligned;
};

template <class Shape>
constexpr size_t outer_shared_bytes() {
  return sizeof(typename Shape::Element) * (Shape::kStages * (Shape::kLeft + Shape::kRight) + kGroup * kTile);
}

/// Warps' shares of a sample's dot products; of two samples, since threads that are ahead begin the next one's.
template <class Shape>
struct OuterSides {
  float dots[2][kGroup][Shape::kThreads / 32];
};

/// The work of one block.
template <class Shape>
class FoldOuter {
 public:
  using T = typename Shape::Element;
  using Sums = ProductSums<Shape>;

  __device__ __forceinline__ FoldOuter(const FoldOuterParams& q, OuterSides<Shape>& sides, T* shared)
      : q_(q),
        sides_(sides),
        left_(shared),
        right_(shared + Shape::kStages * Shape::kLeft),
        basis_(shared + Shape::kStages * (Shape::kLeft + Shape::kRight)),
        slices_(ceil_div(q.p.tokens, Shape::kDepth)),
        tile_(blockIdx.x % tiles()),
        at_(TileIndex::of(tile_, q.product.tiles_down, q.product.tiles_across)),
        first_k_(blockIdx.x / tiles() * kGroup),
        row_(at_.down * Shape::kM),
        col_(at_.across * Shape::kN),
        left_source_(q.p.output.at<T>(0, row_), q.p.output.stride[0], q.p.out_features - row_, q.output_aligned),
        right_source_(q.p.input.at<T>(0, col_), q.p.input.stride[0], q.p.in_features - col_, q.input_aligned) {
    begin_ = q.p.batch * blockIdx.y / gridDim.y;
    end_ = q.p.batch * (blockIdx.y + 1) / gridDim.y;
  }

  __device__ __forceinline__ void run() {
    fetched_sample_ = begin_;
    if (q_.dots) fetch_basis();
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) fetch(stage);
    Sums outer, sums[kGroup];
    outer.clear();
#pragma unroll
    for (int j = 0; j < kGroup; ++j) sums[j].clear();
    int stage = 0;
    for (int64_t b = begin_; b < end_; ++b) {
      for (int64_t slice = 0; slice < slices_; ++slice) {
        copy_async_wait<Shape::kStages - 2>();
        __syncthreads();
        fetch(stage == 0 ? Shape::kStages - 1 : stage - 1);
        if (q_.dots && slice == 0 && b != begin_) flush_dots(b - 1);
        outer.template add<false, false>(left_ + stage * Shape::kLeft, right_ + stage * Shape::kRight, NoFactors{});
        stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
      }
      mask(outer);
      if (q_.dots) dot(b, outer);
      if (q_.out) spread(b, outer, sums);
      outer.clear();
    }
    if (q_.dots) {
      __syncthreads();
      flush_dots(end_ - 1);
    }
    if (!q_.out) return;
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (first_k_ + j < q_.p.num_basis) store(first_k_ + j, sums[j]);
  }

 private:
  __device__ __forceinline__ int64_t tiles() const { return q_.product.tiles_down * q_.product.tiles_across; }

  /// Starts the copies of the next slice of tokens, if there is one; a group in any case.
  __device__ __forceinline__ void fetch(int stage) {
    if (fetched_sample_ < end_) {
      const ManifoldLinearParams& p = q_.p;
      const int64_t t = fetched_slice_ * Shape::kDepth, row = fetched_sample_ * p.tokens + t;
      left_source_.fetch(left_ + stage * Shape::kLeft, row * p.output.stride[0], p.tokens - t);
      right_source_.fetch(right_ + stage * Shape::kRight, row * p.input.stride[0], p.tokens - t);
      if (++fetched_slice_ == slices_) ++fetched_sample_, fetched_slice_ = 0;
    }
    copy_async_commit();
  }

  /// The group's tiles of P, with the first slice's group of copies.
  __device__ __forceinline__ void fetch_basis() {
    const View& basis = q_.p.basis;
    const TileSource<Shape::kM, Shape::kN, true, Shape::kThreads, T> source(
        basis.at<T>(first_k_, row_, col_), basis.stride[1], q_.p.out_features - row_, q_.basis_aligned);
    for (int j = 0; j < kGroup && first_k_ + j < q_.p.num_basis; ++j)
      source.fetch(basis_ + j * kTile, j * basis.stride[0], q_.p.in_features - col_);
  }

  /// Zeros where the tile reaches beyond G: an infinity times the padding may stand there.
  __device__ __forceinline__ void mask(Sums& outer) const {
#pragma unroll
    for (int i = 0; i < outer.kRowParts; ++i) {
#pragma unroll
      for (int j = 0; j < outer.kColParts; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const bool inside =
              row_ + outer.row(i, r / 2) < q_.p.out_features && col_ + outer.col(j) + r % 2 < q_.p.in_features;
          outer.at[i][j][r] = inside ? outer.at[i][j][r] : 0.0f;
        }
      }
    }
  }

  __device__ __forceinline__ void dot(int64_t b, const Sums& outer) const {
    for (int g = 0; g < kGroup && first_k_ + g < q_.p.num_basis; ++g) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < outer.kRowParts; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int j = 0; j < outer.kColParts; ++j) {
            const float2 point = tile_pair<Shape::kN>(basis_ + g * kTile, outer.row(i, h), outer.col(j));
            total += outer.at[i][j][2 * h] * point.x;
            total += outer.at[i][j][2 * h + 1] * point.y;
          }
        }
      }
      total = warp_sum(total);
      if (threadIdx.x % 32 == 0) sides_.dots[b % 2][g][threadIdx.x / 32] = total;
    }
  }

  __device__ __forceinline__ void flush_dots(int64_t b) const {
    const int64_t k = first_k_ + threadIdx.x;
    if (threadIdx.x >= kGroup || k >= q_.p.num_basis) return;
    const int64_t l = q_.p.entry(b, k);
    if (l >= q_.p.num_local) return;
    float total = 0;
    for (int warp = 0; warp < Shape::kThreads / 32; ++warp) total += sides_.dots[b % 2][threadIdx.x][warp];
    q_.dots[(tile_ * q_.p.batch + b) * q_.p.num_local + l] = total;
  }

  /// dP_k += c_k G of those basis points that act on the sample.
  __device__ __forceinline__ void spread(int64_t b, const Sums& outer, Sums (&sums)[kGroup]) const {
    const int64_t first = q_.p.first_basis(b);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const int64_t l = first_k_ + g < q_.p.num_basis ? q_.p.entry_from(first, first_k_ + g) : q_.p.num_local;
      if (l >= q_.p.num_local) continue;
      const float c = *q_.p.coeff.template at<float>(b, l);
#pragma unroll
      for (int i = 0; i < outer.kRowParts; ++i)
#pragma unroll
        for (int j = 0; j < outer.kColParts; ++j)
#pragma unroll
          for (int r = 0; r < 4; ++r) sums[g].at[i][j][r] += c * outer.at[i][j][r];
    }
  }

  __device__ __forceinline__ void store(int64_t k, const Sums& sum) const {
    const OuterStore<T> to{q_.out, q_.partial, q_.accumulate, q_.p.num_basis, q_.p.out_features, q_.p.in_features};
#pragma unroll
    for (int i = 0; i < sum.kRowParts; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < sum.kColParts; ++j)
          to.pair(k, row_ + sum.row(i, h), col_ + sum.col(j), sum.at[i][j][2 * h], sum.at[i][j][2 * h + 1]);
  }

  const FoldOuterParams& q_;
  OuterSides<Shape>& sides_;
  T *left_, *right_, *basis_;
  int64_t slices_, tile_;
  TileIndex at_;
  int64_t first_k_, row_, col_;  // the group's first basis point, the tile's first output and input
  TileSource<Shape::kDepth, Shape::kM, false, Shape::kThreads, T> left_source_;
  TileSource<Shape::kDepth, Shape::kN, false, Shape::kThreads, T> right_source_;
  int64_t begin_, end_;                             // the block's samples
  int64_t fetched_sample_ = 0, fetched_slice_ = 0;  // the next slice to fetch
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    manifold_linear_fold_outer_kernel(const __grid_constant__ FoldOuterParams q) {
  NEUROMOD_DYNAMIC_SHARED(typename Shape::Element, shared);
  __shared__ OuterSides<Shape> sides;
  FoldOuter<Shape>(q, sides, shared).run();
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
    static_assert(outer_shared_bytes<Shape>() + sizeof(OuterSides<Shape>) <= kSharedPerBlock);
    NEUROMOD_LAUNCH(manifold_linear_fold_outer_kernel<Shape>, grid, dim3(Shape::kThreads), outer_shared_bytes<Shape>(),
                    stream, outer);
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
