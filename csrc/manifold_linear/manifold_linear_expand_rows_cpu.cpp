// manifold_linear on the CPU, forward, plan expand where rows are many: y = sum_k c_k (x P_k^T + beta_k). Rows of x are
// A, read in place; P is packed once, and results lie as they are written. manifold_linear_cpu.cpp does the reverse.
//
// 2 R K O I flop; a product tile begins with its bias, and is scaled by its rows' coefficients and summed over k in
// cache. Sums: over i in brgemm's order, then over k upwards, whatever the number of threads.
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tile_product.h"
#include "manifold_linear/manifold_linear_plan.h"

namespace neuromod {
namespace {

template <class T>
class ExpandRows {
  using A = acc_t<T>;
  static constexpr int64_t kBlock = 4;     // row tiles that see a panel of P before it leaves the cache
  static constexpr int64_t kDepth = 1024;  // of a product that is taken at a time: what it reads stays in cache
  static constexpr int64_t kPackedBytes = int64_t(8) << 20;
  static constexpr int64_t kArea = kTile * kNarrowTile;

 public:
  explicit ExpandRows(const ManifoldLinearParams& p)
      : p_(p),
        K_(p.num_basis),
        depth_(packed_depth<T>(p.in_features)),
        panel_(depth_ * kNarrowTile),
        blocks_(ceil_div(p.rows(), kBlock * kTile)) {}

  void run() const {
    const int64_t tiles = ceil_div(p_.out_features, kNarrowTile);
    const int64_t most = std::max<int64_t>(1, kPackedBytes / std::max<int64_t>(1, K_ * panel_ * int64_t(sizeof(T))));
    for (int64_t first = 0; first < tiles; first += most) outputs(first, std::min(most, tiles - first));
  }

 private:
  /// `count` tiles of outputs, whose rows of P fit into scratch memory.
  void outputs(int64_t first, int64_t count) const {
    const Scratch<T> packed(count * K_ * panel_);
    parallel(count * K_, double(panel_) * 1e-9,
             [&](int64_t i) { pack(i % K_, first + i / K_, packed.data() + i * panel_); });
    const double seconds = 2e-11 * double(kBlock * kTile * p_.in_features) * double(count * K_ * kNarrowTile);
    parallel_ranges(blocks_, seconds, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) rows(i, first, count, packed.data());
      release_tiles<T>();
    });
  }

  /// Rows of P_k as columns.
  void pack(int64_t k, int64_t tile, T* panel) const {
    const int64_t out = tile * kNarrowTile, outs = std::min(kNarrowTile, p_.out_features - out);
    const T* weight[kNarrowTile] = {};
    for (int64_t o = 0; o < outs; ++o) weight[o] = p_.basis.at<T>(k, out + o);
    pack_rows(kNarrowTile, p_.in_features, weight, panel, kNarrowTile);
    complete_panel(p_.in_features, panel, kNarrowTile);
  }

  /// Outputs of a block of rows.
  void rows(int64_t block, int64_t first, int64_t count, const T* panels) const {
    const int64_t from = block * kBlock * kTile, rows = std::min(kBlock * kTile, p_.rows() - from);
    const bool in_place = depth_ == p_.in_features;
    const Scratch<T> copy(in_place ? 0 : rows * depth_);
    for (int64_t r = 0; r < rows && !in_place; ++r) {
      T* const end = std::copy_n(p_.input.at<T>(from + r), p_.in_features, copy.data() + r * depth_);
      std::fill(end, copy.data() + (r + 1) * depth_, T{});
    }
    const Tile<T> x = in_place ? Tile<T>{p_.input.at<T>(from), p_.input.stride[0]} : Tile<T>{copy.data(), depth_};
    const Scratch<A> c(K_ * rows);
    for (int64_t k = 0; k < K_; ++k)
      for (int64_t r = 0; r < rows; ++r) c[k * rows + r] = *p_.coeff.at<A>((from + r) / p_.tokens, k);
    const Scratch<A> product(kArea), sums(kBlock * kArea);
    A bias[kNarrowTile];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t out = (first + i) * kNarrowTile, outs = std::min(kNarrowTile, p_.out_features - out);
      for (int64_t k = 0; k < K_; ++k) {
        const T* const panel = panels + (i * K_ + k) * panel_;
        if (p_.bias) vectors<T>().widen(outs, p_.bias.at<T>(k, out), bias);
        for (int64_t t = 0; t * kTile < rows; ++t) {
          const int64_t height = tile_size(t, rows);
          for (int64_t r = 0; r < height && k + 1 == K_; ++r)  // where results will be written
            __builtin_prefetch(p_.output.at<T>(from + t * kTile + r, out), 1);
          for (int64_t r = 0; r < height && p_.bias; ++r) std::copy_n(bias, outs, product.data() + r * kNarrowTile);
          for (int64_t d = 0; d == 0 || d < p_.in_features; d += kDepth)
            tile_product<T>(height, kNarrowTile, packed_depth<T>(std::min(kDepth, p_.in_features - d)),
                            {x.data + t * kTile * x.stride + d, x.stride}, {panel + d * kNarrowTile, kNarrowTile},
                            product.data(), kNarrowTile, d > 0 || p_.bias);
          vectors<T>().mix_rows(height, kNarrowTile, kNarrowTile, product.data(), &c[k * rows + t * kTile],
                                &sums[t * kArea], k > 0);
        }
      }
      for (int64_t r = 0; r < rows; ++r)
        vectors<T>().narrow(outs, &sums[r * kNarrowTile], p_.output.at<T>(from + r, out));
    }
  }

  const ManifoldLinearParams& p_;
  const int64_t K_, depth_, panel_, blocks_;
};

}  // namespace

void manifold_linear_expand_rows_forward(const ManifoldLinearParams& p) {
  dispatch_dtype<Float16, BFloat16>(p.dtype, [&](auto tag) { ExpandRows<typename decltype(tag)::type>(p).run(); });
}

}  // namespace neuromod
