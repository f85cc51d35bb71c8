"""The loop with drafts: k tokens are drafted, the model reads all of them at once, and those it agrees with stand.

The tokens that come out have the distribution that the plain loop's have, however good the drafts are
(`qwen_mlx.decoding.acceptance`). Where no drafts are worth their time it is the plain loop. Knows neither where drafts
come from nor what decides how many there are.
"""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.decoding.acceptance import accept
from qwen_mlx.decoding.drafters import Drafter
from qwen_mlx.decoding.sampling import Sampler
from qwen_mlx.model.mtp import MTPHead
from qwen_mlx.model.qwen import Qwen

LONGEST_REST = 32
"""Tokens at most before drafts are looked for again: to look, a token must be known, which holds up the next."""

Decoded = tuple[int, mx.array, bool]
"""A token, the logits [V] of its place, and whether it was a draft."""


class Lengths(Protocol):
    """Decides on the number of drafts of each round. It is told the seconds of a round in this loop, without those of
    whoever takes the tokens. A plain round waits for the step that the round before it began, and begins the next."""

    def choose(self) -> int: ...
    def observe(self, k: int, accepted: int, seconds: float) -> None: ...


@dataclass(frozen=True)
class Drafting:
    """`head` is that of the drafter, where it has one: it then wants the hidden states of the prompt."""

    drafter: Drafter
    lengths: Lengths
    head: MTPHead | None = None

    @property
    def seen(self) -> Callable[[mx.array, mx.array], None] | None:
        """What wants to see the prompt go through the model, for `prefill`."""
        return self.drafter.take if self.head is not None else None


def decode_with_drafts(
    model: Qwen, logits: mx.array, cache: SequenceCache, sampler: Sampler, *, count: int, drafting: Drafting
) -> Generator[Decoded, None, None]:
    """Yield `count` tokens, as `decode` does; `logits` [1, V] are those of the first, behind what `cache` holds.

    Closed between two tokens, `cache` holds no token that was not yielded.
    """
    drafter, lengths = drafting.drafter, drafting.lengths
    token, row = sampler(logits), logits[0]  # a token that is chosen, and has not gone in
    mx.async_eval(token)
    drafter.take(None, token)
    cleared = count
    since = time.perf_counter()
    missed = rest = 0  # nothing was found to draft so often in a row; tokens before it is looked for again
    while count:
        if cleared - count >= 256:
            mx.clear_cache()  # for the reason that `decode` has
            cleared = count
        drafts = None
        wanted = 0 if rest else min(lengths.choose(), count - 1)
        rest = max(0, rest - 1)
        if wanted:
            drafts, drawn_from = drafter.draft(sampler, wanted)
            missed = 0 if drafts.size else missed + 1
            rest = min(2**missed, LONGEST_REST) if missed else 0
        if drafts is None or not drafts.size:
            current, current_row = token, row
            count -= 1
            if count:
                logits, hidden = model.step(token[:, None], cache)
                token, row = sampler(logits), logits[0]
                mx.async_eval(token)
                drafter.take(hidden, token)
            known = int(current.item())  # type: ignore[arg-type]
            if count:
                now = time.perf_counter()
                if not wanted and not rest:  # else it tells nothing of what a plain step takes
                    lengths.observe(0, 0, now - since)
                since = now
            paused = time.perf_counter()
            yield known, current_row, False
            since += time.perf_counter() - paused
            continue
        hidden = model.hidden(model.embed(mx.concatenate([token, drafts])[None]), cache)
        rows = model.logits(hidden)[0]
        accepted, after = accept(sampler, rows, drafts=drafts, draft_logits=drawn_from)
        mx.async_eval(accepted, after)
        unseen = drafts.size  # tokens in the cache that have not been yielded
        try:
            known = int(token.item())  # type: ignore[arg-type]
            paused = time.perf_counter()
            yield known, row, False
            since += time.perf_counter() - paused
            stand = int(accepted.item())  # type: ignore[arg-type]
            cache.rewind(unseen - stand)
            now = time.perf_counter()
            lengths.observe(drafts.size, stand, now - since)
            since = now
            unseen = stand
            for i, draft in enumerate(np.array(drafts[:stand]).tolist()):
                unseen -= 1
                paused = time.perf_counter()
                yield draft, rows[i], True
                since += time.perf_counter() - paused
        except GeneratorExit:
            cache.rewind(unseen)
            raise
        count -= 1 + stand
        chosen = mx.concatenate([drafts[:stand], after])
        for i in range(stand + 1):
            sampler.observe(chosen[i : i + 1])
        drafter.take(hidden[:, : stand + 1], chosen)
        token, row = after, rows[stand]
