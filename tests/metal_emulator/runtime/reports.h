// The findings of one launch, each kind reported once per place.
#pragma once
#include <cstdint>

#include "abi.h"

namespace emulator {

enum class Kind {
  out_of_bounds,
  padding_read,
  write_to_input,
  uninitialised_threadgroup,
  uninitialised_output,
  threadgroup_race,
  device_race,
  grid_race,
  divergence,
  early_exit,
  bad_lane,
  non_uniform,
  atomic_order,
  threadgroup_limit,
  private_memory,
  not_written,
  undefined_behaviour,
  misaligned,
  time_limit,
  crash,
  redundant_write,
  simdgroup_write_after_read,
};

// Where in the kernel: an address inside it (of a memory access), or a line that the library was told.
struct Place {
  uint64_t program_counter = 0;
  int line = 0;
};

inline Place at_line(int line) { return {0, line}; }

inline Place at_address(const void* return_address) { return {reinterpret_cast<uint64_t>(return_address), 0}; }

void clear_findings();
int finding_count();
void report(Kind kind, Place place, const char* buffer, const char* format, ...) __attribute__((format(printf, 4, 5)));

}  // namespace emulator
