// manifold_conv: y[b,o,q] = sum_ci W_b[o,c,i] x[b,c, q stride + i dilation - padding] + sum_k c[b,k] beta[k,o] with
// W_b = sum_k c[b,k] P_k, and its gradients. Pixels q and taps i have three dimensions; those that a problem lacks come
// first and have one place. x is zero outside; channels c are those of the output's group.
#pragma once

#include "common/params.h"

namespace neuromod {

struct ManifoldConvParams {
  DType dtype;        // of input, basis, bias and output
  int64_t batch;      // B: samples, each with one condition
  int64_t num_basis;  // K
  int64_t groups;
  int64_t in_channels;   // C, of all groups
  int64_t out_channels;  // O, of all groups
  int64_t in_size[3];    // depth, height, width of x
  int64_t out_size[3];   // of y
  int64_t kernel[3], stride[3], padding[3], dilation[3];
  View input;       // x     [B, C, pixels], dense; for CUDA in rows of channels, see below
  View basis;       // P     [K, O, C / groups taps], dense; likewise
  View coeff;       // c     [B, K], accumulation type
  View bias;        // beta  [K, O], unit stride in a row, or null
  View output;      // y, g  [B, O, pixels], dense; g for CUDA in rows of channels
  bool tf32;        // CUDA, float32: products may round their operands to tf32
  void* workspace;  // CUDA only: as much as manifold_conv_cuda.h says

  NEUROMOD_HOST_DEVICE int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  NEUROMOD_HOST_DEVICE int64_t in_pixels() const { return in_size[0] * in_size[1] * in_size[2]; }
  NEUROMOD_HOST_DEVICE int64_t out_pixels() const { return out_size[0] * out_size[1] * out_size[2]; }
  NEUROMOD_HOST_DEVICE int64_t group_channels() const { return in_channels / groups; }
  NEUROMOD_HOST_DEVICE int64_t group_outputs() const { return out_channels / groups; }

  // CUDA kernels read a pixel's, or a tap's, channels side by side: x [B, pixels, groups, Cp], g [B, pixels, groups,
  // Op] and P [K, taps, O, Cp], all dense and aligned to 16 bytes, where Cp and Op are a group's channels filled up
  // with zeros to a multiple of 16 bytes.
  NEUROMOD_HOST_DEVICE int64_t filled(int64_t channels) const {
    const int64_t chunk = 16 / element_bytes(dtype);
    return ceil_div(channels, chunk) * chunk;
  }
};

/// Gradients, those that are not null: p holds input, basis, coeff, bias and the gradient of the output (as output).
struct ManifoldConvBackwardParams {
  ManifoldConvParams p;
  View grad_input;  // [B, C, pixels], dense
  View grad_basis;  // [K, O, C / groups taps], dense
  View grad_coeff;  // [B, K]
  View grad_bias;   // [K, O], unit stride in a row
};

// Each kernel writes every element of its results exactly once, in an order of summation that does not depend on the
// number of threads.
void manifold_conv_forward_cpu(const ManifoldConvParams& p);                     // writes output
void manifold_conv_grad_input_cpu(const ManifoldConvParams& p, const View& to);  // reads no input
/// The same for few channels; whether it was done so.
bool manifold_conv_grad_input_scattered(const ManifoldConvParams& p, const View& to);
void manifold_conv_backward_cpu(const ManifoldConvBackwardParams& q);

// The same on the given stream; each returns a cudaError_t, 0 for success.
int launch_manifold_conv_forward(const ManifoldConvParams& p, stream_t stream);
int launch_manifold_conv_backward(const ManifoldConvBackwardParams& q, stream_t stream);

}  // namespace neuromod
