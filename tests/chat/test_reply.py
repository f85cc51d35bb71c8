"""The splitter: what a reply thinks, says and calls, however it is cut into pieces, and what it holds back."""

from __future__ import annotations

import json
import re
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_mlx.chat.reply import Content, Part, ReplySplitter, Thinking, UnfinishedCall, leaves_thinking_open
from qwen_mlx.chat.template import render
from qwen_mlx.chat.tools import ToolCall, to_openai

DATA = Path(__file__).parent / "data"
LLAMA_CPP = json.loads((DATA / "llama_cpp_cases.json").read_text(encoding="utf-8"))
DEMO_TEMPLATE = (Path(__file__).parents[2] / "qwen_mlx/demo/chat_template.jinja").read_text(encoding="utf-8")

TIME = {"name": "time", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": TIME}, {"type": "function", "function": {"name": "now"}}]
BODY = "<function=time>\n<parameter=city>\nBern\n</parameter>\n</function>"
CALL = f"<tool_call>\n{BODY}\n</tool_call>"
BERN = ToolCall("time", {"city": "Bern"})
OPEN = "<tool_call>\n<function=time>\n<parameter=city>\n"
NOW = "<tool_call>\n<function=now>\n</function>\n</tool_call>"


def joined(parts: list[Part]) -> list[Part]:
    """The parts with neighbours of one kind of text joined, as whoever shows them does."""
    result: list[Part] = []
    for kind, group in groupby(parts, type):
        if kind in (Thinking, Content):
            result.append(kind("".join(part.text for part in group)))
        else:
            result.extend(group)
    return result


def split(*pieces: str, thinking: bool = False, tools: Any = TOOLS) -> list[Part]:
    splitter = ReplySplitter(thinking=thinking, tools=tools)
    parts = [part for piece in pieces for part in splitter.feed(piece)]
    return joined(parts + splitter.finish())


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[i:j] for i, j in pairwise(edges)]


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": LLAMA_CPP["tools"][name]}}


@pytest.mark.parametrize("size", [1, 7, 10**6])
@pytest.mark.parametrize("case", LLAMA_CPP["cases"], ids=lambda case: case["id"])
def test_the_cases_of_llama_cpp(case: dict[str, Any], size: int) -> None:
    text = case.get("prefill", "") + case["text"]
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    parts = split(*pieces, thinking=case["thinking"], tools=[tool(name) for name in case["tools"]])
    expected = case.get("ours", case["theirs"])
    assert [[part.name, part.arguments] for part in parts if isinstance(part, ToolCall)] == expected["calls"]
    assert "".join(part.text for part in parts if isinstance(part, Content)) == expected["content"]
    assert "".join(part.text for part in parts if isinstance(part, Thinking)) == expected["reasoning"]
    assert not any(isinstance(part, UnfinishedCall) for part in parts)


