"""The walk from prompt to text: on the demo model where the model matters, on scripted replies where the words do."""

import gc
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx import PromptCache, SamplingParams, generate, load, stream_generate
from qwen_mlx.cache.kv import KVCache
from qwen_mlx.cache.sequence import SequenceCache
from qwen_mlx.chat.template import render
from qwen_mlx.config import ModelConfig, MoeConfig, Yarn
from qwen_mlx.decoding.asked import recommended_params
from qwen_mlx.decoding.prefill import prefill
from qwen_mlx.decoding.sampling import Sampler
from qwen_mlx.errors import CheckpointError, PromptError, TokenizerError
from qwen_mlx.generate import GenerationResponse
from qwen_mlx.model.qwen import Qwen
from tests.cache.test_sequence import TOLERANCE, contents, same

MODEL, TOKENIZER = load("demo", dtype="float32")
START = "Once upon a time"
LONG = " ".join([START] * 8)  # more tokens than one small chunk
MESSAGES = [{"role": "user", "content": "Who are you?"}]
MLX_LM_FIELDS = {
    "text",
    "token",
    "logprobs",
    "from_draft",
    "prompt_tokens",
    "prompt_tps",
    "generation_tokens",
    "generation_tps",
    "peak_memory",
    "finish_reason",
}
# With this bias no reply of the model ends by itself, so that the test decides how long it is.
ENDLESS = {token: -1e4 for token in MODEL.config.eos_token_ids}


class ScriptedModel:
    """In place of `Qwen`: whatever the prompt, the likeliest tokens are those of `reply`, then the end of the turn."""

    def __init__(self, reply: Sequence[int], config: ModelConfig = MODEL.config, *, height: float = 30.0) -> None:
        self.config = config
        self.dtype = mx.float32
        self.folder = None
        self.prompt: list[int] = []
        self._reply = iter([*reply, *[TOKENIZER.eos_token_id] * 99])
        self._height = height

    def make_cache(self, *, kv_bits: int | None = None) -> SequenceCache:
        return SequenceCache([KVCache()])

    def parameters(self) -> dict[str, mx.array]:
        return {}

    def embed(self, tokens: mx.array) -> mx.array:
        self.prompt += np.array(tokens)[0].tolist()
        return tokens[..., None].astype(mx.float32)

    def hidden(self, x: mx.array, cache: SequenceCache, *, marks: Sequence[int]) -> mx.array:
        cache.layers[0].update(mx.zeros((2, 1, 1, x.shape[1], 1)))  # type: ignore[union-attr, call-arg, arg-type]
        return x

    def logits(self, hidden: mx.array) -> mx.array:
        token = next(self._reply)
        return (mx.arange(self.config.text.vocab_size) == token)[None, None].astype(mx.float32) * self._height

    def step(self, tokens: mx.array, cache: SequenceCache) -> tuple[mx.array, mx.array]:
        return self.logits(tokens)[:, -1], tokens


def scripted(reply: str | Sequence[int], **options: Any) -> list[GenerationResponse]:
    """The responses when the model says `reply`."""
    tokens = TOKENIZER.encode(reply) if isinstance(reply, str) else reply
    return list(stream_generate(ScriptedModel(tokens), TOKENIZER, START, **options))  # type: ignore[arg-type]


def text_of(responses: Iterable[GenerationResponse]) -> str:
    return "".join(response.text for response in responses)


def config_with(**values: Any) -> ModelConfig:
    return replace(MODEL.config, text=replace(MODEL.config.text, **values))


def tokens_of(prompt: Any = START, model: Qwen = MODEL, **options: Any) -> list[int]:
    return [response.token for response in stream_generate(model, TOKENIZER, prompt, **options)]


