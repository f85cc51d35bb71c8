"""The acceptance rule: exact cases, and what it lets stand against the product of the model's own distributions.

The model is a table: the logits of the next token depend on the last token alone. The draft head is another table.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from scipy.stats import chisquare

from qwen_mlx.decoding import acceptance
from qwen_mlx.decoding.acceptance import accept
from qwen_mlx.decoding.sampling import Sampler, SamplingParams
from tests.decoding.test_sampling import PROMPT, REAL, VOCAB, probabilities

LENGTH, COUNT = 3, 50_000

_random = np.random.default_rng(3)
TARGET = _random.normal(0, 1.5, (VOCAB, VOCAB)).astype(np.float32)
DRAFT = (0.6 * TARGET + _random.normal(0, 1, (VOCAB, VOCAB))).astype(np.float32)
TARGET[:, REAL:] = DRAFT[:, REAL:] = 9.0  # padding rows, likelier than any token

CASES = {
    "plain": SamplingParams(temperature=1.0),
    "top_k_top_p": SamplingParams(temperature=1.2, top_k=6, top_p=0.85),
    "min_p": SamplingParams(temperature=0.8, min_p=0.1),
    "bias": SamplingParams(temperature=1.0, logit_bias={2: 3.0, 7: -100.0}),
    "penalties": SamplingParams(
        temperature=1.0, top_k=8, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.7
    ),
}
every_case = pytest.mark.parametrize("params", CASES.values(), ids=CASES.keys())
every_k = pytest.mark.parametrize(("k", "drawn"), [(k, drawn) for k in (1, 2, 3) for drawn in (True, False)])


class Lane(Sampler):
    """A sampler that starts from a given key, so that `mx.vmap` can draw many times at once."""

    def __init__(self, params: SamplingParams, reply: tuple[int, ...], key: mx.array):
        super().__init__(params, PROMPT, vocab_size=VOCAB, num_real_tokens=REAL)
        self._key = key
        for token in reply:
            self.observe(mx.array([token]))


def speculate(
    lane: Lane, last: int, *, k: int, drawn: bool, head: np.ndarray = DRAFT, claimed: SamplingParams | None = None
) -> tuple[mx.array, mx.array]:
    """One round after the token `last`: what may stand [k + 1], and how many drafts do [].

    The drafts are drawn from the table `head`, under the lane's parameters but `claimed` to be under others, or they
    are its likeliest tokens, proposed outright.
    """
    drafter, tokens, rows = copy.copy(lane), [mx.array([last])], []
    for _ in range(k):
        scores = drafter.processed_logits(mx.array(head)[tokens[-1]])[0]
        claim = copy.copy(drafter)
        claim.params = claimed or lane.params
        rows.append(claim.processed_logits(mx.array(head)[tokens[-1]]))
        token = mx.random.categorical(scores, key=lane.next_key()) if drawn else mx.argmax(scores)
        tokens.append(token[None])
        drafter.observe(tokens[-1])
    said = mx.concatenate(tokens)
    draft_logits = mx.concatenate(rows) if drawn else None
    accepted, token = accept(lane, mx.array(TARGET)[said], drafts=said[1:], draft_logits=draft_logits)
    return mx.where(mx.arange(k + 1) < accepted, mx.concatenate([said[1:], token]), token), accepted


def many(params: SamplingParams, reply: tuple[int, ...], seed: int, count: int, **how: Any) -> list[tuple[int, ...]]:
    """What one round adds to `reply`, for `count` keys."""

    def lane(key: mx.array) -> tuple[mx.array, mx.array]:
        return speculate(Lane(params, reply, key), [*PROMPT, *reply][-1], **how)

    tokens, accepted = mx.vmap(lane)(mx.random.split(mx.random.key(seed), count))
    return [tuple(row[: n + 1]) for row, n in zip(tokens.tolist(), accepted.tolist())]


def continuations(params: SamplingParams, *, seed: int, **how: Any) -> Counter[tuple[int, ...]]:
    """COUNT replies of LENGTH tokens, each said in as many rounds as it takes; the last round's excess is dropped."""
    said = Counter({(): COUNT})
    for length in range(LENGTH):
        for number, reply in enumerate(sorted(reply for reply in said if len(reply) == length)):
            rounds = many(params, reply, seed * 1_000_000 + length * 10_000 + number, said.pop(reply), **how)
            said.update((reply + tokens)[:LENGTH] for tokens in rounds)
    return said


