// dP, dc and dbeta of manifold_conv in CUDA, P and dP from one product for each sample (common/fold_outer_tile.h):
//
//   G_b[o,(i,c)] = sum_q g[b,o,q] x[b,c, q stride + i dilation - padding]
//   dP[k,o,c,i]  = sum_b c[b,k] G_b[o,(i,c)]
//   dc[b,k]      = sum_(o,i,c) G_b[o,(i,c)] P[k,o,c,i] + sum_o s[b,o] beta[k,o],   s[b,o] = sum_q g[b,o,q]
//   dbeta[k,o]   = sum_b c[b,k] s[b,o]
//
// Grid of the product: x tiles of a group's (o, (i, c)) for each group of kGroup basis points, y splits of the samples.
// The columns of a tile of x are taps and channels: each thread copies one chunk of channels from where its tap moves
// the pixels, an implicit im2col. Partial sums of dP go to the workspace [splits, K, O, conv_outer_cols] and are added
// in order, and turned into P's layout, by a second kernel; dots [tiles, B, K] by a third. No atomics: samples in
// order, pixels ascending.
//
// Cost: 2 B O C/groups taps pixels ceil(K / kGroup) flop and 4 B K O C/groups taps; each tile reads g and x once a
// group of basis points, from L2, P once; partial sums are written and read once. Error: pixels + B + splits roundings
// of the accumulator for dP and that of the result; pixels, and the sum over O C/groups taps in parts, for dc. Oracle:
// as manifold_conv.cu.
//
// Floor, predicted and not measured, on an H100: B = 64, 64 to 64 channels, 32 x 32, 3 x 3, K = 3, bfloat16: 4.8 Gflop,
// 9 us by mma.sync; 9 tiles of 64 x 64 read g and x: 8 KB a slice of 32 pixels, 0.15 GB from L2, 27 us at 5.5 TB/s, the
// bound. The kernels around it read g once, 8 MB or 3 us at 3 TB/s, and the partial sums, 7 MB or 1 us from L2.
#include "common/fold_outer_tile.h"
#include "manifold_conv/manifold_conv_cuda.h"
#include "manifold_conv/manifold_conv_outer.h"
#include "manifold_conv/manifold_conv_walk.h"

namespace neuromod {
namespace {

/// Plain sums have eight warps: of four, a thread's sums of four tiles do not fit into its registers.
template <class Math>
constexpr int kConvOuterWarps = std::is_same_v<Math, PlainMath<typename Math::Element>> ? 4 : 2;
template <class Math>
using ConvOuterShape = ProductShape<Math, kConvOuterTile, kConvOuterTile, kConvOuterWarps<Math>, 2, 4>;
template <class Shape>
constexpr int kGroup = sizeof(typename Shape::Element) == 8 ? 1 : kConvOuterGroup;  // conv_outer_group()

struct ConvOuterParams {
  ManifoldConvParams p;
  int64_t down, across;  // tiles of a group's gradient
  void* partial;         // of dP, or null
  void* dots;            // or null
};

/// The operands of a block's product (common/fold_outer_tile.h).
template <class Shape>
class ConvOuter {
 public:
  using T = typename Shape::Element;
  using Acc = typename Shape::Acc;

  __device__ __forceinline__ explicit ConvOuter(const ConvOuterParams& q)
      : q_(q), tile_(blockIdx.x % conv_outer_tiles(q.p)), first_k_(blockIdx.x / conv_outer_tiles(q.p) * kGroup<Shape>) {
    const ManifoldConvParams& p = q.p;
    const TileIndex at = TileIndex::of(tile_ % (q.down * q.across), q.down, q.across);
    const int64_t group = tile_ / (q.down * q.across);
    row_ = at.down * Shape::kM;
    col_ = at.across * Shape::kN;
    first_output_ = group * p.group_outputs() + row_;
    outputs_left_ = p.group_outputs() - row_;
    channels_ = int(p.filled(p.group_channels()));
    const int64_t output = row_ + chunk_col(), column = col_ + chunk_col();
    has_left_ = output < p.filled(p.group_outputs());
    left_ = p.output.at<T>(0, 0, group * p.filled(p.group_outputs()) + (has_left_ ? output : 0));
    has_right_ = column < conv_outer_cols(p);
    right_ = p.input.at<T>(0, 0, group * channels_ + (has_right_ ? column % channels_ : 0));
    const ConvPixel tap = ConvPixel::of(has_right_ ? column / channels_ : 0, p.kernel[1], p.kernel[2]);
    for (int d = 0; d < 3; ++d) move_[d] = int(tap.at[d] * p.dilation[d] - p.padding[d]);
  }

