// Switching between the stacks of emulated threads: `emulator_switch` and `prepare_stack`. Included by engine.cpp only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

#include "engine.hpp"

namespace emulator {

constexpr size_t kStackBytes = 256 * 1024;

#if defined(__x86_64__)
// Saves what a callee must keep, stores the stack pointer through the first argument, continues at the second.
extern "C" void emulator_switch(void** save, void* resume);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
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
  ret
.size emulator_switch, .-emulator_switch
)");
static void* prepare_stack(char* top, void (*start)()) {
  auto** slot = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
  *--slot = nullptr;  // the return address of `start`, which never returns; also aligns the stack as after a call
  *--slot = reinterpret_cast<void*>(start);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  return slot;
}
#elif defined(__aarch64__)
extern "C" void emulator_switch(void** save, void* resume);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, %function
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulator_switch, .-emulator_switch
)");
static void* prepare_stack(char* top, void (*start)()) {
  char* sp = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15)) - 160;
  memset(sp, 0, 160);
  *reinterpret_cast<void**>(sp + 88) = reinterpret_cast<void*>(start);  // x30, where `ret` goes
  return sp;
}
#else
// Any other machine: slower, through the C library. The "stack pointer" is a ucontext_t.
static ucontext_t contexts[kMaxThreads + 1];
static unsigned contexts_used = 0;
static void* current_context = &contexts[kMaxThreads];
extern "C" void emulator_switch(void** save, void* resume) {
  *save = current_context;
  auto* from = static_cast<ucontext_t*>(current_context);
  current_context = resume;
  swapcontext(from, static_cast<ucontext_t*>(resume));
}
static void* prepare_stack(char* top, void (*start)()) {
  ucontext_t* context = &contexts[contexts_used++ % kMaxThreads];
  getcontext(context);
  context->uc_stack.ss_sp = top - kStackBytes + 4096;
  context->uc_stack.ss_size = kStackBytes - 4096;
  context->uc_link = nullptr;
  makecontext(context, start, 0);
  return context;
}
#endif

}  // namespace emulator
