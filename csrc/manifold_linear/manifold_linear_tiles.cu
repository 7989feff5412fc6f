// The forward pass of manifold_linear in tiles; the kernel is described in manifold_linear_mix.h.
#include "manifold_linear/manifold_linear_mix.h"
#include "manifold_linear/manifold_linear_tiles.h"

namespace neuromod {

int launch_forward_tiles(const ManifoldLinearParams& p, CudaPlan plan, stream_t stream) {
  MixParams q{};
  q.p = p;
  q.product = cuda_forward(p, plan);
  q.left = p.input;
  q.out = p.output;
  q.depth = p.in_features;
  q.cols = p.out_features;
  q.partial = q.product.splits > 1 ? static_cast<float*>(p.workspace) : nullptr;
  q.left_aligned = rows_are_aligned(p.input, 2, element_bytes(p.dtype));
  q.basis_aligned = rows_are_aligned(p.basis, 3, element_bytes(p.dtype));
  return launch_mix_tiles<false>(q, stream);
}

}  // namespace neuromod
