// Runs CUDA kernels on the CPU, for tests: each thread of a block is a fiber, blocks are spread over OpenMP's threads.
// README.md says what this catches, what it does not, and the rules a kernel must follow.
#pragma once

#include <cstddef>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator/cuda_types.h"
#include "emulator/device_functions.h"
#include "emulator/device_runtime.h"
#include "emulator/half_types.h"

namespace neuromod::emulator {

/// The order in which blocks, a block's warps and a warp's lanes run between two barriers. A kernel that is right in
/// one order only is missing a barrier, so tests run in both.
enum class LaneOrder { forward, reversed };

/// Process-wide; holds for launches that begin afterwards.
void set_lane_order(LaneOrder order);
LaneOrder lane_order();

struct Launch {
  const char* kernel;  // its name, for messages
  dim3 grid, block;
  size_t shared_bytes;
  std::function<void()> thread;  // what one thread runs
};

/// Runs a whole grid and returns when it is done. Throws std::runtime_error for a launch a GPU would refuse and for a
/// mistake the scheduler noticed (divergent barrier, partial mask, failed check).
void run_grid(const Launch& launch);

/// The emulator's <<<grid, block, shared_bytes, stream>>>: holds the configuration, the call brings the arguments.
template <class... Parameters>
class ConfiguredKernel {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...),
                "kernel parameters are copied to the GPU byte for byte: pass plain values and structs");

 public:
  ConfiguredKernel(void (*kernel)(Parameters...), const char* name, dim3 grid, dim3 block, size_t shared_bytes)
      : kernel_(kernel), launch_{name, grid, block, shared_bytes, nullptr} {}

  /// Arguments are evaluated and converted once, on the host; each thread gets its own copy, as on the GPU.
  template <class... Arguments>
  void operator()(Arguments&&... arguments) {
    const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
    launch_.thread = [this, &parameters] { std::apply(kernel_, parameters); };
    run_grid(launch_);
  }

 private:
  void (*kernel_)(Parameters...);
  Launch launch_;
};

/// The stream is ignored: a launch is finished when it returns.
template <class... Parameters>
ConfiguredKernel<Parameters...> configure(void (*kernel)(Parameters...), const char* name, dim3 grid, dim3 block,
                                          size_t shared_bytes, cudaStream_t) {
  return {kernel, name, grid, block, shared_bytes};
}

}  // namespace neuromod::emulator
