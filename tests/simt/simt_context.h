// Fibers for simt.h: their stacks, the switch between them, and the calls that inform the sanitizers of it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#endif

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && defined(__ELF__) && !defined(SIMT_UCONTEXT)
#define SIMT_X86_64 1
#else
#include <ucontext.h>
#endif

#ifdef SIMT_X86_64
// void simt_switch_stack(void** from, void* to). It ends with a jump instead of a return, since the branch predictor
// mispredicts a return to a place that did not call.
asm(R"(
  .pushsection .text.simt_switch_stack, "axG", @progbits, simt_switch_stack, comdat
  .weak simt_switch_stack
  .hidden simt_switch_stack
  .type simt_switch_stack, @function
simt_switch_stack:
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
  jmp *%rcx
  .size simt_switch_stack, . - simt_switch_stack
  .popsection
)");
extern "C" __attribute__((visibility("hidden"))) void simt_switch_stack(void** from, void* to);
#endif

namespace simt {

#ifdef SIMT_ASAN
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

struct Context {
#ifdef SIMT_X86_64
  void* stack_pointer;
#else
  ucontext_t registers;
#endif
#ifdef SIMT_ASAN
  void* fake_stack;
  const void* bottom;
  size_t size;
#endif
};

// The lowest page is inaccessible, so that a stack overflow faults there.
inline unsigned char* new_stack() {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  mprotect(stack, size_t(sysconf(_SC_PAGESIZE)), PROT_NONE);
  return static_cast<unsigned char*>(stack);
}

// Stacks begin at staggered offsets: at equal addresses modulo 4096 they would all map to a few sets of the cache.
inline void prepare_context(Context& context, unsigned char* stack, unsigned number, void (*entry)()) {
  const size_t size = kStackBytes - number % 32 * 128;
#ifdef SIMT_X86_64
  void** top = reinterpret_cast<void**>(stack + size) - 1;  // 8 modulo 16, as a call leaves it
  top[0] = nullptr;                                         // a return address of null ends backtraces
  top[-1] = reinterpret_cast<void*>(entry);
  for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
  context.stack_pointer = top - 7;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = size;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#endif
#ifdef SIMT_ASAN
  // Removes the marks of the stack frames in which the previous fiber on this stack ended, since they never returned.
  __asan_unpoison_memory_region(stack + size - 4096, 4096);
  context.fake_stack = nullptr;
  context.bottom = stack;
  context.size = size;
#endif
}

// last: `from` will never be resumed.
inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool last) {
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#ifdef SIMT_X86_64
  simt_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The scheduler's stack is that of the OS thread. The first fiber that the scheduler starts records its bounds.
inline void forget_stack([[maybe_unused]] Context& scheduler) {
#ifdef SIMT_ASAN
  scheduler.bottom = nullptr;
#endif
}

inline void start_context([[maybe_unused]] Context& scheduler) {
#ifdef SIMT_ASAN
  const bool first = !scheduler.bottom;
  __sanitizer_finish_switch_fiber(nullptr, first ? &scheduler.bottom : nullptr, first ? &scheduler.size : nullptr);
#endif
}

}  // namespace simt
