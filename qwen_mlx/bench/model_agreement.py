"""Whether two engines say the same: greedy tokens position by position, and what of their differences is a near tie.

In: our greedy tokens with the logits they were drawn from, and the other engine's logits at the same positions of the
same text, so that one difference hides no later one. Out: the near ties; EnginesDiffer for anything more.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from qwen_mlx.errors import QwenMLXError

WIDE_BOUND = 5e-4
"""Two candidates' logits are this near at most, where both engines compute in float32 with the same weights; the tests
hold the logits of both to the same figure."""
NARROW_BOUND = 1 / 64
"""The same as a share of the row's spread (its largest logit minus its smallest), where anything is rounded to 16 bits:
bfloat16 itself moves by 1/128 of a logit. On the demo model the two engines' gaps between candidates differ by up to
0.014 of the spread in bfloat16 and 0.004 in float16, and so they do in float32 where mlx-lm rounds its gains."""


class EnginesDiffer(QwenMLXError):
    """Their greedy tokens differ beyond a near tie; the sentence says where and in which tokens."""


@dataclass(frozen=True)
class NearTie:
    """At token `position` of the reply, counted from 1, ours and theirs; how far the two are apart in each engine."""

    position: int
    ours: int
    theirs: int
    our_gap: float
    their_gap: float
    bound: float

    @property
    def is_near(self) -> bool:
        return self.our_gap <= self.bound and self.their_gap <= self.bound  # False for NaN


def near_ties(
    ours: Sequence[tuple[int, mx.array]],
    theirs: Iterable[mx.array],
    *,
    exact: bool,
    prompt_tokens: int,
    shown: Callable[[int], str],
) -> list[NearTie]:
    """Where the two would take different tokens. `exact`: float32 throughout, with the same weights.

    `ours`: tokens and logits [V]; `theirs`: logits [V], up to a constant. Raises EnginesDiffer.
    """
    found = []
    for position, (their_row, (token, our_row)) in enumerate(zip(theirs, ours, strict=True), start=1):
        tie = _difference(position, token, our_row.astype(mx.float32), their_row.astype(mx.float32), exact=exact)
        if tie is None:
            continue
        if not tie.is_near:
            raise EnginesDiffer(_sentence(tie, len(ours), prompt_tokens, shown))
        found.append(tie)
    return found


def _difference(position: int, token: int, our_row: mx.array, their_row: mx.array, *, exact: bool) -> NearTie | None:
    """None if both take `token`, and both logits are numbers."""
    choice = int(mx.argmax(their_row).item())  # type: ignore[arg-type]
    our_gap = float(mx.abs(our_row[token] - our_row[choice]).item())  # type: ignore[arg-type]
    their_gap = float(mx.abs(their_row[token] - their_row[choice]).item())  # type: ignore[arg-type]
    if token == choice and our_gap == their_gap == 0:  # NaN and infinity are not equal to 0
        return None
    bound = WIDE_BOUND if exact else NARROW_BOUND * float((our_row.max() - our_row.min()).item())  # type: ignore[arg-type]
    return NearTie(position, token, choice, our_gap, their_gap, bound)


def _sentence(tie: NearTie, count: int, prompt_tokens: int, shown: Callable[[int], str]) -> str:
    return (
        f"The two engines do not say the same, so no speed-up is told: at token {tie.position} of {count} after "
        f"{prompt_tokens} tokens qwen_mlx takes {shown(tie.ours)} and mlx-lm {shown(tie.theirs)}, whose logits are "
        f"{tie.our_gap:.2g} and {tie.their_gap:.2g} apart in the two, where {tie.bound:.2g} is a near tie."
    )