def chances(params: SamplingParams, reply: tuple[int, ...] = ()) -> dict[tuple[int, ...], float]:
    """The probability of every reply of LENGTH tokens that begins with `reply`, given that it does: float64."""
    if len(reply) == LENGTH:
        return {reply: 1.0}
    p = probabilities(TARGET[[*PROMPT, *reply][-1]], params, PROMPT, list(reply))
    return {
        whole: p[token] * chance
        for token in np.flatnonzero(p).tolist()
        for whole, chance in chances(params, (*reply, token)).items()
    }


def p_value(params: SamplingParams, *, seed: int = 1, **how: Any) -> float:
    """Chi-squared over all replies; those expected fewer than five times are one class."""
    expected, observed = chances(params), continuations(params, seed=seed, **how)
    if observed.keys() - expected.keys():
        return 0.0
    table = np.array([(observed[reply], COUNT * chance) for reply, chance in expected.items()])
    rare = table[:, 1] < 5
    table = np.vstack([table[~rare], table[rare].sum(0)])
    return chisquare(*table[table[:, 1] > 0].T).pvalue


@every_case
@every_k
def test_what_stands_has_the_distribution_of_plain_draws(params: SamplingParams, k: int, drawn: bool) -> None:
    assert p_value(params, k=k, drawn=drawn) > 0.01


@every_case
def test_without_drafts_it_is_a_plain_draw(params: SamplingParams) -> None:
    assert p_value(params, k=0, drawn=False) > 0.01


def from_p(p: mx.array, _: mx.array) -> mx.array:
    """Planted: where a draft falls, p itself."""
    return mx.log(p)


def not_normalised(p: mx.array, q: mx.array) -> mx.array:
    """Planted: max(p - q, 0) taken for probabilities, and what they lack of 1 given to the likeliest token."""
    excess = mx.maximum(p - q, 0)
    return mx.log(excess + (1 - mx.sum(excess)) * (mx.arange(VOCAB) == mx.argmax(p)))


@every_case
@pytest.mark.parametrize("wrong", [from_p, not_normalised])
def test_the_statistics_reject_a_wrong_rest(
    params: SamplingParams, wrong: Callable[..., mx.array], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "_rest", wrong)
    assert p_value(params, k=2, drawn=True) < 1e-6


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_statistics_reject_drafts_claimed_without_top_k(k: int) -> None:
    params = SamplingParams(temperature=1.0, top_k=4)
    assert p_value(params, k=k, drawn=True, claimed=replace(params, top_k=0)) < 1e-6


@pytest.mark.parametrize("drawn", [True, False])
def test_the_statistics_reject_penalties_that_lag(drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "along", lambda sampler, _: sampler)
    assert p_value(CASES["penalties"], k=2, drawn=drawn) < 1e-6


@every_case
def test_many_lanes_at_once_are_as_many_alone(params: SamplingParams) -> None:
    """The statistics rest on `mx.vmap`, which gets some operations wrong."""
    alone = [speculate(Lane(params, (1, 3), key), 3, k=2, drawn=True) for key in mx.random.split(mx.random.key(5), 40)]
    expected = [tuple(tokens.tolist()[: accepted.item() + 1]) for tokens, accepted in alone]
    assert many(params, (1, 3), 5, 40, k=2, drawn=True) == expected


@every_case
def test_drafts_from_the_models_own_distribution_all_stand(params: SamplingParams) -> None:
    said = many(params, (), 9, 10_000, k=3, drawn=True, head=TARGET)
    assert {len(tokens) for tokens in said} == {4}


