"""Logits to a token: what may be asked for, the distribution it means, and the draw from it.

In: logits [B, V] of the next token. Out: tokens [B], lazily, so that a generation can build the next step before this
one is evaluated. Knows neither the model nor the text: what ends a reply is the business of whoever runs the loop.
"""

import copy
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qwen_mlx.decoding.constraint import Constraint
from qwen_mlx.decoding.stop import stop_tuple
from qwen_mlx.errors import CheckpointError, PromptError

_NUMBER = (int, float)
_RULES: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {  # name -> its types, its values, both told
    "temperature": (_NUMBER, lambda x: 0 <= x < math.inf, "a finite number, at least 0 (0 takes the likeliest token)"),
    "top_p": (_NUMBER, lambda x: 0 < x <= 1, "above 0 and at most 1 (1 switches it off)"),
    "min_p": (_NUMBER, lambda x: 0 <= x <= 1, "between 0 and 1 (0 switches it off)"),
    "repetition_penalty": (_NUMBER, lambda x: 0 < x < math.inf, "a finite number above 0 (1 switches it off)"),
    "presence_penalty": (_NUMBER, lambda x: -2 <= x <= 2, "between -2 and 2 (0 switches it off)"),
    "frequency_penalty": (_NUMBER, lambda x: -2 <= x <= 2, "between -2 and 2 (0 switches it off)"),
    "top_k": ((int,), lambda n: n >= 0, "an integer, at least 0 (0 switches it off)"),
    "max_tokens": ((int,), lambda n: n >= 1, "an integer, at least 1"),
    "seed": ((int, type(None)), lambda n: n is None or 0 <= n < 2**64, "None or an integer from 0 to 2**64 - 1"),
}


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one generation are chosen and when it ends at the latest; as it stands, greedily.

    top_k, top_p and min_p are off at 0, 1 and 0. repetition_penalty looks at prompt and reply, presence_penalty and
    frequency_penalty at the reply alone. logit_bias adds to the logits of single token ids. seed None draws one from
    the operating system for each generation. max_tokens is the longest reply in tokens. stop takes one string or
    several and is kept as a tuple. A value out of range is a ValueError that names it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int = 512
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, (types, allowed, words) in _RULES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, types) or not allowed(value):
                raise ValueError(f"{name} must be {words}, not {value!r}")
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias must map integer token ids to finite numbers, not {self.logit_bias!r}")
        for token, bias in (self.logit_bias or {}).items():
            if type(token) is not int or not isinstance(bias, (int, float)) or not abs(bias) <= 1e38:
                raise ValueError(f"logit_bias must map integer token ids to finite numbers, not {token!r} to {bias!r}")
        object.__setattr__(self, "stop", stop_tuple(self.stop))


PRESETS = ("general", "code", "reasoning")
_CARD = {  # (preset, is_small, thinking) -> the rows for text on the Qwen3.5 model cards
    ("general", True, True): {"temperature": 1.0, "top_p": 0.95, "top_k": 20, "presence_penalty": 1.5},
    ("general", True, False): {"temperature": 1.0, "top_p": 1.0, "top_k": 20, "presence_penalty": 2.0},
    ("general", False, True): {"temperature": 1.0, "top_p": 0.95, "top_k": 20, "presence_penalty": 1.5},
    ("general", False, False): {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.5},
    ("code", True, True): {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "presence_penalty": 0.0},
    ("code", False, True): {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "presence_penalty": 0.0},
    ("reasoning", False, False): {"temperature": 1.0, "top_p": 1.0, "top_k": 40, "presence_penalty": 2.0},
}


def default_params(
    generation_config: Mapping[str, Any] | None, *, is_small: bool, thinking: bool, preset: str | None = None
) -> SamplingParams:
    """The parameters a model's makers recommend: generation_config.json where it speaks, else their model card, and
    for a `preset` the model card alone.

    `is_small` means the dense 0.8B and 2B models, which have rows of their own (hidden_size does not tell: 2B and the
    35B mixture share it). A generation_config with do_sample false is greedy; otherwise each of its temperature,
    top_k, top_p, min_p and repetition_penalty replaces the card's value, and presence_penalty, which that file cannot
    state, stays the card's. A value that makes no sense is a CheckpointError, and a PromptError a preset
    that the card lacks.
    """
    chosen = recommendations(generation_config, is_small=is_small, thinking=thinking, preset=preset)
    try:
        return SamplingParams(**{name: value for name, (value, _) in chosen.items()})
    except ValueError as error:
        raise CheckpointError(f"generation_config.json: {error}") from error


