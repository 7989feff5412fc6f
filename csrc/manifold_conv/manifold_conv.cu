// manifold_conv in CUDA: the launchers, the forward pass and the gradient of x, as products with each sample's kernel,
// which is blended tile by tile in shared memory (common/fold_tile.h) and never exists in memory.
//
//   y[b,o,q]  = sum_(i,c) x[b,c, q stride + i dilation - padding] W_b[o,c,i] + sum_k c[b,k] beta[k,o]
//   dx[b,c,r] = sum_(i,o) g[b,o, (r + padding - i dilation) / stride] W_b[o,c,i]    over the taps i where that is whole
//   W_b = sum_k c[b,k] P[k]
//
// Rows of the product are pixels, columns o or c of a group, the depth is (tap, channel): an implicit im2col, the rows
// of a tile being copied from where the tap moves them. The pixels of x that stand alike to the stride see the same
// taps, and are a correlation of their own (a class): no product with the zeros that a stride leaves.
//
// Grid: x tiles of pixels and columns (TileIndex), for each class, group and sample. Reads left once a tap, column tile
// and class and K tiles of P a slice, from L2; writes the result once, rounded once. No atomics; depth ascending.
//
// Cost: 2 B O C/groups taps pixels flop for the product, 2 B ceil(pixels / kM) K O C/groups taps for the blend; B (C +
// O) pixels + K O C/groups taps elements at least. Error: depth roundings of the accumulator on a path, K of the blend,
// one of the blended weight to the operands' type, with tf32 of both operands, one of the result. Oracle:
// python_tests/conv_entries.py, and torch's convolution with a group for each sample.
//
// Floor, predicted and not measured, on an H100: B = 64, 64 to 64 channels, 32 x 32, 3 x 3, K = 3, bfloat16: 4.8 Gflop,
// 6 us at 790 TFLOP/s, about 9 us by mma.sync; 17 MB, 6 us at 3 TB/s. L2 delivers 16 KB of x and 3 x 4 KB of P a slice
// of 256 x 64, 18 slices to 256 blocks: 0.13 GB, 24 us at 5.5 TB/s, the bound.
#include <climits>

#include "common/dispatch.h"
#include "common/fold_tile.h"
#include "manifold_conv/manifold_conv.h"
#include "manifold_conv/manifold_conv_outer.h"
#include "manifold_conv/manifold_conv_walk.h"

namespace neuromod {
namespace {

template <class Math>
using SmallConv = ProductShape<Math, 64, 64, 2, 2, 4>;
template <class Math>
using NarrowConv = ProductShape<Math, 256, 64, 4, 2, 4>;
template <class Math>
using LargeConv = ProductShape<Math, 128, 128, 2, 4, 4>;
template <class Math>
using TallConv = ProductShape<Math, 256, 128, 4, 2, 3>;

struct ConvFoldParams {
  ManifoldConvParams p;
  View left, out;          // x and y, or g and dx
  int64_t channels, cols;  // of a group: in the depth, across
  int64_t filled;          // channels filled up, as left's rows have them
  int64_t classes[3];      // in each dimension: 1 in the forward pass, else the stride
  int64_t down, across;    // tiles
};

/// What a block works out once.
template <class Shape>
struct ConvSides {
  ConvAxis axes[3];
  int at[3][Shape::kM];  // where each of the tile's pixels reads, for the first tap
  int to[Shape::kM];     // where it is written in out; -1 for none
  typename Shape::Acc bias[Shape::kN];
};

/// Which part of the result is the block's.
template <class Shape>
struct ConvBlock {
  int64_t pixel, col, place[3], group, sample;

