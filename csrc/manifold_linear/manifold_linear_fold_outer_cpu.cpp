// dP, dbeta and dc of manifold_linear in plans fold and fold_gemm on the CPU: G_b = g_b^T x_b yields both
// dP_k += c_l G_b and dc_l = <G_b, P_k>.
//
// 2 R O I flop and 2 B L O I of adding up. Tokens are packed once, g turned over; a job is a block of dP for a range of
// samples, whose products go tile by tile from cache into sums that stay there. Blocks follow from the number of
// threads, but the order of each sum from sizes alone.
#include <algorithm>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tile_product.h"
#include "manifold_linear/manifold_linear_plan.h"

namespace neuromod {
namespace {

constexpr int64_t kEnoughParts = 16;                // tiles and ranges of samples, for any number of threads
constexpr int64_t kBlockIns = 512;                  // most columns of a block, which has one tile of rows,
constexpr int64_t kSampleIns = 128;                 // and of one of a single sample
constexpr int64_t kSums = int64_t(1) << 18;         // most sums of a block
constexpr int64_t kChunkBytes = 1024;               // of a feature's tokens in one product, which so stay in cache
constexpr int64_t kPackedBytes = int64_t(8) << 20;  // of packed tokens, or three times as many as dP has, if more,
constexpr int64_t kMostBytes = int64_t(64) << 20;   // but at most so many
constexpr int64_t kArea = kTile * kTile;

template <class T>
class FoldOuter {
  using A = acc_t<T>;

 public:
  explicit FoldOuter(const ManifoldLinearBackwardParams& q) : p_(q.p), q_(q) {
    // The first level of cache holds the sums where each token of a sample has little work, else the second.
    block_ins_ = p_.tokens <= kTile ? kTile : p_.batch == 1 ? kSampleIns : kBlockIns;
    while (block_ins_ > kTile &&
           (p_.num_basis * kTile * block_ins_ > kSums || blocks() * parts_ < 4 * int64_t(at::get_num_threads())))
      block_ins_ /= 2;
    const int64_t bytes = std::clamp(3 * size_ * int64_t(sizeof(A)), kPackedBytes, kMostBytes);
    const int64_t fitting = std::max<int64_t>(1, bytes / (int64_t(sizeof(T)) * std::max<int64_t>(1, chunk_size())));
    const int64_t most = std::max<int64_t>(1, fitting / std::max<int64_t>(1, chunks(p_.tokens)));
    group_samples_ = ceil_div(p_.batch, std::max<int64_t>(1, ceil_div(p_.batch, most)));
    group_tokens_ = std::min(p_.tokens, fitting * kChunk);
    direct_ = q_.grad_basis && p_.batch == 1 && group_tokens_ == p_.tokens && !p_.index && !q_.accumulate;
  }

  void run() const {
    const bool once = parts_ == 1 && p_.rows() > 0 && group_samples_ * group_tokens_ == p_.rows();
    const int64_t rows = p_.num_basis * p_.out_features, I = p_.in_features;
    const Scratch<A> sums(q_.grad_basis && !once ? parts_ * size_ : 0), bias(parts_ * rows);
    const Scratch<A> coeff(q_.grad_coeff ? tiles_ * p_.num_local * p_.batch : 0);
    const Scratch<T> packed(with_products() ? group_samples_ * chunks(group_tokens_) * chunk_size() : 0);
    if (sums.data()) std::fill_n(sums.data(), parts_ * size_, A(0));
    if (coeff.data()) std::fill_n(coeff.data(), tiles_ * p_.num_local * p_.batch, A(0));
    std::fill_n(bias.data(), parts_ * rows, A(0));
    for (int64_t b = 0; b < p_.batch; b += group_samples_)
      for (int64_t t = 0; t < p_.tokens; t += group_tokens_) {
        const int64_t samples = std::min(group_samples_, p_.batch - b), tokens = std::min(group_tokens_, p_.tokens - t);
        const Group group{b, b + samples, t, t + tokens, packed.data()};
        if (with_products()) pack(group);
        add_group(group, sums.data(), bias.data(), coeff.data());
      }
    parallel(rows, 1e-9 * double(parts_ * I), [&](int64_t row) {
      for (int64_t part = 1; part < parts_; ++part) {
        if (sums.data()) vectors<A>().add_scaled(I, A(1), &sums[part * size_ + row * I], &sums[row * I]);
        bias[row] += bias[part * rows + row];
      }
      const int64_t k = row / p_.out_features, o = row % p_.out_features;
      if (sums.data()) store(I, &sums[row * I], q_.grad_basis.at<T>(k, o));
      if (q_.grad_bias) vectors<T>().narrow(1, &bias[row], q_.grad_bias.at<T>(k, o));
    });
    if (q_.grad_coeff) finish_coeff(coeff.data());
  }

 private:
  static constexpr int64_t kChunk = kChunkBytes / sizeof(T);  // tokens

