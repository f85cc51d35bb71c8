"""Kernels that the tests of the emulator share, and one small launch in a line."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from tests.metal_emulator import metal_kernel

COPY = "out[thread_position_in_grid.x] = x[thread_position_in_grid.x];"
SUM = "float s = simd_sum(x[thread_position_in_grid.x]); if (thread_position_in_grid.x == 0) out[0] = s;"
HISTOGRAM = "atomic_fetch_add_explicit(&out[x[thread_position_in_grid.x] & 7], 1, memory_order_relaxed);"

MATMUL = """
    // C[M, N] = A[M, K] @ B[K, N]; one threadgroup of two SIMD-groups makes a tile of 16 x 16
    threadgroup T As[16 * 16];
    threadgroup T Bs[16 * 16];
    const uint sg = simdgroup_index_in_threadgroup;
    const uint lid = thread_index_in_threadgroup;
    const uint row0 = threadgroup_position_in_grid.y * 16, col0 = threadgroup_position_in_grid.x * 16;
    simdgroup_matrix<float, 8, 8> acc[2];
    acc[0] = make_filled_simdgroup_matrix<float, 8>(0.f);
    acc[1] = make_filled_simdgroup_matrix<float, 8>(0.f);
    for (int k0 = 0; k0 < K; k0 += 16) {
      for (uint i = lid; i < 256; i += 64) {
        As[i] = A[(row0 + i / 16) * K + k0 + i % 16];
        Bs[i] = B[(k0 + i / 16) * N + col0 + i % 16];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup); // filled
      for (int kk = 0; kk < 16; kk += 8) {
        simdgroup_matrix<T, 8, 8> a, b;
        simdgroup_load(a, &As[sg * 8 * 16 + kk], 16);
        for (int j = 0; j < 2; ++j) {
          simdgroup_load(b, &Bs[kk * 16 + j * 8], 16);
          simdgroup_multiply_accumulate(acc[j], a, b, acc[j]);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup); // used
    }
    for (int j = 0; j < 2; ++j)
      simdgroup_store(acc[j], C + (row0 + sg * 8) * N + col0 + j * 8, N);
"""

ROWSUM = """
    // y[R] = sums of the rows of x[R, C], one threadgroup of 128 threads a row
    threadgroup float part[4];
    uint row = threadgroup_position_in_grid.x, lid = thread_index_in_threadgroup;
    float s = 0;
    for (uint c = lid; c < C; c += 128) s += x[row * C + c];
    s = simd_sum(s);
    if (thread_index_in_simdgroup == 0) part[simdgroup_index_in_threadgroup] = s;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup_index_in_threadgroup == 0) {
      float t = thread_index_in_simdgroup < 4 ? part[thread_index_in_simdgroup] : 0.0f;
      t = simd_sum(t);
      if (lid == 0) y[row] = t;
    }
"""


def run(
    source: str,
    inputs: Sequence[Any],
    *,
    shape: tuple[int, ...] | None = None,
    dtype: mx.Dtype | None = None,
    threads: int | None = None,
    group: int = 32,
    call: dict[str, Any] | None = None,
    **factory: Any,
) -> mx.array:
    """The output `out` of a kernel whose inputs are named x, y, z, w.

    By default it is like x, with a thread for each of its elements. `call` and `factory`: further keywords of the
    kernel's call and of metal_kernel.
    """
    shape = inputs[0].shape if shape is None else shape
    kernel = metal_kernel("example", list("xyzw"[: len(inputs)]), ["out"], source, **factory)
    (out,) = kernel(
        inputs=inputs,
        grid=(threads or int(np.prod(shape)), 1, 1),
        threadgroup=(group, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype or inputs[0].dtype],
        **(call or {}),
    )
    return out


def arange(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """0, 1, 2, ... in this shape."""
    return mx.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
