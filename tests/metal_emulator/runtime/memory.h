// Buffers and threadgroup arrays, each alone in a slot of address space that a 32-bit index cannot leave.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "abi.h"

namespace emulator {

constexpr int slot_count = 128;
constexpr int first_threadgroup_slot = 64;
constexpr uintptr_t slot_bytes = 1ull << 34;
constexpr size_t threadgroup_memory_limit = 32768;
constexpr unsigned char poison = 0xFF;  // a NaN in every float type

// Who touched one element last. Threadgroup memory lives as long as its threadgroup: older marks count for nothing.
struct Shadow {
  enum : uint8_t { valid = 1, atomic = 2 };  // of the last write

  enum : uint8_t { other_threads = 2, other_simdgroups = 4, other_threadgroups = 8 };  // of the reads since

  uint32_t write_group = 0, write_epoch = 0, write_simd_epoch = 0;
  uint32_t read_group = 0, read_epoch = 0, read_simd_epoch = 0;
  uint16_t write_thread = 0, read_thread = 0;
  uint8_t write_flags = 0, read_flags = 0;
};

struct Region {
  std::string name;
  uintptr_t begin = 0, end = 0;
  uintptr_t mapped = 0;
  size_t mapped_bytes = 0;
  bool read_only = false, is_threadgroup = false, initialised = false;
  int granule = 0;  // 0: not shadowed
  uint32_t owner_group = 0;
  const unsigned char* gaps = nullptr;
  std::vector<Shadow> shadow;
  uint64_t bytes_read = 0, bytes_written = 0;
  std::vector<uint64_t> read_bits, written_bits;  // one bit per byte of a device buffer

  size_t bytes() const { return end - begin; }
};

extern Region regions[slot_count];

bool map_arena();
Region* region_at(uintptr_t address);  // null outside the arena
bool map_buffer(int slot, const mtl_buffer& buffer, bool checked);
void unmap_buffer(int slot, mtl_buffer& buffer);
void report_unwritten(int slot);
void release_threadgroup_memory(mtl_launch& launch);
void count_traffic(Region& region, uintptr_t address, unsigned size, bool reads, bool writes);

}  // namespace emulator
