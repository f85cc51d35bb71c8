"""Keys and values of one full-attention layer in 4 or 8 bits, where `KVCache` has 16 or 32.

What a token brings is quantized along its heads when it comes in, and never again. Knows no attention.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from qwen_mlx.cache.kv import KVCache
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.errors import CheckpointError

BITS = (4, 8)
GROUPS = (64, 32)  # elements of a head that share a scale and a bias; the first that divides the head


class Quantized(NamedTuple):
    """MLX's affine form of [B, Hkv, S, Dh]: packed uint32 [B, Hkv, S, Dh bits / 32], scales and biases [.., Dh / g]."""

    packed: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int


class QuantizedKVCache(KVCache):
    """Packed words, scales and biases, each in a slab as `KVCache` has one; the compiled step does not know them.

    Raises ValueError for `bits` that are not 4 or 8, CheckpointError for heads that no group divides.
    """

    def __init__(self, bits: int, head_dim: int) -> None:
        self.bits, self.group_size = bits, group_size(bits, head_dim)
        self._parts = KVCache(), KVCache(), KVCache()

    @property
    def offset(self) -> int:
        return self._parts[0].offset

    @offset.setter
    def offset(self, offset: int) -> None:
        for part in self._parts:
            part.offset = offset

    def update(self, keys_values: mx.array) -> tuple[Quantized, Quantized]:  # type: ignore[override]
        """Append `keys_values` [2, B, Hkv, T, Dh]; returns all keys and values held, quantized."""
        pieces = mx.quantize(keys_values, group_size=self.group_size, bits=self.bits)
        packed, scales, biases = (part.update(piece) for part, piece in zip(self._parts, pieces))
        keys = Quantized(packed[0], scales[0], biases[0], self.group_size, self.bits)
        return keys, Quantized(packed[1], scales[1], biases[1], self.group_size, self.bits)

    def make_room(self) -> None:
        for part in self._parts:
            part.make_room()

    def fill(self, pieces: Sequence[Sequence[mx.array]], room: int) -> None:
        for part, own in zip(self._parts, zip(*pieces)):
            part.fill([[piece] for piece in own], room)

    def snapshot(self) -> tuple[tuple[mx.array | None, int], ...]:  # type: ignore[override]
        return tuple(part.snapshot() for part in self._parts)

    def restore(self, snapshot: tuple[tuple[mx.array | None, int], ...]) -> None:  # type: ignore[override]
        for part, state in zip(self._parts, snapshot, strict=True):
            part.restore(state)

    @property
    def arrays(self) -> list[mx.array]:
        return [array for part in self._parts for array in part.arrays]


def group_size(bits: int, head_dim: int) -> int:
    """Of the groups along a head; errors as `QuantizedKVCache` has them."""
    if bits not in BITS:
        raise ValueError(f"kv_bits must be 4 or 8, not {bits!r}.")
    for size in GROUPS:
        if head_dim % size == 0:
            return size
    raise CheckpointError(
        f"Keys and values of this model cannot be quantized: its heads of {head_dim} elements do not divide into "
        f"groups of {GROUPS[0]} or {GROUPS[1]}; leave kv_bits out."
    )


def quantized(cache: SequenceCache, bits: int, head_dim: int) -> SequenceCache:
    """`cache`, which is empty, with keys and values in `bits`; errors as `QuantizedKVCache` has them."""
    layers = [QuantizedKVCache(bits, head_dim) if isinstance(layer, KVCache) else layer for layer in cache.layers]
    kept = [f", {bits} bits kept" if isinstance(layer, QuantizedKVCache) else "" for layer in layers]
    return SequenceCache(layers, cache.left_padding, [size + bits for size, bits in zip(cache.sizes, kept)])
