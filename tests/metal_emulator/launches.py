"""One small launch in a line: what the tests of the emulator share."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from tests.metal_emulator import metal_kernel

COPY = "out[thread_position_in_grid.x] = x[thread_position_in_grid.x];"
SUM = "float s = simd_sum(x[thread_position_in_grid.x]); if (thread_position_in_grid.x == 0) out[0] = s;"
HISTOGRAM = "atomic_fetch_add_explicit(&out[x[thread_position_in_grid.x] & 7], 1, memory_order_relaxed);"


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
