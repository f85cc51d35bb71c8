"""The loop with drafts says what the plain loop says, whatever is drafted, and leaves the cache that it would leave."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx import load
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.decoding.autoregressive import decode
from qwen_mlx.decoding.drafters import Drafts, MTPDrafter, NGramDrafter
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.rewind import rewind
from qwen_mlx.decoding.sampling import Sampler, SamplingParams
from qwen_mlx.decoding.speculative import Decoded, Drafting, decode_with_drafts
from qwen_mlx.hub import resolve
from qwen_mlx.load_mtp import load_mtp
from qwen_mlx.model.mtp import MTPHead
from qwen_mlx.model.qwen import Qwen
from tests.cache.test_sequence import contents
from tests.golden.checkpoints import ORDINARY_IDS, VARIANTS, VOCAB_SIZE
from tests.golden.compare import TOLERANCE
from tests.golden.compare import load as load_golden

ModelOf = Callable[[str, str], Qwen]
HeadOf = Callable[[str], MTPHead]
DEMO, TOKENIZER = load("demo", dtype="float32")
DEMO_HEAD = load_mtp(resolve("demo"), DEMO)
GOLDEN = json.loads(Path(__file__).parents[1].joinpath("golden", "demo.json").read_text(encoding="utf-8"))
TALES = [TOKENIZER.encode(text) for text in GOLDEN["fresh_tales"]["texts"]]
GREEDY = SamplingParams()
NEAR = 1e-4
"""Float32 logits, of size up to 30, that are nearer than this may change places with the number of rows computed."""


class Turns:
    """The given numbers of drafts, one a round, over and over."""

    def __init__(self, *lengths: int) -> None:
        self._lengths = cycle(lengths)
        self.seen: list[tuple[int, int]] = []

    def choose(self) -> int:
        return next(self._lengths)

    def observe(self, k: int, accepted: int, seconds: float) -> None:
        self.seen.append((k, accepted))


class Oracle:
    """Knows the plain text: gives `right` right drafts and then wrong ones, `most` at most in all."""

    def __init__(self, text: Sequence[int], right: int, most: int = 99) -> None:
        self._text, self._right, self._most = list(text), right, most
        self._said = 0

    def take(self, hidden: mx.array | None, tokens: mx.array) -> None:
        self._said += tokens.size

    def draft(self, sampler: Sampler, count: int) -> Drafts:
        ahead = self._text[self._said : self._said + min(count, self._most)]
        wrong = [(token + 1) % ORDINARY_IDS for token in ahead]
        return mx.array(ahead[: self._right] + wrong[self._right :], mx.uint32), None


def sampler_of(model: Qwen, prompt: Sequence[int], params: SamplingParams) -> Sampler:
    real = TOKENIZER.vocab_size if model is DEMO else VOCAB_SIZE  # the golden texts have padding ids too
    return Sampler(params, prompt, vocab_size=model.config.text.vocab_size, num_real_tokens=real)


def plain(
    model: Qwen, prompt: list[int], count: int, *, into: SequenceCache | None = None, params: SamplingParams = GREEDY
) -> list[Decoded]:
    """What `decode` says behind `prompt`."""
    sequence = into or model.make_cache()
    logits = prefill(model, prompt, sequence, step_size=64)
    return list(decode(model, logits, sequence, sampler_of(model, prompt, params), count=count))


def drafted(
    model: Qwen, prompt: list[int], count: int, drafting: Drafting, *, into: SequenceCache | None = None
) -> list[Decoded]:
    """What `decode_with_drafts` says behind `prompt`, greedily."""
    sequence, drafter = into or model.make_cache(), drafting.drafter
    logits = prefill(model, prompt, sequence, step_size=64, seen=drafter.take if drafting.head else None)
    sampler = sampler_of(model, prompt, GREEDY)
    return list(decode_with_drafts(model, logits, sequence, sampler, count=count, drafting=drafting))


def by(kind: str, model: Qwen, head: MTPHead, prompt: list[int], *lengths: int) -> Drafting:
    if kind == "ngram":
        return Drafting(NGramDrafter(prompt), Turns(*lengths))
    return Drafting(MTPDrafter(model, head), Turns(*lengths), head)


def tokens_of(said: Sequence[Decoded]) -> list[int]:
    return [token for token, _, _ in said]


@pytest.fixture(scope="module")
def head_of(checkpoint_of: Callable[[str], Path], model_of: ModelOf) -> HeadOf:
    return cache(lambda variant: load_mtp(checkpoint_of(variant), model_of(variant, "float32")))  # type: ignore[return-value]


every_length = pytest.mark.parametrize("lengths", [(1,), (2,), (3,), (4,), (3, 1, 0, 4, 2)], ids=str)


@every_length
@pytest.mark.parametrize(("kind", "prompt"), [("mtp", 1), ("mtp", 65), ("ngram", 5)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_transformers(
    variant: str, kind: str, prompt: int, lengths: tuple[int, ...], model_of: ModelOf, head_of: HeadOf
) -> None:
    """No near ties: in the golden texts the best logit leads by 0.002 at least."""
    golden, model = load_golden(variant), model_of(variant, "float32")
    ids = golden[f"prompt_{prompt}_ids"].tolist()
    said = drafted(model, ids, 24, by(kind, model, head_of(variant), ids, *lengths))
    assert tokens_of(said) == golden[f"greedy_{prompt}_tokens"][:24].tolist()


@every_length
def test_greedy_tokens_of_the_demo_are_transformers(lengths: tuple[int, ...]) -> None:
    prompt, tokens = GOLDEN["story"]["prompt_ids"], GOLDEN["story"]["tokens"]
    said = drafted(DEMO, prompt, len(tokens), by("mtp", DEMO, DEMO_HEAD, prompt, *lengths))
    assert tokens_of(said) == tokens
    assert sum(from_draft for _, _, from_draft in said) > len(tokens) // 4


def behind_the_likeliest(prompts: list[list[int]], said: list[list[int]]) -> np.ndarray:
    """By how much each token's logit is below the best, where the plain model reads everything at once; [N, T]."""
    logits = DEMO(mx.array([prompt + tokens for prompt, tokens in zip(prompts, said)]))
    logits = logits[:, len(prompts[0]) - 1 : -1, : TOKENIZER.vocab_size]
    chosen = mx.take_along_axis(logits, mx.array(said)[..., None], axis=-1)
    return np.array(mx.max(logits, axis=-1) - chosen[..., 0])