  __device__ __forceinline__ int64_t begin() const { return q_.p.batch * blockIdx.y / gridDim.y; }
  __device__ __forceinline__ int64_t end() const { return q_.p.batch * (blockIdx.y + 1) / gridDim.y; }
  __device__ __forceinline__ int64_t slices() const { return ceil_div(q_.p.out_pixels(), Shape::kDepth); }
  __device__ __forceinline__ int group() const {
    const int64_t left = q_.p.num_basis - first_k_;
    return left < kGroup<Shape> ? int(left) : kGroup<Shape>;
  }
  __device__ __forceinline__ bool wants_basis() const { return q_.partial != nullptr; }
  __device__ __forceinline__ bool wants_dots() const { return q_.dots != nullptr; }

  __device__ __forceinline__ void fetch(int64_t b, int64_t slice, T* left, T* right) const {
    const ManifoldConvParams& p = q_.p;
    const int64_t first = slice * Shape::kDepth, pixels = p.out_pixels();
    const T* const g = left_ + b * p.output.stride[0];
    const T* const x = right_ + b * p.input.stride[0];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = chunk_row() + i * kStep;
      const int64_t q = first + row;
      const bool there = q < pixels;
      T* const place = left + swizzled<Shape::kM, T>(row, chunk_col());
      copy_async<16>(place, g + (there ? q * p.output.stride[1] : 0), there && has_left_ ? 16 : 0);
      const ConvPixel at = ConvPixel::of(there ? q : 0, p.out_size[1], p.out_size[2]);
      int in[3];
      bool inside = there && has_right_;
      for (int d = 0; d < 3; ++d) {
        in[d] = at.at[d] * int(p.stride[d]) + move_[d];
        inside = inside && unsigned(in[d]) < unsigned(p.in_size[d]);
      }
      const int64_t pixel = inside ? (in[0] * int(p.in_size[1]) + in[1]) * int(p.in_size[2]) + in[2] : 0;
      copy_async<16>(right + swizzled<Shape::kN, T>(row, chunk_col()), x + pixel * p.input.stride[1], inside ? 16 : 0);
    }
  }

  __device__ __forceinline__ void fetch_basis(int j, T* tile) const {
    const ManifoldConvParams& p = q_.p;
    const int64_t column = col_ + chunk_col();
    const T* const from = p.basis.at<T>(first_k_ + j);
    for (int row = chunk_row(); row < Shape::kM; row += kStep) {
      const bool inside = has_right_ && row < outputs_left_;
      const int64_t at = (column / channels_ * p.out_channels + first_output_ + row) * channels_ + column % channels_;
      copy_async<16>(tile + swizzled<Shape::kN, T>(row, chunk_col()), from + (inside ? at : 0), inside ? 16 : 0);
    }
  }

  __device__ __forceinline__ bool has_row(int row) const { return row < outputs_left_; }
  __device__ __forceinline__ bool has_col(int col) const {
    return col_ + col < conv_outer_cols(q_.p) && (col_ + col) % channels_ < q_.p.group_channels();
  }

  __device__ __forceinline__ bool acts(int64_t b, int j, Acc& c) const {
    c = *q_.p.coeff.template at<Acc>(b, first_k_ + j);
    return true;
  }

  __device__ __forceinline__ void dot(int64_t b, int j, Acc total) const {
    static_cast<Acc*>(q_.dots)[(tile_ * q_.p.batch + b) * q_.p.num_basis + first_k_ + j] = total;
  }

  __device__ __forceinline__ void store(int j, int row, int col, Acc first, Acc second) const {
    using Two = std::conditional_t<sizeof(Acc) == 4, float2, double2>;
    const int64_t cols = conv_outer_cols(q_.p), k = first_k_ + j;  // an even number, and so is col
    if (row >= outputs_left_ || col_ + col >= cols) return;
    const int64_t at =
        ((blockIdx.y * q_.p.num_basis + k) * q_.p.out_channels + first_output_ + row) * cols + col_ + col;
    *reinterpret_cast<Two*>(static_cast<Acc*>(q_.partial) + at) = Two{first, second};
  }

