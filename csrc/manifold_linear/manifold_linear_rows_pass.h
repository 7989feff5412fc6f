// Plan expand of manifold_linear on the CPU where rows are A: products of a tile of rows with a tile of each basis
// point, mixed in cache, sum_l c_l (Z_l + beta_l), or multiplied by rows, <Z_l, x>. Forward, Z_k = x P_k^T; backward,
// Z_k = g P_k.
//
// A basis point's tile is packed once for all rows of a block, and used while it is in cache. Sums: over the depth in
// brgemm's order, then over k upwards. Work is split over columns and rows only, so results do not depend on the number
// of threads.
#pragma once

#include <array>
#include <vector>

#include "common/parallel.h"
#include "manifold_linear/manifold_linear_rows.h"

namespace neuromod {

/// Of a RowsPass; null where not there, or not asked for.
struct RowsOperands {
  View rows;        // A: x, or g
  int64_t depth;    // its columns
  View mixed;       // y or dx
  int64_t cols;     // its columns
  View bias;        // forward
  View factors;     // x, if dc is asked for
  bool transposed;  // whether P's rows are columns of the product: forward
};

template <class T>
class RowsPass {
  using A = acc_t<T>;
  using RowTile = RowOrder::RowTile;
  static constexpr int64_t kBlock = 16;                         // row tiles that see a packed tile of P
  static constexpr int64_t kDepth = 2048 / int64_t(sizeof(A));  // of a product that is packed at a time
  static constexpr int64_t kLanes = 16;                         // to which columns of packed tiles are completed

 public:
  /// `dots` are partial sums of dc, [tile of columns, L, position], if there are factors.
  RowsPass(const ManifoldLinearParams& p, const RowOrder& rows, const Coefficients<A>& coefficients,
           const RowsOperands& operands, A* dots)
      : p_(p),
        rows_(rows),
        coefficients_(coefficients),
        of_(operands),
        dots_(dots),
        tiles_(rows.tiles(kTile)),
        col_tiles_(ceil_div(operands.cols, kTile)),
        wide_(operands.transposed || int64_t(tiles_.size()) > 1 ? 1 : std::clamp<int64_t>(col_tiles_ / 8, 1, 8)) {}

