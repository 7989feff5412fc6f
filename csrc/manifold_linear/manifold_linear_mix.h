// The kernel behind y and dx of manifold_linear, and behind dc, which comes along with dx:
//
//   out[r,n] = sum_k c[r,k] (sum_d left[r,d] P[k,n,d] + beta[k,n])      forward:   left = x, d = i, n = o
//   out[r,n] = sum_k c[r,k]  sum_d left[r,d] P[k,d,n]                   backward:  left = g, d = o, n = i
//   dots[r,k] = sum_n x[r,n] sum_d left[r,d] P[k,d,n]                   backward, on request
//
// Grid: x tiles of the result (TileIndex), y splits. A block walks its share of the K ceil(depth / kDepth) slices: k
// outside, the depth inside, kStages - 1 slices on their way by cp.async. The product of one k stays in its own
// accumulators and is added with the row's float32 c when k ends, so c meets no rounded operand, and P_k need not act
// on a row at all. Where a share ends within a k, what there is of the product is added; whoever begins a k adds its
// bias. Rows may be taken in order of their index, and of k those only that act on a tile's rows
// (manifold_linear_segments.h).
//
// Reads left and P once a tile (L2 serves the repeats), c, beta and x once a k (x from L1 after the first). Writes out
// once, rounded once, or with splits partial sums [splits, B T, partial_cols(n)] for manifold_linear_sum_splits; dots
// [tiles across, splits, B T, L] once. No atomics: the order of sums follows from shapes alone and, where rows are
// taken in order of their index, from the index.
//
// Cost: 2 B T K depth n flop; B T depth + K depth n + B T n elements at least, where left is re-read for each k from
// L2. Error: depth + K + splits roundings of float32 on a path, and that of the result; with tf32, of both operands.
// Oracle: manifold_linear.cu.
//
// Floor, predicted and not measured, on an H100 (790 TFLOP/s by wgmma, of which mma.sync reaches about two thirds):
// (4096, 4096, 4096, 3) bfloat16: 412 Gflop, 0.52 ms, by mma.sync about 0.8 ms. B = 1, 16: 100 MB of P, 34 us at 3
// TB/s.
#pragma once

#include "common/gathered_tile.h"
#include "manifold_linear/manifold_linear.h"
#include "manifold_linear/manifold_linear_cuda_plan.h"
#include "manifold_linear/manifold_linear_segments.h"
#include "manifold_linear/manifold_linear_splits.h"

namespace neuromod {

struct MixParams {
  ManifoldLinearParams p;
  CudaProduct product;
  View left;  // [B T, depth]
  View out;   // [B T, cols], or null
  int64_t depth, cols;
  float* partial;  // with splits, instead of out
  float* dots;     // or null
  bool left_aligned, basis_aligned, input_aligned;
};

/// Which slice a block works on, of which of the tile's basis points.
struct SliceCursor {
  int64_t k, slice;
  __device__ __forceinline__ void advance(int64_t slices) {
    if (++slice == slices) ++k, slice = 0;
  }
};

template <class Shape>
constexpr size_t mix_shared_bytes() {
  return sizeof(typename Shape::Element) * Shape::kStages * (Shape::kLeft + Shape::kRight);
}

/// What a basis point brings to a tile's rows and columns; of two basis points at a time, since threads that are ahead
/// fetch the next one's while others still mix this one's.
template <class Shape>
struct MixSides {
  float coeff[2][Shape::kM];
  bool acts[2][Shape::kM];
  int64_t rows[Shape::kM];  // in memory; -1 for none
  float bias[2][Shape::kN];
  float dots[2][Shape::kWarpsN][Shape::kM];
};

/// The work of one block.
template <class Shape, bool Backward>
class Mixer {
 public:
  using T = typename Shape::Element;

  __device__ __forceinline__ Mixer(const MixParams& q, MixSides<Shape>& sides, T* shared)
      : q_(q),
        sides_(sides),
        left_(shared),
        right_(shared + Shape::kStages * Shape::kLeft),
        slices_(ceil_div(q.depth, Shape::kDepth)),
        tile_(TileIndex::of(blockIdx.x, q.product.tiles_down, q.product.tiles_across)),
        position_(tile_.down * Shape::kM),
        col_(tile_.across * Shape::kN),
        left_source_(q.left.at<T>(0), q.left.stride[0], q.left_aligned, [&](int i) { return row_at(i); }),
        right_source_(Backward ? q.p.basis.at<T>(0, 0, col_) : q.p.basis.at<T>(0, col_), q.p.basis.stride[1],
                      q.cols - col_, q.basis_aligned) {
    const int64_t end = position_ + Shape::kM;
    basis_ = acting_basis(q.p, position_, (end < q.p.rows() ? end : q.p.rows()) - 1);
    const int64_t total = basis_.count * slices_, split = blockIdx.y, splits = gridDim.y;
    begin_ = total * split / splits;
    end_ = total * (split + 1) / splits;
    my_row_ = threadIdx.x < Shape::kM ? row_at(threadIdx.x) : -1;
    sample_ = has_row() ? my_row_ / q.p.tokens : 0;
    first_basis_ = q.p.first_basis(sample_);
    if (threadIdx.x < Shape::kM) sides.rows[threadIdx.x] = my_row_;
  }

