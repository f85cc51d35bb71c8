"""Drafts: of the head those of transformers, from the state of the text alone; of n-grams those of a plain search."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from qwen_mlx.decoding.drafters import APART, NGRAMS, WAITING, MTPDrafter, NGramDrafter
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.sampling import Sampler, SamplingParams
from qwen_mlx.decoding.speculative import Drafting, decode_with_drafts
from qwen_mlx.load_mtp import load_mtp
from qwen_mlx.model.mtp import MTPHead
from qwen_mlx.model.qwen import Qwen
from tests.decoding.test_sampling import REAL, probabilities
from tests.decoding.test_speculative import Oracle, Turns, plain, tokens_of
from tests.golden.checkpoints import VARIANTS, VOCAB_SIZE
from tests.golden.compare import MTP_LENGTHS
from tests.golden.compare import load as load_golden

ModelOf = Callable[[str, str], Qwen]
HeadOf = Callable[[str], MTPHead]


@pytest.fixture(scope="module")
def head_of(checkpoint_of: Callable[[str], Path], model_of: ModelOf) -> HeadOf:
    return cache(lambda variant: load_mtp(checkpoint_of(variant), model_of(variant, "float32")))  # type: ignore[return-value]


def sampler_of(params: SamplingParams | None = None, prompt: Sequence[int] = (), real: int = VOCAB_SIZE) -> Sampler:
    return Sampler(params or SamplingParams(), prompt, vocab_size=VOCAB_SIZE, num_real_tokens=real)


def hidden_states(model: Qwen, text: Sequence[int]) -> mx.array:
    """[1, n, D]"""
    return model.hidden(model.embed(mx.array([list(text)])), model.make_cache())


def fed(model: Qwen, head: MTPHead, text: Sequence[int], *sizes: int) -> MTPDrafter:
    """A drafter that took `text` in pieces of the given sizes and then by single tokens, but the last, whose hidden
    state is not known."""
    drafter, hidden = MTPDrafter(model, head), hidden_states(model, text[:-1])
    ends = [*accumulate(sizes, initial=0)]
    for start, end in pairwise([*ends, *range(ends[-1] + 1, len(text))]):
        drafter.take(hidden[:, start:end], mx.array(text[start + 1 : end + 1], mx.uint32))
    return drafter


def slots(drafter: MTPDrafter) -> list[np.ndarray]:
    """Keys and values of the head in the slots of the text."""
    assert drafter._cache.slab is not None
    return [np.array(drafter._cache.slab[:, :, :, : drafter._slots])]


def text_of(length: int) -> list[int]:
    return np.random.RandomState(length).randint(0, 352, length).tolist()


@pytest.mark.parametrize("length", MTP_LENGTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_are_those_of_transformers(variant: str, length: int, model_of: ModelOf, head_of: HeadOf) -> None:
    """As a text begins: the prompt in two chunks, and then the token behind it."""
    golden, model = load_golden(variant), model_of(variant, "float32")
    ids = golden[f"prompt_{length}_ids"]
    drafter, hidden = MTPDrafter(model, head_of(variant)), hidden_states(model, ids.tolist())
    drafter.take(hidden[:, :2], mx.array(ids[1:3], mx.uint32))
    drafter.take(hidden[:, 2:], mx.array(ids[3:], mx.uint32))
    drafter.take(None, mx.array(golden[f"mtp_{length}_next"].reshape(1), mx.uint32))
    drafts, drawn_from = drafter.draft(sampler_of(), 4)
    assert drawn_from is None
    assert drafts.tolist() == golden[f"mtp_{length}_drafts"].tolist()


def test_a_prompt_of_one_token(model_of: ModelOf, head_of: HeadOf) -> None:
    model, head = model_of("a-r1-d32", "float32"), head_of("a-r1-d32")
    drafter = MTPDrafter(model, head)
    drafter.take(hidden_states(model, [7]), mx.array([], mx.uint32))
    drafter.take(None, mx.array([9], mx.uint32))
    y = head(hidden_states(model, [7]), model.embed(mx.array([[9]])), head.make_cache())
    expected = mx.argmax(model.logits(y)[0, -1]).item()
    assert drafter.draft(sampler_of(), 1)[0].tolist() == [expected]


@pytest.mark.parametrize("stand", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("variant", ["a-r1-d32", "d-moe"])
def test_after_drafts_the_state_is_that_of_the_text(
    variant: str, count: int, stand: int, model_of: ModelOf, head_of: HeadOf
) -> None:
    """Even slots of drafts that stand are made anew: the head's own outputs were their hidden states."""
    model, head, text = model_of(variant, "float32"), head_of(variant), text_of(30)
    hidden = hidden_states(model, text[:-1])
    drafter = fed(model, head, text[:20], 12)
    for start in range(19, 29 - stand, stand + 1):
        drafter.draft(sampler_of(), count)
        end = start + stand + 1
        drafter.take(hidden[:, start:end], mx.array(text[start + 1 : end + 1], mx.uint32))
    never = fed(model, head, text[: end + 1], 12)
    drafts = drafter.draft(sampler_of(), 4)[0].tolist()
    assert drafts == never.draft(sampler_of(), 4)[0].tolist()
    np.testing.assert_allclose(slots(drafter), slots(never), atol=1e-5)


