// manifold_linear on the CPU, backward. Two passes, each over output tiles of its own, in the plan chosen:
//
// rows pass: Z_k = g P_k yields both dx = sum_l c_l Z_k and dc_l = <Z_k, x>; plan fold multiplies g by the blended
// weight
//   instead, which yields dx alone.
// outer pass: dP_k = (c_l g)^T x, c applied while g is transposed; plan fold multiplies g_b^T x_b once for each sample
//   and takes dP_k += c_l g_b^T x_b and dc_l = <g_b^T x_b, P_k> from it.
// Sums over samples, tiles and basis points are taken in fixed order: partial sums of dc by tile, then by token.
#include <array>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "manifold_linear/manifold_linear_rows.h"
#include "manifold_linear/manifold_linear_stream.h"

namespace neuromod {
namespace {

/// Columns of a [K, rows, cols] or [rows, cols] array as B, packed: row d of the panel is row d of the array.
template <class T>
void pack_columns(int64_t count, const T* const* rows, int64_t cols, T* panel) {
  if (interleaved<T>()) {
    for (int64_t d = 0; d < count; d += 2)
      vectors<T>().interleave(cols, rows[d], d + 1 < count ? rows[d + 1] : nullptr, panel + d * kTile);
  } else {
    for (int64_t d = 0; d < count; ++d) {
      if (rows[d]) {
        std::copy_n(rows[d], cols, panel + d * kTile);
      } else {
        std::fill_n(panel + d * kTile, cols, T{});
      }
    }
  }
}

template <class T>
class Backward {
  using A = acc_t<T>;
  using RowTile = RowOrder::RowTile;
  using Segment = RowOrder::Segment;
  static constexpr int64_t kBlock = 16;   // row tiles that see a packed tile of P
  static constexpr int64_t kDepth = 256;  // rows of P packed at a time
  static constexpr int64_t kPackedBytes = int64_t(8) << 20;

 public:
  Backward(const ManifoldLinearBackwardParams& q, Plan plan)
      : q_(q),
        p_(q.p),
        fold_(plan == Plan::fold),
        rows_(q.p, plan, row_alignment<T>()),
        tiles_(rows_.tiles(kTile)),
        in_tiles_(ceil_div(p_.in_features, kTile)),
        out_tiles_(ceil_div(p_.out_features, kTile)) {}

  void run() {
    const int64_t parts = q_.grad_coeff ? (fold_ ? out_tiles_ : in_tiles_) : 0;
    const Scratch<A> partial(parts * p_.num_local * stretch());
    partial_ = partial.data();
    if (fold_) std::fill_n(partial_, parts * p_.num_local * stretch(), A(0));  // summed over tiles of inputs
    if (q_.grad_input || (q_.grad_coeff && !fold_)) rows_pass();
    if (q_.grad_basis || q_.grad_bias || (q_.grad_coeff && fold_)) outer_pass();
    if (q_.grad_coeff) finish_coeff(parts);
  }

 private:
  /// Places of one partial sum of dc: a position each, or with plan fold a sample each.
  int64_t stretch() const { return fold_ ? p_.batch : rows_.positions(); }
  A* partial(int64_t part, int64_t l) const { return partial_ + (part * p_.num_local + l) * stretch(); }
  int64_t basis_point(const Segment& segment, int64_t l) const { return (segment.first_basis + l) % p_.num_basis; }

  // The rows pass.

  void rows_pass() {
    const int64_t depth = packed_depth<T>(p_.out_features), positions = rows_.positions();
    const bool in_place = rows_.in_place() && depth == p_.out_features;
    const Scratch<T> copy(in_place ? 0 : positions * depth);
    if (!in_place) {
      parallel(positions, double(depth) * 1e-10, [&](int64_t i) {
        const T* g;
        rows_.pointers(p_.output, i, 1, 0, &g);
        T* to = copy.data() + i * depth;
        std::fill(g ? std::copy_n(g, p_.out_features, to) : to, to + depth, T{});
      });
    }
    const Tile<T> grad = in_place ? Tile<T>{p_.output.at<T>(0), p_.output.stride[0]} : Tile<T>{copy.data(), depth};
    // Few rows: wide tiles, so that P is read from memory in long pieces.
    const int64_t wide = int64_t(tiles_.size()) <= 1 ? std::clamp<int64_t>(in_tiles_ / 8, 1, 8) : 1;
    const int64_t block = fold_ ? int64_t(tiles_.size()) : kBlock, blocks = ceil_div(int64_t(tiles_.size()), block);
    const int64_t jobs = ceil_div(in_tiles_, wide) * blocks;
    const double seconds = 2e-11 * double(p_.out_features * kTile * wide) * double(std::min(block * kTile, positions));
    parallel_ranges(jobs, seconds, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t in_tile = i / blocks * wide, first = i % blocks * block;
        const int64_t tiles = std::min(wide, in_tiles_ - in_tile);
        const int64_t count = std::min(block, int64_t(tiles_.size()) - first);
        (fold_ ? folded_rows(grad, in_tile, count) : expanded_rows(grad, in_tile, tiles, first, count));
      }
      release_tiles<T>();
    });
  }

