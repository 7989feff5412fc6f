// Row operations of fly_hash on the CPU, written once (fly_hash_vector.cpp) and compiled for each instruction set.
//
// A block holds kFlyBlock samples side by side: a lane is a sample. An input is a row of a block, so to gather inputs
// is to load rows; a unit is a row, too.
#pragma once

#include <cstdint>

namespace neuromod {

template <class A>
constexpr int64_t kFlyBlock = 128 / sizeof(A);

/// In all, rows of a block are dense.
template <class A>
class FlyHashOps {
 public:
  /// Whether all of an index lies in [0, limit), and to[i] = index[i] if it does.
  virtual bool narrow(int64_t n, const int64_t* index, int64_t limit, int32_t* to) const = 0;
  virtual bool within(int64_t n, const int32_t* index, int64_t limit) const = 0;
  /// to[s] = sum_i count[i] x[i][s], over inputs whose count is not 0
  virtual void weighted_sum(int64_t inputs, const A* count, const A* x, A* to) const = 0;
  /// to[u][s] = gain[u] relu(sum_k x[index[u][k]][s] - mean[s]); no gain if null
  virtual void hash(int64_t units, int64_t arity, const int32_t* index, const A* x, const A* mean, const A* gain,
                    A* to) const = 0;
  /// sum[o][s] += sum_u readout[o][u] h[u][s], rows of readout `stride` apart
  virtual void read_out(int64_t units, int64_t outputs, const A* readout, int64_t stride, const A* h, A* sum) const = 0;
  /// to[u][s] = sum_o readout[o][u] grad[o][s]
  virtual void signal(int64_t units, int64_t outputs, const A* readout, int64_t stride, const A* grad, A* to) const = 0;
  /// sum[u][l] += h[u][l] signal[u][l] + h[u][l + kFlyBlock / 2] signal[u][l + kFlyBlock / 2]
  virtual void add_products(int64_t units, const A* h, const A* signal, A* sum) const = 0;
  /// signal[u][s] = (h[u][s] <= 0 ? 0 : gain[u] signal[u][s]); no gain if null
  virtual void mask(int64_t units, const A* h, const A* gain, A* signal) const = 0;
  /// x[index[u][k]][s] += grad[u][s] and total[s] += grad[u][s]
  virtual void scatter(int64_t units, int64_t arity, const int32_t* index, const A* grad, A* x, A* total) const = 0;
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
