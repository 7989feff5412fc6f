// manifold_conv on the CPU, gradients of P, c and beta; that of x is a correlation (manifold_conv_cpu.cpp).
//
// G_b^T = U_b g_b^T for each sample, U_b the windows of x_b (manifold_conv_windows.h) and g_b^T packed; from it dP_k^T
// = sum_b c_bk G_b^T and dc_bk = <G_b^T, P_k^T>. 2 B L O Ckk flop for L pixels and Ckk weights an output, and 4 B K O
// Ckk. Sums: over pixels in brgemm's order, over a slice's samples upwards, then over slices; dc over tiles of the
// weight. Tiles and slices depend on shapes only, so results do not depend on the number of threads.
#include "common/dispatch.h"
#include "common/parallel.h"
#include "manifold_conv/manifold_conv_windows.h"

namespace neuromod {
namespace {

template <class T>
class WeightGradient {
  using A = acc_t<T>;
  static constexpr int64_t kRows = 2 * kTile;  // of windows in a tile of the weight, more or less
  static constexpr int64_t kJobs = 16;         // as many, for any number of threads, if there are samples
  static constexpr int64_t kHeld = int64_t(1)
                                   << 17;  // elements of G held before they are added up, of 8 samples at most
  static constexpr int64_t kStrip = 1024;  // elements of them added up at a time

  /// Channels and outputs of one group; its part of the weight as [taps, rows, outs], row = (channel, horizontal tap).
  struct WeightTile {
    int64_t group, channel, channels, out, outs;
  };

 public:
  explicit WeightGradient(const ManifoldConvBackwardParams& q)
      : q_(q),
        p_(q.p),
        channels_(p_.in_channels / p_.groups),
        outs_(p_.out_channels / p_.groups),
        tile_channels_(split(channels_, kRows / p_.kernel[2])),
        windows_(forward_axes(p_), tile_channels_, sizeof(T), 0),
        area_(tile_channels_ * p_.taps() * std::min(kTile, outs_)) {
    for (int64_t group = 0; group < p_.groups; ++group)
      for (int64_t o = 0; o < outs_; o += kTile)
        for (int64_t c = 0; c < channels_; c += tile_channels_)
          tiles_.push_back({group, c, std::min(tile_channels_, channels_ - c), o, std::min(kTile, outs_ - o)});
    slices_ = std::clamp<int64_t>(ceil_div(kJobs, std::max<int64_t>(1, tiles())), 1, p_.batch);
  }

  void run() {
    const int64_t K = p_.num_basis;
    const Scratch<A> sums(q_.grad_basis ? slices_ * tiles() * K * area_ : 0);
    const Scratch<A> basis(q_.grad_coeff ? tiles() * K * area_ : 0), dots(q_.grad_coeff ? tiles() * p_.batch * K : 0);
    const double each = 1e-9 * double(area_);
    if (q_.grad_coeff)
      parallel(tiles() * K, each, [&](int64_t i) { transpose_basis(tiles_[i / K], i % K, &basis[i * area_]); });
    if (q_.grad_basis || q_.grad_coeff)
      parallel_ranges(tiles() * slices_, 2e-11 * double(area_ * p_.out_pixels()), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t tile = i / slices_;
          slice(tiles_[tile], i % slices_, sums.data() + i * K * area_, basis.data() + tile * K * area_,
                dots.data() + tile * p_.batch * K);
        }
        release_tiles<T>();
      });
    if (q_.grad_basis)
      parallel(tiles() * K, each,
               [&](int64_t i) { store_basis(tiles_[i / K], i % K, &sums[i / K * slices_ * K * area_]); });
    if (q_.grad_bias || q_.grad_coeff) finish(dots.data());
  }

 private:
  /// The size of as few equal parts of a total as have at most `most`.
  static int64_t split(int64_t total, int64_t most) {
    return total > 0 ? ceil_div(total, ceil_div(total, std::max<int64_t>(1, most))) : 1;
  }
  int64_t tiles() const { return int64_t(tiles_.size()); }
  int64_t rows(const WeightTile& tile) const { return tile.channels * p_.kernel[2]; }
  int64_t size(const WeightTile& tile) const { return tile.channels * p_.taps() * tile.outs; }
  int64_t out(const WeightTile& tile) const { return tile.group * outs_ + tile.out; }

