"""The states of one Gated DeltaNet layer: fixed in size, whatever the length of the sequence, and their last update.

A state forgets what it was, so the last update is kept: the states before it, and a tape if it is short. Who writes
that tape, and by which formula it is read, is not known here.
"""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

States = tuple[mx.array | None, mx.array | None]
"""conv_state and recurrent_state; None before the first token."""


class Tape(Protocol):
    """What the tokens of one update did to both states."""

    @property
    def arrays(self) -> list[mx.array]: ...

    def states_after(self, n: int) -> tuple[mx.array, mx.array]:
        """Both states as they were after the first n tokens of the update, n at least 1."""
        ...


class RecurrentCache:
    """conv_state: [B, K-1, Cn] the last projected columns before the convolution; recurrent_state: [B, Hv, Dv, Dk].

    The states before the last update are references to what was held anyway, but they double what stays: 18.6 MiB to
    37.3 MiB over the 18 such layers of the 0.8B, of which a state takes 1 MiB and a window in bfloat16 36 KiB.
    """

    def __init__(self, conv_state: mx.array | None = None, recurrent_state: mx.array | None = None) -> None:
        self.conv_state = conv_state
        self.recurrent_state = recurrent_state
        self.passed: Sequence[States] = ()
        self._before: States = (None, None)
        self._tokens = 0
        self._tape: Tape | None = None

    def update(
        self,
        conv_state: mx.array,
        recurrent_state: mx.array,
        tokens: int,
        tape: Tape | None = None,
        passed: Sequence[States] = (),
    ) -> None:
        """Hold the states after `tokens` more tokens, and until the next update how to take them back, and the states
        that were `passed` on the way, at places that somebody asked for."""
        self._before, self._tokens, self._tape = (self.conv_state, self.recurrent_state), tokens, tape
        self.conv_state, self.recurrent_state, self.passed = conv_state, recurrent_state, passed

    def can_rewind(self, n: int) -> bool:
        """Whether the last n tokens can be taken back: none, the whole last update, or with a tape a part of it."""
        return n in (0, self._tokens) or (self._tape is not None and 0 < n < self._tokens)

    @property
    def reach(self) -> str:
        """The same in words."""
        if not self._tokens:
            return "no update is known that could be taken back"
        return f"the last update had {self._tokens}, of which {'any' if self._tape else 'all'} can be taken back"

    def rewind(self, n: int) -> None:
        """Take back the last n tokens. Ask `can_rewind` first."""
        kept = self._tokens - n
        if n and kept and self._tape:
            self._tokens = kept
            self.conv_state, self.recurrent_state = self._tape.states_after(kept)
        elif n:
            self.restore(self._before)

    def snapshot(self) -> States:
        return (self.conv_state, self.recurrent_state)

    def restore(self, snapshot: States) -> None:
        self.conv_state, self.recurrent_state = snapshot
        self._before, self._tokens, self._tape, self.passed = (None, None), 0, None, ()

    @property
    def arrays(self) -> list[mx.array]:
        """What the next token reads."""
        return [a for a in (self.conv_state, self.recurrent_state) if a is not None]

    @property
    def past(self) -> list[mx.array]:
        """What is kept to go back; of the arrays some may be those of `arrays`."""
        return [*(a for a in self._before if a is not None), *(self._tape.arrays if self._tape else ())]
