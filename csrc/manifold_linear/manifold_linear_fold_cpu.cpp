// Plan fold of manifold_linear on the CPU: the sample's weight, blended in cache and rounded to T, times its tokens.
// The weight is B of every product, rows of x and g are A and are read in place.
//
// 2 R O I flop and 2 B L O I of blending a product, y and dx; the other gradients are in
// manifold_linear_fold_outer_cpu.cpp. A job is a tile or a block of a sample's result, by sizes alone: results do not
// depend on the number of threads, unless torch's product does.
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

class Fold {
 protected:
  explicit Fold(const ManifoldLinearParams& p) : p_(p) {}

  /// result_b = left_b W_b, and the sample's bias: W_b, [depth, cols], is blended from panels, tiles of P_k as right
  /// operands, which pack(k, first, count, panel) packs. So many of them as stay in cache meet all samples in turn,
  /// each of whose rows stays there meanwhile. A job is a tile of one sample's result.
  template <class T, class Pack>
  void multiply_samples(const View& left, int64_t depth, const View& result, int64_t cols, bool bias, Pack pack) const {
    using A = acc_t<T>;
    const int64_t tiles = ceil_div(cols, kTile), panel = packed_depth<T>(depth) * kTile, K = p_.num_basis;
    const int64_t tile_bytes = std::max<int64_t>(1, K * panel * int64_t(sizeof(T)));
    const int64_t enough = std::min(ceil_div(kEnoughJobs, std::max<int64_t>(1, p_.batch)), kMostBytes / tile_bytes);
    const int64_t most = std::max({int64_t(1), kCacheBytes / tile_bytes, enough});
    const std::vector<char> used = used_points();
    for (int64_t tile = 0; tile < tiles; tile += most) {
      const int64_t count = std::min(most, tiles - tile);
      const auto first = [&](int64_t i) { return (tile + i) * kTile; };
      const auto width = [&](int64_t i) { return std::min(kTile, cols - first(i)); };
      const Scratch<T> panels(count * K * panel);
      parallel(count * K, double(panel) * 1e-9, [&](int64_t i) {
        if (!used[i % K]) return;
        T* const to = panels.data() + i * panel;
        pack(i % K, first(i / K), width(i / K), to);
        complete_panel(depth, to, kTile);
      });
      parallel_ranges(count * p_.batch, 2e-11 * double(panel * p_.tokens), [&](int64_t begin, int64_t end) {
        const Scratch<T> weight(panel), copy(kTile * packed_depth<T>(depth));
        const Scratch<A> sum(kTile * kTile);
        for (int64_t job = begin; job < end; ++job) {
          const int64_t b = job / count, i = job % count;
          A shift[kTile] = {};
          blend(b, first(i), width(i), panels.data() + i * K * panel, panel, weight.data(), bias ? shift : nullptr);
          for (int64_t t = 0; t < p_.tokens; t += kTile) {
            const int64_t row = b * p_.tokens + t, rows = std::min(kTile, p_.tokens - t);
            const Tile<T> a = left_operand<T>(left, row, rows, depth, copy.data());
            multiply<T>(result, row, rows, first(i), width(i), depth, a, weight.data(), bias ? shift : nullptr,
                        sum.data());
          }
        }
        release_tiles<T>();
      });
    }
  }

  const ManifoldLinearParams& p_;

 private:
  /// Whether a basis point acts on any sample.
  std::vector<char> used_points() const {
    std::vector<char> used(p_.num_basis, !p_.index);
    for (int64_t b = 0; p_.index && b < p_.batch; ++b)
      for (int64_t l = 0; l < p_.num_local; ++l) used[p_.basis_point(b, l)] = true;
    return used;
  }

  /// A sample's panel, and its bias.
  template <class T>
  void blend(int64_t b, int64_t first, int64_t count, const T* panels, int64_t panel, T* weight, acc_t<T>* bias) const {
    const int64_t L = p_.num_local;
    const Scratch<acc_t<T>> c(L);
    const Scratch<const T*> terms(L);
    for (int64_t l = 0; l < L; ++l) {
      c[l] = *p_.coeff.at<acc_t<T>>(b, l), terms[l] = panels + p_.basis_point(b, l) * panel;
      if (bias) vectors<T>().add_scaled(count, c[l], p_.bias.at<T>(p_.basis_point(b, l), first), bias);
    }
    vectors<T>().mix(panel, L, c.data(), terms.data(), weight);
  }
};

/// A job is a tile, or a block, of outputs of one sample.
template <class T>
class FoldForward : Fold {
  using A = acc_t<T>;

 public:
  explicit FoldForward(const ManifoldLinearParams& p) : Fold(p) {}

  void run() const {
    const auto pack = [&](int64_t k, int64_t first, int64_t count, T* panel) {
      const T* rows[kTile];
      for (int64_t o = 0; o < count; ++o) rows[o] = p_.basis.at<T>(k, first + o);
      pack_rows<T>(count, p_.in_features, rows, panel, kTile);
    };
    multiply_samples<T>(p_.input, p_.in_features, p_.output, p_.out_features, bool(p_.bias), pack);
  }

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
};

/// dx_b = g_b W_b. A job is a tile, or a block, of inputs of one sample.
template <class T>
class FoldInput : Fold {
  using A = acc_t<T>;

 public:
  explicit FoldInput(const ManifoldLinearBackwardParams& q) : Fold(q.p), q_(q) {}

  void run() const {
    const auto pack = [&](int64_t k, int64_t first, int64_t count, T* panel) {
      const Scratch<const T*> rows(p_.out_features);
      for (int64_t o = 0; o < p_.out_features; ++o) rows[o] = p_.basis.at<T>(k, o, first);
      pack_columns<T>(p_.out_features, rows.data(), count, panel);
    };
    multiply_samples<T>(p_.output, p_.out_features, q_.grad_input, p_.in_features, false, pack);
  }

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
