"""The state of one Gated DeltaNet layer: fixed in size, whatever the length of the sequence."""

import mlx.core as mx


class RecurrentCache:
    """conv_state: [B, K-1, Cn] the last projected columns before the convolution; recurrent_state: [B, Hv, Dv, Dk]."""

    def __init__(self, conv_state: mx.array | None = None, recurrent_state: mx.array | None = None) -> None:
        self.conv_state = conv_state
        self.recurrent_state = recurrent_state

    def snapshot(self) -> tuple[mx.array | None, mx.array | None]:
        return (self.conv_state, self.recurrent_state)

    def restore(self, snapshot: tuple[mx.array | None, mx.array | None]) -> None:
        self.conv_state, self.recurrent_state = snapshot

    @property
    def arrays(self) -> list[mx.array]:
        return [a for a in (self.conv_state, self.recurrent_state) if a is not None]
