"""Safetensors files written rows at a time: what they will hold is known before any of it is read."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from qwen_mlx.convert.source import Tensor
from qwen_mlx.errors import CheckpointError, ConversionError

BLOCK = 16 << 20  # bytes read at once
NAMES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
}


@dataclass(frozen=True)
class Output:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Item:
    """One tensor that is read, and what is written of it: `make` turns rows into as many rows of each output."""

    tensor: Tensor
    outputs: tuple[Output, ...]
    make: Callable[[mx.array], Sequence[mx.array]]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def source_nbytes(self) -> int:
        return self.tensor.shape[0] * self.tensor.row_nbytes


def shards(items: Iterable[Item], limit: int) -> list[list[Item]]:
    """`items` in their order, in files of at most `limit` bytes, or of one item where that alone has more."""
    found: list[list[Item]] = []
    room = 0
    for item in items:
        if not found or item.nbytes > room:
            found.append([])
            room = limit
        found[-1].append(item)
        room -= item.nbytes
    return found


def write_file(path: Path, items: Sequence[Item], advance: Callable[[int, int], object]) -> None:
    """Write all outputs of `items` to `path`, which appears when it is complete; `advance` takes tensors and bytes.

    The same items give the same bytes. In memory there are a few blocks of rows at most.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    header, offsets = _header([output for item in items for output in item.outputs])
    try:
        with unfinished.open("wb") as file:
            file.write(header)
            for item in items:
                for start, stop in _blocks(item.tensor):
                    for output, array in zip(item.outputs, item.make(item.tensor.rows(start, stop)), strict=True):
                        file.seek(offsets[output.name] + start * (output.nbytes // output.shape[0]))
                        file.write(_bytes(output, array))
                    advance(0, (stop - start) * item.tensor.row_nbytes)
                advance(1, 0)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            size = sum(item.nbytes for item in items)
            raise ConversionError(
                f"{path} cannot be written ({error.strerror}): it takes {size:,} bytes; make room, and run the same "
                "command again."
            ) from None
        raise
    unfinished.replace(path)


def _header(outputs: Iterable[Output]) -> tuple[bytes, dict[str, int]]:
    """The header, and where in the file each tensor begins: the widest numbers first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    starts, end = {}, 0
    for output in sorted(outputs, key=lambda output: -output.dtype.size):
        starts[output.name], start = end, end
        end += output.nbytes
        entries[output.name] = {
            "dtype": NAMES[output.dtype], "shape": list(output.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + start for name, start in starts.items()}


def _blocks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    rows = max(1, BLOCK // max(tensor.row_nbytes, 1))
    # A block of FP8 scales has 128 rows: it is not read twice.
    rows -= rows % 128 if rows > 128 else 0
    return ((start, min(start + rows, tensor.shape[0])) for start in range(0, tensor.shape[0], rows))


def _bytes(output: Output, array: mx.array) -> memoryview:
    cast = array.astype(output.dtype)
    if output.dtype == mx.float16 and not mx.isfinite(cast).all().item():
        raise CheckpointError(f"{output.name} does not fit float16, whose largest number is 65504; take bfloat16.")
    return np.array(cast.view(mx.uint16) if cast.dtype == mx.bfloat16 else cast, order="C").data
