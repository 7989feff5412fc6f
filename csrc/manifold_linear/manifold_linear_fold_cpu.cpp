// Plan fold of manifold_linear on the CPU: the sample's weight, blended in cache and rounded to T, times its tokens.
// The weight is B of every product, rows of x and g are A and are read in place.
//
// 2 R O I flop and 2 B L O I of blending a product. G_b = g_b^T x_b yields both dP_k += c_l G_b and dc_l = <G_b, P_k>.
// A job is a block of a result, for a range of samples; jobs follow from sizes alone, and what they sum is added up in
// order, so results do not depend on the number of threads, unless torch's product does.
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
constexpr int64_t kBlock = 256;                    // most rows and columns of a block
constexpr int64_t kGemmBlock = 512;                // the same of a product by torch
constexpr int64_t kTokens = 1024;                  // tokens that torch multiplies at a time, at most
constexpr int64_t kOuterBytes = 1024;              // of the tokens in an outer product's tiles, which so stay in cache
constexpr int64_t kCacheBytes = int64_t(3) << 19;  // of panels that samples meet in turn
constexpr int64_t kMostBytes = int64_t(64) << 20;  // of them where there are few samples for many threads

struct Range {
  int64_t first, count;
};
/// The i-th of `parts` parts of [0, total).
Range part_of(int64_t i, int64_t parts, int64_t total) {
  const int64_t size = ceil_div(total, parts), first = std::min(i * size, total);
  return {first, std::min(size, total - first)};
}

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

template <class T>
class FoldBackward : Fold {
  using A = acc_t<T>;

 public:
  FoldBackward(const ManifoldLinearBackwardParams& q, Plan plan) : Fold(q.p), q_(q), gemm_(plan == Plan::fold_gemm) {
    // Sums stay in cache: the first level where each token of a sample has little work, else the second.
    if (p_.tokens <= kTile) block_outs_ = block_ins_ = kTile;
    const auto halve = [&] { (block_ins_ >= block_outs_ ? block_ins_ : block_outs_) /= 2; };
    while (block_outs_ > kTile && p_.num_basis * block_ins_ * block_outs_ > 4 * kBlock * kBlock) halve();
    while (block_outs_ > kTile && out_blocks() * in_blocks() * basis_parts() < kEnoughJobs) halve();
  }

  void run() const {
    if (q_.grad_input) gemm_ ? input_pass_gemm() : input_pass();
    const int64_t blocks = out_blocks() * in_blocks();
    const Scratch<A> coeff(q_.grad_coeff ? blocks * p_.num_local * p_.batch : 0);
    if (q_.grad_basis || q_.grad_bias || q_.grad_coeff) basis_pass(coeff.data());
    if (q_.grad_coeff) finish_coeff(blocks, coeff.data());
  }

 private:
  static constexpr int64_t kArea = kTile * kTile;
  static constexpr int64_t kOuterTokens = kOuterBytes / sizeof(T);

  struct Block {
    int64_t first_out, outs, first_in, ins;
  };

  int64_t out_blocks() const { return ceil_div(p_.out_features, block_outs_); }
  int64_t in_blocks() const { return std::max<int64_t>(1, ceil_div(p_.in_features, block_ins_)); }

  /// Ranges of samples whose sums are taken apart, and added up in the end.
  int64_t basis_parts() const {
    return std::max<int64_t>(1, std::min(ceil_div(kEnoughJobs, out_blocks() * in_blocks()), p_.batch / 4));
  }

  /// dx_b = g_b W_b
  void input_pass() const {
    const auto pack = [&](int64_t k, int64_t first, int64_t count, T* panel) {
      const Scratch<const T*> rows(p_.out_features);
      for (int64_t o = 0; o < p_.out_features; ++o) rows[o] = p_.basis.at<T>(k, o, first);
      pack_columns<T>(p_.out_features, rows.data(), count, panel);
    };
    multiply_samples<T>(p_.output, p_.out_features, q_.grad_input, p_.in_features, false, pack);
  }

