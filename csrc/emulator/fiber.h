// A flow of control with a stack of its own, switched by hand. Private to the emulator.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define NEUROMOD_FIBER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define NEUROMOD_FIBER_ASAN 1
#endif
#endif

// Elsewhere, or on request, ucontext: portable, but each switch costs two system calls (it saves the signal mask).
#if defined(__x86_64__) && defined(__ELF__) && !defined(NEUROMOD_FIBER_UCONTEXT)
#define NEUROMOD_FIBER_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

namespace neuromod::emulator {

/// Where a suspended flow of control goes on. Default-constructed it stands for the calling thread's own stack, which
/// the first switch away from it fills in.
class FiberContext {
 public:
  /// Makes the next switch to this context call `entry` on the given stack. `entry` must begin with arrive() and end
  /// with leave(). Whatever ran on the stack before is forgotten, unfinished or not; no destructor runs.
  void start(unsigned char* stack, size_t bytes, void (*entry)());

  /// Suspends the caller in `from` and goes on in `to`; returns when something switches back to `from`.
  static void resume(FiberContext& from, FiberContext& to);

  /// A new fiber's first act: takes note, for AddressSanitizer, of the stack it was resumed from.
  static void arrive(FiberContext& resumer);

  /// A fiber's last act: goes on in `to` for good.
  [[noreturn]] static void leave(FiberContext& from, FiberContext& to);

 private:
  static void switch_stacks(FiberContext& from, FiberContext& to);

#if defined(NEUROMOD_FIBER_ASSEMBLY)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t registers_ = {};
#endif
#if defined(NEUROMOD_FIBER_ASAN)
  void* fake_stack_ = nullptr;
  const void* stack_bottom_ = nullptr;
  size_t stack_bytes_ = 0;
#endif
};

}  // namespace neuromod::emulator