  __device__ __forceinline__ void run() {
    SliceCursor at{begin_ / slices_, begin_ % slices_};
    ahead_ = at;
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) fetch(begin_ + stage, stage);
    prepare(at.k);
    if (Backward && q_.dots) clear_dots();
    if (begin_ == end_) __syncthreads();  // the rows, which a slice's barrier brings otherwise
    ProductSums<Shape> product, sum;
    product.clear();
    sum.clear();
    int stage = 0;
    for (int64_t step = begin_; step < end_; ++step) {
      // Behind the barrier this slice is there for all, and nobody reads the one before, whose place the fetch takes.
      copy_async_wait<Shape::kStages - 2>();
      __syncthreads();
      fetch(step + Shape::kStages - 1, stage == 0 ? Shape::kStages - 1 : stage - 1);
      if (step == begin_ || at.slice == 0) {
        if (Backward && q_.dots && step != begin_) flush_dots(at.k - 1);
        prepare(at.k + 1);
      }
      product.template add<true, !Backward>(left_ + stage * Shape::kLeft, right_ + stage * Shape::kRight, NoFactors{});
      if (at.slice + 1 == slices_ || step + 1 == end_) {
        if (Backward && q_.dots) dot(at.k, product);
        mix(at.k, product, sum);
      }
      at.advance(slices_);
      stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    }
    if (Backward && q_.dots && begin_ < end_) {
      __syncthreads();
      flush_dots((end_ - 1) / slices_);
    }
    if (q_.out) store(sum);
  }

 private:
  __device__ __forceinline__ bool has_row() const { return my_row_ >= 0; }
  /// The row in memory of a row of the tile; -1 for none.
  __device__ __forceinline__ int64_t row_at(int i) const {
    return position_ + i < q_.p.rows() ? ordered_row(q_.p, position_ + i) : -1;
  }
  /// The i-th basis point that the tile meets.
  __device__ __forceinline__ int64_t basis_point(int64_t i) const { return basis_.at(i, q_.p.num_basis); }

  /// Starts the copies of a slice, if the block has as many; a group in any case, so that waits can count groups.
  __device__ __forceinline__ void fetch(int64_t step, int stage) {
    if (step < end_) {
      const int64_t d = ahead_.slice * Shape::kDepth, depth = q_.depth - d;
      const int64_t down = Backward ? d * q_.p.basis.stride[1] : d;
      left_source_.fetch(left_ + stage * Shape::kLeft, d, depth);
      right_source_.fetch(right_ + stage * Shape::kRight, basis_point(ahead_.k) * q_.p.basis.stride[0] + down, depth);
      ahead_.advance(slices_);
    }
    copy_async_commit();
  }

  /// The k-th basis point's coefficients of the tile's rows, and bias of its columns if this block begins it; if there
  /// is one.
  __device__ __forceinline__ void prepare(int64_t k) {
    if (k >= basis_.count) return;
    const ManifoldLinearParams& p = q_.p;
    const int i = threadIdx.x;  // the row, then the column, that this thread looks after
    if (i < Shape::kM) {
      const int64_t l = p.entry_from(first_basis_, basis_point(k));
      const bool acts = has_row() && l < p.num_local;
      sides_.acts[k % 2][i] = acts;
      sides_.coeff[k % 2][i] = acts && q_.out ? *p.coeff.template at<float>(sample_, l) : 0.0f;  // dots need none
    } else if (!Backward && i < Shape::kM + Shape::kN) {
      const int64_t n = col_ + i - Shape::kM;
      const bool there = p.bias && n < q_.cols && begin_ <= k * slices_;
      sides_.bias[k % 2][i - Shape::kM] = there ? to_acc<float>(*p.bias.template at<T>(basis_point(k), n)) : 0.0f;
    }
  }

