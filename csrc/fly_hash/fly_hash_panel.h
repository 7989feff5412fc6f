// What the passes of fly_hash on the CPU share: the index, and samples transposed so that a lane is a sample.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/vector.h"
#include "fly_hash/fly_hash.h"

namespace neuromod {

constexpr int64_t kFlyPanel = 8;  // blocks of samples that are held transposed at a time

/// The index as offsets of rows, checked, and how often each input occurs in it: with that the mean over the units is a
/// short sum over the inputs, and known before the first unit is. Nothing of it outlives the call, so a changed index
/// is never met by what belongs to another.
template <class A>
class FlyIndex {
 public:
  FlyIndex(const char* op, const FlyHashParams& p) : count(p.inputs), offsets_(p.units * p.arity) {
    const int64_t parts = std::clamp<int64_t>(at::get_num_threads(), 1, 4), most = ceil_div(p.units, parts) * p.arity;
    const Scratch<int32_t> counts(parts * p.inputs * kTables);
    const Scratch<bool> within(parts);
    parallel(parts, 1e-9 * double(most), [&](int64_t part) {
      int32_t* const mine = counts.data() + part * p.inputs * kTables;
      std::fill_n(mine, p.inputs * kTables, 0);
      const int64_t last = std::min((part + 1) * most, p.units * p.arity);
      within[part] = true;
      for (int64_t first = part * most; first < last && within[part]; first += kPiece)
        within[part] = add(p, first, std::min(kPiece, last - first), mine);
    });
    if (!std::all_of(within.data(), within.data() + parts, [](bool good) { return good; })) refuse(op, p);
    for (int64_t i = 0; i < p.inputs; ++i) {
      int64_t total = 0;
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t t = 0; t < kTables; ++t) total += counts[(part * p.inputs + i) * kTables + t];
      count[i] = A(total);
    }
  }

  const uint32_t* data() const { return offsets_.data(); }
  const Scratch<A> count;  // [inputs]

 private:
  static constexpr int64_t kPiece = 4096;  // that stay in cache from their conversion to their count
  static constexpr int64_t kTables = 4;    // in turns, so that an input that follows itself need not wait

  bool add(const FlyHashParams& p, int64_t first, int64_t n, int32_t* counts) const {
    const auto& ops = fly_hash_vectors<A>();
    uint32_t* const to = offsets_.data() + first;
    if (!(p.long_index ? ops.offsets(n, p.index.at<const int64_t>(0) + first, p.inputs, to)
                       : ops.offsets(n, p.index.at<const int32_t>(0) + first, p.inputs, to)))
      return false;
    static_assert(kFlyStep == kTables * sizeof(int32_t));  // so an offset is one in bytes, too
    char* const table = reinterpret_cast<char*>(counts);
    const auto increase = [=](int64_t i, int64_t t) {
      ++*reinterpret_cast<int32_t*>(table + to[i] + t * sizeof(int32_t));
    };
    int64_t i = 0;
    for (; i + kTables <= n; i += kTables)
      for (int64_t t = 0; t < kTables; ++t) increase(i + t, t);
    for (; i < n; ++i) increase(i, 0);
    return true;
  }

  [[noreturn]] static void refuse(const char* op, const FlyHashParams& p) {
    int64_t i = 0, value = 0;
    do {
      value = p.long_index ? *p.index.at<const int64_t>(0, i) : *p.index.at<const int32_t>(0, i);
      ++i;
    } while (value >= 0 && value < p.inputs);
    TORCH_CHECK_VALUE(false, op, ": expected index with entries in [0, I) = [0, ", p.inputs, "), got ", value);
  }

  const Scratch<uint32_t> offsets_;
};

/// The readout by chunks of units, [outputs, kFlyChunk] each, times the gain where that is asked for.
template <class A>
class FlyReadout {
 public:
  FlyReadout(const FlyHashParams& p, bool times_gain)
      : outputs_(p.outputs), data_(ceil_div(p.units, kFlyChunk) * p.outputs * kFlyChunk) {
    parallel(ceil_div(p.units, kFlyChunk), 1e-10 * double(p.outputs * kFlyChunk), [&](int64_t chunk) {
      const int64_t first = chunk * kFlyChunk, units = std::min(kFlyChunk, p.units - first);
      for (int64_t o = 0; o < p.outputs; ++o) {
        const A* const from = p.readout.at<const A>(o, first);
        A* const to = data_.data() + first * outputs_ + o * kFlyChunk;
        if (times_gain) {
          vectors<A>().scale(units, p.gain.at<const A>(0, first), from, to);
        } else {
          std::copy_n(from, units, to);
        }
      }
    });
  }

  /// Of the chunk that `first` begins.
  const A* at(int64_t first) const { return data_.data() + first * outputs_; }

 private:
  const int64_t outputs_;
  const Scratch<A> data_;
};

/// Refuses tasks outside [0, T).
inline void check_fly_tasks(const char* op, const FlyHashParams& p) {
  for (int64_t b = 0; p.task && b < p.batch; ++b) {
    const int64_t t = *p.task.at<const int64_t>(b);
    TORCH_CHECK_VALUE(t >= 0 && t < p.tasks, op, ": expected task with entries in [0, T) = [0, ", p.tasks, "), got ",
                      t);
  }
}

