"""Prompts that begin as earlier ones did: which places are kept, and that what comes of it is what a cold run says."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mlx import PrefixStore, PromptCache, generate, load, load_prompt_cache, save_prompt_cache, stream_generate
from qwen_mlx.cache.prefix import PrefixMatch
from qwen_mlx.cache.sequence import CHECKPOINTS
from qwen_mlx.chat.template import render
from qwen_mlx.decoding.prompt import Prompt
from qwen_mlx.decoding.reuse import APART, SPACING, TAIL, Reuse, in_words, places_to_keep
from qwen_mlx.decoding.sampling import Sampler
from qwen_mlx.model.gated_deltanet import GatedDeltaNet
from qwen_mlx.model.qwen import Qwen

MODEL, TOKENIZER = load("demo", dtype="float32")
START = TOKENIZER.token_to_id("<|im_start|>")
TALE = (
    "Once upon a time there was a cat. The cat had a red ball and a small boat. One day the cat went to the river. "
    "It was a sunny day, and the cat was happy"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def with_messages(length: int, *starts: int) -> list[int]:
    """`length` tokens of which those at `starts` begin a message."""
    tokens = [7] * length
    for start in starts:
        tokens[start] = START
    return tokens


@pytest.mark.parametrize(
    ("tokens", "start", "step_size", "places"),
    [
        pytest.param(with_messages(100, 0, 5, 50, 90), 0, 512, [5, 50, 90, 99], id="messages"),
        pytest.param(with_messages(100, 0, 5, 50, 90), 5, 512, [50, 90, 99], id="behind_what_is_known"),
        pytest.param(with_messages(100, 0, 50, 90), 90, 512, [99], id="all_but_the_answer's_header_is_known"),
        pytest.param(with_messages(100, 0, 50, 90), 99, 512, [], id="all_but_the_last_token_is_known"),
        pytest.param(with_messages(100, 99), 0, 512, [99], id="the_last_token_begins_a_message"),
        pytest.param(
            with_messages(920, *range(100, 920, 100)),
            0,
            512,
            [100, 700, 800, 900, 919],
            id="the_first_and_the_last",
        ),
        pytest.param(
            with_messages(1520, *range(0, 1520, 100)),
            200,
            512,
            [300, 900, 1300, 1400, 1500, 1519],
            id="some_of_the_others",
        ),
        pytest.param(
            with_messages(740, 100, 611, 612, 700, 710, 720, 730),
            0,
            512,
            [100, 612, 710, 720, 730, 739],
            id="as_far_apart_as_need_be",
        ),
        pytest.param(with_messages(100), 0, 512, [70], id="tail"),
        pytest.param(with_messages(100, 10), 0, 512, [10, 70], id="tail_behind_a_message"),
        pytest.param(with_messages(100, 70), 0, 512, [70, 99], id="a_message_where_the_tail_begins"),
        pytest.param(with_messages(100, 69), 0, 512, [69, 70], id="a_message_just_before_the_tail"),
        pytest.param(with_messages(100), 70, 512, [], id="tail_known"),
        pytest.param(with_messages(100), 80, 512, [], id="less_than_the_tail_is_new"),
        pytest.param(with_messages(TAIL), 0, 512, [], id="all_is_tail"),
        pytest.param(with_messages(1), 0, 512, [], id="one_token"),
        pytest.param(with_messages(5000), 0, 512, [2048, 4096, 4970], id="ends_of_chunks"),
        pytest.param(with_messages(5000), 700, 512, [2748, 4796, 4970], id="ends_of_chunks_from_a_start"),
        pytest.param(with_messages(5000, 1000), 0, 512, [1000, 3072, 4970], id="no_end_near_behind_a_message"),
        pytest.param(with_messages(7000), 0, 1000, [3000, 6000, 6970], id="chunks_that_do_not_divide_the_spacing"),
        pytest.param(with_messages(9000), 0, 4096, [4096, 8192, 8970], id="chunks_longer_than_the_spacing"),
        pytest.param(with_messages(4096), 0, 2048, [2048, 4066], id="the_end_is_no_place"),
    ],
)
def test_places_to_keep(tokens: list[int], start: int, step_size: int, places: list[int]) -> None:
    assert (SPACING, APART, TAIL, CHECKPOINTS) == (2048, 512, 30, 4)
    assert places_to_keep(TOKENIZER, tokens, start, step_size) == places


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 9000),
    starts=st.sets(st.floats(0, 1, exclude_max=True), max_size=60),
    start=st.floats(0, 1, exclude_max=True),
    step_size=st.sampled_from([64, 100, 512, 2048, 3000]),
)
def test_places_by_their_definition(length: int, starts: set[float], start: float, step_size: int) -> None:
    messages, begin = {int(s * length) for s in starts}, int(start * length)
    places = places_to_keep(TOKENIZER, with_messages(length, *messages), begin, step_size)
    assert places == sorted({*places})
    assert all(begin < place < length for place in places)
    new = sorted(message for message in messages if message > begin)
    assert {*new[:1], *new[1 - CHECKPOINTS :]} <= {*places}
    assert all(any(message - APART < place <= message for place in places) for message in new)
    assert len([message for message in new if message in places]) <= CHECKPOINTS + length // APART
    ends = range(begin + step_size, length, step_size)
    tail = length - (1 if any(message >= length - TAIL for message in messages) else TAIL)
    assert tail in places or tail <= begin
    assert all(place in messages or place in ends or place == tail for place in places)
    widths = np.diff([begin, *places, length])
    assert widths.max() <= SPACING + step_size
    assert length - max([begin, *places]) <= TAIL or length - TAIL <= begin


@pytest.mark.parametrize(
    ("match", "words"),
    [
        pytest.param((0, 0, None), "0 of 4 tokens were known; nothing is kept yet.", id="nothing"),
        pytest.param((3, 4, None), "3 of 4 tokens were known; the same prompt was met before.", id="all"),
        pytest.param(
            (0, 4, None),
            "0 of 4 tokens were known; the same prompt was met before, too short to go on from.",
            id="all_but_no_place",
        ),
        pytest.param((3, 4, 9), "3 of 4 tokens were known; the same prompt was met before.", id="all_and_more"),
        pytest.param(
            (1, 2, None), "1 of 4 tokens were known; what is kept ends at token 2, before ' was' ({2}).", id="ends"
        ),
        pytest.param(
            (1, 2, 1),
            "1 of 4 tokens were known; at token 2 the prompt has ' was' ({2}) where ' dog' ({1}) was kept.",
            id="parts",
        ),
        pytest.param(
            (0, 0, 3),
            "0 of 4 tokens were known; at token 0 the prompt has 'The' ({0}) where ' big' ({3}) was kept.",
            id="parts_at_once",
        ),
    ],
)
def test_how_much_was_known_in_words(match: tuple[int, int, int | None], words: str) -> None:
    tokens = [TOKENIZER.token_to_id(text) for text in ("The", "Ġdog", "Ġwas", "Ġbig")]
    assert None not in tokens
    cached, common, kept = match
    kept = kept if kept in (None, 9) else tokens[kept]
    assert in_words(TOKENIZER, tokens, PrefixMatch(cached, common, kept)) == words.format(*tokens)


def chunks_of(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> list[int]:
    """How many tokens each call of the model took while `work` was done."""
    lengths: list[int] = []
    hidden = Qwen.hidden

    def counted(self: Qwen, x: mx.array, *rest: Any, **options: Any) -> mx.array:
        lengths.append(x.shape[1])
        return hidden(self, x, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Qwen, "hidden", counted)
        work()
    return lengths


@pytest.mark.parametrize("step_size", [512, 32])
def test_no_chunk_is_divided_for_a_place(monkeypatch: pytest.MonkeyPatch, step_size: int) -> None:
    tokens = with_messages(150, 10, 31, 32, 33, 90, 91, 120)
    store = PrefixStore(MODEL)

    def work(store: PrefixStore | None) -> None:
        mx.eval(Reuse(MODEL, tokens, store=store).read(MODEL, TOKENIZER, step_size=step_size))

    chunks = chunks_of(monkeypatch, lambda: work(store))
    assert chunks == chunks_of(monkeypatch, lambda: work(None))
    assert sum(chunks) == 150
    assert sum(chunks_of(monkeypatch, lambda: work(store))) == 1


@dataclass
class Said:
    """One answer: the prompt's ids, what was written, and how much of the prompt was not computed."""

    prompt: list[int]
    tokens: list[int]
    text: str
    cached: int
    words: str | None
    finish: str | None

    @property
    def all(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def content(self) -> str:
        """Without the thoughts."""
        return self.text.split("</think>")[-1].strip()


def messages_ids(messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
    special = TOKENIZER.special_tokens
    return TOKENIZER.encode(render(TOKENIZER.chat_template, messages, special_tokens=special, **options))


def starts(tokens: Sequence[int]) -> list[int]:
    """Where messages begin."""
    return [i for i, token in enumerate(tokens) if token == START]


def say(prompt: Prompt, *, model: Qwen = MODEL, until: int | None = None, **options: Any) -> Said:
    """Greedily; the reader breaks off after `until` tokens."""
    options = {"temperature": 0.0, "max_tokens": 40, **options}
    heard = []
    stream = stream_generate(model, TOKENIZER, prompt, **options)
    for response in stream:
        heard.append(response)
        if len(heard) == until:
            stream.close()  # type: ignore[attr-defined]
            break
    if isinstance(prompt, str):
        ids = TOKENIZER.encode(prompt)
    else:
        thinking = options.get("thinking")
        ids = list(prompt) if isinstance(prompt[0], int) else messages_ids(prompt, thinking=thinking)  # type: ignore
    assert heard[-1].prompt_tokens == len(ids)
    tokens, text = [r.token for r in heard], "".join(r.text for r in heard)
    return Said(ids, tokens, text, heard[-1].cached_tokens, heard[-1].reuse, heard[-1].finish_reason)


Say = Callable[..., Said]
Scenario = Callable[[Say], Iterator[tuple[Said, int]]]
"""Answers, each with the number of tokens that a store should have known."""


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "You are a kind friend. Answer in a few words."}
QUESTIONS = ["What is the capital of France?", "What is 3 + 4?", "What sound does a dog make?"]


def turns(say: Say, thinking: bool | None) -> Iterator[tuple[Said, int]]:
    """The answers of earlier turns stand there without the empty thoughts, or the thoughts, they were made with."""
    messages, known = [SYSTEM], 0
    for question in QUESTIONS:
        messages.append(user(question))
        said = say(messages, thinking=thinking)
        yield said, known
        known = starts(said.prompt)[-1]
        messages.append(assistant(said.content))


def tool(say: Say, thinking: bool) -> Iterator[tuple[Said, int]]:
    """The call is known with all that led to it; the next question makes the template leave the thoughts out."""
    messages, options = [user("What is the weather in Paris?")], {"tools": [WEATHER], "thinking": thinking}
    call = say(messages_ids(messages, **options))
    yield call, 0
    thought = call.text.partition("</think>")[0].strip() if thinking else ""
    messages.append(assistant(call.content, reasoning_content=thought))
    messages.append({"role": "tool", "content": '{"sky": "sunny", "temperature": 21}'})
    answer = say(messages_ids(messages, **options))
    yield answer, len(call.all)
    messages += [assistant(answer.content), user(QUESTIONS[1])]
    yield say(messages_ids(messages, **options)), starts(call.prompt)[-1]


def regenerate(say: Say) -> Iterator[tuple[Said, int]]:
    messages = [SYSTEM, user(QUESTIONS[0])]
    first = say(messages)
    yield first, 0
    for _ in range(2):
        yield say(messages), len(first.prompt) - 1


def edit(say: Say) -> Iterator[tuple[Said, int]]:
    """Of the second question after a third was asked, and then of the first."""
    answers = []
    for said, known in turns(say, None):
        answers.append(said)
        yield said, known
    second = say([SYSTEM, user(QUESTIONS[0]), assistant(answers[0].content), user("What is two plus two?")])
    yield second, starts(second.prompt)[3]
    first = say([SYSTEM, user(QUESTIONS[2])])
    yield first, starts(first.prompt)[1]


def raw_again(say: Say) -> Iterator[tuple[Said, int]]:
    first = say(TALE)
    yield first, 0
    yield say(TALE), len(first.prompt) - TAIL


def raw_goes_on(say: Say) -> Iterator[tuple[Said, int]]:
    first = say(TALE, until=8)
    yield first, 0
    yield say([*first.all, *TOKENIZER.encode(" The end.")]), len(first.all)


def raw_cut_in_a_word(say: Say) -> Iterator[tuple[Said, int]]:
    first = say(TALE + " and saw a gi")
    yield first, 0
    second = say(TALE + " and saw a girl with a blue hat")
    yield second, len(first.prompt) - TAIL


SCENARIOS: dict[str, Scenario] = {
    "turns": functools.partial(turns, thinking=None),
    "turns_thinking": functools.partial(turns, thinking=True),
    "tool": functools.partial(tool, thinking=False),
    "tool_thinking": functools.partial(tool, thinking=True),
    "regenerate": regenerate,
    "edit": edit,
    "raw_again": raw_again,
    "raw_goes_on": raw_goes_on,
    "raw_cut_in_a_word": raw_cut_in_a_word,
}
every_scenario = pytest.mark.parametrize("name", SCENARIOS)


@functools.cache
def cold(name: str, kv_bits: int | None = None) -> list[Said]:
    """The same without a store."""
    return [said for said, _ in SCENARIOS[name](functools.partial(say, kv_bits=kv_bits))]


def written(answers: Sequence[Said]) -> list[tuple[list[int], str]]:
    return [(said.tokens, said.text) for said in answers]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"kv_bits": 8}, id="8_bits"),
        pytest.param({"prefill_step_size": 16}, id="short_chunks"),
    ],
)
@every_scenario
def test_warm_says_what_cold_says(name: str, options: dict[str, Any]) -> None:
    store = PrefixStore(MODEL)
    warm = list(SCENARIOS[name](functools.partial(say, prefix_store=store, **options)))
    assert [said.cached for said, _ in warm] == [expected for _, expected in warm]
    assert written([said for said, _ in warm]) == written(cold(name, options.get("kv_bits")))
    assert all(said.cached == 0 for said in cold(name, options.get("kv_bits")))


