"""`batch_generate`: every answer is the one that its prompt gets alone, whatever stands beside it."""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qwen_mlx import batch_generate, load, stream_generate
from qwen_mlx.batch import BatchAnswer
from qwen_mlx.decoding import preflight
from qwen_mlx.decoding.batch import decode_batch
from qwen_mlx.decoding.preflight import check_memory
from qwen_mlx.decoding.prompt import Prompt
from qwen_mlx.decoding.sampling import Sampler, SamplingParams
from qwen_mlx.errors import CheckpointError, MemoryLimitError, PromptError
from tests.decoding.test_preflight import SHAPES, measured, random_model

MODEL, TOKENIZER = load("demo", dtype="float32")
PROMPTS: list[Prompt] = [
    "Once upon a time",
    [{"role": "user", "content": "How far is the moon?"}],
    TOKENIZER.encode("One day a dog went to the river. It was a sunny day, and the dog"),
    "The",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me a story about a fox."}],
    "Mia saw a bird",
]


def alone(prompts: Sequence[Prompt], **options: Any) -> list[BatchAnswer]:
    answers = []
    for prompt in prompts:
        said = list(stream_generate(MODEL, TOKENIZER, prompt, speculate="off", **options))
        text, tokens = "".join(each.text for each in said), [each.token for each in said]
        answers.append(BatchAnswer(said[0].prompt_tokens, text, tokens, said[-1].finish_reason))
    return answers


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 2},
        {"batch_size": 8},
        {"batch_size": 3, "prefill_step_size": 4},
        {"stop": ["the"]},
        {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2},
        {"max_tokens": 1},
        {"json_schema": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 9}},
    ],
    ids=lambda options: ",".join(options) + str(options.get("batch_size", "")),
)
def test_every_answer_is_that_of_its_prompt_alone(options: dict[str, Any]) -> None:
    shared = {"max_tokens": 60, "temperature": 0.0} | options
    own = {name: value for name, value in shared.items() if name != "batch_size"}
    assert batch_generate(MODEL, TOKENIZER, PROMPTS, **shared) == alone(PROMPTS, **own)


def test_they_end_for_different_reasons() -> None:
    """So that rows left and others joined, above."""
    answers = batch_generate(MODEL, TOKENIZER, PROMPTS, max_tokens=60, temperature=0.0)
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    assert len({len(answer.tokens) for answer in answers}) > 2


def test_a_switch_of_the_template_needs_messages() -> None:
    asked: list[Prompt] = [PROMPTS[1], PROMPTS[4]]
    options: dict[str, Any] = {"thinking": True, "max_tokens": 40, "temperature": 0.0}
    answers = batch_generate(MODEL, TOKENIZER, asked, **options)
    assert answers == alone(asked, **options)
    assert all("</think>" in answer.text for answer in answers)
    with pytest.raises(ValueError, match="only messages go through it"):
        batch_generate(MODEL, TOKENIZER, PROMPTS, thinking=True)


def test_progress_follows_the_answers() -> None:
    done: list[tuple[int, int]] = []
    batch_generate(MODEL, TOKENIZER, PROMPTS, max_tokens=5, progress=lambda *now: done.append(now))
    assert done == [(n, 6) for n in range(1, 7)]