@pytest.mark.parametrize("start", range(10))
def test_200_texts_of_the_demo_are_greedy(start: int) -> None:
    """Behind 16 pieces of tales and 4 rows of random ids, ten times: each token is the likeliest after those before it,
    so that the whole is the plain text. Of 480 tokens two may be second in a near tie."""
    random = np.random.RandomState(start).randint(0, TOKENIZER.vocab_size, (4, 12)).tolist()
    prompts = [tale[9 * start + 1 : 9 * start + 13] for tale in TALES] + random
    said = [
        tokens_of(drafted(DEMO, prompt, 24, by("mtp", DEMO, DEMO_HEAD, prompt, 2 + i % 3)))
        for i, prompt in enumerate(prompts)
    ]
    behind = behind_the_likeliest(prompts, said)
    assert behind.max() < NEAR
    assert np.count_nonzero(behind) <= 2


def near_ties(ours: Sequence[Decoded], theirs: Sequence[Decoded]) -> int:
    """0 where both say the same, 1 where they part at two tokens whose plain logits are nearer than NEAR."""
    for (token, _, _), (expected, row, _) in zip(ours, theirs, strict=True):
        if token != expected:
            assert (row[expected] - row[token]).item() < NEAR
            return 1
    return 0


@pytest.mark.parametrize("kind", ["mtp", "ngram"])
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_tale_told_again_is_the_plain_one(kind: str, kv_bits: int | None) -> None:
    ties = 0
    for tale in TALES[1:4]:
        prompt = tale + tale[:25]
        theirs = plain(DEMO, prompt, 32, into=DEMO.make_cache(kv_bits=kv_bits))
        drafting = by(kind, DEMO, DEMO_HEAD, prompt, 4, 3)
        ours = drafted(DEMO, prompt, 32, drafting, into=DEMO.make_cache(kv_bits=kv_bits))
        ties += near_ties(ours, theirs)
        assert sum(from_draft for _, _, from_draft in ours) >= 5
    assert ties <= 1


ORACLES = [pytest.param(k, right, 99, id=f"{right}_of_{k}") for k in (1, 2, 4) for right in range(k + 1)]
ORACLES += [pytest.param(4, 4, most, id=f"{most}_given_of_4") for most in (0, 2)]
ORACLES += [pytest.param(15, 7, 99, id="7_of_15")]


