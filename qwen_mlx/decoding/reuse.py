"""A prompt of which the beginning may be known already: what is computed of it, and what of it is kept for the next.

In: token ids, a `PrefixStore` or the cache of an earlier text. Out: the logits behind the prompt. Knows no messages but
the token they begin with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import mlx.core as mx

from qwen_mlx.cache.prefix import PrefixMatch, PrefixStore
from qwen_mlx.cache.sequence import CHECKPOINTS, SequenceCache
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.model.qwen import Qwen
from qwen_mlx.tokenizer import Tokenizer

MESSAGE_START = "<|im_start|>"
TAIL = 30
"""Tokens before the end of a text: what is put behind it may change how its last words are cut into tokens."""
APART = 512
"""Tokens between two messages of a long prompt whose beginnings are both kept: states take as much memory as the keys
and values of 1,500 tokens."""
SPACING = 2048
"""Tokens without a place of their own after which the end of a chunk becomes one. About as many tokens have keys and
values as large as the states of one place."""


@dataclass
class PromptCache:
    """A cache of `model`, and the ids of all tokens that it holds: both go on with every answer given from it."""

    tokens: list[int]
    cache: SequenceCache
    model: Qwen


class Reuse:
    """One text: `tokens`, which whoever makes it appends to, and the cache that takes them in. At the end of its
    context they agree, and are kept for the next.

    Raises ValueError for a store or cache of another model or number of `kv_bits`, and for `tokens` that do not begin
    with those of `prompt_cache` and go on.
    """

    def __init__(
        self,
        model: Qwen,
        tokens: Sequence[int],
        prompt_cache: PromptCache | None = None,
        store: PrefixStore | None = None,
        *,
        kv_bits: int | None = None,
    ) -> None:
        self.cache = model.make_cache(kv_bits=kv_bits)
        self.tokens, self.cached_tokens = list(tokens), 0
        self.in_words: str | None = None
        self._prompt_cache, self._store = prompt_cache, store
        if store is not None:
            if store.model is not model:
                raise ValueError("The prefix store was made for another model; make one for this: PrefixStore(model).")
            store.check_form(self.cache)
        if prompt_cache is not None:
            if prompt_cache.model is not model:
                raise ValueError("The prompt cache was made for another model; load or make it with this one.")
            self.cache.check_form("prompt cache", prompt_cache.cache.form)
            _check_beginning(self.tokens, prompt_cache)
            self.cache, self.cached_tokens = prompt_cache.cache, len(prompt_cache.tokens)

    def read(
        self,
        model: Qwen,
        tokenizer: Tokenizer,
        *,
        step_size: int,
        seen: Callable[[mx.array, mx.array], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> mx.array:
        """Logits [1, V] behind all tokens, of which those not known yet go through `model`; arguments as `prefill`'s.

        Interrupted, the store has the places that were passed up to then.
        """
        prompt, places = self.tokens[:], []
        if self._store is not None:
            if not self.cached_tokens:
                match = self._store.restore(prompt, self.cache)
                self.cached_tokens, self.in_words = match.cached, in_words(tokenizer, prompt, match)
            places = places_to_keep(tokenizer, prompt, self.cached_tokens, step_size)

        def chunk_done(done: int, total: int) -> None:
            if self._store is not None:
                self._store.add(prompt[: self.cache.offset], self.cache)
            if progress:
                progress(done, total)

        rest = prompt[self.cached_tokens :]
        return prefill(model, rest, self.cache, step_size=step_size, marks=places, seen=seen, progress=chunk_done)

    def __enter__(self) -> "Reuse":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error or Ctrl-C nothing is to be computed any more, and the store has the places up to then."""
        if kind in (None, GeneratorExit):
            self.keep()
        else:
            self._settle()

    def keep(self) -> None:
        """The text has ended, between two tokens: the store gets this place too."""
        self._settle()
        if self._store is not None:
            self.cache.checkpoint()
            self._store.add(self.tokens[: self.cache.offset], self.cache)

    def _settle(self) -> None:
        """What went into the cache and is none of the tokens is taken back."""
        beyond = self.cache.offset - len(self.tokens)
        if beyond > 0 and self.cache.can_rewind(beyond):
            self.cache.rewind(beyond)
        if self._prompt_cache is not None:
            self._prompt_cache.tokens[:] = self.tokens[: self.cache.offset]


def _check_beginning(tokens: list[int], known: PromptCache) -> None:
    if len(known.tokens) != known.cache.offset:
        raise ValueError(
            f"The prompt cache holds {known.cache.offset} tokens, but {len(known.tokens)} are given; pass all of them."
        )
    here, there = len(tokens), len(known.tokens)
    differ = next((i for i, (a, b) in enumerate(zip(tokens, known.tokens)) if a != b), None)
    if differ is not None:
        raise ValueError(
            f"The prompt does not begin as the prompt cache does: at token {differ} it has {tokens[differ]}, and the "
            f"cache {known.tokens[differ]}."
        )
    if here <= there:
        raise ValueError(f"The prompt has {here} tokens and the prompt cache {there}: at least one must be new.")


def places_to_keep(tokenizer: Tokenizer, tokens: Sequence[int], start: int, step_size: int) -> list[int]:
    """Ascending offsets between `start` and the end of `tokens`, which is read in chunks of `step_size` from there.

    Beginnings of messages, the assistant's among them: what is generated behind it will stand there in another form
    when it is rendered again. The last three, and of those before, which in a conversation were the last ones once, the
    first and those APART from each other. The place TAIL tokens before the end, or, where a message begins nearer, that
    before the last token: such a prompt comes again as a whole when its answer is made again. With the last beginnings
    it makes the CHECKPOINTS that a cache keeps. Ends of chunks where nothing else lies within SPACING tokens.
    """
    message = tokenizer.token_to_id(MESSAGE_START)
    starts = [i for i in range(start + 1, len(tokens)) if tokens[i] == message]
    places = set(starts[1 - CHECKPOINTS :])
    last = -APART
    for place in starts:
        if place - last >= APART:
            places.add(place)
            last = place
    last_tokens = 1 if message in tokens[-TAIL:] else TAIL
    if (tail := len(tokens) - last_tokens) > start:
        places.add(tail)
    for end in range(start + step_size, len(tokens), step_size):
        if not any(end - SPACING < place <= end for place in (start, *places)):
            places.add(end)
    return sorted(places)


def in_words(tokenizer: Tokenizer, tokens: Sequence[int], match: PrefixMatch) -> str:
    """How much of a prompt was known, and where it parts from what is known."""
    known = f"{match.cached} of {len(tokens)} tokens were known"
    if match.common >= len(tokens):
        return f"{known}; the same prompt was met before{'' if match.cached else ', too short to go on from'}."
    if match.common == 0 and match.kept is None:
        return f"{known}; nothing is kept yet."
    here = _shown(tokenizer, tokens[match.common])
    if match.kept is None:
        return f"{known}; what is kept ends at token {match.common}, before {here}."
    there = _shown(tokenizer, match.kept)
    return f"{known}; at token {match.common} the prompt has {here} where {there} was kept."


def _shown(tokenizer: Tokenizer, token: int) -> str:
    return f"{tokenizer.decode([token])!r} ({token})"
