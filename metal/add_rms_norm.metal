// What a block adds to the residual stream, and the norm of the sum for the next block.
//
//     total = x + update;   normed = total / sqrt(mean(total^2) + eps) * gain        (mean over a row)
//
// in      x, update [rows, D] in X;  gain [D] float32;  eps a float
// out     total, normed [rows, D] in X; the norm reads the rounded total
//
// lane    every (32 SIMDGROUPS)th element of a row, in registers from the sum to the norm
// group   SIMDGROUPS SIMD-groups, one row; one barrier
// grid    (32, SIMDGROUPS, rows) threads
//
// needs   nothing of D
//
// Occupancy and traffic of a decoded token; a prediction, as nobody has measured it:
//                                       0.8B: D = 1024                     9B: D = 4096
//     threadgroups                      1: one core of 10 or 40, whose time is the way to memory and back, twice
//     bytes, 16 bits                    8 KiB and a gain of 4 KiB          32 KiB and a gain of 16 KiB
// Apart, with 16-bit activations, these are four launches: the sum, its cast to float32, the norm, and the rounding.

constexpr int THREADS = 32 * SIMDGROUPS;
constexpr int ELEMENTS = (D + THREADS - 1) / THREADS;  // of a lane

threadgroup float partial[SIMDGROUPS];

const int thread_index = int(thread_index_in_threadgroup);
const size_t row = size_t(threadgroup_position_in_grid.z) * D;

float values[ELEMENTS];
float squares = 0.0f;
for (int i = 0; i < ELEMENTS; ++i) {
  const int at = thread_index + THREADS * i;
  if (at < D) {
    const X sum = static_cast<X>(float(x[row + at]) + float(update[row + at]));
    total[row + at] = sum;
    values[i] = float(sum);
    squares = metal::fma(values[i], values[i], squares);
  }
}
squares = simd_sum(squares);
if (thread_index_in_simdgroup == 0) {
  partial[simdgroup_index_in_threadgroup] = squares;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float sum = 0.0f;
for (int i = 0; i < SIMDGROUPS; ++i) {
  sum += partial[i];
}
const float norm = metal::rsqrt(sum / D + eps);
for (int i = 0; i < ELEMENTS; ++i) {
  const int at = thread_index + THREADS * i;
  if (at < D) {
    normed[row + at] = static_cast<X>(values[i] * norm * gain[at]);
  }
}