  __device__ __forceinline__ explicit ConvBlock(const ConvFoldParams& q) {
    int64_t rest = blockIdx.x;
    const TileIndex tile = TileIndex::of(rest % (q.down * q.across), q.down, q.across);
    pixel = tile.down * Shape::kM;
    col = tile.across * Shape::kN;
    rest /= q.down * q.across;
    for (int d = 2; d >= 0; --d) place[d] = rest % q.classes[d], rest /= q.classes[d];
    group = rest % q.p.groups;
    sample = rest / q.p.groups;
  }
};

/// Fills the sides, for all threads; false if the block's class has no pixel for it.
template <class Shape, bool Backward>
__device__ __forceinline__ bool prepare(const ConvFoldParams& q, const ConvBlock<Shape>& block,
                                        ConvSides<Shape>& sides) {
  using T = typename Shape::Element;
  using Acc = typename Shape::Acc;
  const ManifoldConvParams& p = q.p;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    if (int(threadIdx.x) == d)
      sides.axes[d] = Backward ? gradient_axis(p, d, int(block.place[d])) : convolution_axis(p, d);
  }
  __syncthreads();
  const ConvAxis(&axes)[3] = sides.axes;
  const int64_t pixels = int64_t(axes[0].count) * axes[1].count * axes[2].count;
  if (block.pixel >= pixels) return false;
  for (int m = threadIdx.x; m < Shape::kM; m += Shape::kThreads) {
    const bool there = block.pixel + m < pixels;
    const ConvPixel pixel = ConvPixel::of(there ? block.pixel + m : 0, axes[1].count, axes[2].count);
    int to[3];
    for (int d = 0; d < 3; ++d) {
      sides.at[d][m] = there ? pixel.at[d] * axes[d].step + axes[d].base : INT_MIN / 2;  // outside with any tap
      to[d] = axes[d].first + pixel.at[d] * axes[d].stride;
    }
    const int64_t* const size = Backward ? p.in_size : p.out_size;
    sides.to[m] = there ? int((to[0] * size[1] + to[1]) * size[2] + to[2]) : -1;
  }
  for (int n = threadIdx.x; !Backward && n < Shape::kN; n += Shape::kThreads) {
    Acc bias = 0;
    for (int64_t k = 0; p.bias && block.col + n < q.cols && k < p.num_basis; ++k)
      bias += *p.coeff.template at<Acc>(block.sample, k) *
              to_acc<Acc>(*p.bias.template at<T>(k, block.group * q.cols + block.col + n));
    sides.bias[n] = bias;
  }
  __syncthreads();
  return true;
}

/// The operands of a block's product (common/fold_tile.h).
template <class Shape, bool Backward>
class ConvOperands {
 public:
  using T = typename Shape::Element;
  using Acc = typename Shape::Acc;
  static constexpr bool kRightAlong = !Backward;

  __device__ __forceinline__ ConvOperands(const ConvFoldParams& q, const ConvBlock<Shape>& block,
                                          const ConvSides<Shape>& sides)
      : q_(q),
        sides_(sides),
        left_(q.left.at<T>(block.sample, 0, block.group * q.filled)),
        coeff_(q.p.coeff.template at<Acc>(block.sample, 0)),
        cols_left_(q.cols - block.col),
        first_output_(block.group * q.p.group_outputs() + (Backward ? 0 : block.col)),
        first_channel_(Backward ? block.col : 0),
        pitch_(q.p.filled(q.p.group_channels())),
        depth_(int64_t(sides.axes[0].taps) * sides.axes[1].taps * sides.axes[2].taps * q.filled),
        whole_(q.channels == q.filled && depth_ % Shape::kDepth == 0),
        left_cursor_(sides.axes, int(q.filled), threadIdx.x % kInDepth * kChunk<T>),
        right_cursor_(sides.axes, int(q.filled),
                      Backward ? threadIdx.x / kInRight : threadIdx.x % kInDepth * kChunk<T>) {}

  __device__ __forceinline__ int64_t slices() const { return ceil_div(depth_, Shape::kDepth); }
  __device__ __forceinline__ int64_t terms() const { return q_.p.num_basis; }
  __device__ __forceinline__ Acc coeff(int64_t k) const { return coeff_[k * q_.p.coeff.stride[1]]; }

