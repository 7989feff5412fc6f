// Plan fold of manifold_linear on the CPU: the sample's weight, blended in cache and rounded to T, times its tokens.
// The weight is B of every product, rows of x and g are A and are read in place.
//
// 2 R O I flop and 2 B L O I of blending a product, y and dx; the other gradients are in
// manifold_linear_fold_outer_cpu.cpp. A job is a tile or a block of a sample's result, by sizes alone: results do not
// depend on the number of threads, unless torch's product does.
#include <algorithm>
#include <array>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tile_product.h"
#include "common/torch_product.h"
#include "manifold_linear/manifold_linear_plan.h"

namespace neuromod {
namespace {

constexpr int64_t kEnoughJobs = 16;                // for any number of threads that a layer of this size is worth
constexpr int64_t kGemmBlock = 512;                // most columns of a product by torch
constexpr int64_t kTokens = 1024;                  // tokens that torch multiplies at a time, at most
constexpr int64_t kCacheBytes = int64_t(3) << 19;  // of panels that samples meet in turn
constexpr int64_t kMostBytes = int64_t(64) << 20;  // of them where there are few samples for many threads

/// `count` rows of x or g, n long, as A: in place, or copied where their depth must be completed.
template <class T>
Tile<T> left_operand(const View& matrix, int64_t row, int64_t count, int64_t n, T* copy) {
  const int64_t depth = packed_depth<T>(n);
  if (depth == n) return {matrix.at<T>(row), matrix.stride[0]};
  for (int64_t r = 0; r < count; ++r) {
    T* const end = std::copy_n(matrix.at<T>(row + r), n, copy + r * depth);
    std::fill(end, copy + (r + 1) * depth, T{});
  }
  return {copy, depth};
}

/// Rows [row, row + count) of a result, columns [first, first + cols): A B + bias. Where sums have the result's type,
/// they are taken in its place; else in `sum`.
template <class T>
void multiply(const View& result, int64_t row, int64_t count, int64_t first, int64_t cols, int64_t depth, Tile<T> a,
              const T* b, const acc_t<T>* bias, acc_t<T>* sum) {
  using A = acc_t<T>;
  A* to = sum;
  int64_t stride = kTile;
  if constexpr (std::is_same_v<T, A>) to = result.at<A>(row, first), stride = result.stride[0];
  tile_product<T>(count, cols, packed_depth<T>(depth), a, {b, kTile}, to, stride, false);
  for (int64_t r = 0; r < count; ++r) {
    if (bias) vectors<A>().add(cols, bias, to + r * stride);
    if (to == sum) vectors<T>().narrow(cols, sum + r * kTile, result.at<T>(row + r, first));
  }
}

/// Rows of a result as multiply gives them, by torch; with `add`, to what stands there.
template <class T>
void multiply_block(const View& result, int64_t row, int64_t count, int64_t first, int64_t cols, const View& left,
                    int64_t depth, const Matrix<T>& right, bool add) {
  torch_product(matrix(result.at<T>(row, first), count, cols, result.stride[0]),
                matrix(left.at<T>(row), count, depth, left.stride[0]), right, add);
}

/// result_b = left_b W_b, and the sample's bias, by tiles of W_b that are packed as right operands: panels. Those of
/// the basis points are blended in cache, sample by sample; of fewer samples, rows are blended before they are packed.
template <class T>
class Fold {
  using A = acc_t<T>;
  static constexpr int64_t kRows = 8;  // pieces of so many rows are read together

 public:
  /// W is of `depth` rows and `cols` columns: of P_k, or if `transposed`, of P_k^T.
  Fold(const ManifoldLinearParams& p, const View& left, int64_t depth, const View& result, int64_t cols,
       bool transposed)
      : p_(p),
        left_(left),
        result_(result),
        depth_(depth),
        cols_(cols),
        transposed_(transposed),
        bias_(transposed && p.bias),
        panel_(packed_depth<T>(depth) * kTile) {
    used_.resize(p.num_basis, !p.index);
    for (int64_t b = 0; b < p.batch && p.index; ++b)
      for (int64_t l = 0; l < p.num_local; ++l) used_[p.basis_point(b, l)] = true;
    of_samples_ = p.batch < std::count(used_.begin(), used_.end(), true);
  }

