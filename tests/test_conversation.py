"""Conversations with the demo model: what each answer leaves behind, and what tools and limits do to it."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_mlx import conversation, load
from qwen_mlx.chat.reply import Content, Thinking
from qwen_mlx.chat.tools import ToolCall
from qwen_mlx.conversation import ROUNDS, Chat, Cut, Tool, ToolResult

MODEL, TOKENIZER = load("demo", dtype="float32")
WEATHER = "What is the weather in Paris?"
CALL = "<tool_call>\n<function={}>\n<parameter={}>\n{}\n</parameter>\n</function>\n</tool_call>"
PARIS = CALL.format("get_weather", "city", "Paris")


def get_weather(city: str) -> str:
    """Get the weather in a city.

    Args:
        city: The city.
    """
    return f"sunny in {city}"


def count_to(number: int) -> list[int]:
    """Count.

    Args:
        number: The last number.
    """
    return list(range(1, number + 1))


def chat(**options: Any) -> Chat:
    return Chat(MODEL, TOKENIZER, **{"temperature": 0, "max_tokens": 100} | options)


def scripted(monkeypatch: pytest.MonkeyPatch, *answers: str | Exception) -> list[str]:
    """The model says `answers` one after another, the last one ever again; returns the list of prompts it read."""
    prompts: list[str] = []

    def stream(model: Any, tokenizer: Any, tokens: list[int], **options: Any) -> Any:
        answer = answers[min(len(prompts), len(answers) - 1)]
        prompts.append(tokenizer.decode(tokens))
        if isinstance(answer, Exception):
            raise answer
        for piece in answer.splitlines(keepends=True):
            yield SimpleNamespace(text=piece, token=0)

    monkeypatch.setattr(conversation, "stream_generate", stream)
    return prompts


def text(events: list[Any], kind: type) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def results(events: list[Any]) -> list[str]:
    return [event.text for event in events if isinstance(event, ToolResult)]


def test_an_answer_becomes_a_message() -> None:
    talk = chat(system="Be brief.", max_tokens=20)
    events = list(talk.send("Who are you?"))
    assert talk.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": text(events, Content), "reasoning_content": ""},
    ]
    assert text(events, Content)


def test_what_was_thought_stands_apart_in_the_message() -> None:
    """The golden answer, by transformers: tests/golden/demo.json."""
    talk = chat(thinking=True)
    list(talk.send("What is 3 + 4?"))
    assert talk.messages[-1] == {
        "role": "assistant",
        "content": "3 + 4 = 7",
        "reasoning_content": "I add 3 and 4. The sum is 7.",
    }


def test_a_tool_is_run_and_its_result_is_read() -> None:
    talk = chat(tools=[get_weather])
    events = list(talk.send(WEATHER))
    call = ToolCall("get_weather", {"city": "Paris"})
    assert events[:2] == [call, ToolResult(call, "sunny in Paris")]
    assert "Paris" in text(events[2:], Content)


def test_a_tool_call_and_its_result_become_messages() -> None:
    talk = chat(tools=[get_weather])
    list(talk.send(WEATHER))
    assert [message["role"] for message in talk.messages] == ["user", "assistant", "tool", "assistant"]
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert talk.messages[1]["tool_calls"] == [{"id": "call_1_0", "type": "function", "function": function}]
    assert talk.messages[2]["content"] == "sunny in Paris"


def test_the_result_stands_in_the_next_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = scripted(monkeypatch, PARIS, "Fine.")
    list(chat(tools=[get_weather]).send(WEATHER))
    assert "<tool_response>\nsunny in Paris\n</tool_response>" in prompts[1]


def test_two_calls_in_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, PARIS + "\n" + CALL.format("count_to", "number", 2), "Fine.")
    talk = chat(tools=[get_weather, count_to])
    assert results(list(talk.send(WEATHER))) == ["sunny in Paris", "[1, 2]"]
    assert [call["id"] for call in talk.messages[1]["tool_calls"]] == ["call_1_0", "call_1_1"]


def raises(city: str) -> str:
    """Nothing.

    Args:
        city: The city.
    """
    raise RuntimeError("no wind")


def gives_what_is_no_json(city: str) -> dict[tuple[int, int], int]:
    """Nothing.

    Args:
        city: The city.
    """
    return {(1, 2): 3}


@pytest.mark.parametrize(
    ("tool", "said", "told"),
    [
        pytest.param(
            get_weather,
            CALL.format("get_wind", "city", "Paris"),
            "Error: there is no tool get_wind; those there are: get_weather.",
            id="unknown",
        ),
        pytest.param(raises, CALL.format("raises", "city", "x"), "Error: RuntimeError: no wind", id="raises"),
        pytest.param(
            gives_what_is_no_json,
            CALL.format("gives_what_is_no_json", "city", "x"),
            "Error: TypeError: keys must be str, int, float, bool or None, not tuple",
            id="no_json",
        ),
        pytest.param(
            count_to,
            CALL.format("count_to", "number", "many"),
            "Error: number not of the type that the tool's schema asks for.",
            id="not_of_the_type",
        ),
        pytest.param(count_to, CALL.format("count_to", "number", 3), "[1, 2, 3]", id="json"),
    ],
)
def test_what_the_model_is_told(
    monkeypatch: pytest.MonkeyPatch, tool: Callable[..., Any], said: str, told: str
) -> None:
    scripted(monkeypatch, said, "Fine.")
    talk = chat(tools=[tool])
    assert results(list(talk.send("Go."))) == [told]


def test_an_argument_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, "<tool_call>\n<function=count_to>\n</function>\n</tool_call>", "Fine.")
    (told,) = results(list(chat(tools=[count_to]).send("Go.")))
    assert told.startswith("Error: TypeError: count_to() missing 1 required positional argument")


def test_approve_is_asked_and_may_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, PARIS, "Fine.")
    asked: list[ToolCall] = []

    def refuse(call: ToolCall) -> bool:
        asked.append(call)
        return False

    assert results(list(chat(tools=[get_weather], approve=refuse).send(WEATHER))) == [
        "Error: the user does not allow this call."
    ]
    assert asked == [ToolCall("get_weather", {"city": "Paris"})]


def test_what_is_approved_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, PARIS, "Fine.")
    assert results(list(chat(tools=[get_weather], approve=lambda call: True).send(WEATHER))) == ["sunny in Paris"]


def test_a_tool_by_its_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, PARIS, "Fine.")
    schema = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    tool = Tool(schema, lambda **given: json.dumps(given))
    assert results(list(chat(tools=[tool]).send(WEATHER))) == ['{"city": "Paris"}']


def test_two_tools_of_one_name() -> None:
    with pytest.raises(ValueError, match="Two tools have one name; those given are get_weather, get_weather"):
        chat(tools=[get_weather, get_weather])


def test_a_model_that_calls_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = scripted(monkeypatch, PARIS)
    assert len(results(list(chat(tools=[get_weather]).send(WEATHER)))) == ROUNDS
    assert len(prompts) == ROUNDS


def test_closed_in_the_middle_what_was_yielded_stays() -> None:
    talk = chat()
    events = talk.send("Once upon a time")
    shown = "".join(next(events).text for _ in range(3))  # type: ignore[union-attr]
    events.close()
    assert talk.messages[-1] == {"role": "assistant", "content": shown, "reasoning_content": ""}


def test_closed_in_the_middle_the_conversation_goes_on() -> None:
    talk = chat(max_tokens=5)
    events = talk.send("Once upon a time")
    next(events)
    events.close()
    assert text(list(talk.send("Who are you?")), Content)


def test_closed_before_a_tool_was_run_the_conversation_goes_on() -> None:
    talk = chat(tools=[get_weather])
    events = talk.send(WEATHER)
    assert isinstance(next(events), ToolCall)
    events.close()
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    assert text(list(talk.send("Who are you?")), Content)


def test_an_error_takes_the_message_back(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = chat(max_tokens=5)
    list(talk.send("Who are you?"))
    before = list(talk.messages)
    scripted(monkeypatch, RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        list(talk.send("Hello"))
    assert talk.messages == before


def test_an_error_after_a_tool_takes_all_of_the_turn_back(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, PARIS, RuntimeError("broken"))
    talk = chat(tools=[get_weather])
    with pytest.raises(RuntimeError, match="broken"):
        list(talk.send(WEATHER))
    assert talk.messages == []


def test_rewind_turn_takes_back_all_behind_the_message() -> None:
    talk = chat(tools=[get_weather], max_tokens=30)
    list(talk.send("Who are you?"))
    before = list(talk.messages)
    list(talk.send(WEATHER))
    assert talk.rewind_turn() == WEATHER
    assert talk.messages == before


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_there_is_no_turn_to_take_back(system: str | None) -> None:
    talk = chat(system=system)
    before = list(talk.messages)
    with pytest.raises(ValueError, match="nothing has been said yet"):
        talk.rewind_turn()
    assert talk.messages == before


def cached(talk: Chat) -> int:
    assert talk.last is not None
    return talk.last.cached_tokens


def test_the_next_answer_does_not_compute_the_conversation_again() -> None:
    talk = chat(system="You are a storyteller. " * 5, max_tokens=5)
    list(talk.send("Once upon a time"))
    assert cached(talk) == 0
    list(talk.send("Who are you?"))
    assert cached(talk) >= len(TOKENIZER.encode("You are a storyteller. " * 5))


def test_after_rewind_turn_what_lies_before_the_message_is_known() -> None:
    talk = chat(max_tokens=5)
    list(talk.send("Once upon a time"))
    list(talk.send("Who are you?"))
    before = TOKENIZER.encode(talk.prompt().partition("<|im_start|>user\nWho are you?")[0])
    talk.rewind_turn()
    list(talk.send("What is the capital of France?"))
    assert cached(talk) >= len(before)


def test_an_answer_is_the_same_whatever_is_known() -> None:
    talk, fresh = chat(max_tokens=20), chat(max_tokens=20)
    list(talk.send("Once upon a time"))
    fresh.messages = list(talk.messages)
    assert list(talk.send("Who are you?")) == list(fresh.send("Who are you?"))


def test_thought_ends_with_its_budget_and_the_answer_goes_on() -> None:
    events = list(chat(thinking=True, thinking_budget=4).send("What is 3 + 4?"))
    place = events.index(Cut("its budget of 4 tokens is used up"))
    assert text(events, Thinking) == "I add 3"
    assert all(isinstance(event, Content) for event in events[place + 1 :])
    assert text(events[place + 1 :], Content)


def test_a_thought_within_its_budget_is_left_alone() -> None:
    assert list(chat(thinking=True, thinking_budget=50).send("What is 3 + 4?")) == list(
        chat(thinking=True).send("What is 3 + 4?")
    )


def test_content_does_not_count_as_thought() -> None:
    """The whole answer is longer than the budget, the thought is not."""
    events = list(chat(thinking=False, thinking_budget=3).send("What is the capital of France?"))
    assert not any(isinstance(event, Cut) for event in events)


def test_a_thought_that_is_cut_leaves_room_for_the_rest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """max_tokens are those of both pieces together."""
    given: list[int] = []
    real = conversation.stream_generate

    def watched(*args: Any, **options: Any) -> Any:
        given.append(options["max_tokens"])
        return real(*args, **options)

    monkeypatch.setattr(conversation, "stream_generate", watched)
    list(chat(thinking=True, thinking_budget=4, max_tokens=10).send("What is 3 + 4?"))
    assert given == [10, 6]


@pytest.mark.parametrize(("guard", "cuts"), [(True, [Cut("it went in circles")]), (False, [])])
def test_a_thought_in_circles_is_ended(monkeypatch: pytest.MonkeyPatch, guard: bool, cuts: list[Cut]) -> None:
    monkeypatch.setattr(conversation, "repeats", lambda tokens: len(tokens) == 5)
    events = list(chat(thinking=True, loop_guard=guard).send("What is 3 + 4?"))
    assert [event for event in events if isinstance(event, Cut)] == cuts


def test_content_in_circles_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "repeats", lambda tokens: True)
    events = list(chat(thinking=False).send("What is 3 + 4?"))
    assert not any(isinstance(event, Cut) for event in events)
