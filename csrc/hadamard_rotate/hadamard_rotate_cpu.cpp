// hadamard_rotate on the CPU. A pass over memory takes as many levels as the second cache holds elements: the first one
// blocks of neighbours, those after it columns of a matrix whose rows are what is done already, gathered side by side.
// 10 million elements are two passes, of rotations of 2^23 and 2^22 elements. What is not whole in one piece of memory
// is fetched and put back piece by piece, so that the parameters of a network need not lie in one vector.
// An element is summed in the order of the levels, whatever the pieces and the number of threads: error
// <= (levels + 2) e sum |x| 2^(-levels / 2) in the terms of bounds.py. n levels additions; 2 n elements a pass, and D.
#include <algorithm>

#include "common/element.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/vector.h"
#include "hadamard_rotate/hadamard_rotate.h"

namespace neuromod {
namespace {

constexpr int64_t kBlockBytes = 128 << 10;  // neighbours
constexpr int64_t kTileBytes = 512 << 10;   // columns; both fit the second cache
constexpr int64_t kLeastColumns = 64;       // bytes: no pass takes more levels than leave a cache line of each row
constexpr double kSecondsPerByte = 0.5e-9;  // roughly

/// Calls f(piece, at, count) for the pieces that hold the elements [first, first + count) of a vector.
template <class F>
void for_pieces(const HadamardRotateParams& p, int64_t first, int64_t count, F f) {
  const auto* piece = std::upper_bound(p.pieces, p.pieces + p.num_pieces, first,
                                       [](int64_t i, const HadamardPiece& piece) { return i < piece.end; });
  for (int64_t at = first; at < first + count; at = (piece++)->end)
    f(*piece, at, std::min(first + count, piece->end) - at);
}

template <class A>
struct Rotation {
  const HadamardRotateParams& p;
  const HadamardOps<A>& ops;
  A scale;

  const A* read(const HadamardPiece& piece, bool fresh, int64_t vector, int64_t at) const {
    return fresh ? static_cast<const A*>(piece.in) + vector * piece.in_stride + at - piece.begin
                 : write(piece, vector, at);
  }
  A* write(const HadamardPiece& piece, int64_t vector, int64_t at) const {
    return static_cast<A*>(piece.out) + vector * piece.out_stride + at - piece.begin;
  }

  /// Neighbours: the levels from the first one on.
  void block(int64_t vector, int64_t first, int64_t count, bool last, A* x) const {
    bool whole = false;  // then in place
    for_pieces(p, p.first + first, count, [&](const HadamardPiece& piece, int64_t at, int64_t n) {
      const A* const from = read(piece, true, vector, at);
      const int64_t i = at - p.first;
      whole = n == count;
      if (whole) x = write(piece, vector, at);
      if (!p.inverse) {
        ops.flip(n, p.signs + i, scale, from, x + i - first);
      } else if (from != x) {
        std::copy_n(from, n, x + i - first);
      }
    });
    ops.butterflies(count, 1, x);
    if (!whole || (p.inverse && last)) put(vector, first, count, last, x);
  }

  /// `columns` columns of 2^taken rows that lie 2^level apart: the levels from `level` on.
  void tile(int64_t vector, int64_t first, int level, int taken, int64_t columns, bool last, A* x) const {
    const int64_t rows = int64_t(1) << taken;
    for (int64_t r = 0; r < rows; ++r) {
      A* to = x + r * columns;
      for_pieces(p, p.first + first + (r << level), columns, [&](const HadamardPiece& piece, int64_t at, int64_t n) {
        to = std::copy_n(read(piece, false, vector, at), n, to);
      });
    }
    ops.butterflies(rows * columns, columns, x);
    for (int64_t r = 0; r < rows; ++r) put(vector, first + (r << level), columns, last, x + r * columns);
  }

  void put(int64_t vector, int64_t first, int64_t count, bool last, const A* x) const {
    for_pieces(p, p.first + first, count, [&](const HadamardPiece& piece, int64_t at, int64_t n) {
      A* const to = write(piece, vector, at);
      const int64_t i = at - p.first;
      if (p.inverse && last) {
        ops.flip(n, p.signs + i, scale, x + i - first, to);
      } else {
        std::copy_n(x + i - first, n, to);
      }
    });
  }
};

int floor_log2(int64_t n) {
  int log = 0;
  while (n >>= 1) ++log;
  return log;
}

template <class A>
void rotate(const HadamardRotateParams& p) {
  const Rotation<A> rotation{p, hadamard_vectors<A>(), static_cast<A>(hadamard_scale(p))};
  constexpr int64_t size = sizeof(A);
  int level = std::min(p.levels, floor_log2(kBlockBytes / size));
  const int64_t block = int64_t(1) << level, blocks = int64_t(1) << (p.levels - level);
  parallel(p.vectors * blocks, kSecondsPerByte * double(block * size), [&](int64_t i) {
    const Scratch<A> x(block);
    rotation.block(i / blocks, i % blocks * block, block, level == p.levels, x.data());
  });
  while (level < p.levels) {
    const int taken = std::min(p.levels - level, floor_log2(kTileBytes / kLeastColumns));
    const int64_t columns = std::min(int64_t(1) << level, (kTileBytes / size) >> taken);
    const int64_t across = (int64_t(1) << level) / columns, groups = int64_t(1) << (p.levels - level - taken);
    parallel(p.vectors * groups * across, kSecondsPerByte * double(columns * size << taken), [&](int64_t i) {
      const Scratch<A> x(columns << taken);
      const int64_t column = i % across * columns, group = i / across % groups;
      rotation.tile(i / across / groups, (group << (level + taken)) + column, level, taken, columns,
                    level + taken == p.levels, x.data());
    });
    level += taken;
  }
}

}  // namespace

void hadamard_rotate_cpu(const HadamardRotateParams& p) {
  if (p.dtype == DType::float64) {
    rotate<double>(p);
  } else {
    rotate<float>(p);
  }
}

}  // namespace neuromod
