"""The caches of all layers, as one thing that can be put aside and brought back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qwen_mlx.cache.kv import KVCache
from qwen_mlx.cache.recurrent import RecurrentCache


@dataclass(frozen=True)
class Snapshot:
    """The state of a `SequenceCache` at one moment; it stays what it was, whatever the cache does next."""

    layers: tuple[Any, ...]
    left_padding: mx.array | None


class SequenceCache:
    """One cache for each layer. `left_padding` [B]: padding tokens in front of each row, None without padding."""

    def __init__(self, layers: Sequence[KVCache | RecurrentCache], left_padding: mx.array | None = None) -> None:
        self.layers = list(layers)
        self.left_padding = left_padding

    @property
    def offset(self) -> int:
        """Tokens taken in so far, padding included."""
        return next(layer.offset for layer in self.layers if isinstance(layer, KVCache))

    @property
    def arrays(self) -> list[mx.array]:
        """Everything held, for `mx.eval`."""
        return [array for layer in self.layers for array in layer.arrays]

    def make_room(self) -> None:
        """Let a cache that is not empty take one more token."""
        for layer in self.layers:
            if isinstance(layer, KVCache):
                layer.make_room()

    def advance(self, arrays: Sequence[mx.array]) -> None:
        """Hold `arrays`, in the order of `self.arrays`, in which one token more is written."""
        rest = iter(arrays)
        for layer in self.layers:
            if isinstance(layer, KVCache):
                layer.slab, layer.offset = next(rest), layer.offset + 1
            else:
                layer.conv_state, layer.recurrent_state = next(rest), next(rest)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def snapshot(self) -> Snapshot:
        """The state now. Nothing is copied yet; the next token copies keys and values once, not writing in place."""
        return Snapshot(tuple(layer.snapshot() for layer in self.layers), self.left_padding)

    def restore(self, snapshot: Snapshot) -> None:
        """Be again what this cache was when `snapshot` was taken."""
        for layer, state in zip(self.layers, snapshot.layers, strict=True):
            layer.restore(state)
        self.left_padding = snapshot.left_padding
