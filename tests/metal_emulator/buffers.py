"""Arrays as the bytes that a kernel sees, and back.

In: mx arrays of any dtype, lazy or not. Out: `Buffer`s, and arrays made of what the kernel left in them. Strided inputs
are laid out here. Knows nothing of kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import mlx.core as mx
import numpy as np

# NumPy has no bfloat16: its bits travel as uint16.
NUMPY_TYPES = {
    mx.bool_: np.bool_,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.float16: np.float16,
    mx.float32: np.float32,
    mx.bfloat16: np.uint16,
    mx.complex64: np.complex64,
}
POISON = 0xFF  # in every byte: a NaN in every float type


class Role(IntEnum):
    """By the numbers of runtime/abi.h."""

    INPUT = 0
    OUTPUT = 1
    INITIALISED_OUTPUT = 2


@dataclass(frozen=True)
class Buffer:
    """`data` is a flat array of bytes, written by the kernel unless it is an input; `granule` bytes are one element.

    `offset` is where the kernel's pointer points; `gaps` has a nonzero byte wherever no element of the array lies.
    """

    name: str
    data: np.ndarray
    role: Role = Role.INPUT
    granule: int = 1
    offset: int = 0
    gaps: np.ndarray | None = None


def to_numpy(array: mx.array) -> np.ndarray:
    """The values in row-major order; bfloat16 as its bits."""
    array = mx.contiguous(array)
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, order="C")


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def input_buffer(name: str, array: mx.array) -> Buffer:
    """Row-contiguous, copied."""
    return Buffer(name, _bytes(to_numpy(array)))


def values_buffer(name: str, values: Sequence[int], dtype: type) -> Buffer:
    return Buffer(name, _bytes(np.array(values, dtype)))


def row_contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return strides


def _padded_strides(shape: Sequence[int]) -> list[int]:
    """Elements of the last axis stay neighbours; every row, matrix, ... of more than one is followed by a gap.

    The gaps differ between axes, so that no stride can be told from another and the shape.
    """
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1] + 2 * (len(shape) - axis) - 1
    return strides


def strides_of(array: mx.array) -> list[int]:
    """In elements, as MLX has them."""
    mx.eval(array)
    return [stride // array.itemsize for stride in memoryview(array).strides]


def _is_row_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = row_contiguous_strides(shape)
    return all(size == 1 or mine == other for size, mine, other in zip(shape, strides, expected))


def strided_input_buffer(name: str, array: mx.array) -> tuple[Buffer, list[int]]:
    """As ensure_row_contiguous=False may meet it, with its strides in elements.

    A view keeps MLX's strides, a row-contiguous array gets padded rows: a kernel that ignores strides reads a gap.
    """
    values = to_numpy(array)
    strides = strides_of(array)
    if _is_row_contiguous(values.shape, strides):
        strides = _padded_strides(values.shape)
    if values.size == 0 or values.ndim == 0:
        return Buffer(name, _bytes(values)), strides
    reach = [(size - 1) * stride for size, stride in zip(values.shape, strides)]
    # Where element (0, ..., 0) lies: negative strides lead from there towards the beginning.
    first = -sum(min(step, 0) for step in reach)
    last = first + sum(max(step, 0) for step in reach)
    places = np.full(values.shape, first)
    for axis, stride in enumerate(strides):
        places += stride * np.arange(values.shape[axis]).reshape((-1,) + (1,) * (values.ndim - axis - 1))
    memory = np.full((last + 1, values.itemsize), POISON, np.uint8)
    gaps = np.ones_like(memory)
    memory[places] = values[..., None].view(np.uint8)
    gaps[places] = 0
    return Buffer(name, memory.reshape(-1), offset=first * values.itemsize, gaps=gaps.reshape(-1)), strides


def output_buffer(name: str, shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> Buffer:
    """Uninitialised (the runtime poisons it), or full of `init_value`."""
    if init_value is None:
        values, role = np.empty(tuple(shape), NUMPY_TYPES[dtype]), Role.OUTPUT
    else:
        values, role = to_numpy(mx.full(tuple(shape), init_value, dtype=dtype)), Role.INITIALISED_OUTPUT
    return Buffer(name, _bytes(values), role, granule=values.itemsize)


def to_array(buffer: Buffer, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """What the kernel left in an output."""
    array = mx.array(buffer.data.view(NUMPY_TYPES[dtype]).reshape(tuple(shape)))
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array
