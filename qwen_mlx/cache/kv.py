"""Keys and values of one full-attention layer. Knows nothing of positions beyond how many tokens it holds."""

import mlx.core as mx

SLAB = 256  # tokens: a slab that grows by steps is written in place instead of being copied for every token


class KVCache:
    """keys, values: [B, Hkv, S, Dh] slabs of which the first `offset` tokens are filled."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset: int = 0

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append `keys` and `values` [B, Hkv, T, Dh]; returns all that is held, [B, Hkv, offset, Dh] each."""
        start, end = self.offset, self.offset + keys.shape[2]
        self.keys, self.values = _with_room(self.keys, keys, start, end), _with_room(self.values, values, start, end)
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        self.offset = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def make_room(self) -> None:
        """Let the slabs, which hold something already, take one more token."""
        if self.keys is not None and self.values is not None:
            start, end = self.offset, self.offset + 1
            self.keys, self.values = (_with_room(slab, slab, start, end) for slab in (self.keys, self.values))

    def snapshot(self) -> tuple[mx.array | None, mx.array | None, int]:
        # A second reference to a slab makes the next write copy it, so what a snapshot holds is never written over.
        return _reference(self.keys), _reference(self.values), self.offset

    def restore(self, snapshot: tuple[mx.array | None, mx.array | None, int]) -> None:
        keys, values, self.offset = snapshot
        self.keys, self.values = _reference(keys), _reference(values)

    @property
    def arrays(self) -> list[mx.array]:
        return [a for a in (self.keys, self.values) if a is not None]


class TracedKVCache:
    """The slabs of a `KVCache` while a graph is made that must hold for every offset: it is an array here."""

    def __init__(self, keys: mx.array, values: mx.array, offset: mx.array) -> None:
        self.keys, self.values, self.offset = keys, values, offset

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write `keys` and `values` [B, Hkv, T, Dh] at the offset, where there is room; returns both slabs whole."""
        self.keys = mx.slice_update(self.keys, keys, self.offset, axes=(2,))
        self.values = mx.slice_update(self.values, values, self.offset, axes=(2,))
        return self.keys, self.values

    @property
    def arrays(self) -> list[mx.array]:
        return [self.keys, self.values]


def _with_room(slab: mx.array | None, like: mx.array, start: int, end: int) -> mx.array:
    """`slab`, of which `start` tokens are filled, or one that is longer by steps of SLAB if `end` lies beyond it."""
    if slab is not None and end <= slab.shape[2]:
        return slab
    B, H, _, D = like.shape
    room = mx.zeros((B, H, -(-end // SLAB) * SLAB - start, D), like.dtype)
    return room if slab is None else mx.concatenate([slab[:, :, :start], room], axis=2)


def _reference(slab: mx.array | None) -> mx.array | None:
    return None if slab is None else slab[...]
