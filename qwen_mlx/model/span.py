"""What every layer must know about the tokens of one call, made once and passed down."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Span:
    """`attention`: "causal", None for a single token, or bool [B, 1, T, S] where rows are padded on the left.
    `tokens`: bool [B, T], False on padding, or None without padding.
    `positions`: [3, B, T] where images make them differ from the place in the sequence, else None.
    `cuts`: numbers of tokens, ascending, after which recurrent layers keep their states.
    """

    attention: mx.array | str | None
    tokens: mx.array | None = None
    positions: mx.array | None = None
    cuts: tuple[int, ...] = ()


def make_span(
    count: int,
    offset: int,
    *,
    left_padding: mx.array | None = None,
    positions: mx.array | None = None,
    cuts: Sequence[int] = (),
) -> Span:
    """The span of `count` tokens behind `offset` others; `left_padding` [B] counts the padding in front of each row."""
    if left_padding is None:
        return Span("causal" if count > 1 else None, None, positions, tuple(cuts))
    keys = mx.arange(offset + count)
    queries = keys[offset:, None]
    real = keys >= left_padding[:, None]  # [B, S]
    # A padded query still sees itself: a row of the softmax with nothing to see would be NaN.
    attention = (keys == queries) | ((keys < queries) & real[:, None])
    return Span(attention[:, None], real[:, offset:], positions, tuple(cuts))