  /// Pointers to a tile's rows in basis point k of P or dP.
  template <class U>
  void pointers(const View& basis, const WeightTile& tile, int64_t k, U** to) const {
    for (int64_t o = 0; o < tile.outs; ++o) to[o] = basis.at<T>(k, out(tile) + o) + tile.channel * p_.taps();
  }

  /// Calls f(i, j) for every run of rows that stands at i in a tile and at j in [channels, taps, outs].
  template <class F>
  void each_run(const WeightTile& tile, F f) const {
    const int64_t length = p_.kernel[2] * tile.outs;
    for (int64_t product = 0; product < windows_.products(); ++product)
      for (int64_t c = 0; c < tile.channels; ++c)
        f((product * tile.channels + c) * length, (c * windows_.products() + product) * length);
  }

  void transpose_basis(const WeightTile& tile, int64_t k, A* to) const {
    const Scratch<A> transposed(size(tile));
    const T* from[kTile];
    pointers(p_.basis, tile, k, from);
    vectors<T>().transpose_wide(tile.outs, tile.channels * p_.taps(), from, transposed.data(), tile.outs);
    each_run(tile, [&](int64_t i, int64_t j) { std::copy_n(&transposed[j], p_.kernel[2] * tile.outs, to + i); });
  }

  /// dP of the samples of one slice, a tile for each basis point, and their shares of dc.
  void slice(const WeightTile& tile, int64_t slice, A* sums, const A* basis, A* dots) const {
    const int64_t K = p_.num_basis, held = std::clamp<int64_t>(kHeld / area_, 1, 8), length = size(tile);
    const int64_t first = slice * p_.batch / slices_, last = (slice + 1) * p_.batch / slices_;
    const Scratch<A> products(held * area_);
    std::array<const A*, 9> terms;
    std::array<A, 9> c;
    for (int64_t b = first; b < last; b += held) {
      const int64_t count = std::min(held, last - b);
      for (int64_t i = 0; i < count; ++i) multiply(tile, b + i, &products[i * area_]);
      for (int64_t n = 0; n < length && q_.grad_basis; n += kStrip) {
        for (int64_t k = 0; k < K; ++k) {
          A* const sum = sums + k * area_ + n;
          int64_t added = 0;
          if (b > first) c[added] = 1, terms[added++] = sum;
          for (int64_t i = 0; i < count; ++i)
            c[added] = *p_.coeff.at<A>(b + i, k), terms[added++] = &products[i * area_ + n];
          vectors<A>().mix(std::min(kStrip, length - n), added, c.data(), terms.data(), sum);
        }
      }
      for (int64_t i = 0; i < count && q_.grad_coeff; ++i)
        for (int64_t k = 0; k < K; ++k)
          dots[(b + i) * K + k] = vectors<A>().dot(length, &products[i * area_], basis + k * area_);
    }
  }

  /// A tile of G_b^T.
  void multiply(const WeightTile& tile, int64_t b, A* product) const {
    const int64_t most = pitch(windows_.most_cols());
    const Scratch<T> windows(rows(tile) * windows_.stride(most)), grad(windows_.most_rows() * most * kTile);
    for (int64_t i = 0; i < windows_.blocks(); ++i) {
      const Block block = windows_.block(i);
      const int64_t pitch = this->pitch(block.cols), stride = windows_.stride(pitch);
      {
        const WindowPacker<T> packer(windows_, block, pitch);
        for (int64_t c = 0; c < tile.channels; ++c)
          packer.pack(p_.input.at<T>(b, tile.group * channels_ + tile.channel + c), &windows[c * p_.kernel[2] * stride],
                      stride);
      }
      pack_grad(tile, b, block, pitch, grad.data());
      for (int64_t n = 0; n < windows_.products(); ++n)
        for (int64_t m = 0; m < rows(tile); m += kTile)
          tile_product<T>(std::min(kTile, rows(tile) - m), tile.outs, block.rows * pitch,
                          {&windows[m * stride + windows_.begin(n, pitch)], stride}, {grad.data(), kTile},
                          product + (n * rows(tile) + m) * tile.outs, tile.outs, i > 0);
    }
  }
  /// Distance of lines: even where pairs of pixels are interleaved.
  int64_t pitch(int64_t cols) const { return even_depth<T>(cols); }

