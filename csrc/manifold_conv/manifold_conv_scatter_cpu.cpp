// The gradient of manifold_conv's x on the CPU where groups have few channels: each pixel of g, times the sample's
// weight, is added to what its window saw of x (col2im). So g is copied once, not once for each horizontal tap, and
// products have a row for each channel and tap, not for each channel.
//
// Each sample's weight is blended and rounded to T once. g's lines are laid as far apart as those of the sums, with
// zeros between, so that a tap moves a block of them as a whole. 2 B L O Ckk flop and B L Ckk additions.
// Sums: over outputs in brgemm's order, then over g's blocks and taps upwards. Work is split over samples and groups.
// An infinite weight would spread by those zeros: then windows are taken, as they are where there is more to add up
// than they copy.
#include <algorithm>
#include <cmath>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tile_product.h"
#include "manifold_conv/manifold_conv.h"

namespace neuromod {
namespace {

template <class T>
class ScatteredInput {
  using A = acc_t<T>;
  static constexpr int64_t kPixels = 256;           // of a product
  static constexpr int64_t kStride = kPixels + 16;  // of g's rows: off powers of two

 public:
  ScatteredInput(const ManifoldConvParams& p, const View& to)
      : p_(p), to_(to), rows_(p.group_channels() * p.taps()), depth_(packed_depth<T>(p.group_outputs())) {
    for (int d = 0; d < 3; ++d) size_[d] = p.in_size[d] + 2 * p.padding[d];
  }

  void run() const {
    const int64_t jobs = p_.batch * p_.groups, sums_size = p_.group_channels() * size_[0] * size_[1] * size_[2];
    const Scratch<T> basis(p_.num_basis * p_.groups * rows_ * depth_);
    pack_basis(basis.data());
    parallel_ranges(jobs, 3e-11 * double(rows_ * depth_) * double(p_.out_pixels()), [&](int64_t begin, int64_t end) {
      const Scratch<T> weight(rows_ * depth_), grad(depth_ * kStride);
      const Scratch<A> product(kTile * kPixels), sums(sums_size);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / p_.groups, group = i % p_.groups;
        blend(b, group, basis.data(), weight.data());
        std::fill_n(sums.data(), sums_size, A(0));
        each_block([&](const Block& block) {
          pack_grad(b, group, block, grad.data());
          for (int64_t m = 0; m < rows_; m += kTile) {
            const int64_t rows = std::min(kTile, rows_ - m), cols = ceil_div(block.count, 16) * 16;
            tile_product<T>(rows, cols, depth_, {weight.data() + m * depth_, depth_}, {grad.data(), kStride},
                            product.data(), kPixels, false);
            for (int64_t r = 0; r < rows; ++r)
              vectors<A>().add(block.count, &product[r * kPixels], &sums[place(block, m + r)]);
          }
        });
        store(b, group, sums.data());
      }
      release_tiles<T>();
    });
  }

 private:
  /// Lines of a plane of g, of each the columns [col, col + cols); `count` pixels at the distances of the sums.
  struct Block {
    int64_t plane, line, lines, col, cols, count;
  };

  template <class F>
  void each_block(F f) const {
    const int64_t width = p_.out_size[2], most = std::max<int64_t>(1, kPixels / size_[2]);
    for (int64_t plane = 0; plane < p_.out_size[0]; ++plane)
      for (int64_t line = 0; line < p_.out_size[1]; line += most)
        for (int64_t col = 0; col < width; col += kPixels) {
          const int64_t lines = std::min(most, p_.out_size[1] - line), cols = std::min(kPixels, width - col);
          f(Block{plane, line, lines, col, cols, (lines - 1) * size_[2] + cols});
        }
  }

  /// P as [K, groups, (channel, tap), output], so that blends are rows of A.
  void pack_basis(T* packed) const {
    const int64_t outs = p_.group_outputs();
    parallel(p_.num_basis * p_.groups, double(rows_ * depth_) * 1e-9, [&](int64_t i) {
      const Scratch<const T*> rows(depth_);
      for (int64_t o = 0; o < depth_; ++o)
        rows[o] = o < outs ? p_.basis.at<T>(i / p_.groups, i % p_.groups * outs + o) : nullptr;
      vectors<T>().transpose(depth_, rows_, rows.data(), packed + i * rows_ * depth_, depth_);
    });
  }

  void blend(int64_t b, int64_t group, const T* basis, T* weight) const {
    const Scratch<A> c(p_.num_basis);
    const Scratch<const T*> terms(p_.num_basis);
    for (int64_t k = 0; k < p_.num_basis; ++k)
      c[k] = *p_.coeff.at<A>(b, k), terms[k] = basis + (k * p_.groups + group) * rows_ * depth_;
    vectors<T>().mix(rows_ * depth_, p_.num_basis, c.data(), terms.data(), weight);
  }

