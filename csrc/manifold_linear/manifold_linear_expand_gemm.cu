// Plan expand_gemm of manifold_linear on CUDA: what our kernels do before and after torch's matrix product. The
// formulas stand in manifold_linear_expand_gemm.h.
//
// Grid: x packs of 16 bytes of a row, row by row; 256 threads a block, a pack a thread. Reads c and beta (from cache),
// and each product or element of g once; writes each result once, rounded once from the accumulation type. Products of
// a dtype were rounded to it by torch: error <= u S more than that of the other plans. k in order. No atomics.
//
// 2 B T K O flop; B T O (K + 1) elements, which plan expand_gemm keeps in L2: 24 us for B = O = 4096, K = 3, in
// bfloat16, predicted from 5.5 TB/s of an H100's L2 and not measured.
#include "common/columns.h"
#include "common/dispatch.h"
#include "manifold_linear/manifold_linear_expand_gemm.h"

namespace neuromod {
namespace {

constexpr int kThreads = 256;

/// a / b of numbers that are not negative; a division of 32 bits, where they suffice, costs a third.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 == 0 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

/// The pack of a thread.
struct Place {
  int64_t row, col;  // row counts from the first of these rows
  bool there;
};
template <class T>
__device__ __forceinline__ Place place(const ManifoldLinearExpandGemmParams& q) {
  const int64_t packs = ceil_div(q.p.out_features, Pack<T>::size), i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = quotient(i, packs);
  return {row, (i - row * packs) * Pack<T>::size, row < q.rows};
}

template <bool Whole, class T, class Acc>
__global__ void __launch_bounds__(kThreads)
    manifold_linear_mix_products_kernel(const __grid_constant__ ManifoldLinearExpandGemmParams q) {
  const ManifoldLinearParams& p = q.p;
  const Place at = place<T>(q);
  if (!at.there) return;
  const int64_t row = q.first_row + at.row, b = quotient(row, p.tokens), count = p.out_features - at.col;
  Acc sum[Pack<T>::size] = {};
#pragma unroll 2
  for (int64_t k = 0; k < p.num_basis; ++k) {
    const Acc c = *p.coeff.at<Acc>(b, k);
    const Pack<T> product = load_pack<Whole>(q.products.at<const T>(at.row, k * p.out_features + at.col), count);
    const Pack<T> bias = load_pack<Whole>(p.bias.at<const T>(k, at.col), p.bias ? count : 0);
#pragma unroll
    for (int v = 0; v < Pack<T>::size; ++v) sum[v] += c * (to_acc<Acc>(product.at[v]) + to_acc<Acc>(bias.at[v]));
  }
  store_pack<Whole>(p.output.at<T>(row, at.col), sum, count);
}

template <bool Whole, class T, class Acc>
__global__ void __launch_bounds__(kThreads)
    manifold_linear_spread_kernel(const __grid_constant__ ManifoldLinearExpandGemmParams q) {
  const ManifoldLinearParams& p = q.p;
  const Place at = place<T>(q);
  if (!at.there) return;
  const int64_t row = q.first_row + at.row, b = quotient(row, p.tokens), count = p.out_features - at.col;
  const Pack<T> g = load_pack<Whole>(p.output.at<const T>(row, at.col), count);
#pragma unroll 4
  for (int64_t k = 0; k < q.num_basis; ++k) {
    const Acc c = *p.coeff.at<Acc>(b, q.first_basis + k);
    Acc scaled[Pack<T>::size];
#pragma unroll
    for (int v = 0; v < Pack<T>::size; ++v) scaled[v] = c * to_acc<Acc>(g.at[v]);
    store_pack<Whole>(q.products.at<T>(at.row, k * p.out_features + at.col), scaled, count);
  }
}

/// Calls f with the element type's tag, and whether all packs are whole and aligned; reports what its launches came to.
template <class F>
int launch(const ManifoldLinearExpandGemmParams& q, F&& f) {
  dispatch_dtype<__half, __nv_bfloat16>(q.p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t size = Pack<T>::size, O = q.p.out_features;
    const dim3 grid(static_cast<unsigned>(ceil_div(q.rows * ceil_div(O, size), kThreads)));
    const bool whole = O % size == 0 && rows_aligned<T>(q.p.output, q.p.rows()) &&
                       rows_aligned<T>(q.products, q.rows) && rows_aligned<T>(q.p.bias, q.p.num_basis);
    whole ? f(tag, std::true_type{}, grid) : f(tag, std::false_type{}, grid);
  });
  return launch_status();
}

}  // namespace

int launch_manifold_linear_mix(const ManifoldLinearExpandGemmParams& q, stream_t stream) {
  return launch(q, [&](auto tag, auto whole, dim3 grid) {
    using T = typename decltype(tag)::type;
    NEUROMOD_LAUNCH((manifold_linear_mix_products_kernel<whole.value, T, accumulator_t<T>>), grid, dim3(kThreads), 0,
                    stream, q);
  });
}

int launch_manifold_linear_spread(const ManifoldLinearExpandGemmParams& q, stream_t stream) {
  return launch(q, [&](auto tag, auto whole, dim3 grid) {
    using T = typename decltype(tag)::type;
    NEUROMOD_LAUNCH((manifold_linear_spread_kernel<whole.value, T, accumulator_t<T>>), grid, dim3(kThreads), 0, stream,
                    q);
  });
}

}  // namespace neuromod