@pytest.fixture
def drawn_with(monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    """The parameters that each generation of the test gave to its sampler."""
    seen: list[SamplingParams] = []

    class RecordingSampler(Sampler):
        def __init__(self, params: SamplingParams, prompt_tokens: Sequence[int], **sizes: int) -> None:
            seen.append(params)
            super().__init__(params, prompt_tokens, **sizes)

    monkeypatch.setattr(importlib.import_module("qwen_mlx.decoding.asked"), "Sampler", RecordingSampler)
    return seen


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_streamed_texts_are_the_generated_text(temperature: float) -> None:
    options = {"temperature": temperature, "seed": 5, "max_tokens": 40}
    streamed = text_of(stream_generate(MODEL, TOKENIZER, START, **options))
    assert streamed == generate(MODEL, TOKENIZER, START, **options) != ""


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_text_is_the_decoded_tokens(temperature: float) -> None:
    responses = list(stream_generate(MODEL, TOKENIZER, START, temperature=temperature, seed=6, max_tokens=40))
    assert text_of(responses) == TOKENIZER.decode([r.token for r in responses], skip_special_tokens=True)


def test_greedy_is_the_likeliest_token_without_a_cache() -> None:
    tokens = TOKENIZER.encode(START)
    for _ in range(24):
        tokens.append(int(mx.argmax(MODEL(mx.array([tokens]))[0, -1]).item()))
        if tokens[-1] in MODEL.config.eos_token_ids:
            break
    prompt = TOKENIZER.encode(START)
    assert tokens_of(temperature=0.0, max_tokens=24) == tokens[len(prompt) :]


@pytest.mark.parametrize("size", [1, 7, 64, 4096])
def test_the_prefill_step_size_changes_nothing(size: int) -> None:
    whole = [int(mx.argmax(MODEL(mx.array([TOKENIZER.encode(LONG)]))[0, -1]).item())]
    whole += tokens_of(TOKENIZER.encode(LONG) + whole, max_tokens=11, temperature=0.0, logit_bias=ENDLESS)
    options = {"max_tokens": 12, "temperature": 0.0, "logit_bias": ENDLESS}
    assert tokens_of(LONG, prefill_step_size=size, **options) == whole


def test_the_head_meets_the_last_position_only(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    logits = Qwen.logits

    def spy(model: Qwen, hidden: mx.array) -> mx.array:
        shapes.append(hidden.shape)
        return logits(model, hidden)

    monkeypatch.setattr(Qwen, "logits", spy)
    options = {"temperature": 0.0, "logit_bias": ENDLESS, "speculate": "off"}
    tokens_of(LONG, max_tokens=2, prefill_step_size=20, **options)
    assert shapes == [(1, 1, MODEL.config.text.hidden_size)] * 2


def test_progress_counts_the_prompt() -> None:
    seen: list[tuple[int, int]] = []
    tokens_of(list(range(20)), max_tokens=1, prefill_step_size=8, progress=lambda *place: seen.append(place))
    assert seen == [(0, 20), (8, 20), (16, 20), (20, 20)]


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("o", "The little f"),
        ("fox ran", "The little "),
        ("little fox ran home. It was g", "The "),
        ("The", ""),
        ("glad.", "The little fox ran home. It was "),
        (".", "The little fox ran home"),
        (["glad", "ran"], "The little fox "),
        ("running", "The little fox ran home. It was glad."),
        ("glad. And", "The little fox ran home. It was glad."),
    ],
    ids=str,
)
def test_nothing_is_shown_from_a_stop_string_on(stop: str | list[str], shown: str) -> None:
    assert text_of(scripted("The little fox ran home. It was glad.", stop=stop)) == shown


def test_a_stop_string_ends_the_loop() -> None:
    responses = scripted("one two three four five six", stop=" three")
    assert len(TOKENIZER.encode("one two")) < len(responses) <= len(TOKENIZER.encode("one two three"))


def test_a_stop_string_is_the_reason() -> None:
    assert scripted("one two three four", stop="three")[-1].finish_reason == "stop"


def test_a_stop_string_that_the_last_token_completes_is_the_reason() -> None:
    reply = TOKENIZER.encode("one two three")
    assert scripted(reply, stop="two three", max_tokens=len(reply))[-1].finish_reason == "stop"


def test_what_might_have_become_a_stop_string_is_shown_at_the_end() -> None:
    reply = TOKENIZER.encode("one two thr")
    assert text_of(scripted(reply, stop="two three", max_tokens=len(reply))) == "one two thr"


@pytest.mark.parametrize("end", [*MODEL.config.eos_token_ids, 5, 6], ids=str)
def test_any_end_token_ends_the_reply(end: int) -> None:
    config = replace(MODEL.config, eos_token_ids=(*MODEL.config.eos_token_ids, 5, 6))
    model: Any = ScriptedModel([40, end, 41], config)
    assert tokens_of(model=model) == [40, end]


