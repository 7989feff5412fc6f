// The gradients of P, c and beta of manifold_conv, as manifold_conv.cu calls them, with the workspace of
// manifold_conv_cuda.h. Returns a cudaError_t.
#pragma once

#include "manifold_conv/manifold_conv.h"

namespace neuromod {

int launch_conv_outer(const ManifoldConvBackwardParams& q, stream_t stream);

}  // namespace neuromod
