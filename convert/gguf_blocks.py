"""The number formats of GGUF tensors that can be read exactly, and what the others are called.

In: a tensor's place, a range of its rows. Out: their values, from these bytes alone. A block of q numbers has a float16
scale d, in Q4_1 also a float16 minimum m; its values are d q, d (q - 8) and d q + m in float32 (Q8_0, Q4_0, Q4_1;
`dequantize_row_*` in ggml-quants.c of github.com/ggml-org/llama.cpp). The products are exact, so nothing depends on
the order of the operations.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from qwen_mlx.convert.gguf_file import DAMAGED, Place
from qwen_mlx.errors import CheckpointError

BLOCK = 32  # numbers in a block of every quantized format below


@dataclass(frozen=True)
class Format:
    """`decode` takes bytes [N, bytes of whole blocks] and gives values [N, numbers]."""

    name: str
    numbers: int  # in a block
    size: int  # of a block, in bytes
    dtype: mx.Dtype
    decode: Callable[[np.ndarray], mx.array]


def _q8_0(data: np.ndarray) -> mx.array:
    blocks = _blocks(data, 2 + BLOCK)
    return _values(data, _float16(blocks, 0) * blocks[..., 2:].view(np.int8).astype(np.float32))


def _q4_0(data: np.ndarray) -> mx.array:
    blocks = _blocks(data, 2 + BLOCK // 2)
    return _values(data, _float16(blocks, 0) * (_nibbles(blocks[..., 2:]) - 8))


def _q4_1(data: np.ndarray) -> mx.array:
    blocks = _blocks(data, 4 + BLOCK // 2)
    return _values(data, _float16(blocks, 0) * _nibbles(blocks[..., 4:]) + _float16(blocks, 2))


def _blocks(data: np.ndarray, size: int) -> np.ndarray:
    return data.reshape(len(data), -1, size)


def _float16(blocks: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """The low halves of all bytes of a block, then the high ones."""
    return np.concatenate([data & 15, data >> 4], axis=-1).astype(np.float32)


def _values(data: np.ndarray, blocks: np.ndarray) -> mx.array:
    return mx.array(blocks.reshape(len(data), -1))


FORMATS = {
    0: Format("F32", 1, 4, mx.float32, lambda data: mx.array(data.view("<f4"))),
    1: Format("F16", 1, 2, mx.float16, lambda data: mx.array(data.view("<f2"))),
    2: Format("Q4_0", BLOCK, 2 + BLOCK // 2, mx.float32, _q4_0),
    3: Format("Q4_1", BLOCK, 4 + BLOCK // 2, mx.float32, _q4_1),
    8: Format("Q8_0", BLOCK, 2 + BLOCK, mx.float32, _q8_0),
    30: Format("BF16", 1, 2, mx.bfloat16, lambda data: mx.array(data.view("<u2")).view(mx.bfloat16)),
}
# ggml.h, enum ggml_type
OTHERS = dict(enumerate("Q5_0 Q5_1 _ Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S".split(), start=6))
OTHERS |= dict(enumerate("IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M".split(), start=20))
OTHERS |= {34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}


def row_bytes(place: Place) -> int | None:
    """Bytes of one row, which is what one index of the first axis selects; None if a row is not of whole blocks."""
    form = FORMATS[place.kind]
    blocks, rest = divmod(prod(place.shape[1:]), form.numbers)
    return None if rest else blocks * form.size


def read_rows(place: Place, order: np.ndarray) -> mx.array:
    """The rows at these positions in the file, [N, ...], each run of neighbours by one read."""
    size = row_bytes(place)
    assert size is not None
    data = np.empty((len(order), size), np.uint8)
    bounds = [0, *(np.flatnonzero(np.diff(order) != 1) + 1), len(order)]
    with place.file.open("rb") as stream:
        for start, stop in itertools.pairwise(bounds):
            if start < stop:
                stream.seek(place.offset + int(order[start]) * size)
                run = data[start:stop]
                if stream.readinto(run.data) != run.nbytes:
                    raise CheckpointError(f"{place.file} became shorter while it was read; {DAMAGED}")
    # A scale may be infinite: the product with 0 is NaN by definition, and no reason to warn.
    with np.errstate(invalid="ignore"):
        return FORMATS[place.kind].decode(data).reshape(len(order), *place.shape[1:])
