// Which CUDA kernels a problem gets, and the workspace they need; from sizes alone, so that host functions can allocate
// it and the same bits come out on every card. Torch-free, and the same with and without nvcc.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>

#include "manifold_linear/manifold_linear.h"

namespace neuromod {

enum class CudaPlan : int8_t {
  simt,   ///< the plain kernels of manifold_linear.cu, for every dtype
  small,  ///< all dtypes but float64, on tensor cores where they may: tiles of 64 x 64
  large,  ///< the same in tiles of 128 x 128
  fold,   ///< 16-bit dtypes, samples of many tokens: each sample's weight is blended first
};

/// One product of a call on tensor cores: a result of `rows` x `cols` from `steps` slices of the depth, shared out
/// among `splits` blocks a tile, whose partial sums a second pass adds in order.
struct CudaProduct {
  CudaPlan plan;
  int64_t tiles_down, tiles_across, splits;
};

constexpr int kMostFolded = 64;  // coefficients of a sample that plan fold takes
constexpr int kFoldOuterRows = 128, kFoldOuterCols = 64, kFoldOuterGroup = 3;  // tile and basis points of dP and dc
constexpr int kBiasGroup = 4;  // basis points of dbeta that a block takes at a time

/// The plan that NEUROMOD_CUDA_PLAN forces, if it names one.
inline bool forced_cuda_plan(CudaPlan& plan) {
  const char* const name = std::getenv("NEUROMOD_CUDA_PLAN");
  const std::string forced = name ? name : "";
  if (forced == "simt") return plan = CudaPlan::simt, true;
  if (forced == "small") return plan = CudaPlan::small, true;
  if (forced == "large") return plan = CudaPlan::large, true;
  if (forced == "fold") return plan = CudaPlan::fold, true;
  return false;
}

inline bool is_half(DType dtype) { return dtype == DType::bfloat16 || dtype == DType::float16; }
NEUROMOD_HOST_DEVICE int64_t element_bytes(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}
/// Depth of a slice in plans small and large (ProductShape::kDepth).
NEUROMOD_HOST_DEVICE int64_t slice_depth(DType dtype) { return 64 / element_bytes(dtype); }

/// Tokens of a tile in plan fold.
inline int64_t fold_tokens(const ManifoldLinearParams& p) { return p.tokens <= 64 ? 64 : p.tokens <= 128 ? 128 : 256; }

/// Whether all products of a call take plan fold: where a sample's tokens, with what it costs to fetch and blend its
/// basis points, are fewer than its rows in all K products. Predicted, from L2's bandwidth, not measured.
inline bool cuda_folds(const ManifoldLinearParams& p) {
  constexpr int64_t kBlend = 96, kLeastTokens = 32;  // kBlend: rows whose product takes as long as a tile of P's fetch
  if (!is_half(p.dtype) || p.num_local > kMostFolded) return false;
  if (p.rows() == 0 || p.out_features == 0 || p.in_features == 0) return false;
  CudaPlan forced{};
  if (forced_cuda_plan(forced)) return forced == CudaPlan::fold;
  const int64_t tile = fold_tokens(p), tiles = p.batch * ceil_div(p.tokens, tile);
  return p.tokens >= kLeastTokens && tiles * (tile + kBlend * p.num_local) < p.rows() * p.num_basis;
}

/// Large tiles where they alone occupy half of a card or more, since they read each operand half as often; splits until
/// a card is full (twice over with small tiles, four times where P is read once and only its bandwidth counts), but at
/// least four slices each.
inline CudaProduct cuda_product(DType dtype, int64_t rows, int64_t cols, int64_t steps, int64_t batches) {
  constexpr int64_t kBlocks = 128, kLeastSteps = 4, kMostSplits = 16;  // kBlocks: about the SMs of a large card
  CudaProduct product{CudaPlan::simt, 0, 0, 1};
  if (dtype == DType::float64 || rows == 0 || cols == 0 || steps == 0) return product;
  const int64_t large_tiles = ceil_div(rows, 128) * ceil_div(cols, 128) * batches;
  product.plan = large_tiles >= kBlocks / 2 ? CudaPlan::large : CudaPlan::small;
  if (CudaPlan forced{}; forced_cuda_plan(forced) && forced != CudaPlan::fold) product.plan = forced;
  if (product.plan == CudaPlan::simt) return product;
  const int64_t side = product.plan == CudaPlan::large ? 128 : 64;
  product.tiles_down = ceil_div(rows, side), product.tiles_across = ceil_div(cols, side);
  const int64_t wanted = product.plan == CudaPlan::large ? kBlocks : rows <= side ? 4 * kBlocks : 2 * kBlocks;
  const int64_t tiles = product.tiles_down * product.tiles_across * batches;
  product.splits = std::clamp(std::min(wanted / tiles, steps / kLeastSteps), int64_t(1), kMostSplits);
  return product;
}

/// y or dx (and dc): each basis point's product over the whole depth, one after another.
inline CudaProduct cuda_mix(const ManifoldLinearParams& p, int64_t depth, int64_t cols) {
  return cuda_product(p.dtype, p.rows(), cols, p.num_basis * ceil_div(depth, slice_depth(p.dtype)), 1);
}
inline CudaProduct cuda_forward(const ManifoldLinearParams& p) { return cuda_mix(p, p.in_features, p.out_features); }
inline CudaProduct cuda_grad_rows(const ManifoldLinearParams& p) { return cuda_mix(p, p.out_features, p.in_features); }

/// dP: for each basis point a product over the rows.
inline CudaProduct cuda_grad_basis(const ManifoldLinearParams& p) {
  return cuda_product(p.dtype, p.out_features, p.in_features, ceil_div(p.rows(), slice_depth(p.dtype)), p.num_basis);
}

/// dP and dc in plan fold: over the samples, for groups of basis points.
inline CudaProduct cuda_fold_outer(const ManifoldLinearParams& p) {
  CudaProduct product{CudaPlan::fold, ceil_div(p.out_features, kFoldOuterRows), ceil_div(p.in_features, kFoldOuterCols),
                      1};
  const int64_t blocks = product.tiles_down * product.tiles_across * ceil_div(p.num_basis, kFoldOuterGroup);
  product.splits = std::clamp(std::min(128 / blocks, p.batch / 2), int64_t(1), int64_t(16));
  return product;
}

/// dbeta: splits of the rows until a card is full, at least 128 rows each.
inline int64_t cuda_bias_splits(const ManifoldLinearParams& p) {
  const int64_t blocks = ceil_div(p.out_features, 32) * ceil_div(p.num_basis, kBiasGroup);
  return std::clamp(std::min(512 / blocks, p.rows() / 128), int64_t(1), int64_t(256));
}

/// Partial sums lie in rows of an even number of floats.
NEUROMOD_HOST_DEVICE int64_t partial_cols(int64_t cols) { return cols + cols % 2; }
inline int64_t partial_elements(const CudaProduct& product, int64_t rows, int64_t cols) {
  return product.splits > 1 ? product.splits * rows * partial_cols(cols) : 0;
}

/// Bytes of workspace that launch_manifold_linear_forward needs.
inline int64_t cuda_forward_workspace(const ManifoldLinearParams& p) {
  return cuda_folds(p) ? 0 : 4 * partial_elements(cuda_forward(p), p.rows(), p.out_features);
}

/// Bytes of partial sums that launch_manifold_linear_backward needs: its kernels run one after another and share them.
inline int64_t cuda_partial_bytes(const ManifoldLinearBackwardParams& q) {
  const ManifoldLinearParams& p = q.p;
  const bool folds = cuda_folds(p);
  int64_t elements = 0;
  if (q.grad_input && !folds) elements = partial_elements(cuda_grad_rows(p), p.rows(), p.in_features);
  if (q.grad_basis) {
    const CudaProduct product = folds ? cuda_fold_outer(p) : cuda_grad_basis(p);
    elements = std::max(elements, partial_elements(product, p.num_basis * p.out_features, p.in_features));
  }
  int64_t bytes = 4 * elements;
  if (const int64_t splits = cuda_bias_splits(p); q.grad_bias && splits > 1)
    bytes = std::max(bytes, splits * p.num_basis * p.out_features * (p.dtype == DType::float64 ? 8 : 4));
  return ceil_div(bytes, 16) * 16;
}

/// The terms that dc is summed from, behind the partial sums: [tiles, splits, B, each, L], in the accumulation type.
struct CudaDots {
  int64_t tiles, splits, each;
};
inline CudaDots cuda_dots(const ManifoldLinearParams& p) {
  if (cuda_folds(p)) {
    const CudaProduct product = cuda_fold_outer(p);
    return {product.tiles_down * product.tiles_across, 1, 1};
  }
  const CudaProduct product = cuda_grad_rows(p);
  return {product.plan == CudaPlan::simt ? 1 : product.tiles_across, product.splits, p.tokens};
}
inline void* cuda_dots_begin(const ManifoldLinearBackwardParams& q) {
  return static_cast<char*>(q.p.workspace) + cuda_partial_bytes(q);
}

/// Bytes that launch_manifold_linear_backward needs.
inline int64_t cuda_backward_workspace(const ManifoldLinearBackwardParams& q) {
  const CudaDots dots = cuda_dots(q.p);
  const int64_t elements = dots.tiles * dots.splits * q.p.batch * dots.each * q.p.num_local;
  return cuda_partial_bytes(q) + (q.grad_coeff ? elements * (q.p.dtype == DType::float64 ? 8 : 4) : 0);
}

}  // namespace neuromod
