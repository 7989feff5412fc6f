// manifold_linear's CUDA kernels on tensor cores, as manifold_linear.cu calls them: 16-bit dtypes, operands that are
// not empty, and the workspace of manifold_linear_cuda_plan.h. Each returns a cudaError_t.
#pragma once

#include "manifold_linear/manifold_linear.h"
#include "manifold_linear/manifold_linear_cuda_plan.h"

namespace neuromod {

// Plans small and large: y; dx and dc, those that are asked for; dP.
int launch_forward_tiles(const ManifoldLinearParams& p, CudaPlan plan, stream_t stream);
int launch_grad_rows_tiles(const ManifoldLinearBackwardParams& q, const CudaBackwardPlan& plan, stream_t stream);
int launch_grad_basis_tiles(const ManifoldLinearBackwardParams& q, const CudaBackwardPlan& plan, stream_t stream);

// Plan fold, 16-bit dtypes: y; dx; dP and dc, those that are asked for.
int launch_forward_fold(const ManifoldLinearParams& p, stream_t stream);
int launch_grad_input_fold(const ManifoldLinearBackwardParams& q, stream_t stream);
int launch_fold_outer(const ManifoldLinearBackwardParams& q, const CudaBackwardPlan& plan, stream_t stream);

// Every plan and dtype: dbeta.
int launch_grad_bias(const ManifoldLinearBackwardParams& q, stream_t stream);

/// The last step of dc in all of them: adds up its terms in the workspace, and the bias's.
int launch_grad_coeff_sum(const ManifoldLinearBackwardParams& q, stream_t stream);

}  // namespace neuromod
