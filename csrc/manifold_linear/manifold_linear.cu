// manifold_linear in CUDA: the launchers, and plain SIMT kernels for every dtype, the oracle of the faster ones
// (manifold_linear_tiles.h), which take all dtypes but float64.
//
// All four contractions are built from one 64 x 64 product tile: 256 threads of 4 x 4 sums each, operands staged
// through shared memory 16 deep. Sums run in float32 (float64 for float64): depth in order, then k in order. Tails are
// masked in the loads; every output element is written once; no atomics. With an index, basis points that act on no row
// of a tile are multiplied all the same and left out of the sum.
//
// Floor, predicted and not measured, on an H100 (67 TFLOP/s in float32, 34 in float64): (4096, 4096, 4096, 3): 412
// Gflop, 6 ms and 12 ms. An oracle need not come near it: 4 x 4 sums a thread wait for shared memory, and the plans
// count on 8 and 3 TFLOP/s.
#include "common/cuda_kernel.h"
#include "common/dispatch.h"
#include "manifold_linear/manifold_linear.h"
#include "manifold_linear/manifold_linear_segments.h"
#include "manifold_linear/manifold_linear_tiles.h"

namespace neuromod {
namespace {

constexpr int kTile = 64;   // rows and columns of a tile
constexpr int kDepth = 16;  // of a staged slice
constexpr int kThreads = 256;
constexpr int kPerThread = 4;              // rows, and columns, a thread sums
constexpr int kSide = kTile / kPerThread;  // threads along a side
constexpr int64_t kMaxGrid = 65535;        // of grid dimensions y and z

/// This thread's elements of a product tile: rows row() + i, columns col() + j.
template <class Acc>
struct Fragment {
  Acc at[kPerThread][kPerThread];

  __device__ void clear() {
    for (int i = 0; i < kPerThread; ++i)
      for (int j = 0; j < kPerThread; ++j) at[i][j] = Acc(0);
  }
  static __device__ int row() { return threadIdx.x / kSide * kPerThread; }
  static __device__ int col() { return threadIdx.x % kSide * kPerThread; }
};

/// product += A B over `depth`, where left(row, d) and right(d, col) give elements of the tile, 0 outside the operands.
/// All threads of the block call it together.
template <class Acc, class Left, class Right>
__device__ void tile_product(int64_t depth, Left left, Right right, Fragment<Acc>& product) {
  __shared__ Acc a[kDepth][kTile + 1];
  __shared__ Acc b[kDepth][kTile + 1];
  for (int64_t start = 0; start < depth; start += kDepth) {
    for (int i = threadIdx.x; i < kDepth * kTile; i += kThreads) {
      const int d = i % kDepth, n = i / kDepth;
      const bool inside = start + d < depth;
      a[d][n] = inside ? left(n, start + d) : Acc(0);
      b[d][n] = inside ? right(start + d, n) : Acc(0);
    }
    __syncthreads();
    for (int d = 0; d < kDepth; ++d)
      for (int i = 0; i < kPerThread; ++i)
        for (int j = 0; j < kPerThread; ++j)
          product.at[i][j] += a[d][Fragment<Acc>::row() + i] * b[d][Fragment<Acc>::col() + j];
    __syncthreads();
  }
}

/// The coefficient of basis point k for a row; false if it does not act there.
template <class Acc>
__device__ bool coefficient(const ManifoldLinearParams& p, int64_t row, int64_t k, Acc& c) {
  const int64_t b = row / p.tokens, l = p.entry(b, k);
  if (l >= p.num_local) return false;
  c = *p.coeff.at<Acc>(b, l);
  return true;
}

// out[r,n] = sum_k c[r,k] (sum_d rows[r,d] weight[k,d,n] + bias[k,n])
// Grid: x column tiles, y row tiles (strided where there are more than a grid holds). Reads rows and weight once per
// tile; 2 B T K depth cols flop. Serves forward (depth = i) and grad_input (depth = o).
template <class T, class Acc>
__global__ void __launch_bounds__(kThreads)
    manifold_linear_mix_kernel(ManifoldLinearParams p, View rows, View weight, View out, int64_t depth, int64_t cols) {
  const int64_t num_rows = p.rows(), first_col = int64_t(blockIdx.x) * kTile;
  for (int64_t first = int64_t(blockIdx.y) * kTile; first < num_rows; first += int64_t(gridDim.y) * kTile) {
    Fragment<Acc> sum, product;
    sum.clear();
    for (int64_t k = 0; k < p.num_basis; ++k) {
      product.clear();
      tile_product<Acc>(
          depth,
          [&](int r, int64_t d) {
            const int64_t row = first + r;
            return row < num_rows ? to_acc<Acc>(*rows.at<T>(row, d)) : Acc(0);
          },
          [&](int64_t d, int n) {
            return first_col + n < cols ? to_acc<Acc>(*weight.at<T>(k, d, first_col + n)) : Acc(0);
          },
          product);
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t row = first + Fragment<Acc>::row() + i;
        Acc c;
        if (row >= num_rows || !coefficient(p, row, k, c)) continue;
        for (int j = 0; j < kPerThread; ++j) {
          const int64_t col = first_col + Fragment<Acc>::col() + j;
          const Acc bias = p.bias && col < cols ? to_acc<Acc>(*p.bias.at<T>(k, col)) : Acc(0);
          sum.at[i][j] += c * (product.at[i][j] + bias);
        }
      }
    }
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t row = first + Fragment<Acc>::row() + i;
      for (int j = 0; j < kPerThread; ++j) {
        const int64_t col = first_col + Fragment<Acc>::col() + j;
        if (row < num_rows && col < cols) *out.at<T>(row, col) = from_acc<T>(sum.at[i][j]);
      }
    }
  }
}

