// Signals while a kernel runs: a guard page, a trap of the processor, the time limit.
#pragma once
#include <csetjmp>

namespace emulator {

// Handlers and the timer stand between construction and destruction; a fault is reported, sets `stopped` and jumps
// to `escape`, which the caller has filled with sigsetjmp.
class FaultGuard {
 public:
  explicit FaultGuard(double timeout_s);
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;

  static sigjmp_buf escape;
};

}  // namespace emulator