  /// So many tiles at a time as stay in cache meet all samples in turn, each of whose rows stays there meanwhile. A job
  /// is a tile of one sample's result.
  void run() const {
    const int64_t tiles = ceil_div(cols_, kTile), N = of_samples_ ? p_.batch : p_.num_basis;
    const int64_t tile_bytes = std::max<int64_t>(1, N * panel_ * int64_t(sizeof(T)));
    const int64_t enough = std::min(ceil_div(kEnoughJobs, std::max<int64_t>(1, p_.batch)), kMostBytes / tile_bytes);
    const int64_t most = std::max({int64_t(1), kCacheBytes / tile_bytes, enough});
    for (int64_t tile = 0; tile < tiles; tile += most) {
      const int64_t count = std::min(most, tiles - tile);
      const Scratch<T> panels(count * N * panel_);
      transposed_ ? pack_tiles(tile, count, N, panels.data()) : pack_strips(tile, count, N, panels.data());
      parallel_ranges(count * p_.batch, 2e-11 * double(panel_ * p_.tokens), [&](int64_t begin, int64_t end) {
        const Scratch<T> weight(of_samples_ ? 0 : panel_), copy(kTile * packed_depth<T>(depth_));
        const Scratch<A> sum(kTile * kTile);
        for (int64_t job = begin; job < end; ++job) {
          const int64_t b = job / count, i = job % count;
          const T* const packed = panels.data() + i * N * panel_;
          if (!of_samples_) blend(b, packed, weight.data());
          multiply_tokens(b, tile + i, of_samples_ ? packed + b * panel_ : weight.data(), copy.data(), sum.data());
        }
        release_tiles<T>();
      });
    }
  }

 private:
  /// Rows [first, first + count) of a basis point or of a sample's weight, `length` long from column `col` on: in
  /// place, or blended.
  void rows_of(int64_t n, int64_t first, int64_t count, int64_t col, int64_t length, T* blended, const T** rows) const {
    const int64_t L = of_samples_ ? p_.num_local : 0, stride = length + 64 / int64_t(sizeof(T));
    const Scratch<A> c(L);
    const Scratch<const T*> terms(L);
    for (int64_t l = 0; l < L; ++l) c[l] = *p_.coeff.at<A>(n, l);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t l = 0; l < L; ++l) terms[l] = p_.basis.at<T>(p_.basis_point(n, l), first + i, col);
      if (of_samples_) vectors<T>().mix(length, L, c.data(), terms.data(), blended + i * stride);
      rows[i] = of_samples_ ? blended + i * stride : p_.basis.at<T>(n, first + i, col);
    }
  }
  int64_t blended_size(int64_t count, int64_t length) const {
    return of_samples_ ? count * (length + 64 / int64_t(sizeof(T))) : 0;
  }

  /// Rows of P are columns of a panel.
  void pack_tiles(int64_t tile, int64_t count, int64_t N, T* panels) const {
    parallel(count * N, double(panel_) * 1e-9, [&](int64_t i) {
      if (!of_samples_ && !used_[i % N]) return;
      const int64_t first = tile + i / N, rows = tile_size(first, cols_);
      const Scratch<T> blended(blended_size(rows, depth_));
      std::array<const T*, kTile> from;
      rows_of(i % N, first * kTile, rows, 0, depth_, blended.data(), from.data());
      pack_rows<T>(rows, depth_, from.data(), panels + i * panel_, kTile);
      complete_panel(depth_, panels + i * panel_, kTile);
    });
  }

