// Row operations of fly_hash on the CPU, written once (fly_hash_vector.cpp) and compiled for each instruction set.
//
// A block holds kFlyBlock samples side by side: a lane is a sample. An input is a row of a block, so to gather inputs
// is to load rows; a unit is a row, too.
#pragma once

#include <cstdint>

namespace neuromod {

template <class A>
constexpr int64_t kFlyBlock = 128 / sizeof(A);
constexpr int64_t kFlyStep = 16;   // from row to row, in eights of bytes: an index times this is an address at no cost
constexpr int64_t kFlyChunk = 64;  // units that go through all steps while in cache

/// A chunk of units of one block of samples, in either order.
template <class A>
struct FlyChunk {
  alignas(64) A at[kFlyChunk * kFlyBlock<A>];
};

/// In all, rows of a block are dense, an index is times kFlyStep, and a readout is [outputs, kFlyChunk] for each chunk
/// of units.
template <class A>
class FlyHashOps {
 public:
  /// Whether all of an index lies in [0, limit), and to[i] = kFlyStep index[i] if it does.
  virtual bool offsets(int64_t n, const int64_t* index, int64_t limit, uint32_t* to) const = 0;
  virtual bool offsets(int64_t n, const int32_t* index, int64_t limit, uint32_t* to) const = 0;
  /// x[i][s] -= sum_i count[i] x[i][s] / terms, of inputs whose count is not 0
  virtual void centre(int64_t inputs, const A* count, A terms, A* x) const = 0;
  /// to[u][s] = gain[u] relu(sum_k x[index[u][k]][s]); no gain if null
  virtual void hash(int64_t units, int64_t arity, const uint32_t* index, const A* x, const A* gain, A* to) const = 0;
  /// sum[o][s] += sum_u readout[o][u] hash[u][s], of chunks of units one after another
  virtual void read_out(int64_t units, int64_t arity, const uint32_t* index, const A* x, int64_t outputs,
                        const A* readout, A* sum) const = 0;
  /// The same for one chunk's hash h with (readout[o][u] gain[u][s]) in place of readout[o][u].
  virtual void read_out_each(int64_t units, int64_t outputs, const A* readout, const A* gain, const A* h,
                             A* sum) const = 0;
  /// to[u][s] = sum_o readout[o][u] grad[o][s], of one chunk
  virtual void signal(int64_t units, int64_t outputs, const A* readout, const A* grad, A* to) const = 0;
  /// sum[u][l] += p[u][l] + p[u][l + kFlyBlock / 2], p = hash times signal, of chunks one after another
  virtual void add_products(int64_t units, int64_t arity, const uint32_t* index, const A* x, int64_t outputs,
                            const A* readout, const A* grad, A* sum) const = 0;
  /// signal[u][s] = (h[u][s] <= 0 ? 0 : gain[u] signal[u][s]); no gain if null
  virtual void mask(int64_t units, const A* h, const A* gain, A* signal) const = 0;
  /// x[index[u][k]][s] += grad[u][s] and total[s] += grad[u][s]
  virtual void scatter(int64_t units, int64_t arity, const uint32_t* index, const A* grad, A* x, A* total) const = 0;
  /// x[i][s] -= count[i] mean[s], of inputs whose count is not 0
  virtual void subtract(int64_t inputs, const A* count, const A* mean, A* x) const = 0;

 protected:
  ~FlyHashOps() = default;
};

/// The operations as compiled for one instruction set.
struct FlyHashVectors {
  const FlyHashOps<double>* float64;
  const FlyHashOps<float>* float32;
};

}  // namespace neuromod
