// manifold_conv on the CPU: y, and the gradient of x. Both are correlations, out = W_b * in: y directly, dx as one for
// every place of a pixel of x relative to the stride, whose kernel is the taps that reach such pixels.
//
// Each sample's weight is blended and rounded to T once; the windows of a block of pixels (manifold_conv_windows.h) are
// the other operand. 2 B L O Ckk flop for L pixels and Ckk weights an output, and 2 B K O Ckk for the blends. Zeros of
// the padding are multiplied like any others: times an infinite weight they are NaN.
//
// Sums: the blended bias first, then taps outermost, channels and horizontal taps innermost in brgemm's order. Work is
// split over samples, groups and blocks, so results do not depend on the number of threads.
#include "common/dispatch.h"
#include "common/parallel.h"
#include "manifold_conv/manifold_conv_windows.h"

namespace neuromod {
namespace {

/// What distinguishes the correlations: from which array to which, and how P[k] is read. Channels are those of a group.
struct Form {
  Axes axes;
  View in, out;  // [B, groups channels, pixels]
  View bias;     // [K, groups rows], or null
  int64_t channels, rows;
  int64_t channel_stride, row_stride;  // in P[k]
};

template <class T>
class Correlation {
  using A = acc_t<T>;
  static constexpr int64_t kPixels = 256;     // of a product; many, so that few products cost a call
  static constexpr int64_t kLeastDepth = 12;  // of a product

 public:
  Correlation(const ManifoldConvParams& p, const Form& form)
      : p_(p),
        f_(form),
        windows_(form.axes, form.channels, sizeof(T), kLeastDepth),
        depth_(packed_depth<T>(windows_.depth())),
        weight_(windows_.products() * form.rows * depth_) {
    for (int64_t product = 0; product < windows_.products(); ++product)
      for (int64_t row = 0; row < windows_.channel_rows(); ++row) {
        const auto [d, h, w] = windows_.taps(product, row);
        taps_.push_back((form.axes[0].taps[d].index * p.kernel[1] + form.axes[1].taps[h].index) * p.kernel[2] +
                        form.axes[2].taps[w].index);
      }
  }

  void run() {
    const int64_t blocks = windows_.blocks(), jobs = p_.batch * p_.groups * blocks;
    const Scratch<T> basis(p_.num_basis * p_.groups * weight_);
    pack_basis(basis.data());
    const double seconds = 2e-11 * double(weight_) * double(windows_.most_rows() * windows_.most_cols());
    parallel_ranges(jobs, seconds, [&](int64_t begin, int64_t end) {
      const Scratch<T> weight(weight_), windows(depth_ * windows_.stride(windows_.most_cols()));
      const Scratch<A> bias(f_.rows);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / blocks / p_.groups, group = i / blocks % p_.groups;
        if (i == begin || i % blocks == 0) blend(b, group, basis.data(), weight.data(), bias.data());
        const Block block = windows_.block(i % blocks);
        pack_windows(b, group, block, windows.data());
        multiply(b, group, block, weight.data(), bias.data(), windows.data());
      }
      release_tiles<T>();
    });
  }

 private:
  /// P as [K, groups, products, rows, depth], so that blends are rows of A.
  void pack_basis(T* packed) const {
    const int64_t channel_rows = windows_.channel_rows();
    parallel(p_.num_basis * p_.groups * f_.rows, double(weight_ / f_.rows) * 1e-9, [&](int64_t i) {
      const int64_t row = i % f_.rows, k = i / f_.rows / p_.groups, group = i / f_.rows % p_.groups;
      const T* const from = p_.basis.at<T>(k, group * (p_.out_channels / p_.groups)) + row * f_.row_stride;
      for (int64_t product = 0; product < windows_.products(); ++product) {
        T* to = packed + i / f_.rows * weight_ + (product * f_.rows + row) * depth_;
        T* const end = to + depth_;
        for (int64_t c = 0; c < f_.channels; ++c)
          for (int64_t r = 0; r < channel_rows; ++r)
            *to++ = from[c * f_.channel_stride + taps_[product * channel_rows + r]];
        std::fill(to, end, T{});
      }
    });
  }

  void blend(int64_t b, int64_t group, const T* basis, T* weight, A* bias) const {
    const int64_t K = p_.num_basis;
    const Scratch<A> c(K);
    const Scratch<const T*> rows(K);
    for (int64_t k = 0; k < K; ++k) {
      c[k] = *p_.coeff.at<A>(b, k);
      rows[k] = basis + (k * p_.groups + group) * weight_;
    }
    vectors<T>().mix(weight_, K, c.data(), rows.data(), weight);
    if (!f_.bias) return;
    for (int64_t k = 0; k < K; ++k) rows[k] = f_.bias.at<T>(k, group * f_.rows);
    vectors<T>().mix_wide(f_.rows, K, c.data(), rows.data(), bias);
  }

  void pack_windows(int64_t b, int64_t group, const Block& block, T* windows) const {
    const int64_t length = windows_.length(block.cols), stride = windows_.stride(block.cols),
                  rows = windows_.channel_rows();
    const WindowPacker<T> packer(windows_, block, block.cols);
    const auto channel = [&](int64_t c) { return f_.in.at<T>(b, group * f_.channels + c); };
    if (!interleaved<T>()) {
      for (int64_t c = 0; c < f_.channels; ++c) packer.pack(channel(c), windows + c * rows * stride, stride);
      return;
    }
    const Scratch<T> two(2 * rows * stride);  // channels, whose rows make pairs
    for (int64_t row = 0; row < depth_; row += 2) {
      const int64_t in_two = row % (2 * rows), c = row / rows;
      if (in_two == 0 && row < windows_.depth()) packer.pack(channel(c), two.data(), stride);
      if (in_two == 0 && row + rows < windows_.depth()) packer.pack(channel(c + 1), &two[rows * stride], stride);
      vectors<T>().interleave(length, row < windows_.depth() ? &two[in_two * stride] : nullptr,
                              row + 1 < windows_.depth() ? &two[(in_two + 1) * stride] : nullptr,
                              windows + row * stride);
    }
  }

