// manifold_linear for samples of many tokens, on tensor cores: each sample's weight is blended tile by tile in shared
// memory, rounded once to the operands' dtype, and multiplied; it never exists in memory.
//
//   out[b,t,n] = sum_d left[b,t,d] W_b[n,d] + sum_l c[b,l] beta[k_l,n]     forward:  d = i, n = o
//   out[b,t,n] = sum_d left[b,t,d] W_b[d,n]                                dx:       d = o, n = i
//   W_b = sum_l c[b,l] P[k_l]
//
// Grid: x tiles of a sample's result (TileIndex) for each sample, each by the pipeline of common/fold_tile.h. Basis
// points that do not act on the sample are not read.
//
// Reads left once a tile, and L tiles of P a slice, from L2, once a block; writes out once, rounded once. No atomics.
//
// Cost: 2 B T depth n flop for the product, 2 B ceil(T / kM) L depth n for the blend; B T (depth + n) + K depth n
// elements at least. Error: depth roundings of float32 on a path, L of the blend, one of the blended weight and one of
// the result. Oracle: manifold_linear.cu.
//
// Floor, predicted and not measured, on an H100: B = 64, T = 256, 1024 x 1024, K = 3, bfloat16: 34 Gflop, 43 us at 790
// TFLOP/s, about 65 us by mma.sync. L2 delivers 16 KB of left and 3 x 8 KB of P a slice to each of 512 blocks, 0.67 GB
// in all, 120 us at 5.5 TB/s: the bound.
#include "common/fold_tile.h"
#include "manifold_linear/manifold_linear_splits.h"
#include "manifold_linear/manifold_linear_tiles.h"

namespace neuromod {
namespace {

template <class Math>
using TallShape = ProductShape<Math, 256, 128, 4, 2, 3>;

struct FoldParams {
  ManifoldLinearParams p;
  View left, out;  // [B T, depth], [B T, cols]
  int64_t depth, cols;
  int64_t tiles_down, tiles_across;  // of a sample
  bool left_aligned, basis_aligned;
};

/// What the block's sample brings.
template <class Shape>
struct FoldSides {
  float coeff[kMostFolded];
  float bias[Shape::kN];
};

/// The work of one block, and the operands of its product.
template <class Shape, bool Backward>
class LinearFold {
 public:
  using T = typename Shape::Element;
  static constexpr bool kRightAlong = !Backward;

  __device__ __forceinline__ LinearFold(const FoldParams& q, FoldSides<Shape>& sides)
      : q_(q),
        sides_(sides),
        tile_(TileIndex::of(blockIdx.x % tiles(), q.tiles_down, q.tiles_across)),
        sample_(blockIdx.x / tiles()),
        token_(tile_.down * Shape::kM),
        col_(tile_.across * Shape::kN),
        first_basis_(q.p.first_basis(sample_)),
        left_source_(q.left.at<T>(sample_ * q.p.tokens + token_), q.left.stride[0], q.p.tokens - token_,
                     q.left_aligned),
        right_source_(Backward ? q.p.basis.at<T>(0, 0, col_) : q.p.basis.at<T>(0, col_), q.p.basis.stride[1],
                      q.cols - col_, q.basis_aligned) {}

  __device__ __forceinline__ void run(T* shared) {
    prepare();
    __syncthreads();  // the sides
    ProductSums<Shape> sum;
    Folder<Shape, LinearFold>(*this, shared).run(sum);
    store(sum);
  }

  __device__ __forceinline__ int64_t slices() const { return ceil_div(q_.depth, Shape::kDepth); }
  __device__ __forceinline__ int64_t terms() const { return q_.p.num_local; }
  __device__ __forceinline__ float coeff(int64_t l) const { return sides_.coeff[l]; }

  __device__ __forceinline__ void fetch_left(int64_t slice, T* tile) const {
    const int64_t d = slice * Shape::kDepth;
    left_source_.fetch(tile, d, q_.depth - d);
  }

  __device__ __forceinline__ void fetch_right(int64_t slice, int64_t l, T* tile) const {
    const View& basis = q_.p.basis;
    const int64_t d = slice * Shape::kDepth, down = Backward ? d * basis.stride[1] : d;
    right_source_.fetch(tile, basis_point(l) * basis.stride[0] + down, q_.depth - d);
  }

  __device__ __forceinline__ int inside(int64_t slice, int row, int col) const {
    const int64_t left = q_.depth - slice * Shape::kDepth - (Backward ? row : col);
    return left <= 0 ? 0 : Backward || left > kChunk<T> ? kChunk<T> : static_cast<int>(left);
  }