def outcomes(logits: list[list[float]], drafts: list[int], draft_logits: list[list[float]] | None) -> Counter[Any]:
    """How often a draw, of 500 under top_k 2, lets how many drafts stand and takes which token next."""

    def lane(key: mx.array) -> tuple[mx.array, mx.array]:
        sampler = Sampler(SamplingParams(temperature=1.0, top_k=2), [], vocab_size=5, num_real_tokens=4)
        sampler._key = key
        q = None if draft_logits is None else mx.array(draft_logits)
        return accept(sampler, mx.array(logits), drafts=mx.array(drafts, mx.uint32), draft_logits=q)

    accepted, tokens = mx.vmap(lane)(mx.random.split(mx.random.key(8), 500))
    return Counter(zip(accepted.tolist(), tokens[:, 0].tolist()))


@pytest.mark.parametrize("draft", [0, 4], ids=["cut_off", "padding"])
@pytest.mark.parametrize(
    "draft_logits",
    [None, [0.0] * 5, [0.0, -math.inf, -math.inf, 0.0, 0.0], [-math.inf, 0.0, 0.0, -math.inf, -math.inf]],
    ids=["proposed", "uniform", "on_the_impossible", "on_the_possible"],
)
def test_an_impossible_draft_never_stands(draft: int, draft_logits: list[float] | None) -> None:
    row = [0.5, 1.0, 1.5, 0.0, 9.0]
    seen = outcomes([row, row], [draft], draft_logits and [draft_logits])
    assert seen.keys() <= {(0, 1), (0, 2)}


def test_a_possible_draft_stands_where_q_is_zero() -> None:
    row, nowhere = [0.5, 1.0, 1.5, 0.0, 9.0], [0.0, -math.inf, -math.inf, 0.0, 0.0]
    assert outcomes([row, row], [1], [nowhere]).keys() == {(1, 1), (1, 2)}


@pytest.mark.parametrize("draft_logits", [[[-math.inf, 1.0, 1.0, -math.inf, -math.inf]], None])
def test_where_nothing_is_left_of_p_less_q_p_decides(
    draft_logits: list[list[float]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.random, "uniform", lambda shape, key: mx.ones(shape))  # every draft falls
    row = [0.0, 1.0, 1.0, -math.inf, 9.0] if draft_logits else [-math.inf, 1.0, -math.inf, -math.inf, 9.0]
    seen = outcomes([row, row], [1], draft_logits)
    assert seen.keys() == ({(0, 1), (0, 2)} if draft_logits else {(0, 1)})


def chain(params: SamplingParams, steps: int) -> list[int]:
    """What greedy decoding says after PROMPT, by the float64 definition."""
    reply: list[int] = []
    for _ in range(steps):
        p = probabilities(TARGET[[*PROMPT, *reply][-1]], replace(params, temperature=1.0), PROMPT, reply)
        reply.append(int(p.argmax()))
    return reply


@pytest.mark.parametrize("right", [0, 1, 2, 3])
@pytest.mark.parametrize("draft_logits", [None, mx.zeros((3, VOCAB))], ids=["proposed", "drawn"])
@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(repetition_penalty=1.5, presence_penalty=2.0, logit_bias={4: 1.0})],
    ids=["plain", "penalties"],
)
def test_greedy_follows_the_likeliest(params: SamplingParams, draft_logits: mx.array | None, right: int) -> None:
    likeliest = chain(params, 4)
    drafts = [*likeliest[:right], *[(token + 1) % REAL for token in likeliest[right:3]]]
    logits = mx.array(TARGET[[PROMPT[-1], *drafts]])
    sampler = Sampler(params, PROMPT, vocab_size=VOCAB, num_real_tokens=REAL)
    accepted, token = accept(sampler, logits, drafts=mx.array(drafts, mx.uint32), draft_logits=draft_logits)
    assert (accepted.item(), token.tolist()) == (right, [likeliest[right]])