  void multiply(int64_t b, int64_t group, const Block& block, const T* weight, const A* bias, const T* windows) const {
    const int64_t pixels = block.rows * block.cols, stride = windows_.stride(block.cols),
                  pair = interleaved<T>() ? 2 : 1;
    const Scratch<A> sum(in_place(block) ? 0 : kTile * kPixels);
    for (int64_t n = 0; n < pixels; n += kPixels) {
      // Products have few widths, and none that is slow; columns past a block's pixels hold anything.
      const int64_t cols = std::min(kPixels, pixels - n);
      for (int64_t m = 0; m < f_.rows; m += kTile) {
        const int64_t rows = std::min(kTile, f_.rows - m);
        int64_t width = ceil_div(cols, 16) * 16, ldc = kPixels;
        A* to = sum.data();
        if constexpr (std::is_same_v<T, A>) {
          if (in_place(block)) {
            to = place(block, n, f_.out.at<T>(b, group * f_.rows + m));
            width = cols, ldc = f_.axes[0].out * f_.axes[1].out * f_.axes[2].out;
          }
        }
        const bool start = f_.bias || weight_ == 0;
        for (int64_t r = 0; r < rows && start; ++r) std::fill_n(to + r * ldc, width, f_.bias ? bias[m + r] : A(0));
        for (int64_t i = 0; i < windows_.products() && weight_ > 0; ++i)
          tile_product<T>(rows, width, depth_, {weight + (i * f_.rows + m) * depth_, depth_},
                          {windows + (windows_.begin(i, block.cols) + n) * pair, stride}, to, ldc, start || i > 0);
        for (int64_t r = 0; r < rows && to == sum.data(); ++r)
          store(block, n, cols, &sum[r * kPixels], f_.out.at<T>(b, group * f_.rows + m + r));
      }
    }
  }

  /// Whether a block's pixels lie side by side in the result.
  bool side_by_side(const Block& block) const { return f_.axes[1].stride == 1 && block.cols == f_.axes[2].out; }
  /// Whether they are summed up there.
  bool in_place(const Block& block) const { return std::is_same_v<T, A> && side_by_side(block); }

  /// Where the n-th pixel of a block is in a plane of the result.
  T* place(const Block& block, int64_t n, T* plane) const {
    const auto& [planes, lines, columns] = f_.axes;
    const int64_t d = planes.first + block.plane * planes.stride;
    const int64_t h = lines.first + (block.row + n / block.cols) * lines.stride;
    return plane + (d * lines.out + h) * columns.out + columns.first + (block.col + n % block.cols) * columns.stride;
  }

  /// Pixels [first, first + count) of a block to a plane of the result.
  void store(const Block& block, int64_t first, int64_t count, const A* sum, T* plane) const {
    if (side_by_side(block)) return vectors<T>().narrow(count, sum, place(block, first, plane));
    T narrow[kPixels];
    vectors<T>().narrow(count, sum, narrow);
    for (int64_t n = 0; n < count;) {
      const int64_t length = std::min(count - n, block.cols - (first + n) % block.cols);
      T* const to = place(block, first + n, plane);
      for (int64_t i = 0; i < length; ++i) to[i * f_.axes[2].stride] = narrow[n + i];
      n += length;
    }
  }

  const ManifoldConvParams& p_;
  const Form& f_;
  const Windows windows_;
  const int64_t depth_, weight_;  // of a product; elements of a group's weight
  std::vector<int64_t> taps_;     // of P[k], for each row of a channel in each product
};

}  // namespace

void manifold_conv_forward_cpu(const ManifoldConvParams& p) {
  const Form form{forward_axes(p),           p.input,  p.output,         p.bias, p.in_channels / p.groups,
                  p.out_channels / p.groups, p.taps(), p.basis.stride[1]};
  dispatch_dtype<Float16, BFloat16>(p.dtype,
                                    [&](auto tag) { Correlation<typename decltype(tag)::type>(p, form).run(); });
}

void manifold_conv_grad_input_cpu(const ManifoldConvParams& p, const View& to) {
  if (manifold_conv_grad_input_scattered(p, to)) return;
  const auto places = [&](int d) { return std::min(p.stride[d], p.in_size[d]); };
  for (int64_t d = 0; d < places(0); ++d)
    for (int64_t h = 0; h < places(1); ++h)
      for (int64_t w = 0; w < places(2); ++w) {
        const Form form{{gradient_axis(p, 0, d), gradient_axis(p, 1, h), gradient_axis(p, 2, w)},
                        p.output,
                        to,
                        {},
                        p.out_channels / p.groups,
                        p.in_channels / p.groups,
                        p.basis.stride[1],
                        p.taps()};
        dispatch_dtype<Float16, BFloat16>(p.dtype,
                                          [&](auto tag) { Correlation<typename decltype(tag)::type>(p, form).run(); });
      }
}

}  // namespace neuromod