// row_sums[row,l] = sum_i (g P_k)[row,i] x[row,i], into the workspace.
// Grid: x row tiles, y basis points (strided). Column tiles in order; the 16 threads of a row are folded in order.
template <class T, class Acc>
__global__ void __launch_bounds__(kThreads) manifold_linear_grad_coeff_rows_kernel(ManifoldLinearParams p) {
  __shared__ Acc partial[kTile][kSide];
  const int64_t num_rows = p.rows(), first = int64_t(blockIdx.x) * kTile;
  for (int64_t k = blockIdx.y; k < p.num_basis; k += gridDim.y) {
    Acc dot[kPerThread] = {};
    for (int64_t first_col = 0; first_col < p.in_features; first_col += kTile) {
      Fragment<Acc> product;
      product.clear();
      tile_product<Acc>(
          p.out_features,
          [&](int r, int64_t o) {
            const int64_t row = first + r;
            return row < num_rows ? to_acc<Acc>(*p.output.at<T>(row, o)) : Acc(0);
          },
          [&](int64_t o, int n) {
            return first_col + n < p.in_features ? to_acc<Acc>(*p.basis.at<T>(k, o, first_col + n)) : Acc(0);
          },
          product);
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t row = first + Fragment<Acc>::row() + i;
        for (int j = 0; j < kPerThread; ++j) {
          const int64_t col = first_col + Fragment<Acc>::col() + j;
          if (row < num_rows && col < p.in_features) dot[i] += product.at[i][j] * to_acc<Acc>(*p.input.at<T>(row, col));
        }
      }
    }
    for (int i = 0; i < kPerThread; ++i) partial[Fragment<Acc>::row() + i][threadIdx.x % kSide] = dot[i];
    __syncthreads();
    const int64_t row = first + threadIdx.x;
    const int64_t l = threadIdx.x < kTile && row < num_rows ? p.entry(row / p.tokens, k) : p.num_local;
    if (l < p.num_local) {
      Acc sum = 0;
      for (int i = 0; i < kSide; ++i) sum += partial[threadIdx.x][i];
      static_cast<Acc*>(p.workspace)[row * p.num_local + l] = sum;
    }
    __syncthreads();
  }
}

// dc[b,l] = sum_t (row_sums[b,t,l] + sum_o g[b,t,o] beta[k,o]), t in order, then o; one thread an element.
template <class T, class Acc>
__global__ void __launch_bounds__(kThreads) manifold_linear_grad_coeff_tokens_kernel(ManifoldLinearParams p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.batch * p.num_local) return;
  const int64_t b = i / p.num_local, l = i % p.num_local, k = (p.first_basis(b) + l) % p.num_basis;
  Acc sum = 0;
  for (int64_t row = b * p.tokens; row < (b + 1) * p.tokens; ++row) {
    sum += static_cast<Acc*>(p.workspace)[row * p.num_local + l];
    for (int64_t o = 0; o < p.out_features && p.bias; ++o)
      sum += to_acc<Acc>(*p.output.at<T>(row, o)) * to_acc<Acc>(*p.bias.at<T>(k, o));
  }
  *p.coeff.at<Acc>(b, l) = sum;
}

// dP[k,o,i] = (accumulate ? dP[k,o,i] : 0) + sum_r c[r,k] g[r,o] x[r,i].
// Grid: x input tiles, y output tiles, z basis points (y and z strided).
template <class T, class Acc>
__global__ void __launch_bounds__(kThreads) manifold_linear_grad_basis_kernel(ManifoldLinearParams p, bool accumulate) {
  const int64_t first_in = int64_t(blockIdx.x) * kTile;
  for (int64_t k = blockIdx.z; k < p.num_basis; k += gridDim.z) {
    for (int64_t first_out = int64_t(blockIdx.y) * kTile; first_out < p.out_features;
         first_out += int64_t(gridDim.y) * kTile) {
      Fragment<Acc> product;
      product.clear();
      tile_product<Acc>(
          p.rows(),
          [&](int o, int64_t row) {
            Acc c;
            if (first_out + o >= p.out_features || !coefficient(p, row, k, c)) return Acc(0);
            return c * to_acc<Acc>(*p.output.at<T>(row, first_out + o));
          },
          [&](int64_t row, int n) {
            Acc c;
            if (first_in + n >= p.in_features || !coefficient(p, row, k, c)) return Acc(0);
            return to_acc<Acc>(*p.input.at<T>(row, first_in + n));
          },
          product);
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t o = first_out + Fragment<Acc>::row() + i;
        for (int j = 0; j < kPerThread; ++j) {
          const int64_t col = first_in + Fragment<Acc>::col() + j;
          if (o >= p.out_features || col >= p.in_features) continue;
          T* const to = p.basis.at<T>(k, o, col);
          *to = from_acc<T>(accumulate ? to_acc<Acc>(*to) + product.at[i][j] : product.at[i][j]);
        }
      }
    }
  }
}