  void run() const {
    const int64_t depth = packed_depth<T>(of_.depth), positions = rows_.positions();
    const bool in_place = rows_.in_place() && depth == of_.depth;
    const Scratch<T> copy(in_place ? 0 : positions * depth);
    if (!in_place) {
      parallel(positions, double(depth) * 1e-10, [&](int64_t i) {
        const T* row;
        rows_.pointers(of_.rows, i, 1, 0, &row);
        T* to = copy.data() + i * depth;
        std::fill(row ? std::copy_n(row, of_.depth, to) : to, to + depth, T{});
      });
    }
    const Tile<T> left = in_place ? Tile<T>{of_.rows.at<T>(0), of_.rows.stride[0]} : Tile<T>{copy.data(), depth};
    const int64_t blocks = ceil_div(int64_t(tiles_.size()), kBlock);
    const int64_t wides = ceil_div(col_tiles_, wide_);
    const double seconds = 2e-11 * double(of_.depth * kTile * wide_) * double(std::min(kBlock * kTile, positions));
    // A block's rows stay in cache while all of P passes by.
    parallel_ranges(blocks * wides, seconds, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i / wides * kBlock, col_tile = i % wides * wide_;
        block(left, !in_place,
              {col_tile, std::min(wide_, col_tiles_ - col_tile), first,
               std::min(kBlock, int64_t(tiles_.size()) - first)});
      }
      release_tiles<T>();
    });
  }

 private:
  /// Tiles of columns, and of rows.
  struct Block {
    int64_t col_tile, wide, first, count;
  };

  void block(Tile<T> left, bool copied, const Block& b) const {
    const int64_t area = b.wide * kTile * kTile;
    const int64_t kept = of_.depth > kDepth ? b.count : 1;  // products that wait for the rest of their depth
    const Scratch<T> panels(b.wide * kTile * packed_depth<T>(std::min(kDepth, of_.depth)));
    const Scratch<A> products(kept * area), sums(of_.mixed ? b.count * area : 0);
    const auto uses = [&](int64_t i, int64_t k) { return rows_.entry(tiles_[b.first + i].segment, k) < p_.num_local; };
    std::array<bool, kBlock> started = {};
    std::array<int64_t, kBlock> last = {};  // basis point
    for (int64_t k = 0; k < p_.num_basis; ++k)
      for (int64_t i = 0; i < b.count; ++i)
        if (uses(i, k)) last[i] = k;
    for (int64_t k = 0; k < p_.num_basis; ++k) {
      int64_t used = 0;
      for (int64_t i = 0; i < b.count; ++i) used += uses(i, k) ? tiles_[b.first + i].count : 0;
      if (used == 0) continue;
      // A tile of P that is read once or twice is not worth packing, unless it must be.
      const bool packed = of_.transposed || interleaved<T>() || b.wide > 1 || used > kNarrowTile;
      for (int64_t d = 0; d == 0 || d < of_.depth; d += kDepth) {
        if (packed) pack(k, d, std::min(kDepth, of_.depth - d), b, panels.data());
        for (int64_t i = 0; i < b.count; ++i) {
          if (!uses(i, k)) continue;
          const RowTile& tile = tiles_[b.first + i];
          const int64_t height = copied ? rows_.padded(tile.count) : tile.count;  // empty positions, where they exist
          A* const product = products.data() + i % kept * area;
          multiply(height, k, d, b, {left.data + tile.first * left.stride + d, left.stride},
                   packed ? panels.data() : nullptr, product);
          if (d + kDepth < of_.depth) continue;
          use(tile, k, b, product, sums.data() + i * area, started[i], k == last[i]);
          started[i] = true;
        }
      }
    }
  }

  /// The products of rows with a block's tiles of P_k, from d on along their depth.
  void multiply(int64_t rows, int64_t k, int64_t d, const Block& b, Tile<T> left, const T* panels, A* product) const {
    const int64_t depth = packed_depth<T>(std::min(kDepth, of_.depth - d));
    for (int64_t w = 0; w < b.wide; ++w, product += kTile * kTile) {
      const int64_t cols = tile_size(b.col_tile + w, of_.cols);
      if (of_.bias && d == 0) begin_with_bias(k, b.col_tile + w, rows, product);
      const bool add = d > 0 || of_.bias;
      if (panels) {
        const int64_t completed = ceil_div(cols, kLanes) * kLanes;
        tile_product<T>(rows, completed, depth, left, {panels + w * kTile * depth, kTile}, product, kTile, add);
      } else {
        const Tile<T> right = {p_.basis.at<T>(k, d, (b.col_tile + w) * kTile), p_.basis.stride[1]};
        tile_product<T>(rows, cols, depth, left, right, product, kTile, add);
      }
    }
  }

  /// `depth` rows of the products' right operand, from row d of P_k or its transpose on, in panels of kTile columns.
  void pack(int64_t k, int64_t d, int64_t depth, const Block& b, T* panels) const {
    const int64_t panel = kTile * packed_depth<T>(depth);
    const auto cols = [&](int64_t w) { return tile_size(b.col_tile + w, of_.cols); };
    for (int64_t w = 0; w < b.wide; ++w)
      if (cols(w) < kTile) std::fill_n(panels + w * panel, panel, T{});
    if (of_.transposed) {
      std::array<const T*, kTile> rows;
      for (int64_t r = 0; r < cols(0); ++r) rows[r] = p_.basis.at<T>(k, b.col_tile * kTile + r, d);
      pack_rows<T>(cols(0), depth, rows.data(), panels, kTile);
    } else {
      constexpr int64_t step = 8;  // rows whose pieces are read together
      std::array<const T*, step> rows;
      for (int64_t n = 0; n < depth; n += step) {
        for (int64_t w = 0; w < b.wide; ++w) {
          const int64_t count = std::min(step, depth - n);
          for (int64_t i = 0; i < count; ++i) {
            rows[i] = p_.basis.at<T>(k, d + n + i, (b.col_tile + w) * kTile);
            if (n + step + i < depth) prefetch(rows[i] + step * p_.basis.stride[1], cols(w));
          }
          pack_columns<T>(count, rows.data(), cols(w), panels + w * panel + n * kTile);
        }
      }
    }
    for (int64_t w = 0; w < b.wide; ++w) complete_panel(depth, panels + w * panel, kTile);
  }

  void begin_with_bias(int64_t k, int64_t col_tile, int64_t rows, A* product) const {
    const int64_t cols = tile_size(col_tile, of_.cols);
    vectors<T>().widen(cols, of_.bias.at<T>(k, col_tile * kTile), product);
    for (int64_t r = 1; r < rows; ++r) std::copy_n(product, cols, product + r * kTile);
  }

  /// Mixes a row tile's products with basis point k into its sums, the last of which are results, and multiplies them
  /// by factors.
  void use(const RowTile& tile, int64_t k, const Block& b, const A* products, A* sums, bool add, bool last) const {
    const int64_t l = rows_.entry(tile.segment, k);
    const A* const c = coefficients_.at(l, tile.first);
    std::array<A, kTile> dot;
    std::array<const T*, kTile> factors;
    std::array<T*, kTile> mixed;
    for (int64_t w = 0; w < b.wide; ++w) {
      const A* const product = products + w * kTile * kTile;
      const int64_t cols = tile_size(b.col_tile + w, of_.cols);
      A* const sum = sums + w * kTile * kTile;
      if (of_.mixed && last) {
        rows_.pointers(of_.mixed, tile.first, tile.count, (b.col_tile + w) * kTile, mixed.data());
        vectors<T>().mix_last_rows(tile.count, cols, kTile, product, c, add ? sum : nullptr, mixed.data());
      } else if (of_.mixed) {
        vectors<T>().mix_rows(tile.count, cols, kTile, product, c, sum, add);
      }
      if (!of_.factors) continue;
      rows_.pointers(of_.factors, tile.first, tile.count, (b.col_tile + w) * kTile, factors.data());
      vectors<T>().dot_rows(tile.count, cols, kTile, product, factors.data(), dot.data());
      A* const to = dots_ + ((b.col_tile + w) * p_.num_local + l) * rows_.positions();
      std::copy_n(dot.data(), tile.count, to + tile.first);
    }
  }

  const ManifoldLinearParams& p_;
  const RowOrder& rows_;
  const Coefficients<A>& coefficients_;
  const RowsOperands of_;
  A* const dots_;
  const std::vector<RowTile> tiles_;
  const int64_t col_tiles_;
  const int64_t wide_;  // tiles of columns: of few rows several, so that P is read from memory in long pieces
};

}  // namespace neuromod