@pytest.mark.parametrize(("k", "right", "most"), ORACLES)
@pytest.mark.parametrize("variant", ["a-r1-d32", "d-moe"])
def test_text_logits_and_cache_are_those_of_a_plain_text(
    variant: str, k: int, right: int, most: int, model_of: ModelOf
) -> None:
    model, prompt, lengths = model_of(variant, "float32"), [5, 6, 7, 8, 9], Turns(k)
    sequence, expected = model.make_cache(), plain(model, prompt, 36)
    drafting = Drafting(Oracle(tokens_of(expected), right, most), lengths)
    said = drafted(model, prompt, 24, drafting, into=sequence)
    assert tokens_of(said) == tokens_of(expected[:24])
    for (_, row, _), (_, theirs, _) in zip(said, expected):
        np.testing.assert_allclose(np.array(row), np.array(theirs), atol=TOLERANCE)
    assert all(accepted == min(right, most, drafts) for drafts, accepted in lengths.seen)
    fed, fresh = [*prompt, *tokens_of(expected)][: sequence.offset], model.make_cache()
    prefill(model, prompt, fresh, step_size=64)
    for token in fed[len(prompt) :]:
        model.step(mx.array([[token]]), fresh)
    assert sequence.offset == fresh.offset
    assert fresh.offset - len(prompt) in (23, 24)
    for ours, theirs in zip(contents(sequence), contents(fresh), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    goes_on(model, sequence, [*prompt, *tokens_of(expected)])


def goes_on(model: Qwen, sequence: SequenceCache, text: list[int]) -> None:
    """From here, from its snapshot, and from some tokens before, `sequence` leads to the plain text."""
    snapshot, end = sequence.snapshot(), sequence.offset
    for back in (0, 1, 4, 9):
        rewind(model, sequence, text[:end], back, step_size=64)
        assert sequence.offset == end - back
        for i in range(end - back, end - back + 6):
            logits, _ = model.step(mx.array([[text[i]]]), sequence)
            assert mx.argmax(logits).item() == text[i + 1]
        sequence.restore(snapshot)


@pytest.mark.parametrize(("k", "right"), [(1, 0), (1, 1), (3, 0), (3, 2), (3, 3)])
def test_a_token_is_counted_once(k: int, right: int, model_of: ModelOf) -> None:
    """Whenever a round begins, with the token that it begins with."""
    model, prompt = model_of("f-k32-v64", "float32"), [5, 6, 7]
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.5)
    expected, sequence = tokens_of(plain(model, prompt, 24, params=params)), model.make_cache()
    logits, sampler = prefill(model, prompt, sequence, step_size=64), sampler_of(model, prompt, params)
    drafting = Drafting(Oracle(expected, right), Turns(k))
    said = []
    for token, _, from_draft in decode_with_drafts(model, logits, sequence, sampler, count=20, drafting=drafting):
        said.append(token)
        if not from_draft and len(said) < 20 - k:
            counts = np.array(sampler._counts)[0]
            assert {i: counts[i] for i in np.flatnonzero(counts)} == Counter(said)
    assert said == expected[:20]


@pytest.mark.parametrize("k", [0, 2])
def test_what_was_freed_is_not_hoarded(k: int, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outgrown slabs of keys and values, of which each is larger than the last, would stay with the allocator."""
    model, clear, cleared = model_of("f-k32-v64", "float32"), mx.clear_cache, []
    sequence = model.make_cache()
    logits, drafting = prefill(model, [5], sequence, step_size=64), Drafting(Oracle([9] * 600, 2), Turns(k))
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(sequence.offset) or clear())
    for _ in decode_with_drafts(model, logits, sequence, sampler_of(model, [5], GREEDY), count=600, drafting=drafting):
        pass
    assert [offset // 256 for offset in cleared] == [1, 2]


@pytest.mark.parametrize("n", range(1, 9))
def test_closed_between_two_tokens_the_cache_holds_what_was_said(n: int, model_of: ModelOf) -> None:
    """Rounds say 1 token and 2 drafts of 4, then without a draft 1, and so on."""
    model, prompt = model_of("f-k32-v64", "float32"), [5, 6, 7]
    expected, sequence = tokens_of(plain(model, prompt, 20)), model.make_cache()
    logits, drafting = prefill(model, prompt, sequence, step_size=64), Drafting(Oracle(expected, 2), Turns(4, 0))
    said = decode_with_drafts(model, logits, sequence, sampler_of(model, prompt, GREEDY), count=20, drafting=drafting)
    assert [next(said)[0] for _ in range(n)] == expected[:n]
    said.close()
    assert sequence.offset == len(prompt) + n
    following, _ = model.step(mx.array([expected[n : n + 1]]), sequence)
    assert mx.argmax(following).item() == expected[n + 1]


class Searched(Oracle):
    """Has wrong drafts at one place, and nothing at any other; remembers where it was asked."""

    def __init__(self, place: int) -> None:
        super().__init__([9] * 999, 0)
        self.place, self.asked = place, []

    def draft(self, sampler: Sampler, count: int) -> Drafts:
        self.asked.append(self._said - 1)
        self._most = 99 if self.asked[-1] == self.place else 0
        return super().draft(sampler, count)


@pytest.mark.parametrize(
    ("place", "asked"), [(999, [0, 3, 8, 17, 34, 67, 100, 133]), (8, [0, 3, 8, 9, 12, 17, 26, 43, 76, 109, 142])]
)
def test_drafts_are_looked_for_seldom_where_none_are_found(place: int, asked: list[int], model_of: ModelOf) -> None:
    """Again after 2, 4, 8, 16, and at last always 32 tokens, and from the beginning where some were found."""
    model, drafter, lengths = model_of("f-k32-v64", "float32"), Searched(place), Turns(1)
    sequence = model.make_cache()
    logits = prefill(model, [5], sequence, step_size=64)
    sampler, drafting = sampler_of(model, [5], GREEDY), Drafting(drafter, lengths)
    assert len([*decode_with_drafts(model, logits, sequence, sampler, count=150, drafting=drafting)]) == 150
    assert drafter.asked == asked
    # One plain round is told before each search: of the others some of the time is that of their neighbours.
    found = [(1, 0)] * (place < 150)
    assert sorted(lengths.seen) == [(0, 0)] * (len(asked) - 1 - len(found)) + found
