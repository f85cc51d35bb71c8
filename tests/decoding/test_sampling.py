"""Sampling: every processor against float64 definitions, and the draws against the probabilities they promise."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from scipy.stats import chisquare

from qwen_mlx.decoding.sampling import Sampler, SamplingParams, default_params
from qwen_mlx.errors import CheckpointError, PromptError

REAL, VOCAB = 12, 15
LOGITS = np.array([2.1, 1.7, -0.4, 1.1, 0.3, -1.2, 0.9, 1.55, -0.2, -2.0, 0.65, 0.05, 9.0, 9.0, 9.0], np.float32)
PROMPT = [0, 1, 1, 5]
REPLY = [1, 3, 3, 9]

CASES = {
    "temperature_high": SamplingParams(temperature=1.7),
    "temperature_low": SamplingParams(temperature=0.6),
    "top_k": SamplingParams(temperature=1.0, top_k=4),
    "top_p": SamplingParams(temperature=1.0, top_p=0.7),
    "min_p": SamplingParams(temperature=1.0, min_p=0.3),
    "repetition": SamplingParams(temperature=1.0, repetition_penalty=1.4),
    "presence": SamplingParams(temperature=1.0, presence_penalty=1.5),
    "frequency": SamplingParams(temperature=1.0, frequency_penalty=0.8),
    "bias": SamplingParams(temperature=1.0, logit_bias={2: 1.5, 0: -100.0}),
    "top_k_top_p": SamplingParams(temperature=1.3, top_k=6, top_p=0.8),
    "top_k_min_p": SamplingParams(temperature=0.8, top_k=6, min_p=0.4),
    "all": SamplingParams(
        temperature=0.8,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-0.5,
        frequency_penalty=0.3,
        logit_bias={8: 2.0},
    ),
}
every_case = pytest.mark.parametrize("params", CASES.values(), ids=CASES.keys())


def probabilities(logits: np.ndarray, params: SamplingParams, prompt: list[int], reply: list[int]) -> np.ndarray:
    """The distribution by definition: float64, one token at a time, cut by walking down the sorted tokens."""
    z = logits[:REAL].astype(np.float64)
    for token, bias in (params.logit_bias or {}).items():
        z[token] += bias
    for token in {*prompt, *reply}:
        z[token] *= params.repetition_penalty if z[token] < 0 else 1 / params.repetition_penalty
    for token, count in Counter(reply).items():
        z[token] -= params.presence_penalty + params.frequency_penalty * count
    p = np.exp(z / params.temperature)
    order = sorted(range(REAL), key=lambda token: -p[token])
    order = order[: params.top_k or REAL]
    share = p / p[order].sum()
    kept, above = [], 0.0
    for token in order:
        if above < params.top_p and p[token] >= params.min_p * p[order[0]]:
            kept.append(token)
        above += share[token]
    result = np.zeros(len(logits))
    result[kept] = p[kept] / p[kept].sum()
    return result


def started(params: SamplingParams, *, rows: int, reply: list[int] = REPLY) -> Sampler:
    """A sampler for `rows` replies, each of which has already said `reply`."""
    sampler = Sampler(params, PROMPT, vocab_size=VOCAB, num_real_tokens=REAL)
    for token in reply:
        sampler.observe(mx.full((rows,), token, mx.uint32))
    return sampler


def rows_of(logits: np.ndarray, rows: int) -> mx.array:
    return mx.broadcast_to(mx.array(logits), (rows, len(logits)))


def draws(sampler: Sampler, *, steps: int) -> list[int]:
    return [sampler(mx.array(LOGITS)[None]).item() for _ in range(steps)]


def p_value(params: SamplingParams, expected: np.ndarray, *, rows: int = 20_000) -> float:
    tokens = np.array(started(replace(params, seed=7), rows=rows)(rows_of(LOGITS, rows)))
    counts = np.bincount(tokens, minlength=VOCAB)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    return chisquare(counts[possible], rows * expected[possible]).pvalue


@every_case
def test_processed_logits_are_the_distribution(params: SamplingParams) -> None:
    got = mx.softmax(started(params, rows=1).processed_logits(mx.array(LOGITS)[None]), axis=-1)
    np.testing.assert_allclose(np.array(got[0]), probabilities(LOGITS, params, PROMPT, REPLY), rtol=2e-6, atol=1e-30)


@every_case
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    assert p_value(params, probabilities(LOGITS, params, PROMPT, REPLY)) > 1e-3


@every_case
def test_draws_reject_the_plain_softmax(params: SamplingParams) -> None:
    plain = probabilities(LOGITS, SamplingParams(temperature=1.0), PROMPT, REPLY)
    assert p_value(params, plain) < 1e-6


@every_case
def test_processed_logits_are_those_of_transformers(params: SamplingParams) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers gives the order of the processors")
    torch = pytest.importorskip("torch")
    process = transformers.generation.logits_process
    scores = torch.tensor(LOGITS[None, :REAL], dtype=torch.float64)
    for token, bias in (params.logit_bias or {}).items():
        scores[0, token] += bias
    ids = torch.tensor([PROMPT + REPLY])
    scores = process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token, count in Counter(REPLY).items():
        scores[0, token] -= params.presence_penalty + params.frequency_penalty * count
    scores = process.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = process.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = process.TopPLogitsWarper(params.top_p)(ids, scores)
    scores = process.MinPLogitsWarper(params.min_p)(ids, scores)
    got = mx.softmax(started(params, rows=1).processed_logits(mx.array(LOGITS)[None]), axis=-1)
    np.testing.assert_allclose(np.array(got[0, :REAL]), scores.softmax(-1)[0].numpy(), rtol=2e-6, atol=1e-30)


@every_case
def test_along_has_counted_the_first_tokens_at_every_place(params: SamplingParams) -> None:
    ahead = [2, 3, 2, 0]
    got = started(params, rows=1).along(mx.array(ahead)).processed_logits(rows_of(LOGITS, 5))
    expected = np.stack([probabilities(LOGITS, params, PROMPT, REPLY + ahead[:place]) for place in range(5)])
    np.testing.assert_allclose(np.array(mx.softmax(got, axis=-1)), expected, rtol=2e-6, atol=1e-30)


def test_along_nothing_has_the_one_place() -> None:
    got = started(CASES["all"], rows=1).along(mx.array([], mx.uint32)).processed_logits(mx.array(LOGITS)[None])
    expected = probabilities(LOGITS, CASES["all"], PROMPT, REPLY)
    np.testing.assert_allclose(np.array(mx.softmax(got, axis=-1)[0]), expected, rtol=2e-6, atol=1e-30)


def test_along_leaves_the_sampler_where_it_was() -> None:
    sampler = started(CASES["all"], rows=1)
    sampler.along(mx.array([2, 3])).observe(mx.array([0, 0, 0]))
    got = mx.softmax(sampler.processed_logits(mx.array(LOGITS)[None]), axis=-1)
    expected = probabilities(LOGITS, CASES["all"], PROMPT, REPLY)
    np.testing.assert_allclose(np.array(got[0]), expected, rtol=2e-6, atol=1e-30)


def test_along_counts_no_padding() -> None:
    got = started(CASES["all"], rows=1).along(mx.array([REAL])).processed_logits(rows_of(LOGITS, 2))
    assert mx.array_equal(got[0], got[1])


def test_along_makes_no_counts_without_penalties(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = started(CASES["top_p"], rows=1)
    for name in ("cumsum", "concatenate", "broadcast_to", "zeros"):
        monkeypatch.delattr(mx, name)
    sampler.along(mx.array([2, 3]))


def test_along_refuses_several_replies() -> None:
    with pytest.raises(ValueError, match="one reply, but this sampler has counted 3"):
        started(CASES["all"], rows=3).along(mx.array([2, 3]))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_greedy_is_the_likeliest_after_bias_and_penalties(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, logit_bias={7: 1.0}, presence_penalty=0.5)
    sampler = started(params, rows=1, reply=[7])
    assert [sampler.greedy(mx.array(LOGITS)[None]).item() for _ in range(2)] == [0, 0]  # counted, 0 would give way to 7


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 0.9, 0.0), (50, 0.8, 0.0), (40, 1.0, 0.02), (300, 0.95, 0.01)]
)
def test_larger_vocabulary(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = np.random.default_rng(5).normal(0, 3, (3, 2000)).astype(np.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    p = np.exp(logits.astype(np.float64) / temperature)
    ordered = -np.sort(-p, axis=-1)[:, : top_k or None]
    above = (np.cumsum(ordered, axis=-1) - ordered) / ordered.sum(-1, keepdims=True)
    least = np.where((above < top_p) & (ordered >= min_p * ordered[:, :1]), ordered, np.inf).min(-1, keepdims=True)
    expected = np.where(p >= least, p, 0)
    got = Sampler(params, [], vocab_size=2000, num_real_tokens=2000).processed_logits(mx.array(logits))
    np.testing.assert_allclose(
        np.array(mx.softmax(got, axis=-1)), expected / expected.sum(-1, keepdims=True), rtol=1e-5, atol=1e-30
    )


def test_penalties_count_the_drawn_tokens_of_each_row() -> None:
    params = SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25, seed=1)
    sampler = Sampler(params, PROMPT, vocab_size=VOCAB, num_real_tokens=REAL)
    replies = np.stack([np.array(sampler(rows_of(LOGITS, 5))) for _ in range(6)], axis=1)
    got = np.array(mx.softmax(sampler.processed_logits(rows_of(LOGITS, 5)), axis=-1))
    expected = np.stack([probabilities(LOGITS, params, PROMPT, reply.tolist()) for reply in replies])
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("case", ["temperature_low", "top_p", "repetition", "bias", "all"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_narrow_logits_are_processed_in_float32(dtype: mx.Dtype, case: str) -> None:
    narrow = mx.array(LOGITS)[None].astype(dtype)
    params = CASES[case]
    got = mx.softmax(started(params, rows=1).processed_logits(narrow), axis=-1)
    expected = probabilities(np.array(narrow[0].astype(mx.float32)), params, PROMPT, REPLY)
    np.testing.assert_allclose(np.array(got[0]), expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e30])
def test_padding_is_never_sampled(temperature: float) -> None:
    logits = rows_of(np.where(np.arange(VOCAB) >= REAL, 1e6, LOGITS).astype(np.float32), 4000)
    sampler = Sampler(SamplingParams(temperature=temperature, seed=2), [], vocab_size=VOCAB, num_real_tokens=REAL)
    assert mx.max(sampler(logits)).item() < REAL


def test_padding_has_no_probability() -> None:
    got = started(SamplingParams(temperature=1.0), rows=1).processed_logits(mx.array(LOGITS)[None])
    assert np.array(got[0, REAL:]).tolist() == [-math.inf] * (VOCAB - REAL)


def test_greedy_takes_the_likeliest_real_token() -> None:
    assert draws(started(SamplingParams(), rows=1), steps=3) == [0, 0, 0]


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    sampler = Sampler(SamplingParams(), [], vocab_size=5, num_real_tokens=4)
    assert sampler(mx.array([[1.0, 3.0, 3.0, 2.0, 9.0]])).item() == 1


def test_greedy_obeys_bias_and_penalties() -> None:
    params = SamplingParams(logit_bias={7: 1.0}, presence_penalty=0.5)
    assert draws(started(params, rows=1, reply=[]), steps=3) == [7, 0, 7]


def test_greedy_distribution_is_one_token() -> None:
    got = started(SamplingParams(), rows=1).processed_logits(mx.array(LOGITS)[None])
    assert np.array(got[0]).tolist() == [0.0] + [-math.inf] * (VOCAB - 1)


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-6])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    sampler = started(SamplingParams(temperature=temperature, seed=0), rows=1)
    assert set(draws(sampler, steps=20)) == {0}


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(temperature=1.0, top_k=2), 3),
        (SamplingParams(temperature=1.0, top_p=0.6), 3),
        (SamplingParams(temperature=1.0, top_k=2, top_p=0.6), 3),  # the likeliest alone has 0.576 of those kept
        (SamplingParams(temperature=1.0, top_k=2, top_p=0.57), 1),
        (SamplingParams(temperature=1.0, min_p=1.0), 1),
        (SamplingParams(temperature=1.0, top_k=99), 5),
    ],
    ids=["top_k", "top_p", "top_k_top_p", "top_k_smaller_top_p", "min_p", "top_k_above_vocabulary"],
)
def test_equal_logits_stand_or_fall_together(params: SamplingParams, kept: int) -> None:
    logits = mx.array([[1.0, 2.0, 3.0, 2.0, 0.0]])
    got = Sampler(params, [], vocab_size=5, num_real_tokens=5).processed_logits(logits)
    assert mx.sum(got > -math.inf).item() == kept


@pytest.mark.parametrize(
    ("params", "sorted_sizes"),
    [
        (SamplingParams(), []),
        (SamplingParams(temperature=1.0, min_p=0.1), []),
        (SamplingParams(temperature=1.0, top_k=4), []),
        (SamplingParams(temperature=1.0, top_k=4, top_p=0.9), [4]),
        (SamplingParams(temperature=1.0, top_p=0.9), [REAL]),
    ],
    ids=["greedy", "min_p", "top_k", "top_k_top_p", "top_p"],
)
def test_what_is_sorted(params: SamplingParams, sorted_sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def recorded(sort: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def record_and_sort(x: mx.array, *args: object, **kwargs: object) -> mx.array:
            seen.append(x.shape[-1])
            return sort(x, *args, **kwargs)

        return record_and_sort

    monkeypatch.setattr(mx, "sort", recorded(mx.sort))
    monkeypatch.setattr(mx, "argsort", recorded(mx.argsort))
    started(params, rows=1)(mx.array(LOGITS)[None])
    assert seen == sorted_sizes


@every_case
def test_drawing_evaluates_nothing(params: SamplingParams) -> None:
    """While mx.compile traces a function, any evaluation inside it raises."""
    sampler = started(params, rows=1)
    mx.compile(sampler.__call__)(mx.array(LOGITS)[None])


def test_the_same_seed_draws_the_same_tokens() -> None:
    params = SamplingParams(temperature=1.0, seed=11)
    assert draws(started(params, rows=1), steps=40) == draws(started(params, rows=1), steps=40)


@pytest.mark.parametrize("seeds", [(11, 12), (None, None), (0, 2**64 - 1)], ids=["given", "drawn", "extreme"])
def test_other_seeds_draw_other_tokens(seeds: tuple[int | None, int | None]) -> None:
    first, second = (draws(started(SamplingParams(temperature=1.0, seed=seed), rows=1), steps=40) for seed in seeds)
    assert first != second


def test_steps_and_rows_are_independent() -> None:
    sampler = started(SamplingParams(temperature=1.0, seed=3), rows=1)
    first, second = np.array(sampler(rows_of(LOGITS, 4000))), np.array(sampler(rows_of(LOGITS, 4000)))
    agreeing, expected = (first == second).sum(), 4000 * (probabilities(LOGITS, sampler.params, [], []) ** 2).sum()
    assert abs(agreeing - expected) < 5 * math.sqrt(expected)


def test_the_global_generator_is_left_alone() -> None:
    before = np.array(mx.random.state[0])
    draws(started(SamplingParams(temperature=1.0), rows=1), steps=3)
    assert np.array(mx.random.state[0]).tolist() == before.tolist()


def test_a_copy_goes_its_own_way() -> None:
    sampler = started(CASES["all"], rows=1)
    expected = draws(copy.copy(sampler), steps=20)
    assert draws(sampler, steps=20) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (-0.1, math.nan, math.inf, "1", None, True)],
        *[("top_p", value) for value in (0.0, 1.01, math.nan)],
        *[("top_k", value) for value in (-1, 2.0, True)],
        *[("min_p", value) for value in (-0.1, 1.1, math.nan)],
        *[("repetition_penalty", value) for value in (0.0, -1.0, math.nan, math.inf)],
        *[("presence_penalty", value) for value in (-2.1, 2.1, math.nan)],
        *[("frequency_penalty", value) for value in (-2.1, 2.1, math.nan)],
        *[("logit_bias", value) for value in ({1: math.nan}, {"1": 1.0}, {1: math.inf}, {1: "a"}, {True: 1.0}, [1, 2])],
        *[("seed", value) for value in (-1, 2**64, 1.5)],
        *[("max_tokens", value) for value in (0, -5, 2.5)],
        *[("stop", value) for value in ("", ["a", ""])],
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("stop", ["END", ["END"], ("END",)])
def test_stop_is_kept_as_a_tuple(stop: object) -> None:
    assert SamplingParams(stop=stop).stop == ("END",)


@pytest.mark.parametrize(
    ("params", "prompt", "words"),
    [
        (SamplingParams(logit_bias={REAL: 1.0}), [], "logit_bias has token id 12"),
        (SamplingParams(logit_bias={-1: 1.0}), [], "logit_bias has token id -1"),
        (SamplingParams(repetition_penalty=1.1), [0, REAL], "prompt_tokens has token id 12"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(params: SamplingParams, prompt: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampler(params, prompt, vocab_size=VOCAB, num_real_tokens=REAL)


@pytest.mark.parametrize("real", [0, VOCAB + 1])
def test_an_impossible_vocabulary_is_refused(real: int) -> None:
    with pytest.raises(ValueError, match="num_real_tokens"):
        Sampler(SamplingParams(), [], vocab_size=VOCAB, num_real_tokens=real)


@pytest.mark.parametrize("shape", [(VOCAB,), (1, REAL), (1, 1, VOCAB)])
def test_misshapen_logits_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="logits must have shape"):
        started(SamplingParams(), rows=1)(mx.zeros(shape))


def test_an_empty_prompt_has_nothing_to_penalize() -> None:
    params = SamplingParams(temperature=1.0, repetition_penalty=1.4)
    got = Sampler(params, [], vocab_size=VOCAB, num_real_tokens=REAL).processed_logits(mx.array(LOGITS)[None])
    expected = probabilities(LOGITS, params, [], [])
    np.testing.assert_allclose(np.array(mx.softmax(got, axis=-1)[0]), expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize(
    ("is_small", "thinking", "expected"),
    [
        (True, True, SamplingParams(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5)),
        (True, False, SamplingParams(temperature=1.0, top_p=1.0, top_k=20, presence_penalty=2.0)),
        (False, True, SamplingParams(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5)),
        (False, False, SamplingParams(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5)),
    ],
)
@pytest.mark.parametrize("config", [None, {}, {"eos_token_id": [248046, 248044], "temperature": None}])
def test_defaults_come_from_the_model_card(
    config: dict[str, object] | None, is_small: bool, thinking: bool, expected: SamplingParams
) -> None:
    assert default_params(config, is_small=is_small, thinking=thinking) == expected


CODE = SamplingParams(temperature=0.6, top_p=0.95, top_k=20)
REASONING = SamplingParams(temperature=1.0, top_p=1.0, top_k=40, presence_penalty=2.0)


@pytest.mark.parametrize(
    ("preset", "is_small", "thinking", "expected"),
    [
        ("code", True, True, CODE),
        ("code", False, True, CODE),
        ("reasoning", False, False, REASONING),
        ("general", False, False, SamplingParams(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5)),
    ],
)
@pytest.mark.parametrize("config", [None, {"temperature": 0.1, "top_k": 3}, {"do_sample": False}])
def test_a_preset_is_the_model_cards_whatever_the_checkpoint_says(
    config: dict[str, object] | None, preset: str, is_small: bool, thinking: bool, expected: SamplingParams
) -> None:
    assert default_params(config, is_small=is_small, thinking=thinking, preset=preset) == expected


@pytest.mark.parametrize(
    ("preset", "is_small", "thinking"),
    [("code", True, False), ("reasoning", False, True), ("reasoning", True, False)],
)
def test_a_preset_that_the_card_lacks(preset: str, is_small: bool, thinking: bool) -> None:
    with pytest.raises(PromptError, match=f"no sampling for '{preset}'.*take general, code"):
        default_params(None, is_small=is_small, thinking=thinking, preset=preset)


@pytest.mark.parametrize("preset", ["poetry", ""])
def test_a_preset_that_there_is_not(preset: str) -> None:
    with pytest.raises(ValueError, match="preset must be general, code, reasoning, not "):
        default_params(None, is_small=True, thinking=True, preset=preset)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"do_sample": True, "temperature": 1.0, "top_k": 20, "top_p": 0.95},
            SamplingParams(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5),
        ),
        (
            {"top_k": 0, "min_p": 0.05, "repetition_penalty": 1.05},
            SamplingParams(temperature=0.7, top_p=0.8, min_p=0.05, repetition_penalty=1.05, presence_penalty=1.5),
        ),
        ({"do_sample": False, "temperature": 0.7, "top_k": 20}, SamplingParams()),
        ({"do_sample": False, "repetition_penalty": 1.1}, SamplingParams(repetition_penalty=1.1)),
    ],
    ids=["released_35B", "partial", "greedy", "greedy_with_penalty"],
)
def test_generation_config_comes_before_the_card(config: dict[str, object], expected: SamplingParams) -> None:
    assert default_params(config, is_small=False, thinking=False) == expected


@pytest.mark.parametrize("config", [{"temperature": -1}, {"top_k": "20"}, {"top_p": 0}, {"do_sample": 0}])
def test_a_wrong_generation_config_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: {next(iter(config))}"):
        default_params(config, is_small=True, thinking=True)
