// manifold_linear on the CPU, backward, plan expand. Two passes, each over output tiles of its own:
//
// rows pass: Z_k = g P_k yields both dx = sum_l c_l Z_k and dc_l = <Z_k, x>.
// outer pass: dP_k = (c_l g)^T x, c applied once g is transposed; of few rows, mixed as in plan stream.
// Sums over samples, tiles and basis points are taken in fixed order: partial sums of dc by tile, then by token.
#include <array>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "manifold_linear/manifold_linear_rows_pass.h"
#include "manifold_linear/manifold_linear_stream.h"

namespace neuromod {
namespace {

/// Operand: the type in which outer products take their operands. Half types that are widened to be multiplied are so
/// once, before c is applied: c g need not fit into float16.
template <class T, class Operand>
class ExpandBackward {
  using A = acc_t<T>;
  using Segment = RowOrder::Segment;
  static constexpr int64_t kDepth = 256;  // rows of x packed at a time
  static constexpr int64_t kPackedBytes = int64_t(8) << 20;
  static constexpr int64_t kCachedPanelBytes = int64_t(1) << 20;
  static constexpr int64_t kScaledBytes = int64_t(1) << 20;
  static constexpr int64_t kPieceBytes = int64_t(1) << 19;
  static constexpr int64_t kStretch = 1024;
  static constexpr int64_t kCached = int64_t(1) << 18;  // elements of dP
  static constexpr int64_t kFewRows = 256;

 public:
  explicit ExpandBackward(const ManifoldLinearBackwardParams& q)
      : q_(q),
        p_(q.p),
        rows_(q.p, depth_alignment<T>()),
        coefficients_(q.p, rows_),
        in_tiles_(ceil_div(p_.in_features, kTile)),
        out_tiles_(ceil_div(p_.out_features, kTile)) {}

  void run() {
    const Scratch<A> partial(q_.grad_coeff ? in_tiles_ * p_.num_local * rows_.positions() : 0);
    partial_ = partial.data();
    if (q_.grad_input || q_.grad_coeff) {
      const View factors = q_.grad_coeff ? p_.input : View{};
      const RowsOperands of{p_.output, p_.out_features, q_.grad_input, p_.in_features, {}, factors, false};
      RowsPass<T>(p_, rows_, coefficients_, of, partial_).run();
    }
    if (q_.grad_basis || q_.grad_bias) p_.rows() <= mixed_rows() ? manifold_linear_stream_outer<T>(q_) : outer_pass();
    if (q_.grad_coeff) finish_coeff();
  }

 private:
  /// Partial sums of dc by tile of inputs, one for each position.
  A* partial(int64_t in_tile, int64_t l) const { return partial_ + (in_tile * p_.num_local + l) * rows_.positions(); }

  /// Most rows of which dP is mixed, as plan stream does it: long ones.
  int64_t mixed_rows() const { return std::min<int64_t>(p_.in_features / 64, 8); }

  // The outer pass.

  void outer_pass() {
    const int64_t positions = rows_.positions(), panel = positions * kTile;
    const int64_t most = std::max<int64_t>(1, kPackedBytes / std::max<int64_t>(1, panel * int64_t(sizeof(Operand))));
    for (int64_t first = 0; first == 0 || first < in_tiles_; first += most) {
      const int64_t count = std::min(most, in_tiles_ - first);
      const Scratch<Operand> x(count * panel);
      const int64_t slices = ceil_div(positions, kDepth);
      parallel(count * slices, double(kDepth * kTile) * 1e-10, [&](int64_t i) {
        const int64_t slice = i % slices * kDepth, in_tile = first + i / slices;
        std::array<const T*, kDepth> rows;
        const int64_t length = std::min(kDepth, positions - slice);
        rows_.pointers(p_.input, slice, length, in_tile * kTile, rows.data());
        pack(length, rows.data(), tile_size(in_tile, p_.in_features), x.data() + i / slices * panel + slice * kTile);
      });
      const double seconds = 2e-11 * double(positions * kTile) * double(count * kTile);
      parallel_ranges(out_tiles_, seconds, [&](int64_t begin, int64_t end) {
        for (int64_t out_tile = begin; out_tile < end; ++out_tile) expanded_outer(out_tile, first, count, x.data());
        release_tiles<T>();
      });
    }
  }

  static void pack(int64_t count, const T* const* rows, int64_t cols, Operand* panel) {
    if constexpr (std::is_same_v<T, Operand>) {
      pack_columns<T>(count, rows, cols, panel);
    } else {
      for (int64_t i = 0; i < count; ++i) vectors<T>().widen(cols, rows[i], panel + i * kTile);
    }
  }

  /// Part of dP_k: rows from `out` on, and tiles of their columns.
  struct Piece {
    int64_t k, out, outs, in_tile, tiles;
  };

