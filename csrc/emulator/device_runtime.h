// What a kernel's thread may ask of the emulator: where it is, to wait, to show its warp a value, to give up.
// Everything device_functions.h offers is built from these few calls; a new warp-wide instruction needs one
// WarpExchange of its operands and no change to the scheduler.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>

#include "emulator/cuda_types.h"

namespace neuromod::emulator {

// __thread, not thread_local: an extern thread_local is reached through a wrapper that checks for dynamic
// initialisation each time, and these are read in the innermost loops.
extern __thread uint3 threadIdx, blockIdx;
extern __thread dim3 blockDim, gridDim;
constexpr int warpSize = 32;

/// Where in the kernel's source a call stands. As the last, defaulted parameter it names the caller's line.
struct CallSite {
  const char* file;
  int line;
  static constexpr CallSite here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

/// Suspends the calling thread until every thread of its block (its warp) waits at the same line.
void wait_for_block(const char* operation, CallSite site);
void wait_for_warp(const char* operation, CallSite site);

/// Ends the launch: the host receives a std::runtime_error. This, not `throw`, is how a kernel's thread reports a
/// mistake, since an exception cannot leave a fiber.
[[noreturn]] void fail(const char* message, CallSite site);

/// The running block's dynamic shared memory.
void* dynamic_shared();

/// cp.async of the calling thread (async_copies.h): to start one copy, to close the open group, to wait for all groups
/// but the newest. A thread that ends with a copy under way ends the launch.
void start_copy(void* to, const void* from, unsigned bytes, unsigned valid, CallSite site);
void commit_copies();
void wait_for_copies(unsigned newest);

/// The most bytes one lane can show its warp at once: the A and B fragments of one m16n8k16 product fit.
constexpr size_t kExchangeBytes = 32;

/// Stores a value where the warp can read it and returns the slot's number; published() finds `lane`'s value in that
/// slot, or null if the warp has no such lane. See WarpExchange for the order of calls.
unsigned publish(const void* value, size_t bytes);
const void* published(unsigned lane, unsigned slot);

/// Whether the calling lane is the one of its warp that runs first after an exchange: what it then does is done before
/// any other lane goes on.
bool first_of_warp();

/// One value from each lane of the calling warp, readable by all of them.
///
/// One barrier an exchange is enough because slots alternate: a lane that runs ahead publishes into the other slot, and
/// it cannot come back to this one before the whole warp has passed the next exchange's barrier.
template <class T>
class WarpExchange {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kExchangeBytes);

 public:
  WarpExchange(const T& value, const char* operation, CallSite site) : slot_(publish(&value, sizeof(T))) {
    wait_for_warp(operation, site);
  }

  bool has(unsigned lane) const { return published(lane, slot_) != nullptr; }

  /// What `lane` published. A lane the block does not have yields 0xFF bytes (NaN): on a GPU it is undefined.
  T operator[](unsigned lane) const {
    T value;
    if (const void* source = published(lane, slot_)) {
      std::memcpy(&value, source, sizeof(T));
    } else {
      std::memset(static_cast<void*>(&value), 0xFF, sizeof(T));
    }
    return value;
  }

 private:
  unsigned slot_;
};

/// The thread's position in its block, x fastest: the order in which CUDA fills warps.
inline unsigned linear_thread_index() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

}  // namespace neuromod::emulator

using neuromod::emulator::blockDim;
using neuromod::emulator::blockIdx;
using neuromod::emulator::gridDim;
using neuromod::emulator::threadIdx;
using neuromod::emulator::warpSize;