/// Up to kFlyPanel blocks of samples, transposed. Each sample is shifted so that the mean over the units is 0.
template <class T>
class FlyPanel {
 public:
  using A = acc_t<T>;
  static constexpr int64_t kBlock = kFlyBlock<A>;

  FlyPanel(const FlyHashParams& p, const FlyIndex<A>& index)
      : p_(p), index_(index), most_(std::min(kFlyPanel, ceil_div(p.batch, kBlock))), x_(most_ * p.inputs * kBlock) {}

  /// Samples from `first` on; calls of one panel follow one another.
  void load(int64_t first) {
    first_ = first;
    blocks = std::min(most_, ceil_div(p_.batch - first, kBlock));
    parallel(blocks, 1e-10 * double(p_.inputs * kBlock), [&](int64_t i) {
      transpose(p_.input, p_.inputs, i, x_.data() + i * p_.inputs * kBlock);
      fly_hash_vectors<T>().centre(p_.inputs, index_.count.data(), A(p_.units) * A(p_.arity),
                                   x_.data() + i * p_.inputs * kBlock);
    });
  }

  int64_t sample(int64_t block) const { return first_ + block * kBlock; }
  int64_t samples(int64_t block) const { return std::min(kBlock, p_.batch - sample(block)); }
  /// Blocks with as many samples as lanes; they come first.
  int64_t full_blocks() const { return samples(blocks - 1) == kBlock ? blocks : blocks - 1; }
  const A* x(int64_t block) const { return x_.data() + block * p_.inputs * kBlock; }

  /// to[d][s] = from[sample(block) + s][first + d], and 0 where there is no sample
  void transpose(const View& from, int64_t depth, int64_t block, A* to, int64_t first = 0) const {
    const T* rows[kBlock] = {};
    for (int64_t s = 0; s < samples(block); ++s) rows[s] = from.at<const T>(sample(block) + s, first);
    vectors<T>().transpose_wide(kBlock, depth, rows, to, kBlock);
  }

  /// The block's activity of units [first, first + units): times the gain, if there is one to apply.
  void hash(int64_t block, int64_t first, int64_t units, bool modulated, A* to) const {
    const A* const shared = modulated && !p_.task ? p_.gain.at<A>(0, first) : nullptr;
    fly_hash_vectors<T>().hash(units, p_.arity, index_.data() + first * p_.arity, x(block), shared, to);
    if (modulated && p_.task) modulate(block, first, units, to);
  }

  /// to[u][s] *= gain[t(s)][first + u], units at most kFlyChunk
  void modulate(int64_t block, int64_t first, int64_t units, A* to) const {
    FlyChunk<A> gain;
    gains(block, first, units, gain.at);
    vectors<A>().scale(units * kBlock, gain.at, to, to);
  }

  /// to[u][s] = gain[t(s)][first + u], units at most kFlyChunk
  void gains(int64_t block, int64_t first, int64_t units, A* to) const {
    const A* rows[kBlock] = {};
    for (int64_t s = 0; s < samples(block); ++s) rows[s] = p_.gain.at<A>(task(block, s), first);
    vectors<A>().transpose(kBlock, units, rows, to, kBlock);
  }

  /// sum[o][s] += what units [first, last) add to the outputs; the readout is times the gain, if samples share it.
  void read_out(int64_t block, int64_t first, int64_t last, const FlyReadout<A>& readout, A* sum) const {
    const auto& ops = fly_hash_vectors<T>();
    if (!p_.task) {
      ops.read_out(last - first, p_.arity, index_.data() + first * p_.arity, x(block), p_.outputs, readout.at(first),
                   sum);
      return;
    }
    FlyChunk<A> h, gain;
    for (; first < last; first += kFlyChunk) {
      const int64_t units = std::min(kFlyChunk, last - first);
      hash(block, first, units, false, h.at);
      gains(block, first, units, gain.at);
      ops.read_out_each(units, p_.outputs, readout.at(first), gain.at, h.at, sum);
    }
  }

  /// sum[u][l] += units [first, last) times their signal, in halves of a block; the first of `sum` is of unit `first`.
  void add_products(int64_t block, int64_t first, int64_t last, const FlyReadout<A>& readout, const A* grad,
                    A* sum) const {
    fly_hash_vectors<T>().add_products(last - first, p_.arity, index_.data() + first * p_.arity, x(block), p_.outputs,
                                       readout.at(first), grad, sum);
  }

  /// The samples' rows of a result, from column `first` on, written from [columns, kBlock].
  void store(int64_t block, const A* from, int64_t columns, const View& to, int64_t first = 0) const {
    T* rows[kBlock];
    for (int64_t s = 0; s < samples(block); ++s) rows[s] = to.at<T>(sample(block) + s, first);
    vectors<T>().narrow_transposed(columns, samples(block), kBlock, from, rows);
  }

  int64_t task(int64_t block, int64_t s) const { return p_.task ? *p_.task.at<const int64_t>(sample(block) + s) : 0; }

  int64_t blocks = 0;

 private:
  const FlyHashParams& p_;
  const FlyIndex<A>& index_;
  const int64_t most_;
  const Scratch<A> x_;
  int64_t first_ = 0;
};

}  // namespace neuromod