  /// Samples [first, last) and of each, tokens [begin, end), packed chunk by chunk: several samples have all of theirs.
  struct Group {
    int64_t first, last, begin, end;
    T* packed;
  };
  struct Block {
    int64_t first_out, outs, first_in, ins;
  };

  static int64_t chunks(int64_t tokens) { return ceil_div(tokens, kChunk); }
  int64_t blocks() const { return out_tiles_ * std::max<int64_t>(1, ceil_div(p_.in_features, block_ins_)); }
  bool with_products() const { return q_.grad_basis || q_.grad_coeff; }

  // A chunk: g turned over, [O, left_stride()], then x in panels as wide as a tile.
  int64_t depth() const { return packed_depth<T>(std::min(kChunk, p_.tokens)); }
  int64_t left_stride() const {  // off powers of two, at which rows fall into the same lines
    return depth() < kTile ? depth() : depth() + 64 / int64_t(sizeof(T));
  }
  int64_t left_size() const { return p_.out_features * left_stride(); }
  int64_t chunk_size() const { return left_size() + in_tiles_ * depth() * kTile; }
  T* chunk(const Group& group, int64_t b, int64_t t) const {
    return group.packed +
           ((b - group.first) * chunks(group.end - group.begin) + (t - group.begin) / kChunk) * chunk_size();
  }

  void pack(const Group& group) const {
    const int64_t O = p_.out_features, I = p_.in_features, each = chunks(group.end - group.begin);
    parallel((group.last - group.first) * each, 1e-10 * double(chunk_size()), [&](int64_t i) {
      const int64_t b = group.first + i / each, t = group.begin + i % each * kChunk;
      const int64_t count = std::min(kChunk, group.end - t), row = b * p_.tokens + t;
      T* const left = chunk(group, b, t);
      const Scratch<const T*> rows(count);
      for (int64_t r = 0; r < count; ++r) rows[r] = p_.output.at<T>(row + r);
      vectors<T>().transpose(count, O, rows.data(), left, left_stride());
      for (int64_t o = 0; o < O; ++o) {
        T* const turned = left + o * left_stride();
        std::fill(turned + count, turned + packed_depth<T>(count), T{});
      }
      for (int64_t in = 0; in < I; in += kTile) {
        T* const panel = left + left_size() + in * depth();
        for (int64_t r = 0; r < count; ++r) rows[r] = p_.input.at<T>(row + r, in);
        pack_columns<T>(count, rows.data(), std::min(kTile, I - in), panel);
        complete_panel(count, panel, kTile);
      }
    });
  }

  /// A group's share of all results.
  void add_group(const Group& group, A* sums, A* bias, A* coeff) const {
    const int64_t O = p_.out_features, I = p_.in_features, samples = group.last - group.first;
    const int64_t each = ceil_div(samples, parts_);
    const double seconds = 2e-11 * double(kTile * block_ins_) * double(each * (group.end - group.begin));
    parallel_ranges(blocks() * parts_, seconds, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) {
        const int64_t part = job / blocks(), first = group.first + std::min(part * each, samples);
        const int64_t out = job % blocks() % out_tiles_ * kTile, in = job % blocks() / out_tiles_ * block_ins_;
        const Block block{out, std::min(kTile, O - out), in, std::min(block_ins_, I - in)};
        add_block(group, first, std::min(first + each, group.last), block, sums ? sums + part * size_ : nullptr,
                  bias + part * p_.num_basis * O, coeff);
      }
      release_tiles<T>();
    });
  }

  /// A block's sums over samples [first, last) of a group: to `sums`, or if they are null, into dP.
  void add_block(const Group& group, int64_t first, int64_t last, Block block, A* sums, A* bias, A* coeff) const {
    const int64_t K = p_.num_basis, O = p_.out_features, I = p_.in_features;
    const int64_t area = ceil_div(block.ins, kTile) * kArea;
    const Scratch<A> totals(q_.grad_basis && !direct_ ? K * area : 0), products(area);
    if (totals.data()) std::fill_n(totals.data(), K * area, A(0));
    for (int64_t b = first; b < last; ++b) {
      for (int64_t t = group.begin; t < group.end && with_products(); t += kChunk)
        multiply(group, b, t, block, products.data(), totals.data(), area, coeff);
      if (q_.grad_bias && block.first_in == 0) add_bias(group, b, block, bias);
    }
    for (int64_t k = 0; k < K && totals.data(); ++k)
      for (int64_t o = 0; o < block.outs; ++o)
        for (int64_t i = 0; i < block.ins; i += kTile) {
          const A* const from = &totals[k * area + i / kTile * kArea + o * kTile];
          const int64_t out = block.first_out + o, in = block.first_in + i, cols = std::min(kTile, block.ins - i);
          if (sums) {
            vectors<A>().add(cols, from, sums + (k * O + out) * I + in);
          } else {
            store(cols, from, q_.grad_basis.at<T>(k, out, in));
          }
        }
  }

