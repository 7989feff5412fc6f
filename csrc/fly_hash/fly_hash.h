// fly_hash: a wide sparse binary projection of the input, centred and rectified, and fly_readout, which modulates and
// reads it out without writing it.
//
//   m[b,j] = sum_k x[b, index[j,k]]                 a few inputs for each of many units
//   h[b,j] = relu(m[b,j] - mean_j m[b,j])           fly_hash
//   y[b,o] = sum_j R[o,j] v[t(b),j] h[b,j]          fly_readout; t(b) = 0 without tasks
//
// Gradients, with the gradient q[b,j] of h (that of fly_readout: v[t(b),j] r[b,j], r[b,j] = sum_o R[o,j] g[b,o]):
//
//   dm[b,j] = (h[b,j] <= 0 ? 0 : q[b,j]), less its mean over j
//   dx[b,i] = sum_{j,k: index[j,k] = i} dm[b,j]
//   dv[t,j] = sum_{b: t(b) = t} h[b,j] r[b,j]       dR[o,j] = sum_b g[b,o] v[t(b),j] h[b,j]
//
// NaN passes the rectifier, as it does in torch.relu and its derivative.
#pragma once

#include "common/params.h"

namespace neuromod {

constexpr int64_t kMostFlyInputs = (int64_t(1) << 28) - 1;  // offsets of rows have 32 bits

/// What all passes read. Kernels on the CPU get readout and gain in the accumulation type, rows of unit stride, and an
/// index that has been checked.
struct FlyHashParams {
  DType dtype;      // of the input and of results
  bool long_index;  // int64, else int32
  int64_t batch;    // b
  int64_t inputs;   // i
  int64_t units;    // j
  int64_t arity;    // k
  int64_t outputs;  // o; 0 for fly_hash
  int64_t tasks;    // t
  View input;       // [batch, inputs], last stride 1
  View index;       // [units, arity], dense
  View gain;        // [tasks, units]; null for fly_hash
  View readout;     // [outputs, units]; null for fly_hash
  View task;        // [batch], int64, or null
  View output;      // [batch, units] of fly_hash, [batch, outputs] of fly_readout; dense
};

struct FlyHashBackwardParams {
  FlyHashParams forward;  // output unused
  View grad;              // of the output, last stride 1
  View grad_input;        // [batch, inputs], dense, or null
  View grad_gain;         // [tasks, units], dense, or null
  View grad_readout;      // [outputs, units], dense, or null
  // CUDA only
  const int64_t* starts;  // [inputs + 1]: where each input's units begin in `members`; for grad_input
  const int64_t* members;
  void* mean;  // [batch], accumulation type
  void* sums;  // [tasks, units], accumulation type; for grad_gain with tasks
  void* rows;  // [fly_hash_rows(batch), units], accumulation type; for grad_input
};

/// How many samples' gradients of units the CUDA kernel keeps at a time.
inline int64_t fly_hash_rows(int64_t batch) { return batch < 1024 ? batch : 1024; }

void fly_hash_cpu(const FlyHashParams& p);
void fly_hash_backward_cpu(const FlyHashBackwardParams& p);

int launch_fly_hash(const FlyHashParams& p, stream_t stream);
int launch_fly_hash_backward(const FlyHashBackwardParams& p, stream_t stream);

}  // namespace neuromod