  /// sum += c (product + bias) where k acts; the product begins anew.
  __device__ __forceinline__ void mix(int64_t k, ProductSums<Shape>& product, ProductSums<Shape>& sum) const {
#pragma unroll
    for (int i = 0; i < sum.kRowParts; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = sum.row(i, h);
        const bool acts = sides_.acts[k % 2][row];
        const float c = sides_.coeff[k % 2][row];
#pragma unroll
        for (int j = 0; j < sum.kColParts; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float bias = Backward ? 0.0f : sides_.bias[k % 2][sum.col(j) + e];
            const float all = sum.at[i][j][2 * h + e] + c * (product.at[i][j][2 * h + e] + bias);
            sum.at[i][j][2 * h + e] = acts ? all : sum.at[i][j][2 * h + e];
          }
        }
      }
    }
    product.clear();
  }

  /// Each row's dot product of `product` with x, by warp: its columns in order in a thread, then four threads' sums. x
  /// comes from L1 after the first k: a tile of it in shared memory would not fit every card.
  __device__ __forceinline__ void dot(int64_t k, const ProductSums<Shape>& product) const {
    const int warp_col = threadIdx.x / 32 % Shape::kWarpsN;
#pragma unroll
    for (int i = 0; i < product.kRowParts; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = product.row(i, h);
        const int64_t in_memory = sides_.rows[row], left = in_memory >= 0 ? q_.cols - col_ : 0;
        const T* const from = q_.p.input.template at<T>(in_memory >= 0 ? in_memory : 0, col_);
        float total = 0;
#pragma unroll
        for (int j = 0; j < product.kColParts; ++j) {
          const int col = product.col(j);
          const float2 x = load_pair(from + col, left - col, q_.input_aligned);
          if (col < left) total += product.at[i][j][2 * h] * x.x;
          if (col + 1 < left) total += product.at[i][j][2 * h + 1] * x.y;
        }
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        if (threadIdx.x % 4 == 0) sides_.dots[k % 2][warp_col][row] = total;
      }
    }
  }

  /// Where this thread's row has the dot products of its coefficients.
  __device__ __forceinline__ float* row_dots() const {
    const int64_t slot = tile_.across * gridDim.y + blockIdx.y;
    return q_.dots + (slot * q_.p.rows() + my_row_) * q_.p.num_local;
  }

  __device__ __forceinline__ void flush_dots(int64_t k) const {
    const int64_t l = q_.p.entry_from(first_basis_, basis_point(k));
    if (!has_row() || l >= q_.p.num_local) return;
    float total = 0;
    for (int warp = 0; warp < Shape::kWarpsN; ++warp) total += sides_.dots[k % 2][warp][threadIdx.x];
    row_dots()[l] = total;
  }

  /// Zeros for the basis points of which the block meets no slice.
  __device__ __forceinline__ void clear_dots() const {
    if (!has_row()) return;
    for (int64_t l = 0; l < q_.p.num_local; ++l) {
      const int64_t k = basis_.find((first_basis_ + l) % q_.p.num_basis, q_.p.num_basis) * slices_;
      if (begin_ == end_ || end_ <= k || begin_ >= k + slices_) row_dots()[l] = 0;
    }
  }

  __device__ __forceinline__ void store(const ProductSums<Shape>& sum) const {
#pragma unroll
    for (int i = 0; i < sum.kRowParts; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t row = sides_.rows[sum.row(i, h)];
        if (row < 0) continue;
#pragma unroll
        for (int j = 0; j < sum.kColParts; ++j) {
          const int64_t col = col_ + sum.col(j);
          const float first = sum.at[i][j][2 * h], second = sum.at[i][j][2 * h + 1];
          if (!q_.partial) {
            store_pair(q_.out.template at<T>(row, col), first, second, q_.cols - col);
          } else if (col < q_.cols) {
            const int64_t at = (blockIdx.y * q_.p.rows() + row) * partial_cols(q_.cols) + col;
            *reinterpret_cast<float2*>(q_.partial + at) = make_float2(first, second);
          }
        }
      }
    }
  }

  const MixParams& q_;
  MixSides<Shape>& sides_;
  T *left_, *right_;
  int64_t slices_;
  TileIndex tile_;
  int64_t position_, col_;  // the tile's first, of the rows in order and of the columns
  RowSource<Shape::kM, Shape::kDepth, Shape::kThreads, T> left_source_;
  TileSource<Backward ? Shape::kDepth : Shape::kN, Backward ? Shape::kN : Shape::kDepth, !Backward, Shape::kThreads, T>
      right_source_;
  BasisRange basis_;              // that the tile meets
  int64_t begin_, end_;           // the block's share of their slices
  int64_t my_row_;                // whose sides this thread looks after; -1 for none
  int64_t sample_, first_basis_;  // of it
  SliceCursor ahead_;             // the next slice to fetch
};

template <class Shape, bool Backward>
__global__ void __launch_bounds__(Shape::kThreads)
    manifold_linear_mix_tiles_kernel(const __grid_constant__ MixParams q) {
  NEUROMOD_DYNAMIC_SHARED(typename Shape::Element, shared);
  __shared__ MixSides<Shape> sides;
  Mixer<Shape, Backward>(q, sides, shared).run();
}

/// One product, and the second pass where it has splits.
template <bool Backward>
int launch_mix_tiles(const MixParams& q, stream_t stream) {
  const dim3 grid(static_cast<unsigned>(q.product.tiles_down * q.product.tiles_across),
                  static_cast<unsigned>(q.product.splits));
  dispatch_shape(q.p, q.product.plan, [&](auto tag) {
    using Shape = typename decltype(tag)::type;
    static_assert(mix_shared_bytes<Shape>() + sizeof(MixSides<Shape>) <= kSharedPerBlock);
    NEUROMOD_LAUNCH((manifold_linear_mix_tiles_kernel<Shape, Backward>), grid, dim3(Shape::kThreads),
                    mix_shared_bytes<Shape>(), stream, q);
  });
  if (const int status = launch_status(); status != 0 || !q.partial || !q.out) return status;
  const View out{q.out.data, {0, q.out.stride[0], 1}};
  return launch_sum_splits(q.p.dtype, q.partial, q.product.splits, out, 1, q.p.rows(), q.cols, false, stream);
}

}  // namespace neuromod
