// Which way the CUDA side goes about a problem, by predicted cost, and the workspace that its kernels need; from sizes
// alone, so that the same bits come out on every card. Torch-free, and the same with and without nvcc.
#pragma once

#include <string>
#include <vector>

#include "manifold_linear/manifold_linear.h"

namespace neuromod {

enum class CudaPlan : int8_t {
  simt,         ///< the plain kernels of manifold_linear.cu, for every dtype
  small,        ///< all dtypes but float64, on tensor cores where they may: tiles of 64 x 64
  large,        ///< the same in tiles of 128 x 128
  fold,         ///< 16-bit dtypes, samples of many tokens: each sample's weight is blended first
  expand_gemm,  ///< torch's matrix product (cuBLAS) with all basis points, mixed before it or after
  fold_gemm,    ///< torch's, with each sample's weight, blended and stored
};

const char* cuda_plan_name(CudaPlan plan);

/// The plan that NEUROMOD_CUDA_PLAN forces, if it names one.
bool forced_cuda_plan(CudaPlan& plan);

/// What a call computes: the forward pass; dx; dP; dx and dc at once; dP and dc at once.
enum class CudaPass : int8_t { forward, rows, basis, rows_and_dots, basis_and_dots };

struct CudaPlanCost {
  CudaPlan plan;
  double seconds;
};

/// The plans that can run a pass, cheapest first by prediction, with torch's products among them or kernels alone; none
/// if none can.
std::vector<CudaPlanCost> cuda_plan_costs(const ManifoldLinearParams& p, CudaPass pass, bool torch);

/// The first of them, or the one that is forced. Where that cannot run the pass, the first that is a kernel's if so is
/// the forced one.
CudaPlan cuda_plan(const ManifoldLinearParams& p, CudaPass pass, bool torch);

/// How the gradients are come by, of those that are asked for.
struct CudaBackwardPlan {
  CudaPlan rows, basis;
  bool dots_with_rows;  // dc comes along with dx, else with dP
};
CudaBackwardPlan cuda_backward_plan(const ManifoldLinearBackwardParams& q, bool torch);

/// One product of a call in tiles: a result of `tiles_down` x `tiles_across`, shared out among `splits` blocks a tile,
/// whose partial sums a second pass adds in order.
struct CudaProduct {
  CudaPlan plan;
  int64_t tiles_down, tiles_across, splits;
};

constexpr int kMostFolded = 64;  // coefficients of a sample that plan fold takes
constexpr int kFoldOuterRows = 128, kFoldOuterCols = 64, kFoldOuterGroup = 3;  // tile and basis points of dP and dc
constexpr int kBiasGroup = 4;  // basis points of dbeta that a block takes at a time

inline bool is_half(DType dtype) { return dtype == DType::bfloat16 || dtype == DType::float16; }
/// Depth of a slice in plans small and large (ProductShape::kDepth).
NEUROMOD_HOST_DEVICE int64_t slice_depth(DType dtype) { return 64 / element_bytes(dtype); }

/// Tokens of a tile in plan fold.
inline int64_t fold_tokens(const ManifoldLinearParams& p) { return p.tokens <= 64 ? 64 : p.tokens <= 128 ? 128 : 256; }

// The products of plans small and large (simt has neither tiles nor splits): y; dx and dc; dP.
CudaProduct cuda_forward(const ManifoldLinearParams& p, CudaPlan plan);
CudaProduct cuda_grad_rows(const ManifoldLinearParams& p, CudaPlan plan);
CudaProduct cuda_grad_basis(const ManifoldLinearParams& p, CudaPlan plan);
/// dP and dc in plan fold: over the samples, for groups of basis points.
CudaProduct cuda_fold_outer(const ManifoldLinearParams& p);
/// dbeta: splits of the rows.
int64_t cuda_bias_splits(const ManifoldLinearParams& p);

/// Rows (plan expand_gemm, of `cols` for each basis point) or samples (plan fold_gemm) that torch's product takes at a
/// time, which bounds what is stored between it and our kernels.
int64_t cuda_expand_gemm_rows(const ManifoldLinearParams& p, int64_t cols);
int64_t cuda_fold_gemm_samples(const ManifoldLinearParams& p);

/// Partial sums lie in rows of an even number of floats.
NEUROMOD_HOST_DEVICE int64_t partial_cols(int64_t cols) { return cols + cols % 2; }

/// The terms that dc is summed from, behind the partial sums: [tiles, splits, B, each, L], in the accumulation type.
struct CudaDots {
  int64_t tiles, splits, each;
};
CudaDots cuda_dots(const ManifoldLinearBackwardParams& q);
void* cuda_dots_begin(const ManifoldLinearBackwardParams& q);

/// Bytes of workspace that launch_manifold_linear_forward and launch_manifold_linear_backward need.
int64_t cuda_forward_workspace(const ManifoldLinearParams& p);
int64_t cuda_backward_workspace(const ManifoldLinearBackwardParams& q);

}  // namespace neuromod