 private:
  static constexpr int kInRow = kConvOuterTile / kChunk<T>, kStep = Shape::kThreads / kInRow;
  static constexpr int kCount = Shape::kDepth / kStep;  // chunks of a slice's tile that are this thread's
  static_assert(kCount * kStep == Shape::kDepth);
  static __device__ __forceinline__ int chunk_row() { return threadIdx.x / kInRow; }
  static __device__ __forceinline__ int chunk_col() { return threadIdx.x % kInRow * kChunk<T>; }

  const ConvOuterParams& q_;
  int64_t tile_, first_k_, row_, col_;   // the tile's first output of its group, and column
  int64_t first_output_, outputs_left_;  // of all, and from row_ on
  int channels_, move_[3];               // filled up; of this thread's tap
  bool has_left_, has_right_;            // whether this thread's chunks are there
  const T *left_, *right_;               // for pixel 0 of sample 0
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    manifold_conv_outer_kernel(const __grid_constant__ ConvOuterParams q) {
  NEUROMOD_DYNAMIC_SHARED(typename Shape::Element, shared);
  __shared__ FoldOuterSides<Shape, kGroup<Shape>> sides;
  static_assert(fold_outer_shared_bytes<Shape, kGroup<Shape>>() + sizeof(sides) <= kSharedPerBlock);
  ConvOuter<Shape> operands(q);
  FoldOuter<Shape, kGroup<Shape>, ConvOuter<Shape>>(operands, sides, shared).run();
}

// dP[k,o,c,i] = sum of its splits' partial sums, in order. Grid: x elements, 256 a block.
template <class T, class Acc>
__global__ void __launch_bounds__(256)
    manifold_conv_grad_basis_kernel(ManifoldConvParams p, const Acc* partial, int64_t splits, View out) {
  const int64_t taps = p.taps(), channels = p.group_channels(), cols = conv_outer_cols(p);
  const int64_t all = p.num_basis * p.out_channels, i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= all * channels * taps) return;
  const int64_t tap = i % taps, channel = i / taps % channels, row = i / taps / channels;
  const Acc* const from = partial + row * cols + tap * p.filled(channels) + channel;
  Acc sum = from[0];
  for (int64_t split = 1; split < splits; ++split) sum += from[split * all * cols];
  static_cast<T*>(out.data)[i] = from_acc<T>(sum);
}

// sums[b,o] = sum_q g[b,o,q]. Grid: x 32 of g's columns, for each sample. A warp adds every kConvPixelWarps-th pixel in
// order; then the warps' sums are added in order.
template <class T, class Acc>
__global__ void __launch_bounds__(32 * kConvPixelWarps) manifold_conv_pixels_kernel(ManifoldConvParams p, Acc* sums) {
  __shared__ Acc partial[kConvPixelWarps][32];
  const int64_t outputs = p.group_outputs(), filled = p.filled(outputs), parts = ceil_div(p.groups * filled, 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t b = blockIdx.x / parts, col = blockIdx.x % parts * 32 + lane;
  const bool there = col < p.groups * filled && col % filled < outputs;
  Acc sum = 0;
  for (int64_t q = warp; there && q < p.out_pixels(); q += kConvPixelWarps)
    sum += to_acc<Acc>(*p.output.at<T>(b, q, col));
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || !there) return;
  for (int i = 1; i < kConvPixelWarps; ++i) sum += partial[i][lane];
  sums[b * p.out_channels + col / filled * outputs + col % filled] = sum;
}

// dbeta[k,o] = sum_b c[b,k] sums[b,o], b in order. Grid: x elements, 256 a block.
template <class T, class Acc>
__global__ void __launch_bounds__(256) manifold_conv_grad_bias_kernel(ManifoldConvParams p, const Acc* sums, View out) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= p.num_basis * p.out_channels) return;
  const int64_t k = i / p.out_channels, o = i % p.out_channels;
  Acc sum = 0;
  for (int64_t b = 0; b < p.batch; ++b) sum += *p.coeff.at<Acc>(b, k) * sums[b * p.out_channels + o];
  *out.at<T>(k, o) = from_acc<T>(sum);
}