STATES = 6 * (2 * 128 * 128 + 3 * 4 * 128) * 4
KEYS_VALUES = 2 * 2 * 256 * 4
"""Bytes of a place and of a token of the demo model in float32: six linear layers, two attention layers."""


@pytest.mark.parametrize("max_bytes", [0, STATES, STATES + 60 * KEYS_VALUES, 3 * STATES + 60 * KEYS_VALUES])
@pytest.mark.parametrize("name", ["turns", "edit", "tool"])
def test_a_store_that_is_too_small_changes_nothing_that_is_said(name: str, max_bytes: int) -> None:
    store, answers, known = PrefixStore(MODEL, max_bytes=max_bytes), [], []
    for said, most in SCENARIOS[name](functools.partial(say, prefix_store=store)):
        answers.append(said)
        known.append((said.cached, most))
        assert store.nbytes <= max_bytes
    assert written(answers) == written(cold(name))
    assert all(cached <= most for cached, most in known)


@pytest.mark.parametrize("times", [1, 2, 9])
def test_what_was_dropped_between_two_turns_is_computed_again(times: int) -> None:
    store, answers = PrefixStore(MODEL), []
    for said, most in SCENARIOS["turns"](functools.partial(say, prefix_store=store)):
        answers.append(said)
        assert said.cached <= most
        for _ in range(times):
            store.drop()
    assert written(answers) == written(cold("turns"))
    assert (answers[-1].cached == 0) == (times == 9)