  /// A block of G_b over a chunk of tokens: to `products`, and with a group's last chunk from there into dP and dc.
  void multiply(const Group& group, int64_t b, int64_t t, Block block, A* product, A* totals, int64_t area,
                A* coeff) const {
    const int64_t count = std::min(kChunk, group.end - t), stride = left_stride();
    const T* const packed = chunk(group, b, t);
    const bool more = t > group.begin, last = t + count == group.end;
    for (int64_t in = block.first_in; in < block.first_in + block.ins; in += kTile) {
      const int64_t cols = std::min(kTile, block.first_in + block.ins - in);
      tile_product<T>(block.outs, cols, packed_depth<T>(count), {packed + block.first_out * stride, stride},
                      {packed + left_size() + in * depth(), kTile}, product, kTile, more);
      if (last) add_product(b, block.first_out, block.outs, in, cols, product, totals, area, coeff);
      // A product that more chunks are added to keeps its place, else the next takes it, in the first level of cache.
      if (group.end - group.begin > kChunk) product += kArea;
      if (totals) totals += kArea;
    }
  }

  /// dP_k += c_l G_b, dc_l += <G_b, P_k>, by a tile of G_b.
  void add_product(int64_t b, int64_t out, int64_t outs, int64_t in, int64_t cols, const A* product, A* totals,
                   int64_t area, A* coeff) const {
    const int64_t tile = in / kTile * out_tiles_ + out / kTile, L = p_.num_local;
    for (int64_t l = 0; l < L; ++l) {
      const int64_t k = p_.basis_point(b, l);
      if (totals) vectors<A>().add_scaled(outs * kTile, *p_.coeff.at<A>(b, l), product, totals + k * area);
      if (direct_) {
        A c[kTile];
        std::fill_n(c, kTile, *p_.coeff.at<A>(b, l));
        for (int64_t o = 0; o < outs; ++o)
          vectors<T>().scale(cols, c, product + o * kTile, q_.grad_basis.at<T>(k, out + o, in));
      }
      if (q_.grad_coeff)
        coeff[(tile * L + l) * p_.batch + b] +=
            vectors<T>().dot_tile(outs, cols, kTile, product, p_.basis.at<T>(k, out, in), p_.basis.stride[1]);
    }
  }

  void add_bias(const Group& group, int64_t b, Block block, A* sums) const {
    for (int64_t l = 0; l < p_.num_local; ++l)
      for (int64_t t = group.begin; t < group.end; ++t)
        vectors<T>().add_scaled(block.outs, *p_.coeff.at<A>(b, l), p_.output.at<T>(b * p_.tokens + t, block.first_out),
                                sums + p_.basis_point(b, l) * p_.out_features + block.first_out);
  }

  void store(int64_t n, const A* from, T* to) const {
    q_.accumulate ? vectors<T>().add(n, from, to) : vectors<T>().narrow(n, from, to);
  }

  /// dc[b,l]: its sums over tiles, and <g, beta_k> over its tokens.
  void finish_coeff(const A* coeff) const {
    const double seconds = 1e-9 * double(p_.num_local * (tiles_ + (p_.bias ? p_.tokens * p_.out_features / 8 : 0)));
    parallel(p_.batch, seconds, [&](int64_t b) {
      for (int64_t l = 0; l < p_.num_local; ++l) {
        A sum = 0;
        for (int64_t tile = 0; tile < tiles_; ++tile) sum += coeff[(tile * p_.num_local + l) * p_.batch + b];
        for (int64_t t = 0; t < p_.tokens && p_.bias; ++t)
          sum += vectors<T>().dot(p_.out_features, p_.output.at<T>(b * p_.tokens + t),
                                  p_.bias.at<T>(p_.basis_point(b, l)));
        *q_.grad_coeff.at<A>(b, l) = sum;
      }
    });
  }

  const ManifoldLinearParams& p_;
  const ManifoldLinearBackwardParams& q_;
  const int64_t size_ = p_.num_basis * p_.out_features * p_.in_features;  // of dP
  const int64_t out_tiles_ = ceil_div(p_.out_features, kTile), in_tiles_ = ceil_div(p_.in_features, kTile);
  const int64_t tiles_ = out_tiles_ * in_tiles_;
  // Ranges of samples that are added up apart, where tiles are few.
  const int64_t parts_ =
      std::max<int64_t>(1, std::min(ceil_div(kEnoughParts, std::max<int64_t>(1, tiles_)), p_.batch / 4));
  int64_t block_ins_;
  int64_t group_samples_, group_tokens_;
  bool direct_;  // there is but one product of each tile, which goes into dP as it is
};

}  // namespace

void manifold_linear_fold_outer(const ManifoldLinearBackwardParams& q) {
  dispatch_dtype<Float16, BFloat16>(q.p.dtype, [&](auto tag) { FoldOuter<typename decltype(tag)::type>(q).run(); });
}

}  // namespace neuromod