  __device__ __forceinline__ void fetch_left(int64_t, T* tile) {
    const ConvAxis(&axes)[3] = sides_.axes;
    const int row = threadIdx.x / kInDepth, col = threadIdx.x % kInDepth * kChunk<T>;
    const bool there = !left_cursor_.ended();
    const int move[3] = {left_cursor_.moved(axes, 0), left_cursor_.moved(axes, 1), left_cursor_.moved(axes, 2)};
#pragma unroll
    for (int i = 0; i < kLefts; ++i) {
      const int m = row + i * kLeftStep;
      const int z = sides_.at[0][m] + move[0], y = sides_.at[1][m] + move[1], x = sides_.at[2][m] + move[2];
      const bool inside = there && within(z, axes[0]) && within(y, axes[1]) && within(x, axes[2]);
      const int64_t pixel = inside ? (z * axes[1].size + y) * axes[2].size + x : 0;
      copy_async<16>(tile + swizzled<Shape::kDepth, T>(m, col),
                     left_ + pixel * q_.left.stride[1] + (inside ? left_cursor_.channel() : 0), inside ? 16 : 0);
    }
    left_cursor_.advance(axes, Shape::kDepth);
  }

  __device__ __forceinline__ void fetch_right(int64_t slice, int64_t k, T* tile) {
    const ManifoldConvParams& p = q_.p;
    const int row = threadIdx.x / kInRight, col = threadIdx.x % kInRight * kChunk<T>;
    const T* const from = p.basis.at<T>(k);
    if (k == 0 && slice > 0) right_cursor_.advance(sides_.axes, Shape::kDepth);
    ConvCursor cursor = right_cursor_;  // of the first row, if rows run down the depth
#pragma unroll
    for (int i = 0; i < kRights; ++i) {
      if (Backward && i > 0) cursor.advance(sides_.axes, kRightStep);
      const int n = row + i * kRightStep;  // forward: the tile's output
      const bool inside = !cursor.ended() &&
                          (Backward ? cursor.channel() < q_.channels && first_channel_ + col < pitch_ : n < cols_left_);
      const int64_t output = first_output_ + (Backward ? cursor.channel() : n);
      const int64_t channel = first_channel_ + (Backward ? col : cursor.channel());
      const int64_t offset = (cursor.tap(sides_.axes, p) * p.out_channels + output) * pitch_ + channel;
      copy_async<16>(tile + swizzled<kRightCols, T>(n, col), from + (inside ? offset : 0), inside ? 16 : 0);
    }
  }

  __device__ __forceinline__ int inside(int64_t slice, int row, int col) const {
    if (whole_) return kChunk<T>;
    const int64_t at = slice * Shape::kDepth + (Backward ? row : col);
    const int left = int(q_.channels) - int(unsigned(at) % unsigned(q_.filled));
    return at >= depth_ || left <= 0 ? 0 : Backward || left > kChunk<T> ? kChunk<T> : left;
  }

 private:
  static constexpr int kRightCols = kRightAlong ? Shape::kDepth : Shape::kN;
  static constexpr int kInDepth = Shape::kDepth / kChunk<T>, kInRight = kRightCols / kChunk<T>;  // chunks of a row
  static constexpr int kLeftStep = Shape::kThreads / kInDepth, kRightStep = Shape::kThreads / kInRight;
  static constexpr int kLefts = Shape::kM / kLeftStep;                         // chunks of a tile, of this thread
  static constexpr int kRights = Shape::kRight / kChunk<T> / Shape::kThreads;  // likewise

  static __device__ __forceinline__ bool within(int i, const ConvAxis& axis) {
    return unsigned(i) < unsigned(axis.size);
  }

