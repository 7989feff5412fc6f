// manifold_linear on the CPU, forward, plan expand: y^T = sum_l P_k x^T c_l. Basis points are A, read in place; a
// tile's columns are rows of x, so that their coefficients lie side by side.
//
// 2 R L O I flop; each product tile is scaled by its columns' coefficients and summed over k in cache.
// Sums: over i in the product's order, then over k upwards. Work is split over outputs and rows only, so results do not
// depend on the number of threads.
#include <array>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "manifold_linear/manifold_linear_rows_pass.h"
#include "manifold_linear/manifold_linear_stream.h"

namespace neuromod {
namespace {

/// Plan expand.
template <class T>
class Expand {
  using A = acc_t<T>;
  using RowTile = RowOrder::RowTile;
  static constexpr int64_t kBlock = 8;     // row tiles that see a tile of P before it leaves the cache
  static constexpr int64_t kDepth = 1024;  // of a product that is taken at a time: what it reads stays in cache
  static constexpr int64_t kPackedBytes = int64_t(8) << 20;
  static constexpr int64_t kFewRows = is_half_type<T> ? 16 : 64;
  static constexpr int64_t kMemoryBytes = int64_t(16) << 20;  // more than cores keep of P

 public:
  explicit Expand(const ManifoldLinearParams& p)
      : p_(p),
        rows_(p, row_alignment<T>()),
        coefficients_(p, rows_),
        tiles_(rows_.tiles(kNarrowTile)),
        out_tiles_(ceil_div(p.out_features, kTile)),
        depth_(packed_depth<T>(p.in_features)),
        panel_(depth_ * kNarrowTile) {}

  void run() {
    const int64_t most = std::max(kBlock, kPackedBytes / std::max<int64_t>(1, panel_ * int64_t(sizeof(T))));
    for (int64_t first = 0; first < int64_t(tiles_.size()); first += most)
      run(first, std::min(most, int64_t(tiles_.size()) - first));
  }

 private:
  /// The outputs of `count` row tiles, whose rows of x fit into scratch memory.
  void run(int64_t first, int64_t count) {
    const Scratch<T> packed(count * panel_);
    parallel(count, double(panel_) * 1e-9, [&](int64_t i) { pack(tiles_[first + i], packed.data() + i * panel_); });
    const int64_t blocks = ceil_div(count, kBlock);
    const double seconds = 2e-11 * double(kTile * p_.in_features) * double(std::min(count, kBlock) * kNarrowTile);
    parallel_ranges(out_tiles_ * blocks, seconds, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t from = i % blocks * kBlock, n = std::min(kBlock, count - from);
        expanded(i / blocks, first + from, n, packed.data() + from * panel_);
      }
      release_tiles<T>();
    });
  }

  /// Rows of x as columns, empty ones as zeros.
  void pack(const RowTile& tile, T* panel) const {
    std::array<const T*, kNarrowTile> x;
    const int64_t width = rows_.padded(tile.count);
    rows_.pointers(p_.input, tile.first, width, 0, x.data());
    pack_rows(width, p_.in_features, x.data(), panel, kNarrowTile);
    complete_panel(p_.in_features, panel, kNarrowTile);
  }

  /// Whether P comes from memory to few columns. A product reads many of its rows side by side, which no processor
  /// foresees: rows of pairs are copied first, others fetched ahead as they are multiplied.
  bool from_memory() const {
    const int64_t bytes = p_.num_basis * p_.out_features * p_.in_features * int64_t(sizeof(T));
    return !has_matrix_unit<T>() && p_.rows() <= kFewRows && bytes >= kMemoryBytes;
  }
  /// Whether rows are copied, as they are, too, where their depth must be completed.
  bool copies() const { return depth_ != p_.in_features || (interleaved<T>() && from_memory()); }
  /// Their distance: off powers of two.
  int64_t copy_stride() const { return std::min(kDepth, depth_) + 64 / int64_t(sizeof(T)); }

  /// `depth` columns of rows of P from d on, as a product can read them.
  Tile<T> weight(int64_t k, int64_t first, int64_t outs, int64_t d, int64_t depth, T* copy) const {
    if (!copies()) return {p_.basis.at<T>(k, first, d), p_.basis.stride[1]};
    const int64_t ahead = from_memory() ? 8 : outs;
    for (int64_t o = 0; o < outs; ++o) {
      const T* const row = p_.basis.at<T>(k, first + o, d);
      if (o + ahead < outs) prefetch(row + ahead * p_.basis.stride[1], depth);
      T* const to = copy + o * copy_stride();
      std::fill(std::copy_n(row, depth, to), to + packed_depth<T>(depth), T{});
    }
    return {copy, copy_stride()};
  }

