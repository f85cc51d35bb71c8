// Threads of a threadgroup as fibers: own stacks, switched by hand, one running at a time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "abi.h"

namespace emulator {

constexpr int simd_width = 32;
constexpr size_t stack_bytes = 256 * 1024;
constexpr size_t stack_guard_bytes = 64 * 1024;

enum class State : uint8_t { ready, at_simd_operation, at_threadgroup_barrier, done };

// How many barriers of one memory class this thread has passed: of its threadgroup, and of its SIMD-group.
// A threadgroup_barrier orders the SIMD-group as well and counts in both.
struct Epoch {
  uint32_t threadgroup = 0, simdgroup = 0;
};

struct Fiber {
  void* stack_pointer;
  uintptr_t stack;
  State state;
  uint16_t thread, simdgroup, lane;
  mtl_ids ids;
  Epoch device_epoch, threadgroup_epoch;
  // The rendezvous that it waits at.
  int operation, line, mem_flags;
  mtl_simd_function function;
  mtl_lane argument;

  bool owns(uintptr_t address) const { return address - stack < stack_bytes; }
};

extern Fiber* current;  // null while the scheduler runs
extern std::vector<Fiber> fibers;

void reserve_fibers(int count);
void prepare_fiber(Fiber& fiber, int index, void (*start)());
void switch_to(Fiber& fiber);
void switch_to_scheduler();
bool on_any_stack(uintptr_t address);
bool on_a_stack_guard(uintptr_t address);

}  // namespace emulator
