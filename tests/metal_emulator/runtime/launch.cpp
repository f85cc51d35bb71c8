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

// Apple's compiler is told that denormals are flushed (air.compile.denorms_disable).
class FlushedDenormals {
 public:
#if defined(__x86_64__)
  FlushedDenormals() : former_(_mm_getcsr()) { _mm_setcsr(static_cast<unsigned>(former_) | 0x8040); }

  ~FlushedDenormals() { _mm_setcsr(static_cast<unsigned>(former_)); }
#else
  FlushedDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(former_));
    asm volatile("msr fpcr, %0" ::"r"(former_ | 1ull << 24));
  }

  ~FlushedDenormals() { asm volatile("msr fpcr, %0" ::"r"(former_)); }
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

static void run_guarded() {
  FaultGuard guard(launch->timeout_s);
  FlushedDenormals flushed;
  if (sigsetjmp(FaultGuard::escape, 1) == 0) run_grid();
  current = nullptr;
}

}  // namespace emulator

int mtl_run(mtl_launch* request) {
  using namespace emulator;
  clear_findings();
  forget_collision();
  if (!map_buffers(request)) return -1;
  start_launch(request);
  run_guarded();
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