def recommendations(
    generation_config: Mapping[str, Any] | None, *, is_small: bool, thinking: bool, preset: str | None = None
) -> dict[str, tuple[Any, str]]:
    """Every value that `default_params` sets, unchecked, and where it comes from."""
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be {', '.join(PRESETS)}, not {preset!r}")
    card = _CARD.get((preset or "general", is_small, thinking))
    if card is None:
        mode, size = "with" if thinking else "without", "this size" if is_small else "these sizes"
        raise PromptError(
            f"The model card has no sampling for {preset!r} {mode} thinking at {size}: take general, code (with "
            "thinking), or reasoning (without, from 4B)."
        )
    stated: dict[str, tuple[Any, str]] = {}
    if preset is None:
        config, file = generation_config or {}, "generation_config.json"
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        stated = {name: (config[name], file) for name in names if config.get(name) is not None}
        do_sample = config.get("do_sample")
        if do_sample is not None and not isinstance(do_sample, bool):
            raise CheckpointError(f"generation_config.json: do_sample must be true or false, not {do_sample!r}")
        if do_sample is False:
            greedy = {"temperature": (0.0, file)}
            return greedy | {name: stated[name] for name in stated if name == "repetition_penalty"}
    return {name: (value, "model card") for name, value in card.items()} | stated


