// interpolate_weights in CUDA, and its gradients: bound by memory, every operand read once from it. SIMT, every dtype.
// Tiles, packs and alignment: common/columns.h. Oracle: the einsums of python_tests/op_entries.py.
//
// Floors, predicted from 3.0 TB/s of an H100 and not measured, for K = 3 in bfloat16: 6 us forward and 7 us backward
// for 32 weights of 512 x 512; 45 us forward for one of 4096 x 4096. Few columns (n < 100,000) do not fill a GPU.
#include "common/columns.h"
#include "common/dispatch.h"
#include "interpolate_weights/interpolate_weights.h"

namespace neuromod {
namespace {

// out[m,n] = sum_j mix[m,j] in[j,n]: W (in = P, few terms), and dP alone (in = g, few rows).
// Grid: x tiles of columns by groups of `Rows` rows, groups fastest, folded. Block: 128 threads, each of one pack in
// all rows of a group. Reads `in` once for each group, from memory once as neighbouring blocks share it in L2; writes
// each element of `out` once. Sums in the accumulation type, j in order: error <= u S + terms e S in the terms of
// bounds.py. 2 rows terms n flop, (terms + rows) n elements.
template <class T, class Acc, int Rows>
__global__ void __launch_bounds__(kColumnThreads, 3)
    interpolate_weights_kernel(InterpolateWeightsParams p, bool aligned) {
  const int64_t groups = ceil_div(p.rows, Rows), tiles = ceil_div(p.length, tile_columns<T>());
  for (int64_t i = blockIdx.x; i < groups * tiles; i += gridDim.x) {
    const int64_t tile = i / groups, row = i % groups * Rows;
    const Columns<T> columns(tile, p.length);
    for_tile<T>(aligned, tile, p.length, [&](auto whole) {
      Acc sums[Rows][Pack<T>::size];
      mix_columns<whole.value, 32 / Rows>(p.mix, p.in, p.terms, row, p.rows - row, columns, sums);
#pragma unroll
      for (int r = 0; r < Rows; ++r)
        if (row + r < p.rows) store_pack<whole.value>(p.out.at<T>(row + r, columns.first), sums[r], columns.count);
    });
  }
}

constexpr int kPoints = 4;   // basis points at once
constexpr int kSamples = 8;  // samples at once: kPoints kSamples inner products, one for each lane

// grad_coeff[b,k] = sum_n grad[b,n] basis[k,n] and, where asked for, grad_basis[k,n] = sum_b coeff[b,k] grad[b,n].
// Grid: x one block for each tile of columns, at most 264, which take the rest in turns. Block: 128 threads; each holds
// one pack of four basis points and of their gradients, and runs over all samples. Reads grad once for each four basis
// points, from cache after the first; writes each element of grad_basis once.
// Order: grad_basis sums b in order. An inner product sums a pack in order, then the lanes (warp_sums), then the warp's
// tiles in order in the workspace, then the warps (sum_parts_kernel). It is a matter of n and the dtype alone: error
// <= (n + 2) e S, and far below. 4 B K n flop, (B + 2 K) n elements.
template <bool Whole, class T, class Acc>
__device__ __forceinline__ void backward_tile(const InterpolateWeightsBackwardParams& p, const Columns<T>& columns,
                                              int64_t first_point, Acc* part, bool first_tile) {
  constexpr int kSize = Pack<T>::size;
  const int lane = thread_rank() % 32;
  Pack<T> basis[kPoints];
  Acc grad_basis[kPoints][kSize] = {};
#pragma unroll
  for (int k = 0; k < kPoints; ++k) {
    const int64_t count = first_point + k < p.num_basis ? columns.count : 0;
    basis[k] = load_pack<Whole>(p.basis.at<const T>(first_point + k, columns.first), count);
  }
  for (int64_t first = 0; first < p.batch; first += kSamples) {
    Pack<T> grad[kSamples];
    Acc dots[kSamples * kPoints];
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      const int64_t count = first + s < p.batch ? columns.count : 0;
      grad[s] = load_pack<Whole>(p.grad.at<const T>(first + s, columns.first), count);
    }
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
#pragma unroll
      for (int k = 0; k < kPoints; ++k) {
        Acc dot = 0, c = 0;
        if (p.grad_basis && first + s < p.batch && first_point + k < p.num_basis)
          c = *p.coeff.at<Acc>(first + s, first_point + k);
#pragma unroll
        for (int v = 0; v < kSize; ++v) {
          const Acc g = to_acc<Acc>(grad[s].at[v]);
          dot += g * to_acc<Acc>(basis[k].at[v]);
          grad_basis[k][v] += c * g;
        }
        dots[s * kPoints + k] = dot;
      }
    }
    const Acc sum = warp_sums(dots);
    const int64_t b = first + lane / kPoints, k = first_point + lane % kPoints;
    if (b < p.batch && k < p.num_basis) {
      Acc* const to = part + b * p.num_basis + k;
      *to = first_tile ? sum : *to + sum;
    }
  }
#pragma unroll
  for (int k = 0; k < kPoints; ++k)
    if (p.grad_basis && first_point + k < p.num_basis)
      store_pack<Whole>(p.grad_basis.at<T>(first_point + k, columns.first), grad_basis[k], columns.count);
}

