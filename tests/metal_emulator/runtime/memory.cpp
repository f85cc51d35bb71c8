#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

#include "reports.h"
#include "scheduler.h"

namespace emulator {

constexpr size_t page_bytes = 4096;
constexpr size_t buffer_alignment = 16;

Region regions[slot_count];
static uintptr_t arena = 0;

static size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

static void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

bool map_arena() {
  if (arena) return true;
  void* memory = mmap(nullptr, slot_bytes * slot_count, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  arena = reinterpret_cast<uintptr_t>(memory);
  return true;
}

Region* region_at(uintptr_t address) {
  uintptr_t slot = (address - arena) / slot_bytes;
  return address >= arena && slot < slot_count ? &regions[slot] : nullptr;
}

// The region ends where its pages end, so that an overrun traps even where accesses are not checked.
static bool map_region(Region& region, int slot, size_t bytes) {
  size_t needed = round_up(std::max<size_t>(bytes, 1), page_bytes);
  uintptr_t base = arena + slot * slot_bytes + slot_bytes / 2;
  if (region.mapped_bytes < needed) {
    if (mprotect(pointer(base), needed, PROT_READ | PROT_WRITE)) return false;
    region.mapped = base;
    region.mapped_bytes = needed;
  }
  region.begin = base + needed - round_up(bytes, buffer_alignment);
  region.end = region.begin + bytes;
  return true;
}

bool map_buffer(int slot, const mtl_buffer& buffer, bool checked) {
  Region& region = regions[slot];
  region = Region{};
  if (!map_region(region, slot, buffer.bytes)) return false;
  region.name = buffer.name;
  region.read_only = buffer.role == MTL_INPUT;
  region.initialised = buffer.role != MTL_OUTPUT;
  region.gaps = buffer.gaps;
  if (region.initialised)
    memcpy(pointer(region.begin), buffer.data, buffer.bytes);
  else
    memset(pointer(region.begin), poison, buffer.bytes);
  if (checked) {
    size_t words = buffer.bytes / 64 + 1;
    region.read_bits.assign(words, 0);
    region.written_bits.assign(words, 0);
    if (!region.read_only) {
      region.granule = buffer.granule;
      region.shadow.assign(buffer.bytes / buffer.granule + 1, Shadow{});
    }
  }
  if (region.read_only) mprotect(pointer(region.mapped), region.mapped_bytes, PROT_READ);
  return true;
}

static uint64_t count_bits(const std::vector<uint64_t>& words) {
  uint64_t count = 0;
  for (uint64_t word : words) count += __builtin_popcountll(word);
  return count;
}

void unmap_buffer(int slot, mtl_buffer& buffer) {
  Region& region = regions[slot];
  if (!region.mapped) return;
  if (!region.read_only) memcpy(buffer.data, pointer(region.begin), buffer.bytes);
  buffer.bytes_read = region.bytes_read;
  buffer.bytes_written = region.bytes_written;
  buffer.distinct_bytes_read = count_bits(region.read_bits);
  buffer.distinct_bytes_written = count_bits(region.written_bits);
  mprotect(pointer(region.mapped), region.mapped_bytes, PROT_READ | PROT_WRITE);
  madvise(pointer(region.mapped), region.mapped_bytes, MADV_DONTNEED);
  mprotect(pointer(region.mapped), region.mapped_bytes, PROT_NONE);
  region = Region{};
}

void report_unwritten(int slot) {
  const Region& region = regions[slot];
  if (region.initialised || !region.granule) return;
  size_t elements = region.bytes() / region.granule, missing = 0, first = 0;
  for (size_t i = elements; i-- > 0;)
    if (!(region.shadow[i].write_flags & Shadow::valid)) {
      ++missing;
      first = i;
    }
  // A line of its own for every buffer, so that one does not hide the next.
  if (missing)
    report(Kind::not_written, at_line(-1 - slot), region.name.c_str(),
           "%zu of %zu elements of '%s' never written (first: element %zu)", missing, elements, region.name.c_str(),
           first);
}

void release_threadgroup_memory(mtl_launch& launch) {
  for (int slot = first_threadgroup_slot; slot < slot_count; ++slot) {
    Region& region = regions[slot];
    launch.threadgroup_bytes_read += region.bytes_read;
    launch.threadgroup_bytes_written += region.bytes_written;
    if (region.mapped) mprotect(pointer(region.mapped), region.mapped_bytes, PROT_NONE);
    region = Region{};
  }
}

static inline void set_bits(std::vector<uint64_t>& words, size_t first, unsigned count) {
  if (first % 64 + count <= 64) {
    words[first / 64] |= (count == 64 ? ~0ull : (1ull << count) - 1) << (first % 64);
    return;
  }
  for (size_t bit = first; bit < first + count; ++bit) words[bit / 64] |= 1ull << (bit % 64);
}

void count_traffic(Region& region, uintptr_t address, unsigned size, bool reads, bool writes) {
  size_t first = address - region.begin;
  if (reads) {
    region.bytes_read += size;
    if (!region.is_threadgroup) set_bits(region.read_bits, first, size);
  }
  if (writes) {
    region.bytes_written += size;
    if (!region.is_threadgroup) set_bits(region.written_bits, first, size);
  }
}

}  // namespace emulator

// The same declaration is met by every thread of a threadgroup; the first one to come makes the memory.
void* mtl_threadgroup_memory(int id, unsigned long bytes, int granule, const char* name, int line) {
  using namespace emulator;
  int slot = first_threadgroup_slot + id;
  if (slot >= slot_count) {
    report(Kind::threadgroup_limit, at_line(line), name, "more threadgroup variables than the emulator has room for");
    stop_kernel();
  }
  Region& region = regions[slot];
  if (region.owner_group == group.number) return pointer(region.begin);
  if (!region.begin || region.bytes() != bytes) {
    if (!map_region(region, slot, bytes)) {
      perror("threadgroup memory");
      abort();
    }
    region.name = name;
    region.is_threadgroup = true;
    region.granule = granule;
    region.shadow.assign(bytes / granule + 1, Shadow{});
  }
  region.owner_group = group.number;
  memset(pointer(region.begin), poison, bytes);
  group.threadgroup_bytes += round_up(bytes, buffer_alignment);
  if (group.threadgroup_bytes > threadgroup_memory_limit)
    report(Kind::threadgroup_limit, at_line(line), name, "%zu bytes of threadgroup memory exceed the limit of %zu",
           group.threadgroup_bytes, threadgroup_memory_limit);
  return pointer(region.begin);
}
