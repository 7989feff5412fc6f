#include "emulator/emulator.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/async_copies.h"
#include "emulator/fiber.h"

namespace neuromod::emulator {

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace {

constexpr unsigned kWarpSize = static_cast<unsigned>(warpSize);
constexpr size_t kSharedAlignment = 128;

// ASan's red zones make frames several times larger.
#if defined(NEUROMOD_FIBER_ASAN)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
// Stacks a power of two apart would keep all threads' hot frames in the same few cache sets.
constexpr size_t kStackStride = kStackBytes + 9 * 64;
constexpr uint64_t kCanary = 0x5afe57acc0ffee11;

std::atomic<LaneOrder> g_lane_order{LaneOrder::forward};

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}
std::string text(CallSite site) { return std::string(site.file) + ":" + std::to_string(site.line); }

/// The index that `linear` stands for in a box of the given size, x fastest.
uint3 unravel(uint64_t linear, dim3 size) {
  const uint64_t plane = uint64_t{size.x} * size.y;
  return {static_cast<unsigned>(linear % size.x), static_cast<unsigned>(linear / size.x % size.y),
          static_cast<unsigned>(linear / plane)};
}

/// Whether two literals read the same. The same literal has one address almost always, so this is cheap.
bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

enum class FiberState { ready, waiting_for_warp, waiting_for_block, finished };

/// One CUDA thread of the running block.
struct Fiber {
  FiberContext context;
  FiberState state;
  uint3 thread_index;
  const char* operation;  // what it waits at, and where
  CallSite site;
  unsigned exchanges;  // published so far; the next one's slot is its lowest bit
  alignas(16) unsigned char slots[2][kExchangeBytes];
  AsyncCopies copies;

  bool waiting() const { return state == FiberState::waiting_for_warp || state == FiberState::waiting_for_block; }

  bool waits_with(const Fiber& other) const {
    return state == other.state && site.line == other.site.line && same(operation, other.operation) &&
           same(site.file, other.site.file);
  }