  /// Rows of P are rows of panels, side by side.
  void pack_strips(int64_t tile, int64_t count, int64_t N, T* panels) const {
    const int64_t strips = ceil_div(depth_, kRows), length = std::min(count * kTile, cols_ - tile * kTile);
    parallel(strips * N, double(kRows * length) * 1e-9, [&](int64_t i) {
      const int64_t n = i % N, first = i / N * kRows, rows = std::min(kRows, depth_ - first);
      if (!of_samples_ && !used_[n]) return;
      const Scratch<T> blended(blended_size(rows, length));
      std::array<const T*, kRows> from;
      rows_of(n, first, rows, tile * kTile, length, blended.data(), from.data());
      for (int64_t w = 0; w < count; ++w) {
        T* const panel = panels + (w * N + n) * panel_;
        pack_columns<T>(rows, from.data(), tile_size(tile + w, cols_), panel + first * kTile);
        if (first + rows == depth_) complete_panel(depth_, panel, kTile);
        for (int64_t r = 0; r < rows && w + 1 < count; ++r) from[r] += kTile;
      }
    });
  }

  /// A sample's panel, from those of basis points.
  void blend(int64_t b, const T* panels, T* weight) const {
    const int64_t L = p_.num_local;
    const Scratch<A> c(L);
    const Scratch<const T*> terms(L);
    for (int64_t l = 0; l < L; ++l) c[l] = *p_.coeff.at<A>(b, l), terms[l] = panels + p_.basis_point(b, l) * panel_;
    vectors<T>().mix(panel_, L, c.data(), terms.data(), weight);
  }

  /// A tile of a sample's result, from its panel.
  void multiply_tokens(int64_t b, int64_t tile, const T* weight, T* copy, A* sum) const {
    const int64_t first = tile * kTile, cols = tile_size(tile, cols_);
    A shift[kTile] = {};
    for (int64_t l = 0; l < p_.num_local && bias_; ++l)
      vectors<T>().add_scaled(cols, *p_.coeff.at<A>(b, l), p_.bias.at<T>(p_.basis_point(b, l), first), shift);
    for (int64_t t = 0; t < p_.tokens; t += kTile) {
      const int64_t row = b * p_.tokens + t, count = std::min(kTile, p_.tokens - t);
      const Tile<T> a = left_operand<T>(left_, row, count, depth_, copy);
      multiply<T>(result_, row, count, first, cols, depth_, a, weight, bias_ ? shift : nullptr, sum);
    }
  }

  const ManifoldLinearParams& p_;
  const View left_, result_;
  const int64_t depth_, cols_;
  const bool transposed_, bias_;
  const int64_t panel_;
  std::vector<char> used_;  // whether a basis point acts on any sample
  bool of_samples_;         // what is packed: weights of samples, else basis points
};

/// A job is a tile, or a block, of outputs of one sample.
template <class T>
class FoldForward {
  using A = acc_t<T>;

 public:
  explicit FoldForward(const ManifoldLinearParams& p) : p_(p) {}

  void run() const { Fold<T>(p_, p_.input, p_.in_features, p_.output, p_.out_features, true).run(); }

  void run_gemm() const {
    const int64_t depth = packed_depth<T>(p_.in_features), out_blocks = ceil_div(p_.out_features, kGemmBlock);
    parallel_products(out_blocks * p_.batch * ceil_div(p_.tokens, kTokens), [&](int64_t job) {
      const int64_t b = job % p_.batch, first = job / p_.batch % out_blocks * kGemmBlock;
      const int64_t t = job / p_.batch / out_blocks * kTokens, row = b * p_.tokens + t;
      const int64_t outs = std::min(kGemmBlock, p_.out_features - first), count = std::min(kTokens, p_.tokens - t);
      const Scratch<T> rows(kGemmBlock * depth);
      A bias[kGemmBlock] = {};
      blend_rows(b, first, outs, rows.data(), bias);
      for (int64_t i = 0; i < count && p_.bias; ++i) vectors<T>().narrow(outs, bias, p_.output.at<T>(row + i, first));
      multiply_block<T>(p_.output, row, count, first, outs, p_.input, p_.in_features,
                        matrix(rows.data(), outs, p_.in_features, depth).t(), bool(p_.bias));
    });
  }

