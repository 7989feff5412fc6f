// manifold_step_ in CUDA: bound by memory, every element read and written once, many parameters a launch. SIMT, every
// dtype. Tiles, packs and alignment: common/columns.h. Oracle: step_formula of python_tests/op_entries.py.
#include "common/columns.h"
#include "common/dispatch.h"
#include "manifold_step/manifold_step.h"

namespace neuromod {
namespace {

constexpr int kRows = 4;      // basis points at once
constexpr int kTensors = 24;  // parameters a launch: what 4 KiB of arguments hold, as much as every driver takes

struct StepLaunch {
  ManifoldStepNumbers numbers;
  int count;
  bool aligned[kTensors];
  int64_t first_tile[kTensors + 1];
  ManifoldStepTensor tensors[kTensors];
};
static_assert(sizeof(StepLaunch) <= 4096);

template <bool Whole, class T, class Acc>
__device__ __forceinline__ void step_tile(const ManifoldStepTensor& p, const ManifoldStepRule<Acc>& rule,
                                          const Columns<T>& columns) {
  constexpr int kSize = Pack<T>::size;
  const bool reads_buffer = p.buffer && !rule.first_step;  // before the first step the buffer holds nothing
  for (int64_t row = 0; row < p.num_basis; row += kRows) {
    Pack<T> param[kRows], buffer[kRows];
    Acc d[kRows][kSize];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t count = row + r < p.num_basis ? columns.count : 0;
      param[r] = load_pack<Whole>(p.param.at<const T>(row + r, columns.first), count);
      buffer[r] = load_pack<Whole>(reads_buffer ? p.buffer.at<const T>(row + r, columns.first) : nullptr,
                                   reads_buffer ? count : 0);
      if (!p.metric_inverse) {
        const Pack<T> grad = load_pack<Whole>(p.grad.at<const T>(row + r, columns.first), count);
#pragma unroll
        for (int v = 0; v < kSize; ++v) d[r][v] = to_acc<Acc>(grad.at[v]);
      }
    }
    if (p.metric_inverse)
      mix_columns<Whole, kRows>(p.metric_inverse, p.grad, p.num_basis, row, p.num_basis - row, columns, d);
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
          rule.apply(d[r][v], value, static_cast<Acc*>(nullptr));
        }
        d[r][v] = value;
        new_buffer[v] = m;  // an array whose address is taken would leave the registers
      }
      store_pack<Whole>(p.param.at<T>(row + r, columns.first), d[r], columns.count);
      if (p.buffer) store_pack<Whole>(p.buffer.at<T>(row + r, columns.first), new_buffer, columns.count);
    }
  }
}

// The formula stands in manifold_step.h. Grid: x tiles of columns of all parameters, one after another, folded. Block:
// 128 threads, each of one pack in all K rows, four at a time. Reads the gradient once for each four rows (from cache
// after the first), parameter and buffer once; writes each element of both once. Sums in the accumulation type, k in
// order, and rounds what it stores once: error <= u S + (K + 12) e S in the terms of bounds.py. 2 K^2 n flop, 5 K n
// elements (3 K n without a buffer). Floor, predicted from 3.0 TB/s of an H100 and not measured: 170 us for K = 3,
// n = 4096 x 4096 in bfloat16.
template <class T, class Acc>
__global__ void __launch_bounds__(kColumnThreads, 3) manifold_step_kernel(const __grid_constant__ StepLaunch q) {
  const ManifoldStepRule<Acc> rule(q.numbers);
  int i = 0;
  for (int64_t tile = blockIdx.x; tile < q.first_tile[q.count]; tile += gridDim.x) {
    while (tile >= q.first_tile[i + 1]) ++i;
    const ManifoldStepTensor& p = q.tensors[i];
    const int64_t mine = tile - q.first_tile[i];
    const Columns<T> columns(mine, p.length);
    for_tile<T>(q.aligned[i], mine, p.length, [&](auto whole) { step_tile<whole.value, T, Acc>(p, rule, columns); });
  }
}

template <class T>
void launch_some(const ManifoldStepParams& p, int64_t first, stream_t stream) {
  StepLaunch q{};
  q.numbers = p.numbers;
  for (int64_t i = first; i < p.count && q.count < kTensors; ++i, ++q.count) {
    const ManifoldStepTensor& t = p.tensors[i];
    q.tensors[q.count] = t;
    q.aligned[q.count] = rows_aligned<T>(t.param, t.num_basis) && rows_aligned<T>(t.grad, t.num_basis) &&
                         rows_aligned<T>(t.buffer, t.num_basis);
    q.first_tile[q.count + 1] = q.first_tile[q.count] + ceil_div(t.length, tile_columns<T>());
  }
  const dim3 grid(block_count(q.first_tile[q.count]));
  NEUROMOD_LAUNCH((manifold_step_kernel<T, accumulator_t<T>>), grid, dim3(kColumnThreads), 0, stream, q);
}

}  // namespace

int launch_manifold_step(const ManifoldStepParams& p, stream_t stream) {
  dispatch_dtype<__half, __nv_bfloat16>(p.dtype, [&](auto tag) {
    for (int64_t first = 0; first < p.count; first += kTensors)
      launch_some<typename decltype(tag)::type>(p, first, stream);
  });
  return launch_status();
}

}  // namespace neuromod