class Sampler:
    """Chooses the tokens of one generation: B replies to one prompt, all under the same parameters.

    The logits of the real tokens pass through, in the order of transformers' `generate` (logits processors, then
    warpers; presence and frequency, which it lacks, follow its repetition penalty):

        bias        z += logit_bias
        repetition  z /= r where z > 0, z *= r elsewhere, for tokens of prompt or reply (CTRL, arXiv 1909.05858)
        presence    z -= presence * [n > 0], and frequency: z -= frequency * n, n the count in the reply (OpenAI)
        constraint  z = -inf for tokens that would break the form of the reply (one reply only); to know them, it waits
                    for the tokens before
        temperature z / T
        top_k, top_p (arXiv 1904.09751), min_p (arXiv 2407.01082)

    and one token is drawn from the softmax. Padding rows (ids >= num_real_tokens) are never drawn.

    Ties: top_k, top_p and min_p keep every logit at or above a threshold, so equal logits stand or fall together
    (top_k may keep more than k). Greedy decoding takes the lowest of equal ids.

    `copy.copy(sampler)` is an independent sampler at the same place and with the same keys.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_tokens: Sequence[int],
        *,
        vocab_size: int,
        num_real_tokens: int,
        constraint: Constraint | None = None,
    ):
        if not 0 < num_real_tokens <= vocab_size:
            raise ValueError(f"num_real_tokens must be from 1 to vocab_size {vocab_size}, not {num_real_tokens}")
        self.params = params
        self.vocab_size = vocab_size
        self.num_real_tokens = num_real_tokens
        self._key = mx.random.key(secrets.randbits(64) if params.seed is None else params.seed)

        bias = params.logit_bias or {}
        self._require_real("logit_bias", bias)
        self._bias = (mx.array(list(bias), mx.uint32), mx.array(list(bias.values()), mx.float32)) if bias else None

        penalizes = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        self._counts = mx.zeros((1, num_real_tokens)) if penalizes else None
        self._in_prompt = mx.zeros((1, num_real_tokens), mx.bool_)
        if params.repetition_penalty != 1 and prompt_tokens:
            self._require_real("prompt_tokens", prompt_tokens)
            self._in_prompt[:, mx.array(sorted(set(prompt_tokens)), mx.uint32)] = True
        self._constraint, self._ahead = constraint, mx.array([], mx.uint32)

    def __copy__(self) -> "Sampler":
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other._constraint = copy.copy(self._constraint)
        return other

    def __call__(self, logits: mx.array) -> mx.array:
        """Draw one token per row and count it: logits [B, V] -> tokens [B] uint32, not yet evaluated."""
        if self.params.temperature == 0:
            tokens = self.greedy(logits)
        else:
            tokens = mx.random.categorical(_truncated(self._penalized(logits), self.params), key=self.next_key())
        self.observe(tokens)
        return tokens

    def processed_logits(self, logits: mx.array) -> mx.array:
        """The logits whose softmax is the distribution of the next draw: [B, V] -> [B, V] float32; changes nothing.

        Tokens that cannot be drawn, padding among them, have -inf; at temperature 0 that is all but one.
        """
        if self.params.temperature == 0:
            scores = mx.where(mx.arange(self.num_real_tokens) == self.greedy(logits)[:, None], mx.array(0.0), -math.inf)
        else:
            scores = _truncated(self._penalized(logits), self.params)
        return mx.pad(scores, [(0, 0), (0, self.vocab_size - self.num_real_tokens)], constant_values=-math.inf)

    def greedy(self, logits: mx.array) -> mx.array:
        """The token that temperature 0 draws, at any temperature: [B, V] -> [B] uint32; changes nothing."""
        return mx.argmax(self._penalized(logits), axis=-1)

    def observe(self, tokens: mx.array) -> None:
        """Count tokens [B] as generated, as `__call__` does; for real tokens that were chosen elsewhere."""
        if self._counts is not None:
            counts = mx.broadcast_to(self._counts, (tokens.shape[0], self.num_real_tokens))
            self._counts = counts.at[mx.arange(tokens.shape[0]), tokens].add(1.0)
        if self._constraint is not None:
            if tokens.size != 1:
                raise ValueError(f"a constraint follows one reply, not {tokens.size}")
            self._constraint.observe(tokens)

    def along(self, tokens: mx.array) -> "Sampler":
        """For one reply that may go on with `tokens` [k]: a copy with k + 1 rows; row i has counted the first i.

        ValueError where several replies have been counted.
        """
        places = copy.copy(self)
        if self._counts is not None:
            if self._counts.shape[0] != 1:
                raise ValueError(f"along follows one reply, but this sampler has counted {self._counts.shape[0]}")
            said = mx.cumsum(tokens[:, None] == mx.arange(self.num_real_tokens), axis=0)
            places._counts = mx.concatenate([self._counts, self._counts + said])
        places._ahead = tokens
        return places

    def next_key(self) -> mx.array:
        """A key for `mx.random` that has not been used yet; the sequence of keys follows from the seed alone."""
        self._key, key = mx.random.split(self._key)
        return key

    def _penalized(self, logits: mx.array) -> mx.array:
        """Bias, penalties and form of the real tokens: [B, V] -> [B, num_real_tokens]; with none, only a view."""
        if logits.ndim != 2 or logits.shape[1] != self.vocab_size:
            raise ValueError(f"logits must have shape [B, {self.vocab_size}], not {list(logits.shape)}")
        scores = logits[:, : self.num_real_tokens]
        if self._bias is not None:
            token_ids, values = self._bias
            scores = scores.astype(mx.float32).at[:, token_ids].add(values)
        if self._counts is not None:
            scores = self._less_likely_again(scores.astype(mx.float32), self._counts)
        if self._constraint is not None:
            mx.async_eval(scores)  # the model goes on while the form is looked at
            scores = mx.where(self._constraint.allowed(self.num_real_tokens, self._ahead), scores, -math.inf)
        return scores

    def _less_likely_again(self, scores: mx.array, counts: mx.array) -> mx.array:
        params = self.params
        if params.repetition_penalty != 1:
            scaled = mx.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
            scores = mx.where(self._in_prompt + counts > 0, scaled, scores)
        if params.presence_penalty != 0:
            scores = scores - params.presence_penalty * (counts > 0)
        if params.frequency_penalty != 0:
            scores = scores - params.frequency_penalty * counts
        return scores

    def _require_real(self, name: str, token_ids: Sequence[int] | Mapping[int, float]) -> None:
        wrong = [token for token in token_ids if not 0 <= token < self.num_real_tokens]
        if wrong:
            raise ValueError(f"{name} has token id {wrong[0]}, but ids run from 0 to {self.num_real_tokens - 1}")


def _truncated(scores: mx.array, params: SamplingParams) -> mx.array:
    """Temperature, then top_k, top_p and min_p: [B, N] -> [B, N] float32 with -inf below one threshold per row.

    With the maximum at 0 no temperature overflows, and min_p, a bound on the ratio to the likeliest token, is a bound
    on the difference. Each filter only raises the threshold, and min_p's does not depend on the others'.
    """
    scores = scores.astype(mx.float32)
    scores = scores - mx.max(scores, axis=-1, keepdims=True)
    scores = scores / max(params.temperature, 1e-37)  # float32 has nothing smaller to divide by
    threshold = mx.array(math.log(params.min_p) if params.min_p > 0 else -math.inf)
    likeliest, beyond = scores, mx.array(0)
    if 0 < params.top_k < scores.shape[-1]:
        likeliest = mx.topk(scores, params.top_k, axis=-1)
        kth = mx.min(likeliest, axis=-1, keepdims=True)
        beyond = mx.sum(scores >= kth, axis=-1, keepdims=True) - params.top_k
        threshold = mx.maximum(threshold, kth)
    if params.top_p < 1:
        threshold = mx.maximum(threshold, _nucleus_threshold(likeliest, params.top_p, ties_beyond=beyond))
    return mx.where(scores >= threshold, scores, -math.inf)


def _nucleus_threshold(scores: mx.array, top_p: float, *, ties_beyond: mx.array) -> mx.array:
    """The smallest score whose likelier tokens hold less than top_p of the mass: [B, N] -> [B, 1].

    `ties_beyond` more tokens of the least score share the mass (those that top_k kept beyond k).
    """
    ordered = -mx.sort(-scores, axis=-1)
    weights = mx.exp(ordered)
    mass = mx.sum(weights, axis=-1, keepdims=True) + ties_beyond * weights[:, -1:]
    above = mx.cumsum(weights, axis=-1, inclusive=False)
    return mx.min(mx.where(above < top_p * mass, ordered, math.inf), axis=-1, keepdims=True)
