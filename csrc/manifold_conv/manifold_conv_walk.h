// How a block of the convolution's CUDA kernels finds its elements: which pixels meet in a correlation, and where a
// thread stands in the sum over taps and channels.
#pragma once

#include "common/product_tile.h"
#include "manifold_conv/manifold_conv.h"

namespace neuromod {

/// One dimension of a correlation: the i-th of `count` places, out[first + i stride], sums w[tap + j tap_step] in[i
/// step
/// + base + j delta] over the taps j; zeros where that is not in 0 .. size - 1.
struct ConvAxis {
  int count, size, step, base, delta, taps, tap, tap_step, first, stride;
};

/// The convolution along one dimension.
__device__ __forceinline__ ConvAxis convolution_axis(const ManifoldConvParams& p, int d) {
  return {int(p.out_size[d]),
          int(p.in_size[d]),
          int(p.stride[d]),
          -int(p.padding[d]),
          int(p.dilation[d]),
          int(p.kernel[d]),
          0,
          1,
          0,
          1};
}

/// From the gradient of y to that of every stride-th pixel of x, from `first` on: those see the same taps.
__device__ __forceinline__ ConvAxis gradient_axis(const ManifoldConvParams& p, int d, int first) {
  const int stride = int(p.stride[d]), kernel = int(p.kernel[d]), dilation = int(p.dilation[d]);
  const int there = first + int(p.padding[d]);  // tap i meets g at (there - i dilation) / stride, if that is whole
  int tap = 0, period = 1;
  while (tap < kernel && (there - tap * dilation) % stride != 0) ++tap;
  while (period * dilation % stride != 0) ++period;
  const int left = int(p.in_size[d]) - first;
  return {left > 0 ? int(ceil_div(left, stride)) : 0,
          int(p.out_size[d]),
          1,
          tap < kernel ? (there - tap * dilation) / stride : 0,
          -(period * dilation / stride),
          int(ceil_div(kernel - tap, period)),
          tap,
          period,
          first,
          stride};
}

/// Coordinates of the n-th pixel of a box.
struct ConvPixel {
  int at[3];
  static __device__ __forceinline__ ConvPixel of(int64_t n, int64_t height, int64_t width) {
    const unsigned index = unsigned(n), row = index / unsigned(width);
    return {{int(row / unsigned(height)), int(row % unsigned(height)), int(index % unsigned(width))}};
  }
};

/// A place in the depth of a correlation: tap after tap, of each the channels.
class ConvCursor {
 public:
  using Axes = ConvAxis[3];

  __device__ __forceinline__ ConvCursor(const Axes& axes, int channels, int start)
      : channels_(channels), channel_(0), at_{0, 0, 0} {
    advance(axes, start);
  }

  __device__ __forceinline__ void advance(const Axes& axes, int by) {
    channel_ += by;
    ended_ = axes[0].taps <= at_[0];
    while (channel_ >= channels_ && !ended_) {
      channel_ -= channels_;
      if (++at_[2] < axes[2].taps) continue;
      at_[2] = 0;
      if (++at_[1] < axes[1].taps) continue;
      at_[1] = 0;
      ended_ = ++at_[0] == axes[0].taps;
    }
  }

  /// Beyond the last tap.
  __device__ __forceinline__ bool ended() const { return ended_; }
  __device__ __forceinline__ int channel() const { return channel_; }
  /// How far this tap reads from the first, in dimension d.
  __device__ __forceinline__ int moved(const Axes& axes, int d) const { return at_[d] * axes[d].delta; }
  /// The tap's number in the kernel.
  __device__ __forceinline__ int64_t tap(const Axes& axes, const ManifoldConvParams& p) const {
    const auto place = [&](int d) { return int64_t(axes[d].tap + at_[d] * axes[d].tap_step); };
    return (place(0) * p.kernel[1] + place(1)) * p.kernel[2] + place(2);
  }

 private:
  int channels_, channel_, at_[3];
  bool ended_;
};

}  // namespace neuromod
