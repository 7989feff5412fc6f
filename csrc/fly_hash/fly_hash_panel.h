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

constexpr int64_t kFlyPanel = 8;   // blocks of samples that are held transposed at a time
constexpr int64_t kFlyChunk = 64;  // units that go through all steps while in cache

/// A chunk of units of one block of samples, in either order.
template <class A>
struct FlyChunk {
  alignas(64) A at[kFlyChunk * kFlyBlock<A>];
};

/// The index in 32 bits, checked, and how often each input occurs in it: with that the mean over the units is a short
/// sum over the inputs, and known before the first unit is.
template <class A>
class FlyIndex {
 public:
  FlyIndex(const char* op, const FlyHashParams& p)
      : count(p.inputs), narrowed_(p.long_index ? p.units * p.arity : 0), data_(p.index.at<const int32_t>(0)) {
    const int64_t n = p.units * p.arity;
    bool within;
    if (p.long_index) {
      within = fly_hash_vectors<A>().narrow(n, p.index.at<const int64_t>(0), p.inputs, narrowed_.data());
      data_ = narrowed_.data();
    } else {
      within = fly_hash_vectors<A>().within(n, data_, p.inputs);
    }
    if (!within) refuse(op, p);
    constexpr int64_t parts = 4;
    const Scratch<int32_t> counts(parts * p.inputs);
    parallel(parts, 1e-9 * double(n / parts), [&](int64_t part) {
      int32_t* const mine = counts.data() + part * p.inputs;
      std::fill_n(mine, p.inputs, 0);
      for (int64_t i = n * part / parts; i < n * (part + 1) / parts; ++i) ++mine[data_[i]];
    });
    for (int64_t i = 0; i < p.inputs; ++i) {
      int64_t total = 0;
      for (int64_t part = 0; part < parts; ++part) total += counts[part * p.inputs + i];
      count[i] = A(total);
    }
  }

  const int32_t* data() const { return data_; }
  const Scratch<A> count;  // [inputs]

 private:
  [[noreturn]] static void refuse(const char* op, const FlyHashParams& p) {
    int64_t i = 0, value = 0;
    do {
      value = p.long_index ? *p.index.at<const int64_t>(0, i) : *p.index.at<const int32_t>(0, i);
      ++i;
    } while (value >= 0 && value < p.inputs);
    TORCH_CHECK_VALUE(false, op, ": expected index with entries in [0, I) = [0, ", p.inputs, "), got ", value);
  }

  const Scratch<int32_t> narrowed_;
  const int32_t* data_;
};

/// Refuses tasks outside [0, T).
inline void check_fly_tasks(const char* op, const FlyHashParams& p) {
  for (int64_t b = 0; p.task && b < p.batch; ++b) {
    const int64_t t = *p.task.at<const int64_t>(b);
    TORCH_CHECK_VALUE(t >= 0 && t < p.tasks, op, ": expected task with entries in [0, T) = [0, ", p.tasks, "), got ",
                      t);
  }
}

/// Up to kFlyPanel blocks of samples, transposed, and each sample's mean.
template <class T>
class FlyPanel {
 public:
  using A = acc_t<T>;
  static constexpr int64_t kBlock = kFlyBlock<A>;

  FlyPanel(const FlyHashParams& p, const FlyIndex<A>& index)
      : p_(p),
        index_(index),
        most_(std::min(kFlyPanel, ceil_div(p.batch, kBlock))),
        x_(most_ * p.inputs * kBlock),
        mean_(most_ * kBlock) {}

  /// Samples from `first` on; calls of one panel follow one another.
  void load(int64_t first) {
    first_ = first;
    blocks = std::min(most_, ceil_div(p_.batch - first, kBlock));
    parallel(blocks, 1e-10 * double(p_.inputs * kBlock), [&](int64_t i) {
      transpose(p_.input, p_.inputs, i, x_.data() + i * p_.inputs * kBlock);
      A* const mean = mean_.data() + i * kBlock;
      fly_hash_vectors<T>().weighted_sum(p_.inputs, index_.count.data(), x(i), mean);
      for (int64_t s = 0; s < kBlock; ++s) mean[s] /= A(p_.units);
    });
  }

  int64_t sample(int64_t block) const { return first_ + block * kBlock; }
  int64_t samples(int64_t block) const { return std::min(kBlock, p_.batch - sample(block)); }
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
    fly_hash_vectors<T>().hash(units, p_.arity, index_.data() + first * p_.arity, x(block),
                               mean_.data() + block * kBlock, shared, to);
    if (modulated && p_.task) modulate(block, first, units, to);
  }

  /// to[u][s] *= gain[t(s)][first + u], units at most kFlyChunk
  void modulate(int64_t block, int64_t first, int64_t units, A* to) const {
    const A* rows[kBlock] = {};
    for (int64_t s = 0; s < samples(block); ++s) rows[s] = p_.gain.at<A>(task(block, s), first);
    FlyChunk<A> gain;
    vectors<A>().transpose(kBlock, units, rows, gain.at, kBlock);
    vectors<A>().scale(units * kBlock, gain.at, to, to);
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
  const Scratch<A> x_, mean_;
  int64_t first_ = 0;
};

}  // namespace neuromod