@pytest.mark.parametrize(("draft", "expected"), [(1, (1, [2])), (3, (0, [1]))])
def test_greedy_takes_the_lowest_of_equal_ids(draft: int, expected: tuple[int, list[int]]) -> None:
    logits = mx.array([[0.0, 5.0, 1.0, 5.0, 9.0], [0.0, 1.0, 7.0, 7.0, 9.0]])
    sampler = Sampler(SamplingParams(), [], vocab_size=5, num_real_tokens=4)
    accepted, token = accept(sampler, logits, drafts=mx.array([draft]))
    assert (accepted.item(), token.tolist()) == expected


def test_greedy_needs_no_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("softmax", "logsumexp", "exp", "pad", "sort", "topk"):
        monkeypatch.delattr(mx, name)
    sampler = Sampler(SamplingParams(top_k=4, top_p=0.9), [], vocab_size=VOCAB, num_real_tokens=REAL)
    assert accept(sampler, mx.array(TARGET[:3]), drafts=mx.array([1, 2]))[0].item() == 0


def test_every_place_is_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, topk = [], mx.topk
    monkeypatch.setattr(mx, "topk", lambda x, *args, **kwargs: (seen.append(x.shape), topk(x, *args, **kwargs))[1])
    sampler = Sampler(CASES["top_k_top_p"], [], vocab_size=VOCAB, num_real_tokens=REAL)
    accept(sampler, mx.array(TARGET[:4]), drafts=mx.array([1, 2, 3]), draft_logits=mx.array(DRAFT[:3]))
    assert seen == [(4, REAL)]


@pytest.mark.parametrize("params", [SamplingParams(), *CASES.values()], ids=["greedy", *CASES.keys()])
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("drawn", [True, False])
def test_accepting_evaluates_nothing(params: SamplingParams, k: int, drawn: bool) -> None:
    """While mx.compile traces a function, any evaluation inside it raises."""
    sampler = Sampler(params, PROMPT, vocab_size=VOCAB, num_real_tokens=REAL)

    def once(logits: mx.array, drafts: mx.array, draft_logits: mx.array) -> tuple[mx.array, mx.array]:
        return accept(sampler, logits, drafts=drafts, draft_logits=draft_logits if drawn else None)

    accepted, token = mx.compile(once)(mx.array(TARGET[: k + 1]), mx.arange(k, dtype=mx.uint32), mx.array(DRAFT[:k]))
    assert (accepted.dtype, accepted.shape, token.dtype, token.shape) == (mx.int32, (), mx.uint32, (1,))


def test_nothing_is_counted() -> None:
    sampler = Sampler(CASES["penalties"], PROMPT, vocab_size=VOCAB, num_real_tokens=REAL)
    before = np.array(sampler.processed_logits(mx.array(TARGET[:1])))
    accept(sampler, mx.array(TARGET[:3]), drafts=mx.array([1, 2]))
    np.testing.assert_array_equal(np.array(sampler.processed_logits(mx.array(TARGET[:1]))), before)


def test_no_key_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=4), [], vocab_size=VOCAB, num_real_tokens=REAL)
    keys, next_key = [], sampler.next_key
    monkeypatch.setattr(sampler, "next_key", lambda: keys.append(next_key()) or keys[-1])
    for _ in range(2):
        accept(sampler, mx.array(TARGET[:3]), drafts=mx.array([1, 2]))
    assert len({tuple(key.tolist()) for key in keys}) == 4


@pytest.mark.parametrize(
    ("rows", "draft_shape", "words"),
    [
        (2, None, "2 drafts need 3 rows of logits, not 2"),
        (3, (1, VOCAB), r"draft_logits must have shape \[2, 15\], not \[1, 15\]"),
        (3, (2, REAL), r"draft_logits must have shape \[2, 15\], not \[2, 12\]"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(
    rows: int, draft_shape: tuple[int, int] | None, words: str
) -> None:
    sampler = Sampler(SamplingParams(temperature=1.0), [], vocab_size=VOCAB, num_real_tokens=REAL)
    draft_logits = None if draft_shape is None else mx.zeros(draft_shape)
    with pytest.raises(ValueError, match=words):
        accept(sampler, mx.array(TARGET[:rows]), drafts=mx.array([1, 2]), draft_logits=draft_logits)