def test_generate_takes_a_store_too() -> None:
    store, messages = PrefixStore(MODEL), [SYSTEM, user(QUESTIONS[0])]
    texts = [generate(MODEL, TOKENIZER, messages, temperature=0.0, prefix_store=store) for _ in range(2)]
    assert texts == [generate(MODEL, TOKENIZER, messages, temperature=0.0)] * 2
    assert store.nbytes > 0


def test_the_responses_say_what_was_known() -> None:
    store = PrefixStore(MODEL)
    first, second = say(TALE, prefix_store=store), say(TALE + " and slept", prefix_store=store)
    assert first.words == f"0 of {len(first.prompt)} tokens were known; nothing is kept yet."
    assert second.words is not None
    assert second.words.startswith(f"{second.cached} of {len(second.prompt)} tokens were known; at token ")
    assert say(TALE).words is None


@pytest.mark.parametrize("until", [1, 2, 7])
def test_a_reader_who_breaks_off(until: int) -> None:
    """All that was handed out is known to the next prompt."""
    store = PrefixStore(MODEL)
    first = say(TALE, prefix_store=store, until=until)
    assert len(first.tokens) == until
    asked = [*first.all, *TOKENIZER.encode(" and then")]
    second = say(asked, prefix_store=store)
    assert second.cached == len(first.all)
    assert written([second]) == written([say(asked)])


