// The entry that launch.py calls: maps the buffers, runs the grid under guard, copies the outputs back.
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "faults.h"
#include "fibers.h"
#include "memory.h"
#include "races.h"
#include "reports.h"
#include "scheduler.h"

namespace emulator {

// Arithmetic as Apple's compiler is told to make it (air.compile.denorms_disable): denormals are flushed. The processor
// notes by itself whether an operation overflowed, divided by zero or had no number for a result.
class Arithmetic {
 public:
#if defined(__x86_64__)
  Arithmetic() : former_(_mm_getcsr()) { _mm_setcsr((static_cast<unsigned>(former_) & ~0x3fu) | 0x8040); }

  ~Arithmetic() { _mm_setcsr(static_cast<unsigned>(former_)); }

  bool overflowed() const { return _mm_getcsr() & 0x0d; }
#else
  Arithmetic() {
    asm volatile("mrs %0, fpcr" : "=r"(former_));
    asm volatile("msr fpcr, %0" ::"r"(former_ | 1ull << 24));
    asm volatile("msr fpsr, xzr");
  }

  ~Arithmetic() { asm volatile("msr fpcr, %0" ::"r"(former_)); }

  bool overflowed() const {
    unsigned long long flags;
    asm volatile("mrs %0, fpsr" : "=r"(flags));
    return flags & 0x07;
  }
#endif

 private:
  unsigned long long former_;
};

static bool map_buffers(mtl_launch* request) {
  if (!map_arena()) return false;
  for (int i = 0; i < request->buffer_count; ++i)
    if (!map_buffer(i, request->buffers[i], request->checked)) return false;
  return true;
}

// Whether a result went beyond the numbers.
static bool run_guarded() {
  FaultGuard guard(launch->timeout_s);
  Arithmetic arithmetic;
  if (sigsetjmp(FaultGuard::escape, 1) == 0) run_grid();
  current = nullptr;
  return arithmetic.overflowed();
}

}  // namespace emulator

int mtl_run(mtl_launch* request) {
  using namespace emulator;
  clear_findings();
  forget_collision();
  if (!map_buffers(request)) return -1;
  start_launch(request);
  request->overflowed = run_guarded();
  for (int i = 0; i < request->buffer_count; ++i) {
    if (!stopped) report_unwritten(i);
    unmap_buffer(i, request->buffers[i]);
  }
  release_threadgroup_memory(*request);
  request->accesses = counters.accesses;
  request->simd_operations = counters.simd_operations;
  request->barriers = counters.barriers;
  request->threadgroup_bytes = counters.threadgroup_bytes;
  return finding_count();
}
