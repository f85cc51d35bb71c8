// Every load and store of a checked kernel arrives here before it happens: the kernel is compiled with
// -fsanitize=thread, and the __tsan_* functions that the compiler then calls are these, not libtsan's.
#include <algorithm>
#include <cstring>

#include "fibers.h"
#include "memory.h"
#include "races.h"
#include "reports.h"
#include "scheduler.h"

namespace emulator {

static void check_bounds(const Region& region, const Access& access) {
  uintptr_t end = access.address + access.size;
  if (!region.begin || access.address < region.begin || end > region.end) {
    report(Kind::out_of_bounds, access.place, region.name.c_str(),
           "%s of %u bytes at byte offset %lld of '%s' (%zu bytes)", access.writes ? "write" : "read", access.size,
           static_cast<long long>(access.address - region.begin), region.name.c_str(), region.bytes());
    stop_kernel();
  }
  if (region.is_threadgroup && region.owner_group != group.number) {
    report(Kind::out_of_bounds, access.place, region.name.c_str(), "access to '%s' of another threadgroup",
           region.name.c_str());
    stop_kernel();
  }
}

// More than four bytes may be several elements that the compiler reads at once; of a vector, undefined.cpp hears.
static void check_alignment(const Region& region, const Access& access) {
  constexpr unsigned widest = 16, strictest = 4;
  bool one_value = access.size <= widest && (access.size & (access.size - 1)) == 0;
  if (one_value && access.address % std::min(access.size, strictest))
    report(Kind::misaligned, access.place, region.name.c_str(), "%u-byte access to '%s' at byte offset %zu",
           access.size, region.name.c_str(), access.address - region.begin);
}

static void check_gaps(const Region& region, const Access& access) {
  size_t first = access.address - region.begin;
  if (!access.reads ||
      !std::any_of(region.gaps + first, region.gaps + first + access.size, [](int gap) { return gap; }))
    return;
  report(Kind::padding_read, access.place, region.name.c_str(),
         "read of %u bytes at byte offset %zu of '%s', between two rows of this strided input: use '%s_strides'",
         access.size, first, region.name.c_str(), region.name.c_str());
}

static void access_outside_the_arena(const Access& access) {
  if (in_kernel_image(access.address)) return;  // program-scope constants
  if (on_any_stack(access.address)) {
    report(Kind::private_memory, access.place, nullptr, "access to another thread's private memory");
    return;
  }
  report(Kind::out_of_bounds, access.place, nullptr, "%s of %u bytes at wild address 0x%llx",
         access.writes ? "write" : "read", access.size, static_cast<unsigned long long>(access.address));
  stop_kernel();
}

static void on_access(const Access& access) {
  Fiber* fiber = current;
  if (!fiber || fiber->owns(access.address)) return;
  settle_collision();
  ++counters.accesses;
  Region* region = region_at(access.address);
  if (!region) return access_outside_the_arena(access);
  check_bounds(*region, access);
  check_alignment(*region, access);
  count_traffic(*region, access.address, access.size, access.reads, access.writes);
  if (region->gaps) check_gaps(*region, access);
  if (region->read_only && access.writes) {
    report(Kind::write_to_input, access.place, region->name.c_str(), "write to '%s'", region->name.c_str());
    stop_kernel();
  }
  if (region->granule) check_races(*region, access, *fiber);
}

static void on_plain(const void* address, unsigned long size, bool writes, const void* return_address) {
  if (!size) return;
  on_access({reinterpret_cast<uintptr_t>(address), static_cast<unsigned>(size), !writes, writes, false,
             at_address(return_address)});
}

}  // namespace emulator

#define HOOK(name, size, writes)                                            \
  MTL_EXPORT void __tsan_##name(void* address) {                            \
    emulator::on_plain(address, size, writes, __builtin_return_address(0)); \
  }
#define HOOKS(size)                       \
  HOOK(read##size, size, false)           \
  HOOK(write##size, size, true)           \
  HOOK(unaligned_read##size, size, false) \
  HOOK(unaligned_write##size, size, true) \
  HOOK(volatile_read##size, size, false)  \
  HOOK(volatile_write##size, size, true)

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

MTL_EXPORT void __tsan_read_range(void* address, unsigned long size) {
  emulator::on_plain(address, size, false, __builtin_return_address(0));
}

MTL_EXPORT void __tsan_write_range(void* address, unsigned long size) {
  emulator::on_plain(address, size, true, __builtin_return_address(0));
}

MTL_EXPORT void __tsan_init() {}

MTL_EXPORT void __tsan_func_entry(void*) {}

MTL_EXPORT void __tsan_func_exit() {}

MTL_EXPORT void __tsan_vptr_update(void**, void*) {}

MTL_EXPORT void __tsan_vptr_read(void**) {}
}

void mtl_atomic_access(const volatile void* address, int size, int kind) {
  using namespace emulator;
  if (!launch->checked) return;
  on_access({reinterpret_cast<uintptr_t>(address), static_cast<unsigned>(size), (kind & MTL_ATOMIC_LOAD) != 0,
             (kind & MTL_ATOMIC_STORE) != 0, true, at_address(__builtin_return_address(0))});
}
