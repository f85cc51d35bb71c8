"""Prompts met before: what a new one shares with them at its beginning is taken from here and not computed again.

A tree of pieces. A piece has the keys and values of some tokens, which stand behind those of the piece before, and the
recurrent states after its last token: texts that begin alike share the pieces they have in common, and going on is
possible wherever a piece ends. Knows token ids, no text and no model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from qwen_mlx.cache.recurrent import RecurrentCache, States
from qwen_mlx.cache.sequence import Checkpoint, SequenceCache

MAX_BYTES = 2 << 30
"""Of the 0.8B in bfloat16 enough for 60,000 tokens, with states kept every 2,048 of them."""


@dataclass(frozen=True)
class PrefixMatch:
    """How a prompt relates to the one that is kept and agrees with it the longest."""

    cached: int  # tokens that need not be computed
    common: int  # tokens at the beginning of both
    kept: int | None  # the token that stands behind these in what is kept; None where it ends


@dataclass(eq=False)
class _Piece:
    """`tokens` [n] behind those of `before`; without states where these were given up and others need the rest."""

    tokens: np.ndarray
    end: int
    keys_values: list[list[mx.array]] = field(default_factory=list)  # for each full-attention layer, [2, 1, Hkv, n, ..]
    states: tuple[States, ...] | None = None
    used: int = 0
    after: list[_Piece] = field(default_factory=list)
    _before: weakref.ref[_Piece] | None = None  # a circle of references would hold gigabytes until Python looks for it

    @property
    def before(self) -> _Piece | None:
        return None if self._before is None else self._before()

    def common(self, tokens: np.ndarray) -> int:
        """How many of its tokens stand in `tokens`, in its place."""
        theirs = tokens[self.end - len(self.tokens) : self.end]
        differ = np.flatnonzero(self.tokens[: len(theirs)] != theirs)
        return int(differ[0]) if differ.size else len(theirs)

    @property
    def nbytes(self) -> int:
        states = [a for pair in self.states or () for a in pair if a is not None]
        return sum(a.nbytes for a in [*states, *(a for layer in self.keys_values for a in layer)])


class PrefixStore:
    """What the caches of `model` held at their checkpoints, at most `max_bytes` of it: the least recently used goes.

    Keys and values are copies, and to states nobody writes: what a cache does later touches neither. Not for several
    threads at once.
    """

    def __init__(self, model: object, max_bytes: int = MAX_BYTES) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be 0 or more, not {max_bytes!r}.")
        self._model = weakref.ref(model)
        self.max_bytes = max_bytes
        self._root = _Piece(np.empty(0, np.int64), 0)
        self._form: tuple[str, ...] | None = None
        self._clock = 0

    @property
    def model(self) -> object:
        """Whose caches these are; None when it is gone."""
        return self._model()

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self._pieces())

    def restore(self, tokens: Sequence[int], cache: SequenceCache) -> PrefixMatch:
        """Let `cache`, which is empty, hold as much of the beginning of `tokens` as is kept, but never all of it: the
        last token is left, whose logits are wanted.

        Raises ValueError, and changes nothing, for a cache that is not empty, or of another form than those kept.
        """
        if cache.offset or cache.left_padding is not None:
            raise ValueError("What is kept goes into an empty cache without padding; take one from make_cache().")
        self.check_form(cache)
        ids = np.asarray(tokens, np.int64)
        found = self._longest(ids[:-1], with_states=True)
        match = self._match(ids, found.end)
        if found.states is not None:
            # The beginning last: other texts begin alike, and of this one there will be places further on.
            for piece in sorted(self._matching(ids[: found.end]), key=lambda piece: -piece.end):
                self._touch(piece)
            _fill(cache, found, room=len(ids))
        return match

    def add(self, tokens: Sequence[int], cache: SequenceCache) -> None:
        """Keep what `cache` holds up to each of its checkpoints; `tokens` are the ids of all it has taken in.

        What would not fit by itself is left out, and drives nothing else away.

        Raises ValueError, and changes nothing, for another number of tokens, several or padded rows, and a cache of
        another form than those kept.
        """
        cache.check_tokens(tokens)
        self.check_form(cache)
        rows = {a.shape[0] for layer in cache.layers if isinstance(layer, RecurrentCache) for a in layer.arrays}
        if rows - {1} or cache.left_padding is not None:
            raise ValueError("Only a sequence by itself is kept; give each row of a batch its own cache.")
        self._form = cache.form
        ids = np.asarray(tokens, np.int64)
        for point in cache.checkpoints:
            if _bytes_up_to(point, cache) > self.max_bytes:
                break
            mx.eval(point.states)
            piece = self._longest(ids[: point.offset])
            if piece.end < point.offset:
                piece = self._behind(piece, ids[piece.end : point.offset], cache, point.states)
            elif piece.states is None and piece.end:
                piece.states = point.states
            self._touch(piece)
            while self.nbytes > self.max_bytes:
                self.drop()

    def drop(self) -> bool:
        """Give up the states least recently used, and what served these alone; False if there is nothing."""
        pieces = [piece for piece in self._pieces() if piece.states is not None]
        if not pieces:
            return False
        oldest = min(pieces, key=lambda piece: piece.used)
        oldest.states = None
        while (before := oldest.before) and not oldest.after and oldest.states is None:
            before.after.remove(oldest)
            oldest = before
        return True

    def check_form(self, cache: SequenceCache) -> None:
        """ValueError for a cache of another form than those kept."""
        if self._form is not None:
            cache.check_form("prefix store", self._form)

    def _pieces(self) -> Iterator[_Piece]:
        waiting = [self._root]
        while waiting:
            piece = waiting.pop()
            waiting += piece.after
            yield piece

    def _matching(self, ids: np.ndarray) -> Iterator[_Piece]:
        """All that hold a beginning of `ids`. Two that follow on one may: they end at different places."""
        waiting = [self._root]
        while waiting:
            piece = waiting.pop()
            waiting += [next_ for next_ in piece.after if next_.common(ids) == len(next_.tokens)]
            yield piece

    def _longest(self, ids: np.ndarray, *, with_states: bool = False) -> _Piece:
        found = (piece for piece in self._matching(ids) if piece.states is not None or not with_states)
        return max(found, key=lambda piece: piece.end, default=self._root)

    def _match(self, ids: np.ndarray, cached: int) -> PrefixMatch:
        ways: list[tuple[int, int | None]] = [(0, None)]
        for piece in self._matching(ids):
            ways.append((piece.end, None))
            for next_ in piece.after:
                count = next_.common(ids)
                if count < len(next_.tokens):
                    ways.append((piece.end + count, int(next_.tokens[count])))
        common, kept = max(ways, key=lambda way: (way[0], way[1] is not None))
        return PrefixMatch(cached, common, kept)

    def _behind(self, before: _Piece, ids: np.ndarray, cache: SequenceCache, states: tuple[States, ...]) -> _Piece:
        start, end = before.end, before.end + len(ids)
        keys_values = [layer.piece(start, end) for layer in cache.layers if not isinstance(layer, RecurrentCache)]
        mx.eval(keys_values)
        piece = _Piece(ids.copy(), end, keys_values, states, _before=weakref.ref(before))
        before.after.append(piece)
        return piece

    def _touch(self, piece: _Piece) -> None:
        self._clock += 1
        piece.used = self._clock


def _bytes_up_to(point: Checkpoint, cache: SequenceCache) -> int:
    """Of a store that has this place alone."""
    slabs = [a for layer in cache.layers if not isinstance(layer, RecurrentCache) for a in layer.arrays]
    states = sum(a.nbytes for pair in point.states for a in pair if a is not None)
    return states + point.offset * sum(a.nbytes // a.shape[3] for a in slabs)


def _fill(cache: SequenceCache, piece: _Piece, *, room: int) -> None:
    """`cache`, which is empty, holds then what led up to the end of `piece`."""
    assert piece.states is not None
    way = [piece]
    while (place := way[0].before) and place.end:
        way.insert(0, place)
    states, full = iter(piece.states), iter(range(len(piece.keys_values)))
    for layer in cache.layers:
        if isinstance(layer, RecurrentCache):
            layer.restore(next(states))
        else:
            number = next(full)
            layer.fill([part.keys_values[number] for part in way], room)
            mx.eval(layer.arrays)