def test_the_tokenizers_end_token_counts_even_if_no_configuration_names_it() -> None:
    model: Any = ScriptedModel([40, TOKENIZER.eos_token_id or 0, 41], replace(MODEL.config, eos_token_ids=(5,)))
    assert tokens_of(model=model) == [40, TOKENIZER.eos_token_id]


def test_the_end_token_is_not_shown() -> None:
    config = replace(MODEL.config, eos_token_ids=(TOKENIZER.encode("b")[0],))
    model: Any = ScriptedModel(TOKENIZER.encode("a") + TOKENIZER.encode("b"), config)
    assert generate(model, TOKENIZER, START) == "a"


def test_an_end_token_is_the_reason() -> None:
    assert [r.finish_reason for r in scripted("a")] == [None] * len(TOKENIZER.encode("a")) + ["stop"]


@pytest.mark.parametrize("count", [1, 2, 17])
def test_max_tokens_is_exact(count: int) -> None:
    responses = scripted("a " * 50, max_tokens=count)
    assert [r.finish_reason for r in responses] == [None] * (count - 1) + ["length"]


def test_a_reply_ends_where_the_positions_end() -> None:
    places = len(TOKENIZER.encode(START)) + 3
    model: Any = ScriptedModel(TOKENIZER.encode("a " * 50), config_with(max_position_embeddings=places))
    reasons = [r.finish_reason for r in stream_generate(model, TOKENIZER, START)]
    assert reasons == [None, None, "length"]


def test_a_character_comes_whole() -> None:
    pieces = [response.text for response in scripted("é🙂ß漢")]
    assert [piece for piece in pieces if piece] == list("é🙂ß漢")


def test_half_a_character_at_the_end_is_what_decoding_makes_of_it() -> None:
    half = TOKENIZER.encode("a🙂")[:-1]
    assert text_of(scripted(half, max_tokens=len(half))) == "a\ufffd" == TOKENIZER.decode(half)


def test_special_tokens_are_not_shown() -> None:
    role = TOKENIZER.token_to_id("<|im_start|>")
    assert role is not None
    assert text_of(scripted([*TOKENIZER.encode("a"), role, *TOKENIZER.encode("b")])) == "ab"


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_padding_rows_never_come_out(temperature: float) -> None:
    config = config_with(vocab_size=TOKENIZER.vocab_size + 64)
    model: Any = ScriptedModel([TOKENIZER.vocab_size + i for i in range(20)], config, height=1e4)
    assert max(tokens_of(model=model, temperature=temperature, max_tokens=20)) < TOKENIZER.vocab_size


