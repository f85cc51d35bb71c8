#include "fibers.h"

#include <cstring>
#include <sys/mman.h>

// Saves the callee-saved registers on the running stack, stores its pointer and continues on the other stack.
extern "C" void mtl_switch_stack(void** save_stack_pointer, void* new_stack_pointer);

#if defined(__x86_64__)
asm(R"(
.text
.globl mtl_switch_stack
.type mtl_switch_stack,@function
mtl_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mtl_switch_stack,.-mtl_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl mtl_switch_stack
mtl_switch_stack:
  sub sp, sp, #176
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
  add sp, sp, #176
  ret
)");
#else
#error "no context switch for this processor: x86-64 and aarch64 only"
#endif

namespace emulator {

Fiber* current = nullptr;
std::vector<Fiber> fibers;

static std::vector<uintptr_t> stacks;
static void* scheduler_stack_pointer;

void reserve_fibers(int count) {
  while (static_cast<int>(stacks.size()) < count) {
    void* memory =
        mmap(nullptr, stack_guard_bytes + stack_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uintptr_t stack = reinterpret_cast<uintptr_t>(memory) + stack_guard_bytes;
    mprotect(reinterpret_cast<void*>(stack), stack_bytes, PROT_READ | PROT_WRITE);
    stacks.push_back(stack);
  }
  if (static_cast<int>(fibers.size()) < count) fibers.resize(count);
}

void prepare_fiber(Fiber& fiber, int index, void (*start)()) {
  fiber.stack = stacks[index];
  uint64_t* top = reinterpret_cast<uint64_t*>(fiber.stack + stack_bytes - 64);
#if defined(__x86_64__)
  // The return address of the switch, aligned so that `start` sees the stack as after a call.
  top -= 2;
  top[0] = reinterpret_cast<uint64_t>(start);
  top[1] = 0;
  top -= 6;
  memset(top, 0, 6 * sizeof *top);
#else
  top -= 22;
  memset(top, 0, 22 * sizeof *top);
  top[11] = reinterpret_cast<uint64_t>(start);
#endif
  fiber.stack_pointer = top;
  fiber.state = State::ready;
  fiber.thread = index;
  fiber.simdgroup = index / simd_width;
  fiber.lane = index % simd_width;
  fiber.device_epoch = fiber.threadgroup_epoch = Epoch{};
}

void switch_to(Fiber& fiber) {
  current = &fiber;
  mtl_switch_stack(&scheduler_stack_pointer, fiber.stack_pointer);
  current = nullptr;
}

void switch_to_scheduler() {
  Fiber* fiber = current;
  current = nullptr;
  mtl_switch_stack(&fiber->stack_pointer, scheduler_stack_pointer);
}

bool on_any_stack(uintptr_t address) {
  for (uintptr_t stack : stacks)
    if (address - stack < stack_bytes) return true;
  return false;
}

bool on_a_stack_guard(uintptr_t address) {
  for (uintptr_t stack : stacks)
    if (address < stack && address + stack_guard_bytes >= stack) return true;
  return false;
}

}  // namespace emulator