 private:
  /// Rows of the sample's weight, and its bias.
  void blend_rows(int64_t b, int64_t first, int64_t outs, T* rows, A* bias) const {
    const int64_t L = p_.num_local, depth = packed_depth<T>(p_.in_features);
    const Scratch<A> c(L);
    const Scratch<const T*> basis(L);
    for (int64_t l = 0; l < L; ++l) {
      c[l] = *p_.coeff.at<A>(b, l);
      if (p_.bias) vectors<T>().add_scaled(outs, c[l], p_.bias.at<T>(p_.basis_point(b, l), first), bias);
    }
    for (int64_t o = 0; o < outs; ++o) {
      for (int64_t l = 0; l < L; ++l) basis[l] = p_.basis.at<T>(p_.basis_point(b, l), first + o);
      vectors<T>().mix(p_.in_features, L, c.data(), basis.data(), rows + o * depth);
    }
  }

  const ManifoldLinearParams& p_;
};

/// dx_b = g_b W_b. A job is a tile, or a block, of inputs of one sample.
template <class T>
class FoldInput {
  using A = acc_t<T>;

 public:
  explicit FoldInput(const ManifoldLinearBackwardParams& q) : p_(q.p), q_(q) {}

  void run() const { Fold<T>(p_, p_.output, p_.out_features, q_.grad_input, p_.in_features, false).run(); }

  void run_gemm() const {
    const int64_t O = p_.out_features, L = p_.num_local, in_blocks = ceil_div(p_.in_features, kGemmBlock);
    parallel_products(in_blocks * p_.batch * ceil_div(p_.tokens, kTokens), [&](int64_t job) {
      const int64_t b = job % p_.batch, first = job / p_.batch % in_blocks * kGemmBlock;
      const int64_t t = job / p_.batch / in_blocks * kTokens;
      const int64_t ins = std::min(kGemmBlock, p_.in_features - first), count = std::min(kTokens, p_.tokens - t);
      const Scratch<T> weight(O * ins);
      const Scratch<A> c(L);
      const Scratch<const T*> basis(L);
      for (int64_t l = 0; l < L; ++l) c[l] = *p_.coeff.at<A>(b, l);
      for (int64_t o = 0; o < O; ++o) {
        for (int64_t l = 0; l < L; ++l) basis[l] = p_.basis.at<T>(p_.basis_point(b, l), o, first);
        vectors<T>().mix(ins, L, c.data(), basis.data(), &weight[o * ins]);
      }
      multiply_block<T>(q_.grad_input, b * p_.tokens + t, count, first, ins, p_.output, O,
                        matrix(weight.data(), O, ins, ins), false);
    });
  }

 private:
  const ManifoldLinearParams& p_;
  const ManifoldLinearBackwardParams& q_;
};

}  // namespace

void manifold_linear_fold_forward(const ManifoldLinearParams& p, Plan plan) {
  dispatch_dtype<Float16, BFloat16>(p.dtype, [&](auto tag) {
    const FoldForward<typename decltype(tag)::type> forward(p);
    plan == Plan::fold_gemm ? forward.run_gemm() : forward.run();
  });
}

void manifold_linear_fold_backward(const ManifoldLinearBackwardParams& q, Plan plan) {
  if (q.grad_input)
    dispatch_dtype<Float16, BFloat16>(q.p.dtype, [&](auto tag) {
      const FoldInput<typename decltype(tag)::type> input(q);
      plan == Plan::fold_gemm ? input.run_gemm() : input.run();
    });
  if (q.grad_basis || q.grad_bias || q.grad_coeff) manifold_linear_fold_outer(q);
}

}  // namespace neuromod