  /// Whether sums are taken in the place of dP: if they have its type.
  static constexpr bool kInPlace = std::is_same_v<T, A>;
  /// Whether it takes longer to fetch what dP is added to than to multiply, from as many places as a piece has rows.
  bool read() const {
    const bool in_memory = p_.num_basis * p_.out_features * p_.in_features >= kCached;
    return q_.accumulate && in_memory && rows_.positions() <= kFewRows;
  }
  /// Rows of a piece: of one that is read so many that a tile is 4 KiB.
  int64_t strip() const { return read() ? 4096 / (kTile * int64_t(sizeof(T))) : kTile; }
  int64_t panel_bytes() const { return rows_.positions() * kTile * int64_t(sizeof(Operand)); }
  /// Whether panels of x do not stay in cache until the next basis point.
  bool panels_from_memory() const { return in_tiles_ * panel_bytes() > kCachedPanelBytes; }
  /// Basis points whose c g are kept side by side: of panels that come from memory many, each of which they all meet.
  int64_t scaled_points() const {
    if (!panels_from_memory()) return 1;
    return std::clamp<int64_t>(kScaledBytes / (kTile * stride() * int64_t(sizeof(Operand))), 1, p_.num_basis);
  }
  /// Tiles of a piece: of sums beside dP several, so that it is written in long rows.
  int64_t wide() const {
    if (kInPlace || read()) return 1;
    return panels_from_memory() ? std::clamp<int64_t>(kPieceBytes / panel_bytes(), 1, 8) : 8;
  }
  /// Distance of their rows, off powers of two.
  int64_t sum_stride() const { return wide() * kTile + 16; }
  /// Positions that an outer product is summed over at a time: so many that the operands stay in cache, or all where
  /// the sums cannot stay in dP meanwhile.
  int64_t stretch() const { return kInPlace ? std::min<int64_t>(kStretch, rows_.positions()) : rows_.positions(); }
  /// Distance of the rows of g^T: off powers of two, at which rows would fall into the same lines of the cache.
  int64_t stride() const { return stretch() + 64 / int64_t(sizeof(Operand)); }

  /// g^T for one tile of outputs, in the accumulation type: rows of the positions from `first` on.
  void transpose_grad(int64_t out_tile, int64_t first, A* to) const {
    constexpr int64_t ahead = 2 * kTile;
    const int64_t end = std::min(rows_.positions(), first + stretch()), outs = tile_size(out_tile, p_.out_features);
    std::array<const T*, kTile> rows;
    for (int64_t i = first - ahead; i < end; i += kTile) {
      const int64_t next = std::clamp<int64_t>(end - (i + ahead), 0, kTile);
      rows_.pointers(p_.output, i + ahead, next, out_tile * kTile, rows.data());
      prefetch(rows.data(), next, outs);
      if (i < first) continue;
      const int64_t count = std::min(kTile, end - i);
      rows_.pointers(p_.output, i, count, out_tile * kTile, rows.data());
      vectors<T>().transpose_wide(count, outs, rows.data(), to + (i - first), stride());
    }
  }

  using Ranges = std::vector<std::pair<int64_t, int64_t>>;

  void expanded_outer(int64_t out_tile, int64_t first, int64_t count, const Operand* x) const {
    const int64_t outs = tile_size(out_tile, p_.out_features), positions = rows_.positions(), K = p_.num_basis;
    const Scratch<A> grad(kTile * stride()), c(positions), sum(kInPlace ? 0 : kTile * sum_stride()), bias(K * kTile);
    const Scratch<Operand> scaled(scaled_points() * kTile * stride());
    std::vector<Ranges> ranges(scaled_points());
    std::fill_n(bias.data(), K * kTile, A(0));
    for (int64_t start = 0; start < positions; start += stretch()) {
      transpose_grad(out_tile, start, grad.data());
      for (int64_t from = 0; from < K; from += scaled_points()) {
        const int64_t points = std::min(scaled_points(), K - from);
        const auto scaled_row = [&](int64_t k, int64_t o) { return &scaled[((k - from) * kTile + o) * stride()]; };
        for (int64_t k = from; k < from + points; ++k) {
          ranges[k - from] = positions_of(k, start, c.data());
          for (const auto& [begin, end] : ranges[k - from]) {
            for (int64_t o = 0; o < outs; ++o) {
              const A* const g = &grad[o * stride() + begin - start];
              vectors<Operand>().scale(end - begin, &c[begin], g, scaled_row(k, o) + begin - start);
              if (q_.grad_bias && first == 0) bias[k * kTile + o] += vectors<A>().dot(end - begin, &c[begin], g);
            }
          }
        }
        for (int64_t o = 0; o < outs && q_.grad_basis; o += strip()) {
          for (int64_t i = 0; i < count; i += wide()) {
            for (int64_t k = from; k < from + points; ++k) {
              const Piece piece{k, out_tile * kTile + o, std::min(strip(), outs - o), first + i,
                                std::min(wide(), count - i)};
              outer_products(piece, start, ranges[k - from], scaled_row(k, o), x + i * positions * kTile, sum.data());
            }
          }
        }
      }
    }
    for (int64_t k = 0; k < K && q_.grad_bias && first == 0; ++k)
      vectors<T>().narrow(outs, &bias[k * kTile], q_.grad_bias.at<T>(k, out_tile * kTile));
  }