  /// Rows of A in a product tile: empty positions too where they are there to be read.
  int64_t height(const Tile<T>& grad, const RowTile& tile) const {
    return grad.data == p_.output.at<T>(0) ? tile.count : rows_.padded(tile.count);
  }

  void expanded_rows(Tile<T> grad, int64_t in_tile, int64_t wide, int64_t first, int64_t count) const {
    const int64_t O = p_.out_features, area = kTile * kTile;
    const Scratch<T> panels(wide * kTile * packed_depth<T>(std::min(kDepth, O)));
    const Scratch<A> products(count * wide * area), sums(q_.grad_input ? count * wide * area : 0);
    std::array<bool, kBlock> started = {};
    std::array<const T*, kDepth> rows;
    std::array<const T*, kTile> x;
    A c[kTile], dot[kTile];
    for (int64_t k = 0; k < p_.num_basis; ++k) {
      const auto uses = [&](int64_t i) { return rows_.entry(tiles_[first + i].segment, k) < p_.num_local; };
      int64_t used = 0;
      for (int64_t i = 0; i < count; ++i) used += uses(i) ? tiles_[first + i].count : 0;
      if (used == 0) continue;
      // A tile of P that is read once or twice is not worth packing, unless it must be interleaved.
      const bool packed = interleaved<T>() || wide > 1 || used > kNarrowTile;
      for (int64_t d = 0; d < O; d += kDepth) {
        const int64_t depth = std::min(kDepth, O - d);
        if (packed) pack_wide(k, d, depth, in_tile, wide, rows.data(), panels.data());
        for (int64_t i = 0; i < count; ++i) {
          if (!uses(i)) continue;
          const RowTile& tile = tiles_[first + i];
          if (d + kDepth >= O) prefetch_inputs(tile, in_tile, wide, k + 1 == p_.num_basis);
          for (int64_t w = 0; w < wide; ++w) {
            const Tile<T> basis = packed ? Tile<T>{panels.data() + w * kTile * packed_depth<T>(depth), kTile}
                                         : Tile<T>{p_.basis.at<T>(k, d, (in_tile + w) * kTile), p_.basis.stride[1]};
            tile_product<T>(height(grad, tile), tile_size(in_tile + w, p_.in_features), depth,
                            {grad.data + tile.first * grad.stride + d, grad.stride}, basis,
                            products.data() + (i * wide + w) * area, kTile, d > 0);
          }
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        if (!uses(i)) continue;
        const RowTile& tile = tiles_[first + i];
        const int64_t l = rows_.entry(tile.segment, k);
        rows_.coefficients(tile.first, tile.count, l, c);
        for (int64_t w = 0; w < wide; ++w) {
          const A* product = products.data() + (i * wide + w) * area;
          const int64_t ins = tile_size(in_tile + w, p_.in_features);
          if (q_.grad_input)
            vectors<T>().mix_rows(tile.count, ins, kTile, product, c, sums.data() + (i * wide + w) * area, started[i]);
          if (q_.grad_coeff) {
            rows_.pointers(p_.input, tile.first, tile.count, (in_tile + w) * kTile, x.data());
            vectors<T>().dot_rows(tile.count, ins, kTile, product, x.data(), dot);
            std::copy_n(dot, tile.count, partial(in_tile + w, l) + tile.first);
          }
        }
        started[i] = true;
      }
    }
    for (int64_t i = 0; i < count && q_.grad_input; ++i)
      for (int64_t w = 0; w < wide; ++w)
        store_rows(tiles_[first + i], in_tile + w, sums.data() + (i * wide + w) * area);
  }

  /// Rows [d, d + depth) of P_k in panels of kTile columns, read in pieces of `wide` panels.
  void pack_wide(int64_t k, int64_t d, int64_t depth, int64_t in_tile, int64_t wide, const T** rows, T* panels) const {
    constexpr int64_t step = 8;  // rows whose pieces are read together
    for (int64_t n = 0; n < depth; n += step) {
      for (int64_t w = 0; w < wide; ++w) {
        const int64_t count = std::min(step, depth - n);
        for (int64_t i = 0; i < count; ++i) rows[i] = p_.basis.at<T>(k, d + n + i, (in_tile + w) * kTile);
        pack_columns<T>(count, rows, tile_size(in_tile + w, p_.in_features),
                        panels + w * kTile * packed_depth<T>(depth) + n * kTile);
      }
    }
  }

  void folded_rows(Tile<T> grad, int64_t in_tile, int64_t count) const {
    const int64_t O = p_.out_features, L = p_.num_local, ins = tile_size(in_tile, p_.in_features);
    const int64_t panel = packed_depth<T>(O) * kTile;
    const Scratch<T> basis(p_.num_basis * panel), blend(panel);
    const Scratch<A> sum(kTile * kTile), c(L);
    const Scratch<const T*> rows(std::max(O, L));
    for (int64_t k = 0; k < p_.num_basis; ++k) {
      for (int64_t o = 0; o < O; ++o) rows[o] = p_.basis.at<T>(k, o, in_tile * kTile);
      pack_columns<T>(O, rows.data(), ins, basis.data() + k * panel);
    }
    for (int64_t i = 0; i < count; ++i) {
      const RowTile& tile = tiles_[i];
      const Segment& segment = rows_.segments()[tile.segment];
      if (i == 0 || tile.segment != tiles_[i - 1].segment) {
        for (int64_t l = 0; l < L; ++l) {
          c[l] = *p_.coeff.at<A>(segment.sample, l);
          rows[l] = basis.data() + basis_point(segment, l) * panel;
        }
        vectors<T>().mix(panel, L, c.data(), rows.data(), blend.data());
      }
      prefetch_inputs(tile, in_tile, 1, true);
      tile_product<T>(height(grad, tile), ins, O, {grad.data + tile.first * grad.stride, grad.stride},
                      {blend.data(), kTile}, sum.data(), kTile, false);
      store_rows(tile, in_tile, sum.data());
    }
  }

  /// What the products of a row tile will meet: x for dc, dx to be written.
  void prefetch_inputs(const RowTile& tile, int64_t in_tile, int64_t wide, bool write) const {
    const int64_t length = std::min(wide * kTile, p_.in_features - in_tile * kTile);
    if (q_.grad_coeff && !fold_) {
      std::array<const T*, kTile> x;
      rows_.pointers(p_.input, tile.first, tile.count, in_tile * kTile, x.data());
      prefetch(x.data(), tile.count, length);
    }
    if (q_.grad_input && write) {
      std::array<T*, kTile> dx;
      rows_.pointers(q_.grad_input, tile.first, tile.count, in_tile * kTile, dx.data());
      prefetch(dx.data(), tile.count, length);
    }
  }

  void store_rows(const RowTile& tile, int64_t in_tile, const A* sum) const {
    std::array<T*, kTile> dx;
    rows_.pointers(q_.grad_input, tile.first, tile.count, in_tile * kTile, dx.data());
    for (int64_t r = 0; r < tile.count; ++r)
      vectors<T>().narrow(tile_size(in_tile, p_.in_features), sum + r * kTile, dx[r]);
  }

  // The outer pass.

  void outer_pass() {
    const int64_t positions = rows_.positions(), panel = positions * kTile;
    const int64_t most = std::max<int64_t>(1, kPackedBytes / std::max<int64_t>(1, panel * int64_t(sizeof(T))));
    for (int64_t first = 0; first == 0 || first < in_tiles_; first += most) {
      const int64_t count = std::min(most, in_tiles_ - first);
      const Scratch<T> x(count * panel);
      const int64_t slices = ceil_div(positions, kDepth);
      parallel(count * slices, double(kDepth * kTile) * 1e-10, [&](int64_t i) {
        const int64_t slice = i % slices * kDepth, in_tile = first + i / slices;
        std::array<const T*, kDepth> rows;
        const int64_t length = std::min(kDepth, positions - slice);
        rows_.pointers(p_.input, slice, length, in_tile * kTile, rows.data());
        pack_columns<T>(length, rows.data(), tile_size(in_tile, p_.in_features),
                        x.data() + i / slices * panel + slice * kTile);
      });
      const double seconds = 2e-11 * double(positions * kTile) * double(count * kTile);
      parallel_ranges(out_tiles_, seconds, [&](int64_t begin, int64_t end) {
        for (int64_t out_tile = begin; out_tile < end; ++out_tile)
          (fold_ ? folded_outer(out_tile, first, count, x.data()) : expanded_outer(out_tile, first, count, x.data()));
        release_tiles<T>();
      });
    }
  }

  /// g^T for one tile of outputs, in the accumulation type: rows of all positions.
  void transpose_grad(int64_t out_tile, A* to) const {
    constexpr int64_t ahead = 2 * kTile;
    const int64_t positions = rows_.positions(), outs = tile_size(out_tile, p_.out_features);
    std::array<const T*, kTile> rows;
    for (int64_t i = -ahead; i < positions; i += kTile) {
      const int64_t next = std::clamp<int64_t>(positions - (i + ahead), 0, kTile);
      rows_.pointers(p_.output, i + ahead, next, out_tile * kTile, rows.data());
      prefetch(rows.data(), next, outs);
      if (i < 0) continue;
      const int64_t count = std::min(kTile, positions - i);
      rows_.pointers(p_.output, i, count, out_tile * kTile, rows.data());
      vectors<T>().transpose_wide(count, outs, rows.data(), to + i, stride());
    }
  }
  /// Distance of the rows of g^T: off powers of two, at which rows would fall into the same lines of the cache.
  int64_t stride() const { return rows_.positions() + 16; }

  void expanded_outer(int64_t out_tile, int64_t first, int64_t count, const T* x) const {
    const int64_t outs = tile_size(out_tile, p_.out_features), positions = rows_.positions();
    const Scratch<A> grad(kTile * stride()), c(positions), sum(kTile * kTile);
    const Scratch<T> scaled(kTile * stride());
    transpose_grad(out_tile, grad.data());
    for (int64_t k = 0; k < p_.num_basis; ++k) {
      const auto ranges = positions_of(k, c.data());
      for (int64_t o = 0; o < outs; ++o)
        for (const auto& [begin, end] : ranges)
          vectors<T>().scale(end - begin, &c[begin], &grad[o * stride() + begin], &scaled[o * stride() + begin]);
      for (int64_t i = 0; i < count && q_.grad_basis; ++i) {
        const int64_t in_tile = first + i, ins = tile_size(in_tile, p_.in_features);
        // Where sums have the type of dP, they are taken in its place.
        A* c_tile = sum.data();
        int64_t ldc = kTile;
        bool add = false;
        if constexpr (std::is_same_v<T, A>) {
          c_tile = q_.grad_basis.at<A>(k, out_tile * kTile, in_tile * kTile);
          ldc = q_.grad_basis.stride[1];
          add = q_.accumulate;
        }
        if (ranges.empty() && !add)
          for (int64_t o = 0; o < outs; ++o) std::fill_n(c_tile + o * ldc, ins, A(0));
        prefetch_basis(k, out_tile, in_tile);
        for (const auto& [begin, end] : ranges) {
          tile_product<T>(outs, ins, end - begin, {&scaled[begin], stride()},
                          {x + i * positions * kTile + begin * kTile, kTile}, c_tile, ldc, add);
          add = true;
        }
        if (c_tile == sum.data()) store_basis(k, out_tile, in_tile, sum.data());
      }
      if (first == 0) store_bias(k, out_tile, grad.data(), c.data(), ranges);
    }
  }

  using Ranges = std::vector<std::pair<int64_t, int64_t>>;

  /// The positions whose samples use basis point k, as few ranges, and their coefficients.
  Ranges positions_of(int64_t k, A* c) const {
    Ranges ranges;
    for (size_t s = 0; s < rows_.segments().size(); ++s) {
      const Segment& segment = rows_.segments()[s];
      const int64_t l = rows_.entry(int64_t(s), k);
      if (l >= p_.num_local) continue;
      rows_.coefficients(segment.first, segment.end - segment.first, l, c + segment.first);
      if (!ranges.empty() && ranges.back().second == segment.first) {
        ranges.back().second = segment.end;
      } else {
        ranges.emplace_back(segment.first, segment.end);
      }
    }
    return ranges;
  }

  void folded_outer(int64_t out_tile, int64_t first, int64_t count, const T* x) const {
    const int64_t outs = tile_size(out_tile, p_.out_features), positions = rows_.positions(), K = p_.num_basis;
    const int64_t area = kTile * kTile;
    const Scratch<A> grad(kTile * stride()), product(area), sums(q_.grad_basis ? K * area : 0), c(positions);
    const Scratch<T> narrow(kTile * stride());
    transpose_grad(out_tile, grad.data());
    for (int64_t o = 0; o < outs; ++o) vectors<T>().narrow(positions, &grad[o * stride()], &narrow[o * stride()]);
    for (int64_t i = 0; i < count && (q_.grad_basis || q_.grad_coeff); ++i) {
      const int64_t in_tile = first + i, ins = tile_size(in_tile, p_.in_features);
      if (q_.grad_basis) std::fill_n(sums.data(), K * area, A(0));
      for (const Segment& segment : rows_.segments()) {
        const int64_t b = segment.sample;
        tile_product<T>(outs, ins, segment.end - segment.first, {&narrow[segment.first], stride()},
                        {x + (i * positions + segment.first) * kTile, kTile}, product.data(), kTile, false);
        for (int64_t l = 0; l < p_.num_local; ++l) {
          const int64_t k = basis_point(segment, l);
          if (q_.grad_basis)
            vectors<A>().add_scaled(outs * kTile, *p_.coeff.at<A>(b, l), product.data(), &sums[k * area]);
          if (q_.grad_coeff) {
            A* const dc = partial(out_tile, l) + b;
            const A dot =
                vectors<T>().dot_tile(outs, ins, kTile, product.data(),
                                      p_.basis.at<T>(k, out_tile * kTile, in_tile * kTile), p_.basis.stride[1]);
            *dc += dot;
          }
        }
      }
      for (int64_t k = 0; k < K && q_.grad_basis; ++k) store_basis(k, out_tile, in_tile, &sums[k * area]);
    }
    for (int64_t k = 0; k < K && first == 0; ++k)
      store_bias(k, out_tile, grad.data(), c.data(), positions_of(k, c.data()));
  }

  void prefetch_basis(int64_t k, int64_t out_tile, int64_t in_tile) const {
    std::array<T*, kTile> rows;
    const int64_t outs = tile_size(out_tile, p_.out_features);
    for (int64_t o = 0; o < outs; ++o) rows[o] = q_.grad_basis.at<T>(k, out_tile * kTile + o, in_tile * kTile);
    prefetch(rows.data(), outs, tile_size(in_tile, p_.in_features));
  }

  void store_basis(int64_t k, int64_t out_tile, int64_t in_tile, const A* sum) const {
    const int64_t ins = tile_size(in_tile, p_.in_features);
    for (int64_t o = 0; o < tile_size(out_tile, p_.out_features); ++o) {
      T* to = q_.grad_basis.at<T>(k, out_tile * kTile + o, in_tile * kTile);
      if (q_.accumulate) {
        vectors<T>().add(ins, sum + o * kTile, to);
      } else {
        vectors<T>().narrow(ins, sum + o * kTile, to);
      }
    }
  }

  /// dbeta[k,o] = sum_r c g[r,o]
  void store_bias(int64_t k, int64_t out_tile, const A* grad, const A* c, const Ranges& ranges) const {
    for (int64_t o = 0; o < tile_size(out_tile, p_.out_features) && q_.grad_bias; ++o) {
      A sum = 0;
      for (const auto& [begin, end] : ranges)
        sum += vectors<A>().dot(end - begin, c + begin, grad + o * stride() + begin);
      vectors<T>().narrow(1, &sum, q_.grad_bias.at<T>(k, out_tile * kTile + o));
    }
  }

  /// dc[b,l] = sum over its tokens and tiles of the partial sums, and of <g, beta_k>.
  void finish_coeff(int64_t parts) const {
    const double seconds = 1e-9 * double(p_.tokens * p_.num_local * (parts + (p_.bias ? p_.out_features / 8 : 0)));
    parallel(p_.batch, seconds, [&](int64_t b) {
      for (int64_t l = 0; l < p_.num_local; ++l) {
        A sum = 0;
        for (int64_t t = 0; t < p_.tokens; ++t) {
          const int64_t row = b * p_.tokens + t;
          for (int64_t part = 0; part < parts && (t == 0 || !fold_); ++part)
            sum += partial(part, l)[fold_ ? b : rows_.position(row)];
          if (p_.bias)
            sum += vectors<T>().dot(p_.out_features, p_.output.at<T>(row),
                                    p_.bias.at<T>((p_.first_basis(b) + l) % p_.num_basis));
        }
        *q_.grad_coeff.at<A>(b, l) = sum;
      }
    });
  }

  const ManifoldLinearBackwardParams& q_;
  const ManifoldLinearParams& p_;
  const bool fold_;
  const RowOrder rows_;
  const std::vector<RowTile> tiles_;
  const int64_t in_tiles_, out_tiles_;
  A* partial_ = nullptr;
};

}  // namespace

void manifold_linear_backward_cpu(const ManifoldLinearBackwardParams& q) {
  dispatch_dtype<Float16, BFloat16>(q.p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Plan plan = choose_plan(q.p, Pass::backward);
    if (plan == Plan::stream) {
      manifold_linear_stream_backward<T>(q);
    } else {
      Backward<T>(q, plan).run();
    }
  });
}

}  // namespace neuromod