@pytest.mark.parametrize("case", [case for case in LLAMA_CPP["cases"] if "ours" in case], ids=lambda case: case["id"])
def test_a_case_decided_otherwise_gives_its_reason(case: dict[str, Any]) -> None:
    assert case["ours"] != case["theirs"]
    assert case["reason"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        (" \n", []),
        ("Hello.", [Content("Hello.")]),
        ("\n\n Hello,\n\nyou. \n", [Content("Hello,\n\nyou.")]),
        ("a < b, <b>, </p>, <", [Content("a < b, <b>, </p>, <")]),
        (f"So: {CALL}", [Content("So:"), BERN]),
        (f"{CALL}\n{CALL}", [BERN, BERN]),
        (f"{CALL}{CALL}", [BERN, BERN]),
        (f"One.\n\n{CALL}\nTwo.\n{NOW}\n\nThree.\n", None),
        (f"{CALL}\nDone.", [BERN, Content("Done.")]),
        (NOW, [ToolCall("now", {})]),
        ("<tool_call><function=now></function></tool_call>", [ToolCall("now", {})]),
        (f"<tool_call>\n{BODY}\n{BODY}\n</tool_call>", [BERN, BERN]),
        (f"<tool_call>\n{BODY}", [BERN]),
        (f"<tool_call>\n{BODY}\nDone.", [BERN, Content("Done.")]),
        ("<tool_call>\n<function=new>\n</function>\n</tool_call>", [ToolCall("new", {})]),
    ],
)
def test_content_and_calls(text: str, parts: list[Part] | None) -> None:
    if parts is None:
        parts = [Content("One."), BERN, Content("\n\n\nTwo."), ToolCall("now", {}), Content("\n\n\nThree.")]
    assert split(text) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (BODY, [BERN]),
        (f"{BODY}\n</tool_call>\n{CALL}", [BERN, BERN]),
        (f"So:\n{BODY}{BODY}", [Content("So:"), BERN, BERN]),
        (f"<think>I think.</think>{BODY}", [Thinking("I think."), BERN]),
        (f"Here:\n  {BODY}\nDone.", [Content("Here:"), BERN, Content("\n  \nDone.")]),
        (f"Here: {BODY}", [Content(f"Here: {BODY}")]),
        ("<function=other>\n</function>", [Content("<function=other>\n</function>")]),
    ],
    ids=["alone", "half_wrapped", "after_a_call", "after_thought", "own_line", "within_a_line", "unknown_tool"],
)
def test_a_call_without_its_wrapper(text: str, parts: list[Part]) -> None:
    assert split(text) == parts


def test_without_tools_any_name_is_taken() -> None:
    assert split(f"Here:\n{BODY}", tools=None) == [Content("Here:"), BERN]


@pytest.mark.parametrize(
    "text",
    [
        "Write <tool_call> first.",
        "<tool_call>\nnothing\n</tool_call>",
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
        "<tool_call>\n<function=time> is how a call begins.",
        "<tool_call>\n<function={{ name }}>\n</function>\n</tool_call>",
        '<tool_call>\n<function="time">\n</function>\n</tool_call>',
        f"<tool_call>\n<function={'n' * 129}>\n</function>\n</tool_call>",
        "</tool_call>",
        "</function> and </parameter>",
        "It ends with </think>.",
        "Not <think> at the start.",
    ],
)
def test_what_only_looks_like_a_call_is_content(text: str) -> None:
    assert split(text) == [Content(text)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("I think.\n</think>\n\nI say.", [Thinking("I think."), Content("I say.")]),
        ("I think.</think>I say.", [Thinking("I think."), Content("I say.")]),
        ("\n I\n\nthink \n</think>\nI say.", [Thinking("I\n\nthink"), Content("I say.")]),
        ("</think>\n\nI say.", [Content("I say.")]),
        ("\n\n</think>\n\n", []),
        ("I think and", [Thinking("I think and")]),
        ("<think>\nI think.\n</think>\n\nI say.", [Thinking("I think."), Content("I say.")]),
        ("I think <think>.</think>I say </think>.", [Thinking("I think <think>."), Content("I say </think>.")]),
        (f"I think.\n</think>\n\n{CALL}", [Thinking("I think."), BERN]),
    ],
)
def test_thought(text: str, parts: list[Part]) -> None:
    assert split(text, thinking=True) == parts