  /// g^T for a block's pixels and a tile's outputs.
  void pack_grad(const WeightTile& tile, int64_t b, const Block& block, int64_t pitch, T* to) const {
    const bool whole = block.cols == p_.out_size[2] && pitch == block.cols;
    const int64_t lines = whole ? 1 : block.rows, length = whole ? block.rows * block.cols : block.cols;
    const T* from[kTile];
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t pixel = (block.plane * p_.out_size[1] + block.row + line) * p_.out_size[2] + block.col;
      for (int64_t o = 0; o < tile.outs; ++o) from[o] = p_.output.at<T>(b, out(tile) + o) + pixel;
      T* const panel = to + line * pitch * kTile;
      pack_rows(tile.outs, length, from, panel, kTile);
    }
  }

  void store_basis(const WeightTile& tile, int64_t k, const A* sums) const {
    const int64_t length = size(tile);
    const Scratch<A> sum(length), ordered(length), ones(slices_);
    const Scratch<const A*> terms(slices_);
    for (int64_t slice = 0; slice < slices_; ++slice) {
      ones[slice] = 1;
      terms[slice] = sums + (slice * p_.num_basis + k) * area_;
    }
    vectors<A>().mix(length, slices_, ones.data(), terms.data(), sum.data());
    each_run(tile, [&](int64_t i, int64_t j) { std::copy_n(&sum[i], p_.kernel[2] * tile.outs, &ordered[j]); });
    T* to[kTile];
    pointers(q_.grad_basis, tile, k, to);
    vectors<T>().narrow_transposed(tile.channels * p_.taps(), tile.outs, tile.outs, ordered.data(), to);
  }

  /// dbeta[k,o] = sum_b c[b,k] s[b,o] and dc[b,k] = sum of its shares + sum_o s[b,o] beta[k,o]; s is g summed over
  /// pixels.
  void finish(const A* dots) const {
    const int64_t B = p_.batch, K = p_.num_basis, O = p_.out_channels, L = p_.out_pixels();
    const bool summed = q_.grad_bias || p_.bias;
    const Scratch<A> sums(summed ? B * O : 0);
    const Scratch<T> ones(summed ? L : 0);
    if (summed) {
      T one;
      const A value = 1;
      vectors<T>().narrow(1, &value, &one);
      std::fill_n(ones.data(), L, one);
      parallel(B * O, 1e-10 * double(L),
               [&](int64_t i) { sums[i] = vectors<T>().dot(L, p_.output.at<T>(i / O, i % O), ones.data()); });
    }
    if (q_.grad_coeff)
      parallel(B, 1e-9 * double(K * (tiles() + O)), [&](int64_t b) {
        const Scratch<A> bias(O);
        for (int64_t k = 0; k < K; ++k) {
          A sum = 0;
          for (int64_t tile = 0; tile < tiles(); ++tile) sum += dots[(tile * B + b) * K + k];
          if (p_.bias) {
            vectors<T>().widen(O, p_.bias.at<T>(k), bias.data());
            sum += vectors<A>().dot(O, &sums[b * O], bias.data());
          }
          *q_.grad_coeff.at<A>(b, k) = sum;
        }
      });
    if (q_.grad_bias)
      parallel(K, 1e-10 * double(B * O), [&](int64_t k) {
        const Scratch<A> c(B), sum(O);
        const Scratch<const A*> rows(B);
        for (int64_t b = 0; b < B; ++b) c[b] = *p_.coeff.at<A>(b, k), rows[b] = &sums[b * O];
        vectors<A>().mix(O, B, c.data(), rows.data(), sum.data());
        vectors<T>().narrow(O, sum.data(), q_.grad_bias.at<T>(k));
      });
  }

  const ManifoldConvBackwardParams& q_;
  const ManifoldConvParams& p_;
  const int64_t channels_, outs_, tile_channels_;
  const Windows windows_;
  const int64_t area_;  // elements of a tile, at most
  std::vector<WeightTile> tiles_;
  int64_t slices_;
};

}  // namespace

void manifold_conv_backward_cpu(const ManifoldConvBackwardParams& q) {
  if (q.grad_input) manifold_conv_grad_input_cpu(q.p, q.grad_input);
  if (!q.grad_basis && !q.grad_coeff && !q.grad_bias) return;
  dispatch_dtype<Float16, BFloat16>(q.p.dtype,
                                    [&](auto tag) { WeightGradient<typename decltype(tag)::type>(q).run(); });
}

}  // namespace neuromod