def test_an_answer_that_ended_by_its_length() -> None:
    """Its last token was written, and need not have been read."""
    store = PrefixStore(MODEL)
    first = say(TALE, prefix_store=store, max_tokens=8)
    assert first.finish == "length"
    second = say([*first.all, *TOKENIZER.encode(" The end.")], prefix_store=store)
    assert len(first.all) - 1 <= second.cached <= len(first.all)
    assert written([second]) == written([say(second.prompt)])


def test_a_stream_that_nobody_reads_keeps_nothing() -> None:
    store = PrefixStore(MODEL)
    stream_generate(MODEL, TOKENIZER, TALE, prefix_store=store)
    assert store.nbytes == 0


def interrupt(at: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= at:
            raise KeyboardInterrupt

    return progress


def test_interrupted_in_the_middle_of_a_prompt() -> None:
    """Places in the chunks that were done are used when the prompt is read again."""
    store, system = PrefixStore(MODEL), {"role": "system", "content": f"{SYSTEM['content']} {TALE}."}
    messages = [system, user(QUESTIONS[0]), assistant("I think so."), user(QUESTIONS[1])]
    with pytest.raises(KeyboardInterrupt):
        say(messages, prefix_store=store, prefill_step_size=32, progress=interrupt(64))
    again = say(messages, prefix_store=store, prefill_step_size=32)
    assert 32 < again.cached == starts(again.prompt)[1] < 64
    assert written([again]) == written([say(messages)])


@pytest.fixture(scope="module")
def tiny(model_of: Callable[[str, str], Qwen]) -> Qwen:
    return model_of("a-r1-d32", "float32")


def test_interrupted_in_a_long_prompt_without_messages(tiny: Qwen) -> None:
    """Of the chunks that were done, those up to the last place are used."""
    store, tokens = PrefixStore(tiny), np.random.RandomState(1).randint(0, 352, 2600).tolist()
    with pytest.raises(KeyboardInterrupt):
        Reuse(tiny, tokens, store=store).read(tiny, TOKENIZER, step_size=256, progress=interrupt(2304))
    again = Reuse(tiny, tokens[:2305], store=store)
    warm = again.read(tiny, TOKENIZER, step_size=256)
    assert again.cached_tokens == SPACING
    assert mx.abs(warm - Reuse(tiny, tokens[:2305]).read(tiny, TOKENIZER, step_size=256)).max() < 5e-4


def test_a_prompt_cache_goes_on() -> None:
    """Interrupted between chunks, broken off, and to the end: it knows the tokens that it holds."""
    known, ids = PromptCache([], MODEL.make_cache(), MODEL), TOKENIZER.encode(TALE)
    with pytest.raises(KeyboardInterrupt):
        say(ids, prompt_cache=known, prefill_step_size=8, progress=interrupt(16))
    assert (known.tokens, known.cache.offset) == (ids[:16], 16)
    first = say(ids, prompt_cache=known, until=4)
    assert first.cached == 16
    assert (known.tokens, known.cache.offset) == (first.all, len(first.all))
    asked = [*first.all, *TOKENIZER.encode(" and then")]
    second = say(asked, prompt_cache=known)
    assert second.cached == len(first.all)
    assert known.tokens == second.all[: known.cache.offset]
    assert written([second]) == written([say(asked)])


@pytest.mark.parametrize(
    ("layer", "least"),
    [
        pytest.param(3, 0, id="in_the_first_chunk"),
        pytest.param(6 + 3, 16, id="in_another_chunk"),
        pytest.param(3 * 6 + 3, 40, id="in_the_first_step"),
        pytest.param(6 * 6 + 5, 41, id="in_a_later_step"),
    ],
)
def test_interrupted_between_two_layers(layer: int, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them have taken tokens in then, and others not; what goes on is as if none had."""
    known, store, ids = PromptCache([], MODEL.make_cache(), MODEL), PrefixStore(MODEL), TOKENIZER.encode(TALE)
    mixer, passed = GatedDeltaNet.__call__, iter(range(1, 999))

    def interrupted(*arguments: Any) -> mx.array:
        if next(passed) == layer:
            raise KeyboardInterrupt
        return mixer(*arguments)

    assert len(ids) == 40
    monkeypatch.setattr(GatedDeltaNet, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        say(ids, prompt_cache=known, prefix_store=store, prefill_step_size=16)
    monkeypatch.undo()
    assert known.cache.offset == len(known.tokens) >= least
    assert known.tokens[:40] == ids[: len(known.tokens)]
    asked = [*ids, *known.tokens[40:], *TOKENIZER.encode(" and then")]
    cold = next(stream_generate(MODEL, TOKENIZER, asked, temperature=0.0))
    for options in ({"prompt_cache": known}, {"prefix_store": store}):
        warm = next(stream_generate(MODEL, TOKENIZER, asked, temperature=0.0, **options))
        assert mx.abs(warm.logprobs - cold.logprobs).max() < 5e-4


def test_interrupted_between_a_step_and_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache has taken in and nobody has heard is taken back."""
    known, ids = PromptCache([], MODEL.make_cache(), MODEL), TOKENIZER.encode(TALE)
    draw, drawn = Sampler.__call__, iter(range(1, 99))

    def interrupted(*arguments: Any) -> mx.array:
        if next(drawn) == 4:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(Sampler, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        say(ids, prompt_cache=known, speculate="off")
    monkeypatch.undo()
    assert known.tokens == [*ids, *say(ids, max_tokens=2).tokens]
    assert known.cache.offset == len(known.tokens)


def test_after_a_restart(tmp_path: Path) -> None:
    known, store, path = PromptCache([], MODEL.make_cache(), MODEL), PrefixStore(MODEL), tmp_path / "prompt.safetensors"
    warm = SCENARIOS["tool"](functools.partial(say, prompt_cache=known, prefix_store=store))
    call, _ = next(warm)
    assert known.tokens == call.all
    save_prompt_cache(path, known, MODEL, TOKENIZER)
    model, tokenizer = load("demo", dtype="float32")
    loaded = load_prompt_cache(path, model, tokenizer)
    _, expected, _ = cold("tool")
    answer = say(expected.prompt, model=model, prompt_cache=loaded)
    assert answer.cached == len(call.all)
    assert written([answer]) == written([expected])


def test_a_store_fills_an_empty_prompt_cache() -> None:
    store, known = PrefixStore(MODEL), PromptCache([], MODEL.make_cache(), MODEL)
    first = say(TALE, prefix_store=store, until=4)
    second = say([*first.all, *TOKENIZER.encode(" and")], prefix_store=store, prompt_cache=known)
    assert second.cached == len(first.all)
    assert known.tokens == second.all[: known.cache.offset]
    third = say([*second.all, *TOKENIZER.encode(" then")], prefix_store=store)
    assert third.cached == known.cache.offset


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        pytest.param([1, 2, 9, 4], "at token 2 it has 9, and the cache 3", id="another"),
        pytest.param([1, 2, 3], "The prompt has 3 tokens and the prompt cache 3: at least one must be new", id="same"),
        pytest.param([1, 2], "The prompt has 2 tokens and the prompt cache 3", id="shorter"),
    ],
)
def test_a_prompt_that_does_not_go_on_from_the_cache(tokens: list[int], why: str, tiny: Qwen) -> None:
    known = PromptCache([1, 2, 3], tiny.make_cache(), tiny)
    mx.eval(tiny(mx.array([[1, 2, 3]]), known.cache))
    with pytest.raises(ValueError, match=why):
        Reuse(tiny, tokens, known)
    assert (known.tokens, known.cache.offset) == ([1, 2, 3], 3)


def test_a_prompt_cache_with_other_tokens_than_it_holds(tiny: Qwen) -> None:
    with pytest.raises(ValueError, match="The prompt cache holds 0 tokens, but 1 are given"):
        Reuse(tiny, [1, 2], PromptCache([1], tiny.make_cache(), tiny))


def test_a_prompt_cache_of_another_model_of_the_same_form() -> None:
    twin, _ = load("demo", dtype="float32")
    with pytest.raises(ValueError, match="The prompt cache was made for another model; load or make it with this one"):
        say(TALE, prompt_cache=PromptCache([], twin.make_cache(), twin))


def test_a_prompt_cache_of_another_form(tiny: Qwen) -> None:
    with pytest.raises(ValueError, match="The prompt cache is of another model"):
        Reuse(tiny, [1, 2], PromptCache([], tiny.make_cache(), tiny), kv_bits=8)


def test_a_store_of_another_model_of_the_same_form() -> None:
    twin, _ = load("demo", dtype="float32")
    with pytest.raises(ValueError, match=r"made for another model; make one for this: PrefixStore\(model\)"):
        say(TALE, prefix_store=PrefixStore(twin))


def test_a_store_of_another_number_of_bits_is_refused_before_anything_is_read(tiny: Qwen) -> None:
    store, known = PrefixStore(tiny), PromptCache([1, 2, 3], tiny.make_cache(kv_bits=8), tiny)
    mx.eval(Reuse(tiny, [1, 2], store=store).read(tiny, TOKENIZER, step_size=8))
    mx.eval(tiny(mx.array([[1, 2, 3]]), known.cache))
    with pytest.raises(ValueError, match="The prefix store is of another model: its layer 3 holds KVCache"):
        Reuse(tiny, [1, 2, 3, 4], known, store, kv_bits=8)
    assert (known.tokens, known.cache.offset) == ([1, 2, 3], 3)
