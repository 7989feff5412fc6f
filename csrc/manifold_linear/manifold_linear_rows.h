// In which order, and in which tiles, the CPU kernels of manifold_linear take the rows of x and g.
//
// Rows are sorted into segments, rows that share their basis points. A segment begins at a multiple of `align`
// positions; positions past its rows are empty and count as rows of zeros, so that packed operands come in few sizes,
// and in sizes that brgemm multiplies well.
#pragma once

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/prefetch.h"
#include "common/scratch.h"
#include "common/tile_product.h"
#include "manifold_linear/manifold_linear_plan.h"

namespace neuromod {

/// Fetches pieces of rows, which lie too far apart for the processor to foresee them.
template <class T>
void prefetch(T* const* rows, int64_t count, int64_t length) {
  for (int64_t r = 0; r < count; ++r)
    if (rows[r]) prefetch(rows[r], length);
}

class RowOrder {
 public:
  struct Segment {
    int64_t first, count;  // positions
    int64_t first_basis;
    int64_t end;  // with its empty positions
  };
  /// Consecutive positions of one segment.
  struct RowTile {
    int64_t first, count, segment;
  };

  RowOrder(const ManifoldLinearParams& p, int64_t align) : p_(p), align_(align) {
    if (!p.index) {
      append(0, p.batch, [](int64_t b) { return b; });
    } else {
      std::vector<std::vector<int64_t>> samples(p.num_basis);
      for (int64_t b = 0; b < p.batch; ++b) samples[p.first_basis(b)].push_back(b);
      for (int64_t k = 0; k < p.num_basis; ++k)
        if (!samples[k].empty()) append(k, int64_t(samples[k].size()), [&](int64_t i) { return samples[k][i]; });
    }
    in_place_ = true;
    for (int64_t i = 0; i < p.rows(); ++i) in_place_ = in_place_ && row_[i] == i;
    position_.resize(p.rows());
    for (int64_t i = 0; i < positions(); ++i)
      if (row_[i] >= 0) position_[row_[i]] = i;
  }

  int64_t padded(int64_t count) const { return ceil_div(count, align_) * align_; }
  int64_t positions() const { return int64_t(row_.size()); }
  const std::vector<Segment>& segments() const { return segments_; }
  /// Whether a position and its row are the same number.
  bool in_place() const { return in_place_; }
  int64_t row(int64_t position) const { return row_[position]; }
  int64_t position(int64_t row) const { return position_[row]; }

  std::vector<RowTile> tiles(int64_t size) const {
    std::vector<RowTile> tiles;
    for (int64_t s = 0; s < int64_t(segments_.size()); ++s)
      for (int64_t n = 0; n < segments_[s].count; n += size)
        tiles.push_back({segments_[s].first + n, std::min(size, segments_[s].count - n), s});
    return tiles;
  }

  /// Which coefficient of a segment's rows belongs to basis point k; L or more if none does.
  int64_t entry(int64_t segment, int64_t k) const { return p_.entry_from(segments_[segment].first_basis, k); }

  /// Pointers to the elements from `col` on of the rows of x or g at `count` positions; null for an empty one.
  template <class T>
  void pointers(const View& matrix, int64_t first, int64_t count, int64_t col, T** rows) const {
    using Element = std::remove_const_t<T>;
    for (int64_t i = 0; i < count; ++i)
      rows[i] = row_[first + i] < 0 ? nullptr : matrix.at<Element>(row_[first + i], col);
  }

 private:
  /// A segment of `samples` samples, the i-th of which is sample_of(i).
  template <class SampleOf>
  void append(int64_t first_basis, int64_t samples, SampleOf sample_of) {
    const int64_t first = positions(), count = samples * p_.tokens;
    segments_.push_back({first, count, first_basis, first + padded(count)});
    for (int64_t i = 0; i < samples; ++i)
      for (int64_t t = 0; t < p_.tokens; ++t) row_.push_back(sample_of(i) * p_.tokens + t);
    row_.resize(padded(positions()), -1);
  }

  const ManifoldLinearParams& p_;
  const int64_t align_;
  std::vector<Segment> segments_;
  std::vector<int64_t> row_, position_;  // row at a position, or -1; position of a row
  bool in_place_;
};

/// The coefficients of rows in their order, those of one l side by side; zeros at empty positions.
template <class A>
class Coefficients {
 public:
  Coefficients(const ManifoldLinearParams& p, const RowOrder& rows)
      : positions_(rows.positions()), c_(p.num_local * positions_) {
    constexpr int64_t many = 64;  // positions whose coefficients stay in cache meanwhile
    parallel(ceil_div(positions_, many), 2e-9 * double(many * p.num_local), [&](int64_t block) {
      const int64_t begin = block * many, end = std::min(begin + many, positions_);
      for (int64_t l = 0; l < p.num_local; ++l) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = rows.row(i);
          c_[l * positions_ + i] = row < 0 ? A(0) : *p.coeff.at<A>(p.tokens == 1 ? row : row / p.tokens, l);
        }
      }
    });
  }

  /// The l-th ones from a position on.
  const A* at(int64_t l, int64_t position) const { return &c_[l * positions_ + position]; }

 private:
  const int64_t positions_;
  const Scratch<A> c_;
};

/// The alignment of segments whose rows are columns of B: AMX multiplies tiles of 16 columns no faster than those of
/// 32, and often slower.
template <class T>
int64_t row_alignment() {
  return has_matrix_unit<T>() ? 32 : 16;
}

/// Of segments whose rows are A, or the depth of a product.
template <class T>
int64_t depth_alignment() {
  return has_matrix_unit<T>() ? 32 : even_depth<T>(1);
}

}  // namespace neuromod