@pytest.mark.parametrize("lengths", [(3,), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("right", [0, 2])
def test_the_loop_gives_it_the_hidden_states_of_what_stands(
    right: int, lengths: tuple[int, ...], model_of: ModelOf, head_of: HeadOf
) -> None:
    """The drafts are those of someone who knows the text, so that some stand; the head is told the same."""
    model, head, prompt = model_of("a-r1-d32", "float32"), head_of("a-r1-d32"), [5, 6, 7, 8]
    text = tokens_of(plain(model, prompt, 30))
    oracle, drafter, sequence = Oracle(text, right), MTPDrafter(model, head), model.make_cache()
    drafter.draft = oracle.draft  # type: ignore[method-assign]
    logits = prefill(model, prompt, sequence, step_size=3, seen=drafter.take)
    take = drafter.take
    drafter.take = lambda *told: (take(*told), oracle.take(*told))  # type: ignore[assignment, method-assign]
    drafting = Drafting(drafter, Turns(*lengths), head)
    said = tokens_of([*decode_with_drafts(model, logits, sequence, sampler_of(), count=20, drafting=drafting)])
    assert said == text[:20]
    del drafter.draft
    behind = [*prompt, *text][: 1 + drafter._slots + sum(tokens.size for tokens in drafter._tokens)]
    assert len(behind) >= len(prompt) + 20
    never = fed(model, head, behind)
    assert drafter.draft(sampler_of(), 4)[0].tolist() == never.draft(sampler_of(), 4)[0].tolist()
    np.testing.assert_allclose(slots(drafter), slots(never), atol=1e-4)


@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_draft_where_the_most_wait_that_may(more: int, model_of: ModelOf, head_of: HeadOf) -> None:
    model, head, text = model_of("f-k32-v64", "float32"), head_of("f-k32-v64"), text_of(WAITING + 1 + more)
    at_once = fed(model, head, text, len(text) - 1)
    assert fed(model, head, text).draft(sampler_of(), 4)[0].tolist() == at_once.draft(sampler_of(), 4)[0].tolist()


@pytest.mark.parametrize("sizes", [(), (WAITING + 40,), (100, 7)], ids=str)
def test_no_more_tokens_wait(sizes: tuple[int, ...], model_of: ModelOf, head_of: HeadOf) -> None:
    text = text_of(3 * WAITING)
    drafter = fed(model_of("f-k32-v64", "float32"), head_of("f-k32-v64"), text, *sizes)
    assert sum(tokens.size for tokens in drafter._tokens) <= WAITING
    assert drafter._cache.offset >= len(text) - 1 - WAITING
    assert max(len(drafter._tokens), len(drafter._hidden)) <= APART


PARAMS = SamplingParams(
    temperature=3.0, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.8, seed=3
)


def test_what_drafts_are_drawn_from(model_of: ModelOf, head_of: HeadOf) -> None:
    """The head's logits as the sampler processes them, each draft counted for the next: by the float64 definition."""
    model, head, text = model_of("f-k32-v64", "float32"), head_of("f-k32-v64"), [3, 0, 7, 1, 3, 2]
    prompt, reply, sampler = text[:5], text[5:], sampler_of(PARAMS, text[:5], REAL)
    sampler.observe(mx.array(reply))
    drafts, drawn_from = fed(model, head, text, 5).draft(sampler, 3)
    sequence = head.make_cache()
    y = head(hidden_states(model, text[:-1]), model.embed(mx.array([text[1:]])), sequence)[:, -1:]
    for draft, row in zip(drafts.tolist(), np.array(mx.softmax(drawn_from, axis=-1))):
        expected = probabilities(np.array(model.logits(y)[0, -1]), PARAMS, prompt, reply)
        np.testing.assert_allclose(row, expected, atol=1e-5)
        assert expected[draft] > 0
        reply = [*reply, draft]
        y = head(y, model.embed(mx.array([[draft]])), sequence)


def test_drafting_counts_nothing_and_uses_keys_of_the_sampler(model_of: ModelOf, head_of: HeadOf) -> None:
    drafter = fed(model_of("f-k32-v64", "float32"), head_of("f-k32-v64"), [3, 0, 7, 1])
    sampler, untouched = sampler_of(PARAMS, [3, 0, 7]), sampler_of(PARAMS, [3, 0, 7])
    drafter.draft(sampler, 2)
    assert np.array(sampler._counts).tolist() == np.array(untouched._counts).tolist()
    untouched.next_key()
    untouched.next_key()
    assert sampler.next_key().tolist() == untouched.next_key().tolist()


def naive(text: list[int], count: int) -> list[int]:
    """What stands behind the last earlier place of the longest of the last 4, 3 and 2 words that was there before."""
    for size in (4, 3, 2):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[len(text) - size :]:
                return text[end : end + count]
    return []


words = st.lists(st.integers(0, 3), max_size=12)


@given(words, st.lists(st.tuples(words.filter(len), st.booleans()), max_size=5), st.integers(1, 5))
def test_ngrams_are_found_as_by_a_plain_search(
    prompt: list[int], pieces: list[tuple[list[int], bool]], count: int
) -> None:
    """Drafts are asked for behind some of the pieces, and behind the last."""
    drafter, text = NGramDrafter(prompt), list(prompt)
    for piece, asks in [*pieces, ([1], True)]:
        drafter.take(None, mx.array(piece, mx.uint32))
        text += piece
        if asks:
            drafts, drawn_from = drafter.draft(sampler_of(), count)
            assert (drafts.tolist(), drafts.dtype, drawn_from) == (naive(text, count), mx.uint32, None)


def test_the_longest_ngram_goes_before_a_later_one() -> None:
    assert NGRAMS == (4, 3, 2)
    drafter = NGramDrafter([1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3])
    drafter.take(None, mx.array([4], mx.uint32))
    assert drafter.draft(sampler_of(), 3)[0].tolist() == [50, 9, 3]


def test_tokens_do_not_pile_up_where_no_drafts_are_asked_for() -> None:
    drafter, text = NGramDrafter([]), text_of(WAITING) * 3
    for token in text:
        drafter.take(None, mx.array([token], mx.uint32))
    assert len(drafter._waiting) <= APART
    assert drafter.draft(sampler_of(), 4)[0].tolist() == text[:4]


DRAWN = SamplingParams(
    temperature=4.0,
    top_p=0.97,
    repetition_penalty=1.5,
    presence_penalty=0.6,
    frequency_penalty=1.5,
    logit_bias={token: -1e4 for token in range(4, REAL)},
)
DRAWN_PROMPT, LENGTH, COUNT = [3, 0, 7, 1, 3], 3, 1500


def chance_of(logits: mx.array, reply: Sequence[int]) -> np.ndarray:
    """p [V] float64 of the token behind `reply`, from logits [1, T, V]."""
    return probabilities(np.array(logits[0, -1]), DRAWN, DRAWN_PROMPT, list(reply))


def chances(model: Qwen, reply: tuple[int, ...] = ()) -> dict[tuple[int, ...], float]:
    """The probability of every reply of LENGTH tokens that begins with `reply`, given that it does: float64."""
    if len(reply) == LENGTH:
        return {reply: 1.0}
    p = chance_of(model(mx.array([[*DRAWN_PROMPT, *reply]])), reply)
    return {
        whole: p[token] * chance
        for token in np.flatnonzero(p).tolist()
        for whole, chance in chances(model, (*reply, token)).items()
    }


def share_that_stands(model: Qwen, head: MTPHead) -> float:
    """Of first drafts: the mean of sum min(p, q) over the tokens before them (arXiv 2211.17192, theorem 3.5)."""
    hidden, share = hidden_states(model, DRAWN_PROMPT), 0.0
    for token, chance in enumerate(chance_of(model(mx.array([DRAWN_PROMPT])), [])[:REAL]):
        text = [*DRAWN_PROMPT, token]
        y = head(hidden, model.embed(mx.array([text[1:]])), head.make_cache())
        p, q = chance_of(model(mx.array([text])), [token]), chance_of(model.logits(y), [token])
        share += chance * np.minimum(p, q).sum()
    return share


def test_replies_with_drafts_have_the_distribution_of_plain_ones(model_of: ModelOf, head_of: HeadOf) -> None:
    model, head, prompt = model_of("f-k32-v64", "float32"), head_of("f-k32-v64"), []
    sequence = model.make_cache()
    logits = prefill(model, DRAWN_PROMPT, sequence, step_size=64, seen=lambda *slots: prompt.append(slots))
    start, observed, rounds = sequence.snapshot(), Counter[tuple[int, ...]](), Counter[tuple[int, int]]()
    for seed in range(COUNT):
        sequence.restore(start)
        params = replace(DRAWN, seed=seed)
        sampler = sampler_of(params, DRAWN_PROMPT, REAL)
        drafting = Drafting(MTPDrafter(model, head), Turns(2), head)
        drafting.drafter.take(*prompt[0])
        said = decode_with_drafts(model, logits, sequence, sampler, count=LENGTH, drafting=drafting)
        observed[tuple(token for token, _, _ in said)] += 1
        rounds.update(drafting.lengths.seen)
    expected = chances(model)
    assert observed.keys() <= expected.keys()
    assert abs(1 - rounds[2, 0] / COUNT - share_that_stands(model, head)) < 4 * 0.5 / COUNT**0.5
    table = np.array([(observed[reply], COUNT * chance) for reply, chance in expected.items()])
    rare = table[:, 1] < 5
    table = np.vstack([table[~rare], table[rare].sum(0)])
    assert chisquare(*table[table[:, 1] > 0].T).pvalue > 0.01
