// manifold_step_ in CUDA: bound by memory, every element read and written once. SIMT, every dtype.
// Tiles, packs and alignment: common/columns.h. Oracle: step_formula of python_tests/op_entries.py.
#include "common/columns.h"
#include "common/dispatch.h"
#include "manifold_step/manifold_step.h"

namespace neuromod {
namespace {

constexpr int kRows = 4;  // basis points at once

// The formula stands in manifold_step.h. Grid: x tiles of columns, folded. Block: 128 threads, each of one pack in all
// K rows, four at a time. Reads the gradient once for each four rows (from cache after the first), parameter and buffer
// once; writes each element of both once. Sums in the accumulation type, k in order, and rounds what it stores once:
// error <= u S + (K + 12) e S in the terms of bounds.py. 2 K^2 n flop, 5 K n elements (3 K n without a buffer).
// Floor, predicted from 3.0 TB/s of an H100 and not measured: 170 us for K = 3, n = 4096 x 4096 in bfloat16.
template <class T, class Acc>
__global__ void __launch_bounds__(kColumnThreads, 3) manifold_step_kernel(ManifoldStepParams p, bool aligned) {
  constexpr int kSize = Pack<T>::size;
  const ManifoldStepRule<Acc> rule(p);
  const bool reads_buffer = p.buffer && !p.first_step;  // before the first step the buffer holds nothing
  const int64_t tiles = ceil_div(p.length, tile_columns<T>());
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Columns<T> columns(tile, p.length);
    for_tile<T>(aligned, tile, p.length, [&](auto whole) {
      for (int64_t row = 0; row < p.num_basis; row += kRows) {
        Pack<T> param[kRows], buffer[kRows];
        Acc d[kRows][kSize];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int64_t count = row + r < p.num_basis ? columns.count : 0;
          param[r] = load_pack<whole.value>(p.param.at<const T>(row + r, columns.first), count);
          buffer[r] = load_pack<whole.value>(reads_buffer ? p.buffer.at<const T>(row + r, columns.first) : nullptr,
                                             reads_buffer ? count : 0);
          if (!p.metric_inverse) {
            const Pack<T> grad = load_pack<whole.value>(p.grad.at<const T>(row + r, columns.first), count);
#pragma unroll
            for (int v = 0; v < kSize; ++v) d[r][v] = to_acc<Acc>(grad.at[v]);
          }
        }
        if (p.metric_inverse)
          mix_columns<whole.value, kRows>(p.metric_inverse, p.grad, p.num_basis, row, p.num_basis - row, columns, d);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (row + r >= p.num_basis) continue;
          Acc new_buffer[kSize];
#pragma unroll
          for (int v = 0; v < kSize; ++v) {
            Acc value = to_acc<Acc>(param[r].at[v]), m = to_acc<Acc>(buffer[r].at[v]);
            if (p.buffer) {
              rule.apply(d[r][v], value, &m);
            } else {
              rule.apply(d[r][v], value, nullptr);
            }
            d[r][v] = value;
            new_buffer[v] = m;  // an array whose address is taken would leave the registers
          }
          store_pack<whole.value>(p.param.at<T>(row + r, columns.first), d[r], columns.count);
          if (p.buffer) store_pack<whole.value>(p.buffer.at<T>(row + r, columns.first), new_buffer, columns.count);
        }
      }
    });
  }
}

}  // namespace

int launch_manifold_step(const ManifoldStepParams& p, stream_t stream) {
  dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool aligned = rows_aligned<T>(p.param, p.num_basis) && rows_aligned<T>(p.grad, p.num_basis) &&
                         rows_aligned<T>(p.buffer, p.num_basis);
    const dim3 grid(block_count(ceil_div(p.length, tile_columns<T>())));
    NEUROMOD_LAUNCH((manifold_step_kernel<T, accumulator_t<T>>), grid, dim3(kColumnThreads), 0, stream, p, aligned);
  });
  return launch_status();
}

}  // namespace neuromod