  void input_pass_gemm() const {
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

  /// dP, dbeta, and partial sums of dc, [blocks, L, B]. A job is a block of dP for a range of samples.
  void basis_pass(A* coeff) const {
    const int64_t blocks = out_blocks() * in_blocks(), K = p_.num_basis, O = p_.out_features, I = p_.in_features;
    const int64_t parts = basis_parts();
    const Scratch<A> sums(q_.grad_basis && parts > 1 ? parts * K * O * I : 0), bias(parts * K * O);
    const double seconds = 2e-11 * double(block_outs_ * block_ins_) * double(p_.rows() / parts);
    parallel_ranges(blocks * parts, seconds, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) {
        const int64_t block = job % blocks, part = job / blocks;
        const Range samples = part_of(part, parts, p_.batch);
        A* const partial = sums.data() ? sums.data() + part * K * O * I : nullptr;
        const int64_t out = block % out_blocks() * block_outs_, in = block / out_blocks() * block_ins_;
        basis_block(samples, {out, std::min(block_outs_, O - out), in, std::min(block_ins_, I - in)}, partial,
                    bias.data() + part * K * O, coeff + block * p_.num_local * p_.batch);
      }
      release_tiles<T>();
    });
    parallel(K * O, 1e-9 * double(parts * I), [&](int64_t row) {
      const int64_t k = row / O, o = row % O;
      for (int64_t part = 1; part < parts; ++part) {
        if (q_.grad_basis) vectors<A>().add_scaled(I, A(1), &sums[part * K * O * I + row * I], &sums[row * I]);
        if (q_.grad_bias) bias[row] += bias[part * K * O + row];
      }
      if (q_.grad_basis && parts > 1) store(I, &sums[row * I], q_.grad_basis.at<T>(k, o));
      if (q_.grad_bias) vectors<T>().narrow(1, &bias[row], q_.grad_bias.at<T>(k, o));
    });
  }

  void store(int64_t n, const A* from, T* to) const {
    q_.accumulate ? vectors<T>().add(n, from, to) : vectors<T>().narrow(n, from, to);
  }

  /// A block's sums over samples, into `partial` or, if null, dP.
  void basis_block(Range samples, Block block, A* partial, A* bias, A* coeff) const {
    const int64_t K = p_.num_basis, O = p_.out_features, I = p_.in_features;
    const int64_t out_tiles = ceil_div(block.outs, kTile), tiles = out_tiles * ceil_div(block.ins, kTile);
    const Scratch<A> sums(q_.grad_basis ? K * tiles * kArea : 0), bias_sums(K * kBlock);
    const Scratch<A> products(p_.tokens > kOuterTokens ? tiles * kArea : kArea);
    std::fill_n(sums.data(), q_.grad_basis ? K * tiles * kArea : 0, A(0));
    std::fill_n(bias_sums.data(), K * kBlock, A(0));
    const bool with_bias = q_.grad_bias && block.first_in == 0;
    for (int64_t b = samples.first; b < samples.first + samples.count; ++b) {
      if (q_.grad_coeff)
        for (int64_t l = 0; l < p_.num_local; ++l) coeff[l * p_.batch + b] = A(0);
      if (q_.grad_basis || q_.grad_coeff)
        for (int64_t t = 0; t < p_.tokens; t += kOuterTokens)
          outer_product(b, t, block, products.data(), sums.data(), tiles, coeff + b);
      if (with_bias) add_bias(b, block, bias_sums.data());
    }
    for (int64_t k = 0; k < K; ++k) {
      if (with_bias) std::copy_n(&bias_sums[k * kBlock], block.outs, bias + k * O + block.first_out);
      for (int64_t o = 0; o < block.outs && q_.grad_basis; ++o) {
        for (int64_t i = 0; i < block.ins; i += kTile) {
          const A* const from = &sums[(k * tiles + i / kTile * out_tiles + o / kTile) * kArea + o % kTile * kTile];
          const int64_t out = block.first_out + o, in = block.first_in + i, cols = std::min(kTile, block.ins - i);
          if (partial) {
            std::copy_n(from, cols, partial + (k * O + out) * I + in);
          } else {
            store(cols, from, q_.grad_basis.at<T>(k, out, in));
          }
        }
      }
    }
  }

  void add_bias(int64_t b, Block block, A* sums) const {
    for (int64_t l = 0; l < p_.num_local; ++l)
      for (int64_t t = 0; t < p_.tokens; ++t)
        vectors<T>().add_scaled(block.outs, *p_.coeff.at<A>(b, l), p_.output.at<T>(b * p_.tokens + t, block.first_out),
                                sums + p_.basis_point(b, l) * kBlock);
  }

  /// A block of g_b^T x_b over tokens from `first` on, by tiles that go from cache into dP_k and dc with the last
  /// tokens. g is turned over, x read in place or packed as brgemm wants it.
  void outer_product(int64_t b, int64_t first, Block block, A* products, A* sums, int64_t tiles, A* coeff) const {
    const int64_t count = std::min(kOuterTokens, p_.tokens - first), row = b * p_.tokens + first;
    const int64_t stride = packed_depth<T>(count) + 16;  // off powers of two, at which rows fall into the same lines
    const Scratch<T> left(block_outs_ * stride), panel(interleaved<T>() ? packed_depth<T>(count) * kTile : 0);
    const Scratch<const T*> rows(count);
    turn_over(row, count, block, rows.data(), left.data(), stride);
    for (int64_t i = 0; i < block.ins; i += kTile) {
      const int64_t cols = std::min(kTile, block.ins - i);
      Tile<T> x = {p_.input.at<T>(row, block.first_in + i), p_.input.stride[0]};
      if (interleaved<T>()) {
        for (int64_t r = 0; r < count; ++r) rows[r] = p_.input.at<T>(row + r, block.first_in + i);
        pack_columns<T>(count, rows.data(), cols, panel.data());
        complete_panel(count, panel.data(), kTile);
        x = {panel.data(), kTile};
      }
      for (int64_t o = 0; o < block.outs; o += kTile, sums += kArea) {
        const int64_t outs = std::min(kTile, block.outs - o);
        A* const product = products;
        if (p_.tokens > kOuterTokens) products += kArea;
        tile_product<T>(outs, cols, packed_depth<T>(count), {&left[o * stride], stride}, x, product, kTile, first > 0);
        if (first + count < p_.tokens) continue;
        for (int64_t l = 0; l < p_.num_local; ++l) {
          const int64_t k = p_.basis_point(b, l);
          if (q_.grad_basis)
            vectors<A>().add_scaled(outs * kTile, *p_.coeff.at<A>(b, l), product, sums + k * tiles * kArea);
          if (q_.grad_coeff)
            coeff[l * p_.batch] +=
                vectors<T>().dot_tile(outs, cols, kTile, product,
                                      p_.basis.at<T>(k, block.first_out + o, block.first_in + i), p_.basis.stride[1]);
        }
      }
    }
  }

  /// left[o][t] = g[t][o]
  void turn_over(int64_t row, int64_t count, Block block, const T** rows, T* left, int64_t stride) const {
    for (int64_t r = 0; r < count; ++r) rows[r] = p_.output.at<T>(row + r, block.first_out);
    vectors<T>().transpose(count, block.outs, rows, left, stride);
    for (int64_t o = 0; o < block.outs; ++o) {
      T* const row = left + o * stride;
      std::fill(row + count, row + packed_depth<T>(count), T{});
    }
  }

  /// dc[b,l] = sum of its partial sums, and of <g, beta_k> over its tokens
  void finish_coeff(int64_t blocks, const A* coeff) const {
    const double seconds = 1e-9 * double(p_.num_local * (blocks + (p_.bias ? p_.tokens * p_.out_features / 8 : 0)));
    parallel(p_.batch, seconds, [&](int64_t b) {
      for (int64_t l = 0; l < p_.num_local; ++l) {
        A sum = 0;
        for (int64_t block = 0; block < blocks; ++block) sum += coeff[(block * p_.num_local + l) * p_.batch + b];
        for (int64_t t = 0; t < p_.tokens && p_.bias; ++t)
          sum += vectors<T>().dot(p_.out_features, p_.output.at<T>(b * p_.tokens + t),
                                  p_.bias.at<T>(p_.basis_point(b, l)));
        *q_.grad_coeff.at<A>(b, l) = sum;
      }
    });
  }

  const ManifoldLinearBackwardParams& q_;
  const bool gemm_;
  int64_t block_outs_ = kBlock, block_ins_ = kBlock;
};

}  // namespace

void manifold_linear_fold_forward(const ManifoldLinearParams& p, Plan plan) {
  dispatch_dtype<Float16, BFloat16>(p.dtype, [&](auto tag) {
    const FoldForward<typename decltype(tag)::type> forward(p);
    plan == Plan::fold_gemm ? forward.run_gemm() : forward.run();
  });
}

void manifold_linear_fold_backward(const ManifoldLinearBackwardParams& q, Plan plan) {
  dispatch_dtype<Float16, BFloat16>(q.p.dtype,
                                    [&](auto tag) { FoldBackward<typename decltype(tag)::type>(q, plan).run(); });
}

}  // namespace neuromod
