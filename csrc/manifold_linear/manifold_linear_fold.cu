// manifold_linear for samples of many tokens, on tensor cores: each sample's weight is blended tile by tile in shared
// memory, rounded once to the operands' dtype, and multiplied; it never exists in memory.
//
//   out[b,t,n] = sum_d left[b,t,d] W_b[n,d] + sum_l c[b,l] beta[k_l,n]     forward:  d = i, n = o
//   out[b,t,n] = sum_d left[b,t,d] W_b[d,n]                                dx:       d = o, n = i
//   W_b = sum_l c[b,l] P[k_l]
//
// Grid: x tiles of a sample's result (TileIndex) for each sample. A block walks the depth in slices; of a slice it
// takes the tiles of the L basis points one after another, kStages - 1 on their way by cp.async. Whoever copied a chunk
// of a tile also blends it, in registers and float32, l ascending, so only the blended tile needs a barrier; there are
// two of it, to blend one while the other is multiplied. Basis points that do not act on the sample are not read.
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

template <class Shape>
constexpr size_t fold_shared_bytes() {
  return 2 * Shape::kDepth * (Shape::kStages * (Shape::kM + Shape::kN) + 2 * Shape::kN);
}

/// What the block's sample brings.
template <class Shape>
struct FoldSides {
  float coeff[kMostFolded];
  float bias[Shape::kN];
};

/// The work of one block.
template <class Shape, bool Backward>
class Folder {
 public:
  using T = typename Shape::Element;

  __device__ __forceinline__ Folder(const FoldParams& q, FoldSides<Shape>& sides, T* shared)
      : q_(q),
        sides_(sides),
        left_(shared),
        right_(shared + Shape::kStages * Shape::kLeft),
        blended_(shared + Shape::kStages * (Shape::kLeft + Shape::kRight)),
        slices_(ceil_div(q.depth, Shape::kDepth)),
        tile_(TileIndex::of(blockIdx.x % tiles(), q.tiles_down, q.tiles_across)),
        sample_(blockIdx.x / tiles()),
        token_(tile_.down * Shape::kM),
        col_(tile_.across * Shape::kN),
        first_basis_(q.p.first_basis(sample_)),
        left_source_(q.left.at<T>(sample_ * q.p.tokens + token_), q.left.stride[0], q.p.tokens - token_,
                     q.left_aligned),
        right_source_(Backward ? q.p.basis.at<T>(0, 0, col_) : q.p.basis.at<T>(0, col_), q.p.basis.stride[1],
                      q.cols - col_, q.basis_aligned) {}

  __device__ __forceinline__ void run() {
    const int64_t terms = q_.p.num_local, steps = slices_ * terms;
    prepare();
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) {
      fetch_left(stage);
      fetch_right(stage);
      copy_async_commit();
    }
    __syncthreads();  // the sides
    ProductSums<Shape> sum;
    sum.clear();
    Blend blend = {};
    int64_t slice = 0, l = 0;
    for (int64_t step = 0; step < steps; ++step) {
      copy_async_wait<Shape::kStages - 2>();
      add(blend, right_ + step % Shape::kStages * Shape::kRight, sides_.coeff[l]);
      const bool last = l + 1 == terms;
      T* const blended = blended_ + slice % 2 * Shape::kRight;
      if (last) {
        round(blend, blended, q_.depth - slice * Shape::kDepth);
        __syncthreads();  // the blended tile and left's slice are there; left's slice before is no longer read
        fetch_left(slice + Shape::kStages - 1);
      }
      fetch_right(step + Shape::kStages - 1);
      copy_async_commit();
      if (last) {
        sum.template add<true, !Backward>(left_ + slice % Shape::kStages * Shape::kLeft, blended, NoFactors{});
        l = 0;
        ++slice;
      } else {
        ++l;
      }
    }
    store(sum);
  }

 private:
  static constexpr int kRightCols = Backward ? Shape::kN : Shape::kDepth;
  static constexpr int kChunks = Shape::kRight / kChunk<T> / Shape::kThreads;  // of a tile of P, that are this thread's

  struct Blend {
    float at[kChunks][kChunk<T>];
  };

  static __device__ __forceinline__ int chunk_row(int i) {
    return (threadIdx.x + i * Shape::kThreads) / (kRightCols / kChunk<T>);
  }
  static __device__ __forceinline__ int chunk_col(int i) {
    return (threadIdx.x + i * Shape::kThreads) % (kRightCols / kChunk<T>)*kChunk<T>;
  }

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

  __device__ __forceinline__ void fetch_left(int64_t slice) {
    const int64_t d = slice * Shape::kDepth;
    if (slice < slices_) left_source_.fetch(left_ + slice % Shape::kStages * Shape::kLeft, d, q_.depth - d);
  }

  __device__ __forceinline__ void fetch_right(int64_t step) {
    if (fetched_slice_ == slices_) return;
    const View& basis = q_.p.basis;
    const int64_t d = fetched_slice_ * Shape::kDepth, down = Backward ? d * basis.stride[1] : d;
    right_source_.fetch(right_ + step % Shape::kStages * Shape::kRight, basis_point(fetched_) * basis.stride[0] + down,
                        q_.depth - d);
    if (++fetched_ == q_.p.num_local) ++fetched_slice_, fetched_ = 0;
  }

  /// blend += c times this thread's chunks of a tile of P.
  __device__ __forceinline__ void add(Blend& blend, const T* tile, float c) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const uint4 chunk = *reinterpret_cast<const uint4*>(tile + swizzled<kRightCols, T>(chunk_row(i), chunk_col(i)));
      const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 two = widen_pair<T>(pairs[j]);
        blend.at[i][2 * j] += c * two.x;
        blend.at[i][2 * j + 1] += c * two.y;
      }
    }
  }

  /// Rounds the blend into a tile, zero from `depth` on, where an infinite c would have made NaN of padding; begins
  /// anew.
  __device__ __forceinline__ void round(Blend& blend, T* tile, int64_t depth) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int row = chunk_row(i), col = chunk_col(i);
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int d = Backward ? row : col + 2 * j;
        const float first = d < depth ? blend.at[i][2 * j] : 0.0f;
        const float second = (Backward ? d : d + 1) < depth ? blend.at[i][2 * j + 1] : 0.0f;
        pairs[j] = round_pair<T>(first, second);
      }
      *reinterpret_cast<uint4*>(tile + swizzled<kRightCols, T>(row, col)) =
          make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    blend = Blend{};
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
  T *left_, *right_, *blended_;
  int64_t slices_;
  TileIndex tile_;
  int64_t sample_, token_, col_, first_basis_;  // the tile's first token and column
  TileSource<Shape::kM, Shape::kDepth, true, Shape::kThreads, T> left_source_;
  TileSource<Backward ? Shape::kDepth : Shape::kN, kRightCols, !Backward, Shape::kThreads, T> right_source_;
  int64_t fetched_slice_ = 0, fetched_ = 0;  // the next tile of P to fetch: its slice and coefficient
};

template <class Shape, bool Backward>
__global__ void __launch_bounds__(Shape::kThreads) manifold_linear_fold_kernel(const __grid_constant__ FoldParams q) {
  NEUROMOD_DYNAMIC_SHARED(typename Shape::Element, shared);
  __shared__ FoldSides<Shape> sides;
  Folder<Shape, Backward>(q, sides, shared).run();
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
