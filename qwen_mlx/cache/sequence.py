"""The caches of all layers, as one thing that can be put aside, brought back and taken back by some tokens.

A place in the sequence is known from here alone: no layer of a model remembers one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qwen_mlx.cache.kv import KVCache
from qwen_mlx.cache.recurrent import RecurrentCache, States

CHECKPOINTS = 4
"""How many a cache keeps, and all of the last update. One is as large as the states of all recurrent layers: 18.6 MiB
for the 0.8B."""


@dataclass(frozen=True)
class Checkpoint:
    """The states of the recurrent layers after `offset` tokens. Keys and values of these are still in the cache."""

    offset: int
    states: tuple[States, ...]


@dataclass(frozen=True)
class Snapshot:
    """The state of a `SequenceCache` at one moment; it stays what it was, whatever the cache does next."""

    layers: tuple[Any, ...]
    left_padding: mx.array | None
    checkpoints: tuple[Checkpoint, ...]
    form: tuple[str, ...]


class SequenceCache:
    """One cache for each layer. `left_padding` [B]: padding tokens in front of each row, None without padding.

    `sizes` says for each layer, in words, of which size a row of it is: what tells the caches of two models apart.
    """

    def __init__(
        self,
        layers: Sequence[KVCache | RecurrentCache],
        left_padding: mx.array | None = None,
        sizes: Sequence[str] = (),
    ) -> None:
        self.layers = list(layers)
        self.left_padding = left_padding
        self.sizes = tuple(sizes)
        names = [type(layer).__name__ for layer in self.layers]
        self.form = tuple(map(" of ".join, zip(names, sizes, strict=True)) if sizes else names)
        """For each layer in words, what it holds."""
        self.checkpoints: tuple[Checkpoint, ...] = ()
        """In the order of the sequence."""

    @property
    def offset(self) -> int:
        """Tokens taken in so far, padding included."""
        return next(layer.offset for layer in self.layers if not isinstance(layer, RecurrentCache))

    @property
    def arrays(self) -> list[mx.array]:
        """Everything that the next token reads, for `mx.eval`."""
        return [array for layer in self.layers for array in layer.arrays]

    @property
    def remembered(self) -> list[mx.array]:
        """The arrays of all checkpoints."""
        return [array for point in self.checkpoints for states in point.states for array in states if array is not None]

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
                layer.update(next(rest), next(rest), 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all that this cache keeps alive, what serves to go back included; what is shared counts once."""
        held = [*self.arrays, *self.remembered, *(array for layer in self._recurrent for array in layer.past)]
        held += [] if self.left_padding is None else [self.left_padding]
        return sum({id(array): array.nbytes for array in held}.values())

    def can_rewind(self, n: int) -> bool:
        """Whether `rewind(n)` takes back the last n tokens. Raises ValueError where there are no such tokens.

        It can for none; for all tokens of the last update, one or many; and for a part of them if these are not more
        than the tape holds (`SCAN_TOKENS`). After a part, what is left of the update counts as the last one; after
        all, or after `restore`, none is known any more. Without recurrent layers it always can.
        """
        if n < 0:
            raise ValueError(f"Cannot take back {n} tokens: the number must be 0 or more.")
        if n > self.offset:
            raise ValueError(f"Cannot take back {n} tokens: the cache holds {self.offset}.")
        return all(layer.can_rewind(n) for layer in self._recurrent)

    def rewind(self, n: int) -> None:
        """Take back the last n tokens, of every row of a batch.

        Keys and values go by the offset, the window of the convolution by slicing, the recurrent state by replaying
        the tape of the last update from the state before it. Taking back a whole update brings back the very arrays
        that were there. A part of it ends, bit for bit, in the states of an update by the kept tokens alone that
        computes as this one did, token by token; tokens fed one at a time may have gone through another kernel, which
        rounds differently.

        Raises ValueError for n below 0, beyond the start, or not of the last update (`can_rewind`), and then changes
        nothing; `qwen_mlx.decoding.rewind` goes any way back.
        """
        if not self.can_rewind(n):
            raise ValueError(
                f"Cannot take back {n} tokens: {self._recurrent[0].reach}. "
                "Restore a snapshot, or let qwen_mlx.decoding.rewind compute anew what lies between."
            )
        for layer in self.layers:
            if isinstance(layer, RecurrentCache):
                layer.rewind(n)
            else:
                layer.offset -= n  # what lies behind it is not seen, and will be written over
        self._drop_checkpoints()

    def checkpoint(self, passed: Sequence[int] = ()) -> None:
        """Remember the recurrent states of this place, and of the offsets `passed` inside the last update, at which it
        was asked to keep them; `back_to_checkpoint` returns there.

        The CHECKPOINTS newest are kept, and all of one call. Raises ValueError for another number of offsets than the
        update was asked for.
        """
        self._remember([*self._passed(passed), self.place()])

    def checkpoint_passed(self, passed: Sequence[int]) -> None:
        """The same without this place."""
        self._remember(self._passed(passed))

    def _passed(self, offsets: Sequence[int]) -> list[Checkpoint]:
        if not offsets:
            return []
        states = zip(*(layer.passed for layer in self._recurrent), strict=True)
        return [Checkpoint(*point) for point in zip(offsets, states, strict=True)]

    def _remember(self, points: Sequence[Checkpoint]) -> None:
        first = min((point.offset for point in points), default=self.offset + 1)
        others = [other for other in self.checkpoints if other.offset < first]
        self.checkpoints = (*others, *points)[-max(CHECKPOINTS, len(points)) :]

    def place(self) -> Checkpoint:
        """This place, for `return_to`."""
        return Checkpoint(self.offset, tuple(layer.snapshot() for layer in self._recurrent))

    def return_to(self, point: Checkpoint) -> None:
        """Be what this cache was at `point`, which it has not gone behind since: keys and values are still there."""
        for recurrent, states in zip(self._recurrent, point.states, strict=True):
            recurrent.restore(states)
        for layer in self.layers:
            if not isinstance(layer, RecurrentCache):
                layer.offset = point.offset
        self._drop_checkpoints()

    def back_to_checkpoint(self, offset: int) -> None:
        """Be what this cache was at its last checkpoint at or before `offset`; without one it is empty again."""
        empty = Checkpoint(0, ((None, None),) * len(self._recurrent))
        self.return_to(max((p for p in (empty, *self.checkpoints) if p.offset <= offset), key=lambda p: p.offset))

    def snapshot(self) -> Snapshot:
        """The state now. Nothing is copied yet; the next token copies keys and values once, not writing in place.

        The way back over the last update is no part of it, checkpoints are.
        """
        layers = tuple(layer.snapshot() for layer in self.layers)
        return Snapshot(layers, self.left_padding, self.checkpoints, self.form)

    def restore(self, snapshot: Snapshot) -> None:
        """Be again what this cache was when `snapshot` was taken.

        Raises ValueError for the snapshot of a model of other layers, shapes or dtype, and then changes nothing. Of
        two models that are alike in all of these it cannot tell one from the other.
        """
        self.check_form("snapshot", snapshot.form)
        for layer, state in zip(self.layers, snapshot.layers, strict=True):
            layer.restore(state)
        self.left_padding, self.checkpoints = snapshot.left_padding, snapshot.checkpoints

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """ValueError where `tokens` are not as many as this cache has taken in."""
        if len(tokens) != self.offset:
            raise ValueError(f"The cache holds {self.offset} tokens, but {len(tokens)} are given; pass all of them.")

    def check_form(self, what: str, theirs: Sequence[str]) -> None:
        """ValueError where `theirs`, the form of that `what`, is not this cache's."""
        if len(self.form) != len(theirs):
            raise ValueError(
                f"The {what} is of another model: it has {len(theirs)} layers, this cache {len(self.form)}."
            )
        for place, (mine, other) in enumerate(zip(self.form, theirs)):
            if mine != other:
                raise ValueError(
                    f"The {what} is of another model: its layer {place} holds {other}, that of this cache {mine}; take "
                    "the same model and kv_bits."
                )

    @property
    def _recurrent(self) -> list[RecurrentCache]:
        return [layer for layer in self.layers if isinstance(layer, RecurrentCache)]

    def _drop_checkpoints(self) -> None:
        """Those that lie ahead now: what comes there may be another text."""
        self.checkpoints = tuple(point for point in self.checkpoints if point.offset <= self.offset)
