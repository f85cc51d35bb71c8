"""Keys and values of one full-attention layer. Knows nothing of positions beyond how many tokens it holds.

Both lie in one slab, so that a token is written by one operation. Its halves, `slab[0, :]` and `slab[1, :]`, are views
that attention reads without a copy; `slab[0]` alone would gather one.
"""

from collections.abc import Sequence

import mlx.core as mx

SLAB = 256  # tokens: a slab grows by so many at a time, or by an eighth, and not with every token


class KVCache:
    """slab: [2, B, Hkv, S, Dh], keys and values, of which the first `offset` tokens are filled."""

    def __init__(self) -> None:
        self.slab: mx.array | None = None
        self.offset: int = 0

    def update(self, keys_values: mx.array) -> tuple[mx.array, mx.array]:
        """Append `keys_values` [2, B, Hkv, T, Dh]; returns all keys and values held, [B, Hkv, offset, Dh] each."""
        start, end = self.offset, self.offset + keys_values.shape[3]
        # Of a snapshot's slab the write makes a copy, since two refer to it, and leaves the snapshot's object alone.
        slab = _with_room(self.slab, keys_values, start, end)[...]
        slab[:, :, :, start:end] = keys_values
        self.slab, self.offset = slab, end
        return slab[0, :, :, :end], slab[1, :, :, :end]

    def make_room(self) -> None:
        """Let the slab, which holds something already, take one more token."""
        if self.slab is not None:
            self.slab = _with_room(self.slab, self.slab, self.offset, self.offset + 1)

    def piece(self, start: int, end: int) -> list[mx.array]:
        """What tokens `start` to `end` left, [2, B, Hkv, end - start, ...] for each of `arrays`, as copies."""
        # Added to nothing: all of a slab would stay with its slice, and be written anew when the sequence goes on.
        return [mx.concatenate([a[:, :, :, start:start], a[:, :, :, start:end]], axis=3) for a in self.arrays]

    def fill(self, pieces: Sequence[Sequence[mx.array]], room: int) -> None:
        """Hold `pieces`, one behind the other, in a slab with room for `room` tokens at least."""
        (parts,) = zip(*pieces)
        self.offset = sum(part.shape[3] for part in parts)
        *front, _, D = parts[0].shape
        rest = grown(0, max(room, self.offset)) - self.offset
        self.slab = mx.concatenate([*parts, mx.zeros((*front, rest, D), parts[0].dtype)], axis=3)

    def snapshot(self) -> tuple[mx.array | None, int]:
        return self.slab, self.offset

    def restore(self, snapshot: tuple[mx.array | None, int]) -> None:
        self.slab, self.offset = snapshot

    @property
    def keys(self) -> mx.array | None:
        """[B, Hkv, S, Dh]"""
        return None if self.slab is None else self.slab[0, :]

    @property
    def values(self) -> mx.array | None:
        """[B, Hkv, S, Dh]"""
        return None if self.slab is None else self.slab[1, :]

    @property
    def arrays(self) -> list[mx.array]:
        return [] if self.slab is None else [self.slab]


class TracedKVCache:
    """The slab of a `KVCache` while a graph is made that must hold for every offset: it is an array here."""

    def __init__(self, slab: mx.array, offset: mx.array) -> None:
        self.slab, self.offset = slab, offset

    def update(self, keys_values: mx.array) -> tuple[mx.array, mx.array]:
        """Write `keys_values` [2, B, Hkv, T, Dh] at the offset, where there is room; returns all of both halves."""
        self.slab = mx.slice_update(self.slab, keys_values, self.offset, axes=(3,))
        return self.slab[0, :], self.slab[1, :]

    @property
    def arrays(self) -> list[mx.array]:
        return [self.slab]


def grown(start: int, end: int) -> int:
    """Tokens that a slab of `start` has room for when it grows to hold `end`.

    By an eighth at least: the copies of a long sequence, of which each is larger than the last, then add up to nine
    times its length, whatever that is, and a compiled step meets few lengths.
    """
    return -(-max(end, start + start // 8) // SLAB) * SLAB


def _with_room(slab: mx.array | None, like: mx.array, start: int, end: int) -> mx.array:
    """`slab`, of which `start` tokens are filled, or one that has `grown` if `end` lies beyond it."""
    if slab is not None and end <= slab.shape[3]:
        return slab
    _, B, H, _, D = like.shape
    room = mx.zeros((2, B, H, grown(start, end) - start, D), like.dtype)
    return room if slab is None else mx.concatenate([slab[:, :, :, :start], room], axis=3)