  const ConvFoldParams& q_;
  const ConvSides<Shape>& sides_;
  const T* left_;
  const Acc* coeff_;
  int64_t cols_left_, first_output_, first_channel_, pitch_, depth_;
  bool whole_;  // no part of a slice is padding
  ConvCursor left_cursor_, right_cursor_;
};

/// Blocks a multiprocessor that ptxas is to aim at: left to itself it aims at one more of small tiles, and spills.
template <class Shape>
constexpr int fold_blocks() {
  if (Shape::kThreads != 128) return 1;
  return sizeof(typename Shape::Element) == 8 ? 2 : 3;
}

template <class Shape, bool Backward>
__global__ void __launch_bounds__(Shape::kThreads, fold_blocks<Shape>())
    manifold_conv_fold_kernel(const __grid_constant__ ConvFoldParams q) {
  using T = typename Shape::Element;
  using Operands = ConvOperands<Shape, Backward>;
  NEUROMOD_DYNAMIC_SHARED(T, shared);
  __shared__ ConvSides<Shape> sides;
  static_assert(fold_shared_bytes<Shape>() + sizeof(sides) <= kSharedPerBlock);
  const ConvBlock<Shape> block(q);
  if (!prepare<Shape, Backward>(q, block, sides)) return;
  Operands operands(q, block, sides);
  ProductSums<Shape> sum;
  Folder<Shape, Operands>(operands, shared).run(sum);
#pragma unroll
  for (int i = 0; i < sum.kRowParts; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int to = sides.to[sum.row(i, h)];
#pragma unroll
      for (int j = 0; j < sum.kColParts; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = sum.col(j) + e;
          if (to < 0 || block.col + col >= q.cols) continue;
          *q.out.at<T>(block.sample, block.group * q.cols + block.col + col, to) =
              from_acc<T>(Backward ? sum.at[i][j][2 * h + e] : sum.at[i][j][2 * h + e] + sides.bias[col]);
        }
      }
    }
  }
}

template <class Shape, bool Backward>
void launch_fold(ConvFoldParams& q, int64_t pixels, stream_t stream) {
  q.down = ceil_div(pixels, Shape::kM);
  q.across = ceil_div(q.cols, Shape::kN);
  const int64_t classes = q.classes[0] * q.classes[1] * q.classes[2];
  const dim3 grid(static_cast<unsigned>(q.p.batch * q.p.groups * classes * q.down * q.across));
  NEUROMOD_LAUNCH((manifold_conv_fold_kernel<Shape, Backward>), grid, dim3(Shape::kThreads), fold_shared_bytes<Shape>(),
                  stream, q);
}

/// `pixels` of the result, in its largest class.
template <bool Backward>
int launch_fold(ConvFoldParams q, int64_t pixels, stream_t stream) {
  dispatch_math(q.p.dtype, q.p.tf32, [&](auto tag) {
    using Math = typename decltype(tag)::type;
    constexpr int bytes = sizeof(typename Math::Element);
    if constexpr (bytes == 2) {
      if (q.cols <= 64 && pixels > 128) return launch_fold<NarrowConv<Math>, Backward>(q, pixels, stream);
      if (pixels > 128) return launch_fold<TallConv<Math>, Backward>(q, pixels, stream);
    }
    if constexpr (bytes <= 4) {
      if (q.cols > 64 && pixels > 64) return launch_fold<LargeConv<Math>, Backward>(q, pixels, stream);
    }
    launch_fold<SmallConv<Math>, Backward>(q, pixels, stream);
  });
  return launch_status();
}

}  // namespace

int launch_manifold_conv_forward(const ManifoldConvParams& p, stream_t stream) {
  const int64_t channels = p.group_channels();
  return launch_fold<false>({p, p.input, p.output, channels, p.group_outputs(), p.filled(channels), {1, 1, 1}, 0, 0},
                            p.out_pixels(), stream);
}

namespace {

int launch_grad_input(const ManifoldConvBackwardParams& q, stream_t stream) {
  const ManifoldConvParams& p = q.p;
  const int64_t outputs = p.group_outputs(), *const stride = p.stride;
  int64_t pixels = 1;
  for (int d = 0; d < 3; ++d) pixels *= ceil_div(p.in_size[d], stride[d]);
  return launch_fold<true>({p,
                            p.output,
                            q.grad_input,
                            outputs,
                            p.group_channels(),
                            p.filled(outputs),
                            {stride[0], stride[1], stride[2]},
                            0,
                            0},
                           pixels, stream);
}

}  // namespace

int launch_manifold_conv_backward(const ManifoldConvBackwardParams& q, stream_t stream) {
  int status = 0;
  if (q.grad_input) status = launch_grad_input(q, stream);
  if (status == 0 && (q.grad_basis || q.grad_coeff || q.grad_bias)) status = launch_conv_outer(q, stream);
  return status;
}

}  // namespace neuromod