def test_logprobs_are_the_log_softmax_of_the_logits() -> None:
    prompt = TOKENIZER.encode(START)
    responses = list(stream_generate(MODEL, TOKENIZER, prompt, temperature=1.0, seed=3, max_tokens=6))
    tokens = prompt + [r.token for r in responses]
    logits = np.array(MODEL(mx.array([tokens]))[0, len(prompt) - 1 : -1]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(np.stack([np.array(r.logprobs) for r in responses]), expected, atol=5e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_probabilities_sum_to_one(dtype: str) -> None:
    model, _ = load("demo", dtype=dtype)
    (response,) = stream_generate(model, TOKENIZER, START, max_tokens=1)
    assert np.exp(np.array(response.logprobs, np.float64)).sum() == pytest.approx(1, abs=1e-4)


def test_the_same_seed_gives_the_same_tokens() -> None:
    assert tokens_of(temperature=2.0, seed=4, max_tokens=30) == tokens_of(temperature=2.0, seed=4, max_tokens=30)


def test_another_seed_gives_other_tokens() -> None:
    assert tokens_of(temperature=2.0, seed=4, max_tokens=30) != tokens_of(temperature=2.0, seed=5, max_tokens=30)


FIELD_VALUES: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.6,
    "top_k": 7,
    "min_p": 0.2,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": {3: 1.5},
    "seed": 11,
    "max_tokens": 2,
    "stop": ("zebra",),
}


def test_every_parameter_has_a_value_to_be_tried() -> None:
    assert FIELD_VALUES.keys() == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize(("name", "value"), FIELD_VALUES.items(), ids=FIELD_VALUES.keys())
def test_a_keyword_reaches_the_sampler(drawn_with: list[SamplingParams], name: str, value: Any) -> None:
    scripted("a b c", **{name: value})
    assert getattr(drawn_with[0], name) == value


def test_params_reach_the_sampler_as_they_are(drawn_with: list[SamplingParams]) -> None:
    params = SamplingParams(**FIELD_VALUES)
    scripted("a b c", params=params)
    assert drawn_with == [params]


def test_a_keyword_goes_before_params(drawn_with: list[SamplingParams]) -> None:
    scripted("a b c", params=SamplingParams(temperature=0.5, top_k=3), top_k=4)
    assert drawn_with == [SamplingParams(temperature=0.5, top_k=4)]


@pytest.mark.parametrize(
    "prompt", [START, TOKENIZER.encode(START), mx.array(TOKENIZER.encode(START))], ids=["text", "ids", "array"]
)
def test_a_prompt_that_is_taken_as_it_stands(prompt: Any) -> None:
    model: Any = ScriptedModel([])
    generate(model, TOKENIZER, prompt)
    assert model.prompt == TOKENIZER.encode(START)


@pytest.mark.parametrize("thinking", [None, True, False])
def test_messages_go_through_the_template(thinking: bool | None) -> None:
    model: Any = ScriptedModel([])
    generate(model, TOKENIZER, MESSAGES, thinking=thinking)
    special = TOKENIZER.special_tokens
    text = render(TOKENIZER.chat_template, MESSAGES, thinking=thinking, special_tokens=special)
    assert model.prompt == TOKENIZER.encode(text)


def test_thinking_changes_the_prompt() -> None:
    prompts = []
    for thinking in (True, False):
        model: Any = ScriptedModel([])
        generate(model, TOKENIZER, MESSAGES, thinking=thinking)
        prompts.append(model.prompt)
    assert prompts[0] != prompts[1]


@pytest.mark.parametrize("prompt", [START, [1, 2, 3]], ids=["text", "ids"])
def test_thinking_without_a_template_is_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match="thinking"):
        generate(MODEL, TOKENIZER, prompt, thinking=True)


@pytest.mark.parametrize("thinking", ["on", "off", 1])
def test_thinking_is_a_bool_or_none(thinking: Any) -> None:
    with pytest.raises(ValueError, match="thinking must be True, False or None"):
        generate(MODEL, TOKENIZER, MESSAGES, thinking=thinking)


CARDS = {  # the table on the Qwen3.5 model cards, rows "general text"
    "small_thinking": ({"hidden_size": 1024}, True, {"temperature": 1.0, "top_p": 0.95, "presence_penalty": 1.5}),
    "small": ({"hidden_size": 2048}, False, {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 2.0}),
    "large_thinking": ({"hidden_size": 2560}, True, {"temperature": 1.0, "top_p": 0.95, "presence_penalty": 1.5}),
    "large": ({"hidden_size": 2560}, False, {"temperature": 0.7, "top_p": 0.8, "presence_penalty": 1.5}),
    "experts": (
        {"hidden_size": 2048, "moe": MoeConfig(256, 8, 512, 512)},
        False,
        {"temperature": 0.7, "top_p": 0.8, "presence_penalty": 1.5},
    ),
}


@pytest.mark.parametrize(("sizes", "thinking", "card"), CARDS.values(), ids=CARDS.keys())
def test_the_card_of_its_size_is_recommended(sizes: dict[str, Any], thinking: bool, card: dict[str, float]) -> None:
    model: Any = ScriptedModel([], replace(config_with(**sizes), generation={}))
    assert recommended_params(model, thinking=thinking) == SamplingParams(top_k=20, **card)


def test_a_preset_is_the_cards_and_single_fields_go_before_it(drawn_with: list[SamplingParams]) -> None:
    model, tokenizer = load("demo")
    asked = [{"role": "user", "content": "Hello"}]
    options: dict[str, Any] = {"preset": "code", "thinking": True, "temperature": 0.0, "max_tokens": 1}
    generate(model, tokenizer, asked, **options)
    assert drawn_with == [SamplingParams(temperature=0.0, top_p=0.95, top_k=20, max_tokens=1)]
    with pytest.raises(ValueError, match="params and preset both say"):
        generate(model, tokenizer, asked, SamplingParams(), preset="code")


def test_the_generation_config_goes_before_the_card() -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 10, "top_p": 0.9}
    model: Any = ScriptedModel([], replace(config_with(hidden_size=1024), generation=generation))
    params = SamplingParams(temperature=0.6, top_k=10, top_p=0.9, presence_penalty=2.0)
    assert recommended_params(model, thinking=False) == params


