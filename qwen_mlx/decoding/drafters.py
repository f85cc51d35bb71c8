"""Where drafts come from: the model's own draft head, or words that stood in the text before.

In: the tokens of a text, and the hidden states the model had at them. Out: tokens that may follow, lazily, and the
distributions they were drawn from. Knows nothing of whether they stand.
"""

import copy
from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np

from qwen_mlx.decoding.sampling import Sampler
from qwen_mlx.model.mtp import MTPHead
from qwen_mlx.model.qwen import Qwen

WAITING = 256
"""Tokens that wait until a drafter takes them in, where no drafts are asked for."""
APART = 32
"""Arrays that are kept one by one. Steps took 1 to 2 % longer on a CPU where some hundred were."""
FEW = 16
"""Tokens for which one pass through the head takes less than two, of which the first leaves out most of its work."""
NGRAMS = (4, 3, 2)
"""Lengths, by preference, of the last words that are looked for in the text before them."""

Drafts = tuple[mx.array, mx.array | None]
"""k tokens [k], and what each was drawn from as processed logits [k, V], None where they were simply proposed."""


class Drafter(Protocol):
    def take(self, hidden: mx.array | None, tokens: mx.array) -> None:
        """hidden [1, m, D]: the model's at the next m tokens that stand in the text; `tokens` [m]: what was chosen to
        stand behind each of them. The last may lack its token, which then comes in the next call, without `hidden`."""
        ...

    def draft(self, sampler: Sampler, count: int) -> Drafts:
        """At most `count` tokens behind all that were taken."""
        ...


class MTPDrafter:
    """The draft head (`MTPHead`): from the model's hidden state at a token and the token behind it, the one after.

    Each further draft takes the head's own output for a hidden state. The slots of drafts are dropped, and made anew
    from the model's hidden states of what stands.
    """

    def __init__(self, model: Qwen, head: MTPHead) -> None:
        self._model, self._head, self._cache = model, head, head.make_cache()
        self._hidden: list[mx.array] = []
        self._tokens: list[mx.array] = []
        self._waiting = 0  # tokens of all `_tokens`: to add them up at every token would take longer than the rest
        self._slots = 0  # those of the text; the cache may hold drafts behind them

    def take(self, hidden: mx.array | None, tokens: mx.array) -> None:
        if self._waiting >= WAITING:  # not the new ones: a draft needs the last output
            self._advance()
            mx.async_eval(self._cache.arrays)
        self._hidden += [] if hidden is None else [hidden]
        self._tokens.append(tokens)
        self._waiting += tokens.size
        if len(self._tokens) >= APART:
            self._hidden, self._tokens = [mx.concatenate(self._hidden, axis=1)], [mx.concatenate(self._tokens)]
            mx.async_eval(self._hidden, self._tokens)

    def draft(self, sampler: Sampler, count: int) -> Drafts:
        y = self._advance()
        counting = copy.copy(sampler)  # its counts are followed; keys are taken from `sampler` alone
        drawn: list[mx.array] = []
        logits: list[mx.array] = []
        for i in range(count):
            if i:
                y = self._head(y, self._model.embed(drawn[-1][None]), self._cache)
            row = self._model.logits(y)[:, -1]
            if sampler.params.temperature == 0:
                token = counting.greedy(row)
            else:
                logits.append(counting.processed_logits(row))
                token = mx.random.categorical(logits[-1][0], key=sampler.next_key())[None]
            counting.observe(token)
            drawn.append(token)
        return mx.concatenate(drawn), mx.concatenate(logits) if logits else None

    def _advance(self) -> mx.array:
        """Take in what waits, but a last hidden state whose token is not known: the head's last output [1, 1, D]."""
        hidden, tokens = mx.concatenate(self._hidden, axis=1), mx.concatenate(self._tokens)
        count = tokens.size
        self._hidden, self._tokens, self._waiting = [hidden[:, count:]], [], 0
        self._cache.offset = self._slots
        self._slots += count
        embeddings = self._model.embed(tokens[None])
        # Nobody asks for what the head makes of the others, so only their keys and values are computed.
        front = count - 1 if count > FEW else 0
        if front:
            self._head(hidden[:, :front], embeddings[:, :front], self._cache)
        return self._head(hidden[:, front:count], embeddings[:, front:], self._cache)[:, -1:]


class NGramDrafter:
    """What stood behind the last words when they stood in the text before (prompt lookup, Saxena 2023).

    `tokens` are those of the prompt.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._text = list(tokens)
        self._waiting: list[mx.array] = []
        self._ends: dict[tuple[int, ...], int] = {}  # where an n-gram that has something behind it ended last
        self._seen = 0

    def take(self, hidden: mx.array | None, tokens: mx.array) -> None:
        if len(self._waiting) >= APART:  # not the new ones, which may be under way
            self._read()
        self._waiting.append(tokens)

    def draft(self, sampler: Sampler, count: int) -> Drafts:
        self._read()
        for end in range(self._seen, len(self._text)):  # not the last place: nothing stands behind it yet
            for size in NGRAMS:
                if end >= size:
                    self._ends[tuple(self._text[end - size : end])] = end
        self._seen = len(self._text)
        for size in NGRAMS:
            if last := self._ends.get(tuple(self._text[-size:])):
                return mx.array(self._text[last : last + count], mx.uint32), None
        return mx.array([], mx.uint32), None

    def _read(self) -> None:
        self._text += [int(token) for tokens in self._waiting for token in np.array(tokens)]
        self._waiting = []
