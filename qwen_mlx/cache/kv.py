"""Keys and values of one full-attention layer. Knows nothing of positions beyond how many tokens it holds."""

import mlx.core as mx

SLAB = 256  # tokens: a slab that grows by steps is written in place instead of being copied for every token


class KVCache:
    """keys, values: [B, Hkv, S, Dh] slabs of which the first `offset` tokens are filled."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append `keys` and `values` [B, Hkv, T, Dh]; returns all that is held, [B, Hkv, offset, Dh] each."""
        start, end = self.offset, self.offset + keys.shape[2]
        self.keys = self._write(self.keys, keys, start, end)
        self.values = self._write(self.values, values, start, end)
        self.offset = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _write(self, slab: mx.array | None, new: mx.array, start: int, end: int) -> mx.array:
        if slab is None or end > slab.shape[2]:
            B, H, _, D = new.shape
            missing = -(-end // SLAB) * SLAB - start
            room = mx.zeros((B, H, missing, D), new.dtype)
            slab = room if slab is None else mx.concatenate([slab[:, :, :start], room], axis=2)
        slab[:, :, start:end] = new
        return slab

    def snapshot(self) -> tuple[mx.array | None, mx.array | None, int]:
        # A second reference to a slab makes the next write copy it, so what a snapshot holds is never written over.
        return _reference(self.keys), _reference(self.values), self.offset

    def restore(self, snapshot: tuple[mx.array | None, mx.array | None, int]) -> None:
        keys, values, self.offset = snapshot
        self.keys, self.values = _reference(keys), _reference(values)

    @property
    def arrays(self) -> list[mx.array]:
        return [a for a in (self.keys, self.values) if a is not None]


def _reference(slab: mx.array | None) -> mx.array | None:
    return None if slab is None else slab[...]
