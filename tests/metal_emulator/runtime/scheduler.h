// Runs the threadgroups of a launch one after the other, and in each the threads until all wait or are done.
#pragma once
#include <cstddef>
#include <cstdint>

#include "abi.h"

namespace emulator {

struct Group {
  uint32_t number = 0;  // counted from 1 over the launch
  uint32_t position[3] = {};
  int threads = 0, simdgroups = 0;
  size_t threadgroup_bytes = 0;
};

struct Counters {
  uint64_t accesses = 0, simd_operations = 0, barriers = 0, threadgroup_bytes = 0;
};

extern mtl_launch* launch;
extern Group group;
extern Counters counters;
extern bool stopped;  // nothing more is run in this launch

void start_launch(mtl_launch* request);
void run_grid();
[[noreturn]] void stop_kernel();  // from a fiber
bool in_kernel_image(uintptr_t address);

}  // namespace emulator