unsigned tiles(int64_t n) { return static_cast<unsigned>(ceil_div(n, kTile)); }
unsigned bounded(int64_t n) { return static_cast<unsigned>(n < kMaxGrid ? n : kMaxGrid); }

/// Calls f with the element type's tag; reports what its launches came to.
template <class F>
int launch(const ManifoldLinearParams& p, F&& f) {
  dispatch_dtype<__half, __nv_bfloat16>(p.dtype, f);
  return launch_status();
}

dim3 blocks(int64_t threads) { return dim3(static_cast<unsigned>(ceil_div(threads, kThreads))); }

int launch_mix(const ManifoldLinearParams& p, View rows, View weight, View out, int64_t depth, int64_t cols,
               stream_t stream) {
  const dim3 grid(tiles(cols), bounded(tiles(p.rows())));
  return launch(p, [&](auto tag) {
    using T = typename decltype(tag)::type;
    NEUROMOD_LAUNCH((manifold_linear_mix_kernel<T, accumulator_t<T>>), grid, dim3(kThreads), 0, stream, p, rows, weight,
                    out, depth, cols);
  });
}

}  // namespace

int launch_manifold_linear_forward(const ManifoldLinearParams& p, stream_t stream) {
  if (const int status = p.order ? launch_segments(p, stream) : 0) return status;
  const CudaPlan plan = cuda_plan(p, CudaPass::forward, false);
  if (plan == CudaPlan::fold) return launch_forward_fold(p, stream);
  if (plan != CudaPlan::simt) return launch_forward_tiles(p, plan, stream);
  const View transposed{p.basis.data, {p.basis.stride[0], p.basis.stride[2], p.basis.stride[1]}};
  return launch_mix(p, p.input, transposed, p.output, p.in_features, p.out_features, stream);
}

namespace {

/// dx, and dc if it comes along with it.
int launch_grad_rows(const ManifoldLinearBackwardParams& q, const CudaBackwardPlan& plan, stream_t stream) {
  if (plan.rows == CudaPlan::fold) return launch_grad_input_fold(q, stream);
  if (plan.rows != CudaPlan::simt) return launch_grad_rows_tiles(q, plan, stream);
  ManifoldLinearParams p = q.p;
  if (q.grad_input) {
    p.bias = View{};
    if (const int status = launch_mix(p, p.output, p.basis, q.grad_input, p.out_features, p.in_features, stream))
      return status;
  }
  if (!q.grad_coeff || !plan.dots_with_rows) return 0;
  p = q.p;
  p.workspace = cuda_dots_begin(q);
  return launch(p, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulator_t<T>;
    const dim3 grid(tiles(p.rows()), bounded(p.num_basis));
    NEUROMOD_LAUNCH((manifold_linear_grad_coeff_rows_kernel<T, Acc>), grid, dim3(kThreads), 0, stream, p);
    p.coeff = q.grad_coeff;
    NEUROMOD_LAUNCH((manifold_linear_grad_coeff_tokens_kernel<T, Acc>), blocks(p.batch * p.num_local), dim3(kThreads),
                    0, stream, p);
  });
}

/// dP, and dc if it comes along with it.
int launch_grad_basis(const ManifoldLinearBackwardParams& q, const CudaBackwardPlan& plan, stream_t stream) {
  if (plan.basis == CudaPlan::fold) return launch_fold_outer(q, plan, stream);
  if (plan.basis != CudaPlan::simt) return launch_grad_basis_tiles(q, plan, stream);
  ManifoldLinearParams p = q.p;
  p.basis = q.grad_basis;
  return launch(p, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(tiles(p.in_features), bounded(tiles(p.out_features)), bounded(p.num_basis));
    NEUROMOD_LAUNCH((manifold_linear_grad_basis_kernel<T, accumulator_t<T>>), grid, dim3(kThreads), 0, stream, p,
                    q.accumulate);
  });
}

}  // namespace

int launch_manifold_linear_backward(const ManifoldLinearBackwardParams& q, stream_t stream) {
  const CudaBackwardPlan plan = cuda_backward_plan(q, false);
  const bool dots_with_rows = q.grad_coeff && plan.dots_with_rows, dots_with_basis = q.grad_coeff && !dots_with_rows;
  int status = q.p.order ? launch_segments(q.p, stream) : 0;
  if (status != 0) return status;
  if (q.grad_input || dots_with_rows) status = launch_grad_rows(q, plan, stream);
  if (status == 0 && (q.grad_basis || dots_with_basis)) status = launch_grad_basis(q, plan, stream);
  if (status == 0 && q.grad_bias) status = launch_grad_bias(q, stream);
  return status;
}

}  // namespace neuromod
