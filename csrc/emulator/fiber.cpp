#include "emulator/fiber.h"

#include <cstdint>
#include <cstdlib>

#if defined(NEUROMOD_FIBER_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(NEUROMOD_FIBER_ASSEMBLY)
// neuromod_fiber_switch(void** saved_stack_pointer, void* stack_pointer): saves the registers that the System V ABI
// lets a function keep, changes the stack, restores. All other registers are the caller's to save, so to the compiler
// this is an ordinary call. It ends in a jump because a `ret` to another stack's caller is always mispredicted, and
// makes the following ones so too: three times the cost. The floating-point control words are not switched: all fibers
// share those of the thread they run on.
extern "C" void neuromod_fiber_switch(void** saved_stack_pointer, void* stack_pointer);
asm(R"(
  .pushsection .text
  .globl neuromod_fiber_switch
  .hidden neuromod_fiber_switch
  .type neuromod_fiber_switch, @function
neuromod_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
  .size neuromod_fiber_switch, .-neuromod_fiber_switch
  .popsection
)");
#endif

namespace neuromod::emulator {

void FiberContext::start(unsigned char* stack, size_t bytes, void (*entry)()) {
#if defined(NEUROMOD_FIBER_ASAN)
  // Frames that never returned left their red zones behind.
  ASAN_UNPOISON_MEMORY_REGION(stack, bytes);
  fake_stack_ = nullptr;
  stack_bottom_ = stack;
  stack_bytes_ = bytes;
#endif
#if defined(NEUROMOD_FIBER_ASSEMBLY)
  // As the switch expects it: six saved registers, then the address it returns to. At a function's first instruction
  // the ABI wants the stack pointer 8 below a multiple of 16; the null return address ends debuggers' backtraces.
  const auto end = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
  auto** top = reinterpret_cast<void**>(end) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  stack_pointer_ = top;
#else
  if (getcontext(&registers_) != 0) std::abort();
  registers_.uc_stack.ss_sp = stack;
  registers_.uc_stack.ss_size = bytes;
  registers_.uc_link = nullptr;
  makecontext(&registers_, entry, 0);
#endif
}

void FiberContext::switch_stacks(FiberContext& from, FiberContext& to) {
#if defined(NEUROMOD_FIBER_ASSEMBLY)
  neuromod_fiber_switch(&from.stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&from.registers_, &to.registers_);
#endif
}

void FiberContext::resume(FiberContext& from, FiberContext& to) {
#if defined(NEUROMOD_FIBER_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_bottom_, to.stack_bytes_);
#endif
  switch_stacks(from, to);
#if defined(NEUROMOD_FIBER_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

void FiberContext::arrive([[maybe_unused]] FiberContext& resumer) {
#if defined(NEUROMOD_FIBER_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &resumer.stack_bottom_, &resumer.stack_bytes_);
#endif
}

void FiberContext::leave(FiberContext& from, FiberContext& to) {
#if defined(NEUROMOD_FIBER_ASAN)
  __sanitizer_start_switch_fiber(nullptr, to.stack_bottom_, to.stack_bytes_);
#endif
  switch_stacks(from, to);
  std::abort();
}

}  // namespace neuromod::emulator
