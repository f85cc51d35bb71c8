"""Several texts at once: each is the text that a run of its own says."""

from collections.abc import Callable, Sequence

import pytest

from qwen_mlx import load
from qwen_mlx.cache import rows
from qwen_mlx.decoding import batch
from qwen_mlx.decoding.autoregressive import decode
from qwen_mlx.decoding.batch import decode_batch
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.sampling import Sampler, SamplingParams
from qwen_mlx.model.qwen import Qwen

MODEL, TOKENIZER = load("demo", dtype="float32")
TALES = [
    "Once upon a time",
    "One day a dog went to the river. It was a sunny day, and the dog",
    "The",
    "There was a small boat on the river. The cat had a red ball. Tom and Mia went to the park. They were happy, and",
    "The cat had a red",
    "Mia saw a bird",
    "It was a sunny day",
]
PROMPTS = [TOKENIZER.encode(tale) for tale in TALES]
COUNTS = [5, 24, 1, 9, 16, 3, 12]
"""Tokens after which each text leaves."""


def samplers(model: Qwen, prompts: Sequence[Sequence[int]], **params: float) -> list[Sampler]:
    """Greedy ones where `params` do not say otherwise, and each with a seed of its own."""
    real = model.config.text.vocab_size
    every = [SamplingParams(**{"temperature": 0.0, "seed": seed} | params) for seed in range(len(prompts))]
    return [Sampler(p, prompt, vocab_size=real, num_real_tokens=real) for p, prompt in zip(every, prompts)]


def alone(model: Qwen, prompts: Sequence[Sequence[int]], counts: Sequence[int], **params: float) -> list[list[int]]:
    """The tokens of each text in a run of its own."""
    texts = []
    for prompt, sampler, count in zip(prompts, samplers(model, prompts, **params), counts):
        cache = model.make_cache()
        logits = prefill(model, prompt, cache, step_size=512)
        texts.append([token for token, *_ in decode(model, logits, cache, sampler, count=count)])
    return texts


def together(
    model: Qwen, prompts: Sequence[Sequence[int]], counts: Sequence[int], *, size: int, step: int = 512, **params: float
) -> list[list[int]]:
    """The same from one batch, where text i leaves after counts[i] tokens."""
    texts: list[list[int]] = [[] for _ in prompts]
    run = decode_batch(model, zip(prompts, samplers(model, prompts, **params)), size=size, step_size=step)
    answer = None
    while True:
        try:
            number, token = next(run) if answer is None else run.send(answer)
        except StopIteration:
            return texts
        texts[number].append(token)
        answer = len(texts[number]) < counts[number]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_each_text_is_that_of_its_own_run(size: int) -> None:
    assert together(MODEL, PROMPTS, COUNTS, size=size) == alone(MODEL, PROMPTS, COUNTS)


@pytest.mark.parametrize("order", [[2, 4, 0, 3, 1], [3, 1, 4, 0, 2]], ids=["shortest_first", "longest_first"])
def test_a_prompt_of_any_length_may_join_late(order: list[int]) -> None:
    prompts, counts = [PROMPTS[i] for i in order], [4, 20, 6, 8, 10]
    assert together(MODEL, prompts, counts, size=2) == alone(MODEL, prompts, counts)


def test_prompts_read_in_chunks() -> None:
    assert together(MODEL, PROMPTS, COUNTS, size=3, step=4) == alone(MODEL, PROMPTS, COUNTS)


def test_texts_that_are_drawn_draw_from_their_own_seed() -> None:
    drawn = together(MODEL, PROMPTS, COUNTS, size=3, temperature=1.0, repetition_penalty=1.3)
    assert drawn == alone(MODEL, PROMPTS, COUNTS, temperature=1.0, repetition_penalty=1.3)


def test_many_turns_in_which_padding_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that goes on for long, where offsets would otherwise add up."""
    monkeypatch.setattr(rows, "TRIM", 4)
    moves: list[int] = []
    moved = rows._moved

    def watched(cache: rows.SequenceCache, by: int, turn: rows.Turn) -> rows.SequenceCache:
        moves.append(by)
        return moved(cache, by, turn)

    monkeypatch.setattr(rows, "_moved", watched)
    prompts, counts = PROMPTS * 3, [7, 13, 2, 11, 5, 17, 3] * 3
    assert together(MODEL, prompts, counts, size=2) == alone(MODEL, PROMPTS * 3, counts)
    assert min(moves) <= -4


@pytest.mark.parametrize("variant", ["b-r2-d64", "d-moe"])
def test_golden_checkpoints(model_of: Callable[[str, str], Qwen], variant: str) -> None:
    model = model_of(variant, "float32")
    prompts, counts = [[5, 6, 7], [9] * 20, [30, 31], [100, 3, 50, 60, 70, 80, 90]], [4, 6, 9, 5]
    assert together(model, prompts, counts, size=2) == alone(model, prompts, counts)


def test_a_batch_that_all_have_left_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    joins: list[list[int]] = []
    joined = batch.joined

    def watched(caches: Sequence[rows.SequenceCache], turn: rows.Turn) -> rows.SequenceCache:
        joins.append([cache.offset for cache in caches])
        return joined(caches, turn)

    monkeypatch.setattr(batch, "joined", watched)
    assert together(MODEL, PROMPTS[:4], [3] * 4, size=2) == alone(MODEL, PROMPTS[:4], [3] * 4)
    lengths = [len(prompt) for prompt in PROMPTS]
    assert joins == [lengths[:2], lengths[2:4]]


def test_tokens_come_in_the_order_of_time() -> None:
    run = decode_batch(MODEL, zip(PROMPTS[:2], samplers(MODEL, PROMPTS[:2])), size=2, step_size=512)
    assert [next(run)[0], *(run.send(True)[0] for _ in range(5))] == [0, 1, 0, 1, 0, 1]


def test_a_text_is_taken_when_it_is_its_turn() -> None:
    texts = iter(list(zip(PROMPTS[:3], samplers(MODEL, PROMPTS[:3]))))
    run = decode_batch(MODEL, texts, size=2, step_size=512)
    next(run)
    assert texts.__length_hint__() == 1
    run.send(False)  # the first leaves, and then the third is read
    run.send(True)
    assert texts.__length_hint__() == 0


def test_no_prompts_no_tokens() -> None:
    assert list(decode_batch(MODEL, [], size=4, step_size=512)) == []


def test_a_size_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        next(decode_batch(MODEL, zip(PROMPTS, samplers(MODEL, PROMPTS)), size=0, step_size=512))


def test_padding_rows_of_the_vocabulary_are_not_chosen(model_of: Callable[[str, str], Qwen]) -> None:
    """Each row has the sampler of its own text, and with it what that forbids."""
    model = model_of("a-r1-d32", "float32")
    prompts = [[5, 6, 7], [9] * 4]
    forbid = [
        Sampler(SamplingParams(temperature=0.0), p, vocab_size=384, num_real_tokens=n) for p, n in zip(prompts, (1, 2))
    ]
    run = decode_batch(model, zip(prompts, forbid), size=2, step_size=512)
    assert next(run) == (0, 0)
    assert run.send(True)[1] < 2