def test_a_generation_config_can_ask_for_greedy_decoding() -> None:
    model: Any = ScriptedModel([], replace(MODEL.config, generation={"do_sample": False}))
    assert recommended_params(model, thinking=False) == SamplingParams()


@pytest.mark.parametrize(
    ("prompt", "presence"),
    [
        (START, 2.0),
        (START + "<think>\n", 1.5),
        (TOKENIZER.encode(START + "<think>\n"), 1.5),
        (START + "<think>\n\n</think>\n\n", 2.0),
        (START + "<think>\nA story.", 1.5),
    ],
    ids=["text", "thinking", "thinking_ids", "thought", "within"],
)
def test_a_prompt_that_opens_a_thought_is_sampled_as_the_card_says_for_thinking(
    drawn_with: list[SamplingParams], prompt: Any, presence: float
) -> None:
    model: Any = ScriptedModel([], replace(MODEL.config, generation={}))
    generate(model, TOKENIZER, prompt)
    assert drawn_with[0].presence_penalty == presence


@pytest.mark.parametrize("prompt", ["", [], ()], ids=repr)
def test_an_empty_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(PromptError, match="empty"):
        generate(MODEL, TOKENIZER, prompt)


@pytest.mark.parametrize("places", [1, 3, 4])
def test_a_prompt_beyond_the_positions_is_answered_with_one_warning_that_names_the_remedy(places: int) -> None:
    model: Any = ScriptedModel(TOKENIZER.encode("a " * 50), config_with(max_position_embeddings=places))
    with pytest.warns(UserWarning, match=f'4 tokens, .* made for {places}, .*"yarn", "factor": .*: {places}') as said:
        responses = list(stream_generate(model, TOKENIZER, [1, 2, 3, 4], max_tokens=5))
    assert (len(said), len(responses), said[0].filename) == (1, 5, __file__)


def test_yarn_makes_room(recwarn: pytest.WarningsRecorder) -> None:
    yarn = Yarn(2.0, 4, 32.0, 1.0, True, 1.0)
    text = MODEL.config.text
    config = config_with(max_position_embeddings=4, rope_parameters=replace(text.rope_parameters, yarn=yarn))
    model: Any = ScriptedModel(TOKENIZER.encode("a " * 50), config)
    assert len(list(stream_generate(model, TOKENIZER, [1, 2, 3, 4]))) == 4
    assert not recwarn.list


@pytest.mark.parametrize("wrong", [-1, 2**40, MODEL.config.text.vocab_size])
def test_an_id_that_the_model_does_not_have_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"token id {wrong}, but ids run from 0 to {MODEL.config.text.vocab_size - 1}"):
        generate(MODEL, TOKENIZER, [1, wrong])


@pytest.mark.parametrize(
    "prompt",
    [
        [1, 2.5],
        ["a", "b"],
        [None],
        [[1, 2]],
        mx.array([[1, 2]]),
        b"Hello",
        bytearray(b"Hello"),
        b"",
        None,
        5,
        {1, 2},
        MESSAGES[0],
        ["Who are you?", *MESSAGES],
    ],
    ids=repr,
)
def test_a_prompt_of_another_kind_is_refused(prompt: Any) -> None:
    with pytest.raises(TypeError, match="prompt must be text, a list of token ids or a list of messages, not "):
        generate(MODEL, TOKENIZER, prompt)


@pytest.mark.parametrize(
    "prompt",
    [[*MESSAGES, "And you?"], [{"content": "no role"}], [{"role": "user"}]],
    ids=["text", "no_role", "no_content"],
)
def test_messages_of_another_form_are_refused(prompt: Any) -> None:
    with pytest.raises(PromptError):
        generate(MODEL, TOKENIZER, prompt)


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(PromptError, match="Unicode"):
        generate(MODEL, TOKENIZER, "a\ud800")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(value: float) -> None:
    model, _ = load("demo", dtype="float32")
    layer = model.model.layers[2].mlp.down_proj
    layer.weight = mx.full(layer.weight.shape, value)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.down_proj\.weight"):
        generate(model, TOKENIZER, START)


def test_weights_that_are_numbers_but_overflow_are_told_apart() -> None:
    model, _ = load("demo", dtype="float32")
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, 3e38)
    with pytest.raises(CheckpointError, match="overflow"):
        generate(model, TOKENIZER, START)