template <class T, class Acc>
__global__ void __launch_bounds__(kColumnThreads, 2)
    interpolate_weights_backward_kernel(InterpolateWeightsBackwardParams p, bool aligned) {
  const int64_t tiles = ceil_div(p.length, tile_columns<T>());
  const int64_t warp = int64_t(blockIdx.x) * kColumnWarps + thread_rank() / 32;
  Acc* const part = static_cast<Acc*>(p.workspace) + warp * p.batch * p.num_basis;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Columns<T> columns(tile, p.length);
    for_tile<T>(aligned, tile, p.length, [&](auto whole) {
      for (int64_t k = 0; k < p.num_basis; k += kPoints)
        backward_tile<whole.value>(p, columns, k, part, tile == blockIdx.x);
    });
  }
}

}  // namespace

int launch_interpolate_weights(const InterpolateWeightsParams& p, stream_t stream) {
  dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulator_t<T>;
    const bool aligned = rows_aligned<T>(p.in, p.terms) && rows_aligned<T>(p.out, p.rows);
    const int64_t tiles = ceil_div(p.length, tile_columns<T>());
    if (p.rows <= 4) {
      const dim3 grid(block_count(tiles));
      NEUROMOD_LAUNCH((interpolate_weights_kernel<T, Acc, 4>), grid, dim3(kColumnThreads), 0, stream, p, aligned);
    } else {
      const dim3 grid(block_count(tiles * ceil_div(p.rows, 8)));
      NEUROMOD_LAUNCH((interpolate_weights_kernel<T, Acc, 8>), grid, dim3(kColumnThreads), 0, stream, p, aligned);
    }
  });
  return launch_status();
}

int launch_interpolate_weights_backward(const InterpolateWeightsBackwardParams& p, stream_t stream) {
  return dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulator_t<T>;
    const bool aligned = rows_aligned<T>(p.grad, p.batch) && rows_aligned<T>(p.basis, p.num_basis) &&
                         rows_aligned<T>(p.grad_basis, p.num_basis);
    const int64_t parts = interpolate_weights_parts(p.dtype, p.length);
    const dim3 grid(static_cast<unsigned>(parts / kColumnWarps));
    NEUROMOD_LAUNCH((interpolate_weights_backward_kernel<T, Acc>), grid, dim3(kColumnThreads), 0, stream, p, aligned);
    if (const int status = launch_status()) return status;
    launch_sum_parts(static_cast<const Acc*>(p.workspace), parts, p.batch * p.num_basis, Acc(1),
                     static_cast<Acc*>(p.grad_coeff), stream);
    return launch_status();
  });
}

}  // namespace neuromod