 private:
  __device__ __forceinline__ int64_t tiles() const { return q_.tiles_down * q_.tiles_across; }
  __device__ __forceinline__ int64_t basis_point(int64_t l) const {
    const int64_t k = first_basis_ + l;
    return k < q_.p.num_basis ? k : k - q_.p.num_basis;
  }

  __device__ __forceinline__ void prepare() {
    const ManifoldLinearParams& p = q_.p;
    for (int l = threadIdx.x; l < p.num_local; l += Shape::kThreads)
      sides_.coeff[l] = *p.coeff.template at<float>(sample_, l);
    const int64_t n = col_ + threadIdx.x;
    if (Backward || threadIdx.x >= Shape::kN) return;
    float bias = 0;
    for (int64_t l = 0; p.bias && n < q_.cols && l < p.num_local; ++l)
      bias += *p.coeff.template at<float>(sample_, l) * to_acc<float>(*p.bias.template at<T>(basis_point(l), n));
    sides_.bias[threadIdx.x] = bias;
  }

  __device__ __forceinline__ void store(const ProductSums<Shape>& sum) const {
#pragma unroll
    for (int i = 0; i < sum.kRowParts; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t token = token_ + sum.row(i, h);
        if (token >= q_.p.tokens) continue;
#pragma unroll
        for (int j = 0; j < sum.kColParts; ++j) {
          const int col = sum.col(j);
          const float first = Backward ? 0.0f : sides_.bias[col], second = Backward ? 0.0f : sides_.bias[col + 1];
          store_pair(q_.out.template at<T>(sample_ * q_.p.tokens + token, col_ + col), sum.at[i][j][2 * h] + first,
                     sum.at[i][j][2 * h + 1] + second, q_.cols - col_ - col);
        }
      }
    }
  }

  const FoldParams& q_;
  FoldSides<Shape>& sides_;
  TileIndex tile_;
  int64_t sample_, token_, col_, first_basis_;  // the tile's first token and column
  TileSource<Shape::kM, Shape::kDepth, true, Shape::kThreads, T> left_source_;
  TileSource<Backward ? Shape::kDepth : Shape::kN, Backward ? Shape::kN : Shape::kDepth, !Backward, Shape::kThreads, T>
      right_source_;
};

template <class Shape, bool Backward>
__global__ void __launch_bounds__(Shape::kThreads) manifold_linear_fold_kernel(const __grid_constant__ FoldParams q) {
  NEUROMOD_DYNAMIC_SHARED(typename Shape::Element, shared);
  __shared__ FoldSides<Shape> sides;
  LinearFold<Shape, Backward>(q, sides).run(shared);
}

template <template <class> class Shape, bool Backward>
int launch_fold(FoldParams q, stream_t stream) {
  dispatch_half(q.p.dtype, [&](auto tag) {
    using Tile = Shape<HalfMath<typename decltype(tag)::type>>;
    q.tiles_down = ceil_div(q.p.tokens, Tile::kM);
    q.tiles_across = ceil_div(q.cols, Tile::kN);
    const dim3 grid(static_cast<unsigned>(q.p.batch * q.tiles_down * q.tiles_across));
    static_assert(fold_shared_bytes<Tile>() + sizeof(FoldSides<Tile>) <= kSharedPerBlock);
    NEUROMOD_LAUNCH((manifold_linear_fold_kernel<Tile, Backward>), grid, dim3(Tile::kThreads),
                    fold_shared_bytes<Tile>(), stream, q);
  });
  return launch_status();
}

template <bool Backward>
int launch_fold(const ManifoldLinearParams& p, const View& left, const View& out, int64_t depth, int64_t cols,
                stream_t stream) {
  FoldParams q{p, left, out, depth, cols, 0, 0, rows_are_aligned(left, 2, 2), rows_are_aligned(p.basis, 3, 2)};
  switch (fold_tokens(p)) {
    case 64:
      return launch_fold<SmallShape, Backward>(q, stream);
    case 128:
      return launch_fold<LargeShape, Backward>(q, stream);
    default:
      return launch_fold<TallShape, Backward>(q, stream);
  }
}

}  // namespace

int launch_forward_fold(const ManifoldLinearParams& p, stream_t stream) {
  return launch_fold<false>(p, p.input, p.output, p.in_features, p.out_features, stream);
}

int launch_grad_input_fold(const ManifoldLinearBackwardParams& q, stream_t stream) {
  return launch_fold<true>(q.p, q.p.output, q.grad_input, q.p.out_features, q.p.in_features, stream);
}

}  // namespace neuromod