  /// A block of g as the right operand.
  void pack_grad(int64_t b, int64_t group, const Block& block, T* packed) const {
    const int64_t outs = p_.group_outputs();
    T two[2][kStride];
    for (int64_t o = 0; o < depth_; ++o) {
      T* const row = interleaved<T>() ? two[o % 2] : packed + o * kStride;
      o < outs ? line_up(p_.output.at<T>(b, group * outs + o), block, row) : (void)std::fill_n(row, block.count, T{});
      if (interleaved<T>() && o % 2 == 1)
        vectors<T>().interleave(block.count, two[0], two[1], packed + (o - 1) * kStride);
    }
  }

  void line_up(const T* plane, const Block& block, T* to) const {
    const T* from = plane + (block.plane * p_.out_size[1] + block.line) * p_.out_size[2] + block.col;
    for (int64_t line = 0; line < block.lines; ++line, from += p_.out_size[2]) {
      to = std::copy_n(from, block.cols, to);
      if (line + 1 < block.lines) to = std::fill_n(to, size_[2] - block.cols, T{});
    }
  }

  /// Where the products of a row, (channel, tap), with a block belong among the sums.
  int64_t place(const Block& block, int64_t row) const {
    const int64_t channel = row / p_.taps(), tap = row % p_.taps(), w = tap % p_.kernel[2],
                  h = tap / p_.kernel[2] % p_.kernel[1], d = tap / p_.kernel[2] / p_.kernel[1];
    const int64_t plane = block.plane + d * p_.dilation[0], line = block.line + h * p_.dilation[1];
    return ((channel * size_[0] + plane) * size_[1] + line) * size_[2] + block.col + w * p_.dilation[2];
  }

  void store(int64_t b, int64_t group, const A* sums) const {
    const auto& [depth, height, width] = p_.in_size;
    for (int64_t c = 0; c < p_.group_channels(); ++c)
      for (int64_t d = 0; d < depth; ++d)
        for (int64_t h = 0; h < height; ++h) {
          const int64_t plane = c * size_[0] + d + p_.padding[0], line = plane * size_[1] + h + p_.padding[1];
          vectors<T>().narrow(width, sums + line * size_[2] + p_.padding[2],
                              to_.at<T>(b, group * p_.group_channels() + c) + (d * height + h) * width);
        }
  }

  const ManifoldConvParams& p_;
  const View to_;
  const int64_t rows_, depth_;  // of the weight: channels and taps, outputs
  int64_t size_[3];             // of the sums: x with its padding
};

/// The larger magnitude; NaN if either is.
double larger(double a, double b) { return std::abs(b) <= a ? a : std::isnan(a) ? a : std::abs(b); }

/// Whether no sample's weight can become infinite, or NaN.
template <class T>
bool weights_are_finite(const ManifoldConvParams& p) {
  using A = acc_t<T>;
  const double most = p.dtype == DType::float64 ? 1e308 : p.dtype == DType::float16 ? 65504 : 3.3e38;
  const int64_t size = p.group_channels() * p.taps();
  const Scratch<A> row(size);
  double weight = 0, sum = 0;
  for (int64_t k = 0; k < p.num_basis; ++k)
    for (int64_t o = 0; o < p.out_channels; ++o) {
      vectors<T>().widen(size, p.basis.at<T>(k, o), row.data());
      for (int64_t i = 0; i < size; ++i) weight = larger(weight, double(row[i]));
    }
  for (int64_t b = 0; b < p.batch; ++b) {
    double each = 0;
    for (int64_t k = 0; k < p.num_basis; ++k) each += std::abs(double(*p.coeff.at<A>(b, k)));
    sum = larger(sum, each);
  }
  return weight * sum < most;
}

/// Whether groups have so few channels that adding up takes less than copying windows does.
bool has_few_channels(const ManifoldConvParams& p) {
  constexpr int64_t least_jobs = 16;  // for any number of threads
  if (p.stride[0] * p.stride[1] * p.stride[2] > 1 || p.batch * p.groups < least_jobs) return false;
  return 3 * p.group_channels() * p.taps() <= 2 * (p.kernel[2] - 1) * p.group_outputs();
}

}  // namespace

bool manifold_conv_grad_input_scattered(const ManifoldConvParams& p, const View& to) {
  bool done = false;
  dispatch_dtype<Float16, BFloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    done = has_few_channels(p) && weights_are_finite<T>(p);
    if (done) ScatteredInput<T>(p, to).run();
  });
  return done;
}

}  // namespace neuromod