  /// The positions from `start` on whose samples use basis point k, as few ranges, and their coefficients.
  Ranges positions_of(int64_t k, int64_t start, A* c) const {
    Ranges ranges;
    for (size_t s = 0; s < rows_.segments().size(); ++s) {
      const Segment& segment = rows_.segments()[s];
      const int64_t l = rows_.entry(int64_t(s), k);
      const int64_t begin = std::max(segment.first, start), end = std::min(segment.end, start + stretch());
      if (l >= p_.num_local || begin >= end) continue;
      std::copy_n(coefficients_.at(l, begin), end - begin, c + begin);
      if (!ranges.empty() && ranges.back().second == begin) {
        ranges.back().second = end;
      } else {
        ranges.emplace_back(begin, end);
      }
    }
    return ranges;
  }

  /// Sums over the positions from `start` on, whose columns of (c g)^T, and panels of x, are given.
  void outer_products(const Piece& d, int64_t start, const Ranges& ranges, const Operand* grad, const Operand* x,
                      A* sum) const {
    const int64_t panel = rows_.positions() * kTile;
    for (int64_t w = 0; w < d.tiles; ++w) {
      const int64_t ins = tile_size(d.in_tile + w, p_.in_features);
      A* c_tile = sum + w * kTile;
      int64_t ldc = sum_stride();
      bool add = false;
      if constexpr (kInPlace) {
        c_tile = at(d, 0, w);
        ldc = q_.grad_basis.stride[1];
        add = q_.accumulate || start > 0;
      }
      if (ranges.empty() && !add)
        for (int64_t o = 0; o < d.outs; ++o) std::fill_n(c_tile + o * ldc, ins, A(0));
      if (read()) prefetch_basis(d, w, ins);
      for (const auto& [begin, end] : ranges) {
        tile_product<Operand>(d.outs, ins, end - begin, {grad + begin - start, stride()},
                              {x + w * panel + begin * kTile, kTile}, c_tile, ldc, add);
        add = true;
      }
    }
    if constexpr (!kInPlace) store_basis(d, sum);
  }

  /// Element of dP: row o of a piece, where its tile w begins.
  T* at(const Piece& d, int64_t o, int64_t w) const {
    return q_.grad_basis.at<T>(d.k, d.out + o, (d.in_tile + w) * kTile);
  }

  void prefetch_basis(const Piece& d, int64_t w, int64_t ins) const {
    std::array<T*, kTile> rows;
    for (int64_t o = 0; o < d.outs; ++o) rows[o] = at(d, o, w);
    prefetch(rows.data(), d.outs, ins);
  }

  void store_basis(const Piece& d, const A* sum) const {
    const int64_t cols = std::min(d.tiles * kTile, p_.in_features - d.in_tile * kTile);
    for (int64_t o = 0; o < d.outs; ++o) {
      if (q_.accumulate) {
        vectors<T>().add(cols, sum + o * sum_stride(), at(d, o, 0));
      } else {
        vectors<T>().narrow(cols, sum + o * sum_stride(), at(d, o, 0));
      }
    }
  }

  /// dc[b,l] = sum over its tokens and tiles of the partial sums, and of <g, beta_k>.
  void finish_coeff() const {
    const double seconds = 1e-9 * double(p_.tokens * p_.num_local * (in_tiles_ + (p_.bias ? p_.out_features / 8 : 0)));
    parallel(p_.batch, seconds, [&](int64_t b) {
      for (int64_t l = 0; l < p_.num_local; ++l) {
        A sum = 0;
        for (int64_t t = 0; t < p_.tokens; ++t) {
          const int64_t row = b * p_.tokens + t;
          for (int64_t in_tile = 0; in_tile < in_tiles_; ++in_tile) sum += partial(in_tile, l)[rows_.position(row)];
          if (p_.bias)
            sum += vectors<T>().dot(p_.out_features, p_.output.at<T>(row), p_.bias.at<T>(p_.basis_point(b, l)));
        }
        *q_.grad_coeff.at<A>(b, l) = sum;
      }
    });
  }

  const ManifoldLinearBackwardParams& q_;
  const ManifoldLinearParams& p_;
  const RowOrder rows_;
  const Coefficients<A> coefficients_;
  const int64_t in_tiles_, out_tiles_;
  A* partial_ = nullptr;
};

}  // namespace

void manifold_linear_backward_cpu(const ManifoldLinearBackwardParams& q) {
  const bool update = q.accumulate && !q.grad_input && !q.grad_coeff && !q.grad_bias;
  const Plan plan = choose_plan(q.p, update ? Pass::update : Pass::backward);
  if (plan == Plan::fold || plan == Plan::fold_gemm) return manifold_linear_fold_backward(q, plan);
  if (plan == Plan::expand_gemm) return manifold_linear_expand_gemm_backward(q);
  dispatch_dtype<Float16, BFloat16>(q.p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (plan == Plan::stream) return manifold_linear_stream_backward<T>(q);
    if constexpr (is_half_type<T>)
      if (half_tiles<T>() == HalfTiles::widened) return ExpandBackward<T, float>(q).run();
    ExpandBackward<T, T>(q).run();
  });
}

}  // namespace neuromod