// dc[b,k] = sum of the tiles' dots + sum_o sums[b,o] beta[k,o]. Grid: x pairs (b, k), a warp each; a lane adds every
// 32nd term in order, then warp_sum.
template <class T, class Acc>
__global__ void __launch_bounds__(128)
    manifold_conv_grad_coeff_kernel(ManifoldConvParams p, const Acc* dots, const Acc* sums, View out) {
  const int64_t pair = int64_t(blockIdx.x) * 4 + threadIdx.x / 32, b = pair / p.num_basis, k = pair % p.num_basis;
  const int64_t tiles = conv_outer_tiles(p);
  const int lane = threadIdx.x % 32;
  const bool there = b < p.batch;
  Acc sum = 0;
  for (int64_t tile = lane; there && tile < tiles; tile += 32) sum += dots[tile * p.batch * p.num_basis + pair];
  for (int64_t o = lane; there && p.bias && o < p.out_channels; o += 32)
    sum += sums[b * p.out_channels + o] * to_acc<Acc>(*p.bias.at<T>(k, o));
  sum = warp_sum(sum);
  if (there && lane == 0) *out.at<Acc>(b, k) = sum;
}

dim3 blocks(int64_t threads, int64_t each) { return dim3(static_cast<unsigned>(ceil_div(threads, each))); }

/// What comes before and after the product.
template <class T>
struct ConvSums {
  using Acc = accumulator_t<T>;
  const ManifoldConvBackwardParams& q;
  stream_t stream;

  ConvWorkspace sizes() const { return conv_workspace(q); }
  Acc* partial() const { return static_cast<Acc*>(q.p.workspace); }
  Acc* dots() const { return partial() + sizes().basis; }
  Acc* pixel_sums() const { return dots() + sizes().dots; }

  void pixels() const {
    const ManifoldConvParams& p = q.p;
    if (sizes().pixel_sums == 0) return;
    const dim3 grid(static_cast<unsigned>(p.batch * ceil_div(p.groups * p.filled(p.group_outputs()), 32)));
    NEUROMOD_LAUNCH((manifold_conv_pixels_kernel<T, Acc>), grid, dim3(32 * kConvPixelWarps), 0, stream, p,
                    pixel_sums());
  }

  void finish() const {
    const ManifoldConvParams& p = q.p;
    const int64_t weights = p.num_basis * p.out_channels * p.group_channels() * p.taps();
    if (q.grad_basis)
      NEUROMOD_LAUNCH((manifold_conv_grad_basis_kernel<T, Acc>), blocks(weights, 256), dim3(256), 0, stream, p,
                      partial(), conv_outer_splits(p), q.grad_basis);
    if (q.grad_bias)
      NEUROMOD_LAUNCH((manifold_conv_grad_bias_kernel<T, Acc>), blocks(p.num_basis * p.out_channels, 256), dim3(256), 0,
                      stream, p, pixel_sums(), q.grad_bias);
    if (q.grad_coeff)
      NEUROMOD_LAUNCH((manifold_conv_grad_coeff_kernel<T, Acc>), blocks(p.batch * p.num_basis, 4), dim3(128), 0, stream,
                      p, dots(), pixel_sums(), q.grad_coeff);
  }
};

}  // namespace

int launch_conv_outer(const ManifoldConvBackwardParams& q, stream_t stream) {
  const ManifoldConvParams& p = q.p;
  dispatch_math(p.dtype, p.tf32, [&](auto tag) {
    using Shape = ConvOuterShape<typename decltype(tag)::type>;
    const ConvSums<typename Shape::Element> sums{q, stream};
    sums.pixels();
    const int64_t tiles = conv_outer_tiles(p);
    if ((q.grad_basis || q.grad_coeff) && tiles > 0) {
      const ConvOuterParams outer{p, ceil_div(p.group_outputs(), kConvOuterTile),
                                  ceil_div(conv_outer_cols(p), kConvOuterTile), q.grad_basis ? sums.partial() : nullptr,
                                  q.grad_coeff ? sums.dots() : nullptr};
      const dim3 grid(static_cast<unsigned>(tiles * ceil_div(p.num_basis, kGroup<Shape>)),
                      static_cast<unsigned>(conv_outer_splits(p)));
      NEUROMOD_LAUNCH(manifold_conv_outer_kernel<Shape>, grid, dim3(Shape::kThreads),
                      (fold_outer_shared_bytes<Shape, kGroup<Shape>>()), stream, outer);
    }
    sums.finish();
  });
  return launch_status();
}

}  // namespace neuromod