@pytest.mark.parametrize("text", ["<think>\nI think.\n</think>\n\nI say.", "\n<think>I think.</think>I say."])
def test_a_reply_may_open_its_thought_itself(text: str) -> None:
    assert split(*text) == [Thinking("I think."), Content("I say.")]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"I think.\n{CALL}", [Thinking("I think."), BERN]),
        (f"{CALL}\n{NOW}", [BERN, ToolCall("now", {})]),
        (f"{CALL}\n{NOW}\nI say.", [BERN, ToolCall("now", {}), Content("I say.")]),
        (f"I think.\n{CALL}\nI say.", [Thinking("I think."), BERN, Content("I say.")]),
        (f"{CALL}\nI say.\n<tool_call>", [BERN, Content("I say."), UnfinishedCall("<tool_call>")]),
        (f"I think.\n{CALL}\n</think>\n\n", [Thinking("I think."), BERN]),
        (f"I think: {CALL}\n</think>\n\nI say.", [Thinking(f"I think: {CALL}"), Content("I say.")]),
        (f"{CALL}\n{CALL}\n</think>\n{CALL}", [Thinking(f"{CALL}\n{CALL}"), BERN]),
        (f"{CALL} or {NOW} then", [BERN, Content("or"), ToolCall("now", {}), Content("  then")]),
        ("A <tool_call>\n<function=time>\n</think>\n\nI", [Thinking("A <tool_call>\n<function=time>"), Content("I")]),
        (f"{OPEN}</think>\n\nI", [Thinking(OPEN.strip()), Content("I")]),
        (f"{OPEN}</think>{CALL.removeprefix(OPEN)}", [Thinking(OPEN.strip()), Content(CALL.removeprefix(OPEN))]),
        (f"{CALL}\n{OPEN}{CALL}\n</think>", [Thinking(f"{CALL}\n{OPEN.strip()}"), BERN]),
        (f"{CALL.replace('</function>', '')}\n<tool_call>", [BERN, UnfinishedCall("<tool_call>")]),
        (f"I think\n{BODY}", [Thinking(f"I think\n{BODY}")]),
        (CALL.replace("time", "eg"), [Thinking(CALL.replace("time", "eg"))]),
    ],
    ids=[
        "ends_the_block",
        "several",
        "several_and_text",
        "text_follows",
        "text_and_another_begun_follow",
        "closed_and_over",
        "closed_and_text",
        "closed_and_the_real_call",
        "text_between",
        "closed_at_the_call",
        "closed_within_a_value",
        "closed_and_value_goes_on",
        "closed_within_another_call",
        "repaired_and_another_begun",
        "without_its_wrapper",
        "unknown_tool",
    ],
)
def test_a_call_in_an_open_block_of_thought(text: str, parts: list[Part]) -> None:
    assert split(text, thinking=True) == parts


UNFINISHED = CALL.removesuffix("\n</function>\n</tool_call>")


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("length", range(len("<tool_call>"), len(UNFINISHED)))
def test_a_call_that_breaks_off_is_told_as_such(length: int, thinking: bool) -> None:
    begun = Thinking("So:") if thinking else Content("So:")
    assert split("So: " + CALL[:length], thinking=thinking) == [begun, UnfinishedCall(CALL[:length])]


def test_calls_before_one_that_breaks_off_are_calls() -> None:
    assert split(f"{CALL}\n{UNFINISHED}", thinking=True) == [BERN, UnfinishedCall(UNFINISHED)]


@pytest.mark.parametrize(
    "text",
    [
        CALL.replace("\n</parameter>", ""),
        CALL.replace("\n</function>", ""),
        CALL.replace("</parameter>\n</function>\n", ""),
        CALL.replace("\n</parameter>", "") + "\n" + CALL,
    ],
    ids=["parameter", "function", "both", "another_call_follows"],
)
def test_a_call_without_one_of_its_ends_is_repaired(text: str) -> None:
    assert split(text) == [BERN] * text.count("<tool_call>")


def test_an_example_in_a_value_that_breaks_off_is_not_run() -> None:
    text = f"<tool_call>\n<function=time>\n<parameter=city>\nWrite\n{CALL}"
    assert split(text) == [UnfinishedCall(text)]


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nI begin", True),
        ("<|im_start|>user\n<think>\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_start|>user\n<think>\n", False),
        ("What is <think>\n", False),
        ("", False),
    ],
)
def test_whether_a_prompt_leaves_thinking_open(prompt: str, is_open: bool) -> None:
    assert leaves_thinking_open(prompt) is is_open