  std::string status() const {
    if (!waiting()) return "thread " + text(thread_index) + " has finished";
    return "thread " + text(thread_index) + " waits at " + operation + " (" + text(site) + ")";
  }
};

/// Dynamic shared memory of one block: its exact size, so that ASan sees the first byte too many, a new allocation for
/// each block, and filled with NaN, so that a read before the first write shows.
class DynamicShared {
 public:
  explicit DynamicShared(size_t bytes) {
    if (posix_memalign(&data_, kSharedAlignment, bytes) != 0) throw std::bad_alloc();
    std::memset(data_, 0xFF, bytes);
  }
  ~DynamicShared() { std::free(data_); }
  DynamicShared(const DynamicShared&) = delete;
  DynamicShared& operator=(const DynamicShared&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

/// Runs blocks one after another on the operating-system thread that owns it.
///
/// Each warp runs until all its lanes wait for the block or have finished; when every warp is there, the block barrier
/// opens. So whatever cannot go on is noticed at once, and there is no deadlock to time out on. The rule is stricter
/// than recent GPUs': all threads must wait at the same line, and none may have finished while others wait.
class BlockScheduler {
 public:
  static BlockScheduler& of_this_thread();

  void run(const Launch& launch, uint3 block_index, LaneOrder order);

  // The rest is called from the running fiber.
  void wait(FiberState state, const char* operation, CallSite site);
  [[noreturn]] void fail(const char* message, CallSite site);
  unsigned publish(const void* value, size_t bytes);
  const void* published(unsigned lane, unsigned slot) const;
  void* dynamic_shared() const { return shared_->data(); }
  AsyncCopies& copies() { return running_->copies; }
  bool first_of_warp() const;

 private:
  static void fiber_main() noexcept;
  void start_fibers();
  void run_warp(unsigned first);
  void resume(Fiber& fiber);
  void release(unsigned first, unsigned end);
  unsigned in_order(unsigned i, unsigned count) const { return order_ == LaneOrder::forward ? i : count - 1 - i; }
  unsigned running_index() const { return static_cast<unsigned>(running_ - fibers_.data()); }
  std::string place() const { return std::string("emulator: ") + launch_->kernel + ", block " + text(blockIdx) + ": "; }
  uint64_t& canary(unsigned i) { return *reinterpret_cast<uint64_t*>(stacks_.get() + i * kStackStride); }

  const Launch* launch_ = nullptr;
  LaneOrder order_ = LaneOrder::forward;
  unsigned count_ = 0;  // threads of the running block
  std::vector<Fiber> fibers_;
  std::unique_ptr<unsigned char[]> stacks_;
  FiberContext scheduler_;
  Fiber* running_ = nullptr;
  DynamicShared* shared_ = nullptr;
  std::string failure_;
};

// The scheduler whose fiber runs on this thread; null outside of kernels.
__thread BlockScheduler* g_scheduler = nullptr;

BlockScheduler& BlockScheduler::of_this_thread() {
  static thread_local BlockScheduler scheduler;
  return scheduler;
}

BlockScheduler& running_block() {
  if (g_scheduler == nullptr) throw std::runtime_error("emulator: a device function was called outside of a kernel");
  return *g_scheduler;
}

void BlockScheduler::run(const Launch& launch, uint3 block_index, LaneOrder order) {
  DynamicShared shared(launch.shared_bytes);
  launch_ = &launch;
  order_ = order;
  shared_ = &shared;
  blockIdx = block_index;
  blockDim = launch.block;
  gridDim = launch.grid;
  failure_.clear();
  start_fibers();

  const unsigned warps = (count_ + kWarpSize - 1) / kWarpSize;
  for (;;) {
    for (unsigned i = 0; i < warps; ++i) run_warp(in_order(i, warps) * kWarpSize);
    const bool any_waiting =
        std::any_of(fibers_.begin(), fibers_.begin() + count_, [](const Fiber& fiber) { return fiber.waiting(); });
    if (!any_waiting) return;
    release(0, count_);
  }
}

void BlockScheduler::start_fibers() {
  count_ = launch_->block.x * launch_->block.y * launch_->block.z;
  if (fibers_.size() < count_) {
    fibers_.resize(count_);
    stacks_.reset(new unsigned char[count_ * kStackStride]);
  }
  for (unsigned i = 0; i < count_; ++i) {
    Fiber& fiber = fibers_[i];
    fiber.state = FiberState::ready;
    fiber.thread_index = unravel(i, launch_->block);
    fiber.exchanges = 0;
    fiber.copies.forget();
    fiber.context.start(stacks_.get() + i * kStackStride, kStackBytes, &BlockScheduler::fiber_main);
    canary(i) = kCanary;
  }
}

/// Resumes a warp's lanes until none of them can run without the rest of the block.
void BlockScheduler::run_warp(unsigned first) {
  const unsigned end = std::min(first + kWarpSize, count_), lanes = end - first;
  for (;;) {
    bool warp_waits = false;
    for (unsigned i = 0; i < lanes; ++i) {
      Fiber& fiber = fibers_[first + in_order(i, lanes)];
      if (fiber.state == FiberState::ready) resume(fiber);
      warp_waits |= fiber.state == FiberState::waiting_for_warp;
    }
    if (!warp_waits) return;
    release(first, end);
  }
}

void BlockScheduler::resume(Fiber& fiber) {
  running_ = &fiber;
  threadIdx = fiber.thread_index;
  g_scheduler = this;
  FiberContext::resume(scheduler_, fiber.context);
  g_scheduler = nullptr;
  if (canary(running_index()) != kCanary) {
    // Memory beyond the stack is already overwritten, so there is nothing sound to go on with.
    std::fprintf(stderr, "%sthread %s needs more than %zu bytes of stack\n", place().c_str(),
                 text(fiber.thread_index).c_str(), kStackBytes);
    std::abort();
  }
  if (!failure_.empty()) throw std::runtime_error(failure_);
}

/// Opens a barrier for fibers [first, end), none of which can run, if they all wait at the same one.
void BlockScheduler::release(unsigned first, unsigned end) {
  const Fiber& waiting =
      *std::find_if(fibers_.begin() + first, fibers_.begin() + end, [](const Fiber& fiber) { return fiber.waiting(); });
  for (unsigned i = first; i < end; ++i) {
    if (fibers_[i].waits_with(waiting)) continue;
    throw std::runtime_error(place() + "divergent barrier: " + waiting.status() + " while " + fibers_[i].status());
  }
  for (unsigned i = first; i < end; ++i) fibers_[i].state = FiberState::ready;
}

/// noexcept: an exception could not be unwound beyond this frame, so it ends the process here, by std::terminate.
void BlockScheduler::fiber_main() noexcept {
  BlockScheduler& block = *g_scheduler;
  FiberContext::arrive(block.scheduler_);
  block.launch_->thread();
  if (const CallSite* const site = block.copies().pending()) block.fail("cp.async that no wait has completed", *site);
  block.running_->state = FiberState::finished;
  FiberContext::leave(block.running_->context, block.scheduler_);
}

void BlockScheduler::wait(FiberState state, const char* operation, CallSite site) {
  running_->state = state;
  running_->operation = operation;
  running_->site = site;
  FiberContext::resume(running_->context, scheduler_);
}

void BlockScheduler::fail(const char* message, CallSite site) {
  failure_ = place() + "thread " + text(running_->thread_index) + ": " + message + " (" + text(site) + ")";
  FiberContext::leave(running_->context, scheduler_);
}

unsigned BlockScheduler::publish(const void* value, size_t bytes) {
  const unsigned slot = running_->exchanges++ & 1u;
  std::memcpy(running_->slots[slot], value, bytes);
  return slot;
}

const void* BlockScheduler::published(unsigned lane, unsigned slot) const {
  const unsigned i = running_index() / kWarpSize * kWarpSize + lane;
  return i < count_ ? fibers_[i].slots[slot] : nullptr;
}

bool BlockScheduler::first_of_warp() const {
  const unsigned lane = running_index() % kWarpSize, lanes = std::min(kWarpSize, count_ - (running_index() - lane));
  return lane == in_order(0, lanes);
}

void require_launchable(const Launch& launch) {
  const auto refuse = [&](const std::string& expected, const std::string& got) {
    throw std::runtime_error(std::string("emulator: ") + launch.kernel + ": expected " + expected + ", got " + got);
  };
  const dim3 grid = launch.grid, block = launch.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) {
    refuse("a block of 1 to 1024 threads, at most 64 along z", text(uint3{block.x, block.y, block.z}));
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse("a grid of at least 1 and at most 2^31 - 1 blocks along x and 65535 along y and z",
           text(uint3{grid.x, grid.y, grid.z}));
  }
  constexpr size_t kMostShared = 99 << 10;  // kSharedPerBlock of common/cuda_kernel.h
  if (launch.shared_bytes > kMostShared) {
    refuse("at most " + std::to_string(kMostShared) + " bytes of dynamic shared memory",
           std::to_string(launch.shared_bytes));
  }
}

}  // namespace

void set_lane_order(LaneOrder order) { g_lane_order = order; }
LaneOrder lane_order() { return g_lane_order; }

void wait_for_block(const char* operation, CallSite site) {
  running_block().wait(FiberState::waiting_for_block, operation, site);
}
void wait_for_warp(const char* operation, CallSite site) {
  running_block().wait(FiberState::waiting_for_warp, operation, site);
}
void fail(const char* message, CallSite site) { running_block().fail(message, site); }
void* dynamic_shared() { return running_block().dynamic_shared(); }
void start_copy(void* to, const void* from, unsigned bytes, unsigned valid, CallSite site) {
  running_block().copies().start(to, from, bytes, valid, site);
}
void commit_copies() { running_block().copies().commit(); }
void wait_for_copies(unsigned newest) { running_block().copies().wait(newest); }
bool first_of_warp() { return running_block().first_of_warp(); }
unsigned publish(const void* value, size_t bytes) { return running_block().publish(value, bytes); }
const void* published(unsigned lane, unsigned slot) { return running_block().published(lane, slot); }

void run_grid(const Launch& launch) {
  require_launchable(launch);
  const LaneOrder order = lane_order();
  const int64_t blocks = int64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  std::exception_ptr failure;  // an exception may not leave OpenMP's loop; the first one waits here
  std::atomic<bool> failed{false};

#pragma omp parallel for schedule(dynamic) if (blocks > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    if (failed) continue;
    try {
      const int64_t block = order == LaneOrder::forward ? i : blocks - 1 - i;
      BlockScheduler::of_this_thread().run(launch, unravel(static_cast<uint64_t>(block), launch.grid), order);
    } catch (...) {
#pragma omp critical(neuromod_emulator_failure)
      if (!failure) failure = std::current_exception();
      failed = true;
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace neuromod::emulator

/// set_lane_order for those who load the library, such as Python's ctypes.
extern "C" __attribute__((visibility("default"))) void neuromod_emulator_reverse_lanes(bool reversed) {
  neuromod::emulator::set_lane_order(reversed ? neuromod::emulator::LaneOrder::reversed
                                              : neuromod::emulator::LaneOrder::forward);
}
