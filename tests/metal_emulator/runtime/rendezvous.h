// Where the threads of a SIMD-group or a threadgroup wait for each other.
#pragma once

namespace emulator {

// Each runs the operation once all live threads have come to the same one; false while some have not.
bool meet_at_simd_operation(int simdgroup);
bool meet_at_threadgroup_barrier();

// No thread can go on: says who waits where.
void report_divergence();

}  // namespace emulator