# Texts in which tags, halves of them and white space come together in every way.
SNIPPETS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<function=time>", "<function=x>", "</function>"]
SNIPPETS += ["<parameter=city>", "</parameter>", "\n", " ", "a", "<", ">", "</", CALL, NOW, BODY, UNFINISHED]
TEXTS = st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join)
PLACES = st.lists(st.integers(0, 400), max_size=12)


@given(text=TEXTS, places=PLACES, thinking=st.booleans(), tools=st.sampled_from([TOOLS, None]))
def test_any_split_gives_the_same_parts(text: str, places: list[int], thinking: bool, tools: Any) -> None:
    assert split(*cut(text, places), thinking=thinking, tools=tools) == split(text, thinking=thinking, tools=tools)


@given(text=TEXTS, thinking=st.booleans(), tools=st.sampled_from([TOOLS, None]))
def test_one_character_at_a_time_gives_the_same_parts(text: str, thinking: bool, tools: Any) -> None:
    assert split(*text, thinking=thinking, tools=tools) == split(text, thinking=thinking, tools=tools)


def words(text: str) -> str:
    """The text without tags and white space."""
    return re.sub(r"<[^<>]*>|\s", "", text)


# Without single parameters: one given twice loses its first value.
@given(text=st.lists(st.sampled_from(sorted(set(SNIPPETS) - {"<parameter=city>"})), max_size=12).map("".join))
@pytest.mark.parametrize("thinking", [True, False])
def test_no_word_is_lost(text: str, thinking: bool) -> None:
    parts = split(text, thinking=thinking)
    said = ["".join(part.arguments.values()) if isinstance(part, ToolCall) else part.text for part in parts]
    assert "".join(map(words, said)) == words(text)


@pytest.mark.parametrize(
    ("text", "thinking", "held"),
    [
        ("word", False, ""),
        ("word word ", False, ""),
        ("a <", False, "<"),
        ("a <tool", False, "<tool"),
        ("a <b", False, ""),
        ("a <function=time", False, ""),
        ("a\n<function=time", False, "\n<function=time"),
        ("a </think", False, ""),
        ("a </think", True, " </think"),
        ("a\n<function=time", True, ""),
    ],
)
def test_only_half_a_tag_and_white_space_are_held_back(text: str, thinking: bool, held: str) -> None:
    splitter = ReplySplitter(thinking=thinking, tools=TOOLS)
    shown = "".join(part.text for part in splitter.feed(text))
    assert text.removesuffix(held).rstrip() == shown


# A value of this kind in a call is told apart from the call's own tags.
EXAMPLES = ["<", "</parameter>x", "\n<parameter=a>\n1\n</parameter>\n</function>\n", CALL, " \n", "a", "</function>"]
VALUES = st.text() | st.lists(st.sampled_from(EXAMPLES), max_size=6).map("".join)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<")).map(str.strip)


@given(thought=WORDS, content=WORDS, cities=st.lists(VALUES, max_size=3), places=PLACES)
def test_a_rendered_turn_comes_back(thought: str, content: str, cities: list[str], places: list[int]) -> None:
    calls = [ToolCall("time", {"city": city}) for city in cities]
    message = {"role": "assistant", "content": content, "reasoning_content": thought}
    message["tool_calls"] = [to_openai(call, str(number)) for number, call in enumerate(calls)]
    turns = [{"role": "user", "content": "Hi"}, message]
    prompt = render(DEMO_TEMPLATE, turns[:1], tools=TOOLS, thinking=True)
    whole = render(DEMO_TEMPLATE, turns, tools=TOOLS, add_generation_prompt=False)
    reply = whole.removeprefix(prompt).removesuffix("<|im_end|>\n")
    said = [kind(text) for kind, text in ((Thinking, thought), (Content, content)) if text]
    assert split(*cut(reply, places), thinking=leaves_thinking_open(prompt)) == said + calls