def test_the_tokenizer_of_a_larger_model_is_refused() -> None:
    model: Any = ScriptedModel([], config_with(vocab_size=100))
    with pytest.raises(TokenizerError, match="different models"):
        generate(model, TOKENIZER, [1, 2, 3])


@pytest.mark.parametrize("size", [0, -1])
def test_a_prefill_step_without_tokens_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="step_size"):
        generate(MODEL, TOKENIZER, START, prefill_step_size=size)


def test_a_parameter_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="top_p"):
        generate(MODEL, TOKENIZER, START, top_p=1.5)


def test_a_bias_on_a_token_that_does_not_exist_is_refused_before_the_prompt_is_read() -> None:
    model: Any = ScriptedModel([])
    with pytest.raises(ValueError, match="logit_bias"):
        generate(model, TOKENIZER, START, logit_bias={TOKENIZER.vocab_size: 1.0})
    assert model.prompt == []


@pytest.mark.parametrize("name", ["temp", "max_kv_size", "kv_group_size", "draft_model"])
def test_an_unknown_keyword_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"There is no option {name}; those of sampling are temperature, top_p"):
        generate(MODEL, TOKENIZER, START, **{name: 1})


def test_a_response_has_the_fields_of_mlx_lm() -> None:
    assert {field.name for field in fields(GenerationResponse)} >= MLX_LM_FIELDS


def test_responses_count_the_tokens() -> None:
    responses = scripted("a b c d")
    assert [r.generation_tokens for r in responses] == [*range(1, len(responses) + 1)]


def test_responses_know_the_length_of_the_prompt() -> None:
    assert {r.prompt_tokens for r in scripted("a b c")} == {len(TOKENIZER.encode(START))}


@pytest.mark.parametrize(
    ("model", "first", "last", "options"),
    [
        (MODEL, 30, 120, {"logit_bias": ENDLESS, "speculate": "off"}),  # no longer than one slab of keys and values
        (ScriptedModel([7] * 500), 20, 500, {}),
        (ScriptedModel([7] * 500), 20, 500, {"temperature": 1.0, "frequency_penalty": 0.01, "stop": "zebra"}),
    ],
    ids=["model", "greedy", "sampled"],
)
def test_the_loop_keeps_nothing_of_the_tokens_it_has_given_out(
    model: Any, first: int, last: int, options: dict[str, Any]
) -> None:
    held = {}
    for response in stream_generate(model, TOKENIZER, START, max_tokens=500, **options):
        if response.generation_tokens in (first, last):
            gc.collect()
            held[response.generation_tokens] = (mx.get_active_memory(), len(gc.get_objects()))
        if response.generation_tokens == last:
            break
    bytes_more, objects_more = np.subtract(held[last], held[first])
    row = 4 * MODEL.config.text.vocab_size
    assert (bytes_more < 4 * row, objects_more < 50) == (True, True), f"{bytes_more} bytes, {objects_more} objects"


BEHIND = TOKENIZER.encode(", the fox")


def known(kv_bits: int | None = None) -> PromptCache:
    """`LONG`, computed before."""
    prompt = PromptCache(TOKENIZER.encode(LONG), MODEL.make_cache(kv_bits=kv_bits), MODEL)
    mx.eval(prefill(MODEL, prompt.tokens, prompt.cache, step_size=64))
    return prompt


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_an_answer_behind_a_prompt_cache_is_that_to_the_whole_prompt(kv_bits: int | None) -> None:
    prompt = known(kv_bits)
    whole = [*prompt.tokens, *BEHIND]
    options = {"kv_bits": kv_bits, "temperature": 0.0, "max_tokens": 32, "logit_bias": ENDLESS}
    assert tokens_of(whole, prompt_cache=prompt, **options) == tokens_of(whole, **options)


def test_what_a_prompt_cache_knows_counts_as_cached() -> None:
    prompt = known()
    whole, before = [*prompt.tokens, *BEHIND], len(prompt.tokens)
    responses = list(stream_generate(MODEL, TOKENIZER, whole, prompt_cache=prompt, max_tokens=3))
    assert {(r.cached_tokens, r.prompt_tokens) for r in responses} == {(before, len(whole))}


def test_without_a_prompt_cache_nothing_counts_as_cached() -> None:
    assert {(r.cached_tokens, r.reuse) for r in scripted("a b c")} == {(0, None)}