def test_of_no_prompts_come_no_answers() -> None:
    assert batch_generate(MODEL, TOKENIZER, []) == []


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"batch_size": 0}, ValueError, "at least 1, not 0"),
        ({"batch_size": "2"}, ValueError, "must be an integer"),
        ({"temperature": -1}, ValueError, "temperature must be"),
        ({"warmth": 1}, TypeError, "There is no option warmth"),
        ({"prefill_step_size": 0}, ValueError, "at least 1 token"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        batch_generate(MODEL, TOKENIZER, PROMPTS, **options)


def test_one_text_is_no_list_of_prompts() -> None:
    with pytest.raises(TypeError, match="a list of prompts, not one text"):
        batch_generate(MODEL, TOKENIZER, "Once upon a time")


def test_weights_that_are_no_numbers_are_told() -> None:
    model, _ = load("demo", dtype="float32")
    norm = model.model.norm
    norm.weight = norm.weight * float("nan")
    with pytest.raises(CheckpointError, match="not numbers"):
        batch_generate(model, TOKENIZER, ["Once"], max_tokens=3)


def test_every_option_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools are in the prompt, params and preset in what draws the tokens, and force goes on without memory."""
    asked: list[Prompt] = [PROMPTS[1]]
    tool = {"type": "function", "function": {"name": "lookup", "parameters": {}}}
    plain, told = (batch_generate(MODEL, TOKENIZER, asked, tools=tools, max_tokens=1)[0] for tools in ([], [tool]))
    assert told.prompt_tokens > plain.prompt_tokens
    assert batch_generate(MODEL, TOKENIZER, asked, SamplingParams(max_tokens=2))[0].finish_reason == "length"
    with pytest.raises(PromptError, match="no sampling for 'reasoning'"):
        batch_generate(MODEL, TOKENIZER, asked, preset="reasoning")
    monkeypatch.setattr(preflight, "memory_limit", lambda: 1)
    assert batch_generate(MODEL, TOKENIZER, asked, max_tokens=1, force=True)


def test_samplers_go_with_their_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with penalties takes as much as the vocabulary, for each prompt."""
    alive: list[weakref.ref[Sampler]] = []
    made = Sampler.__init__

    def counted(self: Sampler, *given: Any, **options: Any) -> None:
        made(self, *given, **options)
        alive.append(weakref.ref(self))

    monkeypatch.setattr(Sampler, "__init__", counted)
    left: list[int] = []
    batch_generate(
        MODEL,
        TOKENIZER,
        ["Once"] * 6,
        batch_size=1,
        max_tokens=2,
        progress=lambda done, total: left.append(sum(ref() is not None for ref in alive)),
    )
    assert left == [6, 5, 4, 3, 2, 1]


def test_a_wrong_prompt_is_found_before_any_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_mlx.batch.decode_batch", lambda *args, **options: pytest.fail("it began"))
    with pytest.raises(PromptError, match="empty"):
        batch_generate(MODEL, TOKENIZER, ["Once", ""])


def test_what_does_not_fit_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = check_memory(MODEL, 10, 4000, step_size=64, force=True)
    monkeypatch.setattr(preflight, "memory_limit", lambda: plan.total + 2 * plan.keys_values)
    options: dict[str, Any] = {"max_tokens": 4000, "temperature": 0.0, "stop": ["."]}
    with pytest.raises(MemoryLimitError, match=r"8 texts of 4,\d\d\d tokens take .*: take a smaller batch_size, "):
        batch_generate(MODEL, TOKENIZER, ["Once upon a time"] * 8, **options)
    assert len(batch_generate(MODEL, TOKENIZER, ["Once upon a time"] * 8, batch_size=2, **options)) == 8


@pytest.mark.parametrize("name", ["keys_and_values", "delta_rule"])
def test_the_count_is_near_the_measured_peak(name: str) -> None:
    (sizes, prompt), rows, step_size = SHAPES[name], 4, 128
    model = random_model(sizes)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 352, prompt // 2).tolist() for _ in range(rows)]

    def work() -> None:
        samplers = [Sampler(SamplingParams(), [], vocab_size=384, num_real_tokens=352) for _ in prompts]
        steps, left = decode_batch(model, zip(prompts, samplers), size=rows, step_size=step_size), [20] * rows
        number, _ = next(steps)
        while any(left):
            left[number] -= 1
            if any(left):
                number, _ = steps.send(left[number] > 0)

    plan = check_memory(model, prompt // 2, 20, step_size=step_size, force=True, rows=rows)
    assert 0.8 < replace(plan, others=0).total / measured(model, work) < 1.2


def test_the_answers_are_not_all_alike() -> None:
    """One per prompt, in the order of the prompts."""
    answers = batch_generate(MODEL, TOKENIZER, PROMPTS, max_tokens=8, temperature=0.0, batch_size=2)
    assert len({answer.text for answer in answers}) == len(PROMPTS)
    assert [answer.prompt_tokens for answer in answers] == [each.prompt_tokens for each in alone(PROMPTS, max_tokens=1)]
