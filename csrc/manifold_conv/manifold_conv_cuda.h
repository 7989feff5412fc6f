// What the CUDA kernels of manifold_conv share: how a product walks over pixels and taps, the tiles it gets, and the
// workspace, from sizes alone. Plain C++, but for what nvcc and the emulator compile.
#pragma once

#include <algorithm>

#include "manifold_conv/manifold_conv.h"

namespace neuromod {

constexpr int kConvOuterTile = 64;  // of a kernel's gradient: outputs, and (tap, channel) columns
constexpr int kConvOuterGroup = 3;  // basis points whose gradients a block holds; float64: 1
constexpr int kConvPixelWarps = 8;  // of a block that sums the pixels of g

inline int64_t conv_outer_group(DType dtype) { return dtype == DType::float64 ? 1 : kConvOuterGroup; }
/// Columns of a kernel's gradient, as P lies: (tap, channel), channels filled up.
NEUROMOD_HOST_DEVICE int64_t conv_outer_cols(const ManifoldConvParams& p) {
  return p.taps() * p.filled(p.group_channels());
}
NEUROMOD_HOST_DEVICE int64_t conv_outer_tiles(const ManifoldConvParams& p) {
  return p.groups * ceil_div(p.group_outputs(), kConvOuterTile) * ceil_div(conv_outer_cols(p), kConvOuterTile);
}
/// Blocks among which the samples of a kernel's gradient are shared out, so that about two on each SM of a large card
/// have work.
inline int64_t conv_outer_splits(const ManifoldConvParams& p) {
  const int64_t blocks = conv_outer_tiles(p) * ceil_div(p.num_basis, conv_outer_group(p.dtype));
  return std::clamp(std::min<int64_t>(256 / std::max<int64_t>(blocks, 1), p.batch / 2), int64_t(1), int64_t(16));
}

/// What launch_manifold_conv_backward keeps in its workspace, in elements of the accumulation type: dP by splits
/// [splits, K, O, conv_outer_cols], the terms of dc [tiles, B, K], and the sums of g's pixels [B, O].
struct ConvWorkspace {
  int64_t basis, dots, pixel_sums;
  int64_t bytes(DType dtype) const { return (basis + dots + pixel_sums) * (dtype == DType::float64 ? 8 : 4); }
};
inline ConvWorkspace conv_workspace(const ManifoldConvBackwardParams& q) {
  const ManifoldConvParams& p = q.p;
  const bool sums = q.grad_bias || (q.grad_coeff && p.bias);
  return {q.grad_basis ? conv_outer_splits(p) * p.num_basis * p.out_channels * conv_outer_cols(p) : 0,
          q.grad_coeff ? conv_outer_tiles(p) * p.batch * p.num_basis : 0, sums ? p.batch * p.out_channels : 0};
}

}  // namespace neuromod