  /// The products of rows of P with columns of x.
  void multiply(int64_t outs, int64_t width, int64_t depth, Tile<T> basis, const T* panel, A* product, bool add) const {
    if constexpr (std::is_same_v<T, A>)
      if (from_memory())
        return vectors<T>().product(outs, width, depth, basis.data, basis.stride, 1, panel, kNarrowTile, product,
                                    kNarrowTile, add);
    tile_product<T>(outs, width, packed_depth<T>(depth), basis, {panel, kNarrowTile}, product, kNarrowTile, add);
  }

  void expanded(int64_t out_tile, int64_t first, int64_t count, const T* panels) const {
    const int64_t out_first = out_tile * kTile, outs = tile_size(out_tile, p_.out_features);
    const int64_t area = kTile * kNarrowTile;
    const Scratch<A> products(count * area), sums(count * area);
    const Scratch<T> copy(copies() ? kTile * copy_stride() : 0);
    std::array<bool, kBlock> started = {};
    A bias[kTile];
    for (int64_t k = 0; k < p_.num_basis; ++k) {
      std::array<int64_t, kBlock> used;
      int64_t uses = 0;
      for (int64_t i = 0; i < count; ++i)
        if (rows_.entry(tiles_[first + i].segment, k) < p_.num_local) used[uses++] = i;
      if (uses == 0) continue;
      if (p_.bias) vectors<T>().widen(outs, p_.bias.at<T>(k, out_first), bias);
      for (int64_t d = 0; d == 0 || d < p_.in_features; d += kDepth) {
        const int64_t depth = std::min(kDepth, p_.in_features - d);
        const Tile<T> basis = weight(k, out_first, outs, d, depth, copy.data());
        for (int64_t n = 0; n < uses; ++n) {
          const int64_t i = used[n];
          const RowTile& tile = tiles_[first + i];
          const int64_t width = rows_.padded(tile.count);
          A* const product = products.data() + i * area;
          multiply(outs, width, depth, basis, panels + i * panel_ + d * kNarrowTile, product, d > 0);
          if (d + kDepth < p_.in_features) continue;
          const A* const c = coefficients_.at(rows_.entry(tile.segment, k), tile.first);
          vectors<T>().mix_columns(outs, width, kNarrowTile, product, c, p_.bias ? bias : nullptr,
                                   sums.data() + i * area, started[i]);
          started[i] = true;
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) store(tiles_[first + i], out_first, outs, &sums[i * kTile * kNarrowTile]);
  }

  void store(const RowTile& tile, int64_t out_first, int64_t outs, const A* sum) const {
    std::array<T*, kNarrowTile> y;
    rows_.pointers(p_.output, tile.first, tile.count, out_first, y.data());
    vectors<T>().narrow_transposed(outs, tile.count, kNarrowTile, sum, y.data());
  }

  const ManifoldLinearParams& p_;
  const RowOrder rows_;
  const Coefficients<A> coefficients_;
  const std::vector<RowTile> tiles_;
  const int64_t out_tiles_, depth_, panel_;
};

/// Whether rows are A of plan expand's products: where that is less to pack, and where few rows share a basis point,
/// any number of which multiplies fast as A, but as columns multiples of 16 alone (AMX multiplies neither faster).
template <class T>
bool rows_are_left(const ManifoldLinearParams& p) {
  return p.index ? !has_matrix_unit<T>() : p.rows() >= p.num_basis * p.out_features;
}

}  // namespace

void manifold_linear_forward_cpu(const ManifoldLinearParams& p) {
  const Plan plan = choose_plan(p, Pass::forward);
  if (plan == Plan::fold || plan == Plan::fold_gemm) return manifold_linear_fold_forward(p, plan);
  if (plan == Plan::expand_gemm) return manifold_linear_expand_gemm_forward(p);
  dispatch_dtype<Float16, BFloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (plan == Plan::stream) return manifold_linear_stream_forward<T>(p);
    if (!rows_are_left<T>(p)) return Expand<T>(p).run();
    const RowOrder rows(p, depth_alignment<T>());
    const Coefficients<acc_t<T>> coefficients(p, rows);
    RowsPass<T>(p, rows, coefficients, {p.input, p.in_features, p.output, p.out_features, p.bias, {}, true}, nullptr)
        .run();
  });
}

}  // namespace neuromod