def test_only_what_is_new_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, read = known(), []
    embed = Qwen.embed

    def spy(model: Qwen, tokens: mx.array) -> mx.array:
        read.extend(np.array(tokens)[0].tolist())
        return embed(model, tokens)

    monkeypatch.setattr(Qwen, "embed", spy)
    tokens_of([*prompt.tokens, *BEHIND], prompt_cache=prompt, max_tokens=1)
    assert read == BEHIND


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        pytest.param("length", {"max_tokens": 5, "logit_bias": ENDLESS}, id="max_tokens"),
        pytest.param("length", {"max_tokens": 1, "logit_bias": ENDLESS}, id="one_token"),
        pytest.param("stop", {"max_tokens": 5, "logit_bias": {MODEL.config.eos_token_ids[0]: 1e4}}, id="end_token"),
        pytest.param("stop", {"max_tokens": 400, "stop": "e", "logit_bias": ENDLESS}, id="stop_string"),
        pytest.param(None, {"max_tokens": 400, "logit_bias": ENDLESS}, id="broken_off"),
    ],
)
def test_a_prompt_cache_knows_exactly_the_tokens_that_it_holds(ending: str | None, options: dict[str, Any]) -> None:
    prompt = known()
    whole, responses = [*prompt.tokens, *BEHIND], []
    stream = stream_generate(MODEL, TOKENIZER, whole, prompt_cache=prompt, temperature=0.0, **options)
    for response in stream:
        responses.append(response)
        if ending is None and len(responses) == 3:
            break
    stream.close()  # type: ignore[attr-defined]
    assert responses[-1].finish_reason == ending
    text = whole + [r.token for r in responses]
    # The last token was written, and need not have been read.
    assert prompt.tokens in (text, text[:-1])
    fresh = MODEL.make_cache()
    mx.eval(prefill(MODEL, prompt.tokens, fresh, step_size=64), fresh.arrays)
    assert prompt.cache.offset == fresh.offset
    for ours, expected in zip(contents(prompt.cache), contents(fresh), strict=True):
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


def test_a_text_goes_on_behind_its_answer() -> None:
    prompt, options = known(), {"temperature": 0.0, "max_tokens": 8, "logit_bias": ENDLESS}
    first = [*prompt.tokens, *BEHIND]
    second = [*first, *tokens_of(first, prompt_cache=prompt, **options), *BEHIND]
    assert tokens_of(second, prompt_cache=prompt, **options) == tokens_of(second, **options)


OTHER = next(token for token in range(99) if token != TOKENIZER.encode(LONG)[7])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            lambda tokens: [*tokens[:7], OTHER, *tokens[8:], 5],
            f"at token 7 it has {OTHER}, and the cache {TOKENIZER.encode(LONG)[7]}",
            id="another_token",
        ),
        pytest.param(lambda tokens: tokens, "at least one must be new", id="equal"),
        pytest.param(lambda tokens: tokens[:-1], "at least one must be new", id="shorter"),
    ],
)
def test_a_prompt_that_does_not_begin_as_the_prompt_cache_is_refused(
    change: Callable[[list[int]], list[int]], words: str
) -> None:
    prompt = known()
    tokens, before = list(prompt.tokens), contents(prompt.cache)
    with pytest.raises(ValueError, match=words):
        generate(MODEL, TOKENIZER, change(tokens), prompt_cache=prompt)
    assert (prompt.tokens, same(contents(prompt.cache), before)) == (tokens, True)


@pytest.mark.parametrize("kv_bits", [None, 4])
def test_a_prompt_cache_of_other_bits_is_refused(kv_bits: int | None) -> None:
    prompt = known(8)
    with pytest.raises(ValueError, match=r"layer 3 holds QuantizedKVCache of .*, 8 bits kept, that of this cache"):
        generate(MODEL, TOKENIZER, [*prompt.tokens, *BEHIND], prompt_cache=prompt, kv_bits=kv_bits)


def test_a_prompt_cache_of_another_model_is_refused(model_of: Callable[[str, str], Qwen]) -> None:
    prompt = PromptCache([], model_of("a-r1-d32", "float32").make_cache(), MODEL)
    with pytest.raises(ValueError, match="The prompt cache is of another model"):
        generate(MODEL, TOKENIZER, START, prompt_cache=prompt)
