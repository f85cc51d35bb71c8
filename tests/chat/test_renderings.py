"""The renderer against transformers: with a template that does what the released ones do, it gives their texts.

data/renderings.json is what transformers made of data/conversations.json with the released templates. They are no part
of this project: data/qwen3_5.jinja stands in for them, and `render` must make the same of it to the byte.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwen_mlx.chat.template import render
from qwen_mlx.errors import PromptError
from qwen_mlx.hub import resolve

DATA = Path(__file__).parent / "data"
GIVEN = json.loads((DATA / "conversations.json").read_text(encoding="utf-8"))
CASES, REFUSED = GIVEN["conversations"], GIVEN["refused"]
RENDERINGS = json.loads((DATA / "renderings.json").read_text(encoding="utf-8"))["renderings"]
OURS = (DATA / "qwen3_5.jinja").read_text(encoding="utf-8")
DEMO = (resolve("demo") / "chat_template.jinja").read_text(encoding="utf-8")

BY_DEFAULT = {"large": "true", "small": "false"}
# The released sentences about tools are taken from one rendering; every other one with tools is held against them.
_, BEFORE_TOOLS, AFTER_TOOLS, _ = re.split(
    r"<\|im_start\|>system\n|<tools>\n.*\n</tools>|<\|im_end\|>", RENDERINGS["large"]["tools"], maxsplit=3
)


def template(size: str) -> str:
    text = OURS.replace("BY_DEFAULT", BY_DEFAULT[size])
    return text.replace("BEFORE_TOOLS", BEFORE_TOOLS).replace("AFTER_TOOLS", AFTER_TOOLS)


def rendered(text: str, case: dict[str, Any]) -> str:
    return render(
        text,
        case["messages"],
        tools=[GIVEN["tools"][name] for name in case["tools"]] if "tools" in case else None,
        thinking=case.get("thinking"),
        add_generation_prompt=case.get("add_generation_prompt", True),
    )


def texts_in_calls(case: dict[str, Any]) -> int:
    """How many tool calls of the case have JSON text for arguments."""
    calls = [call for message in case["messages"] for call in message.get("tool_calls") or []]
    return sum(isinstance(call.get("function", call).get("arguments"), str) for call in calls)


def has_media(case: dict[str, Any]) -> bool:
    return bool({"image", "image_url", "video"} & set(re.findall(r"\w+", json.dumps(case["messages"]))))


@pytest.mark.parametrize("size", BY_DEFAULT)
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers_with_the_released_template(name: str, size: str) -> None:
    assert rendered(template(size), CASES[name]) == RENDERINGS[size][name]


@pytest.mark.parametrize("size", BY_DEFAULT)
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_the_released_template_refuses(name: str, size: str) -> None:
    assert RENDERINGS[size][name] is None
    with pytest.raises(PromptError):
        rendered(template(size), REFUSED[name])


@pytest.mark.parametrize("size", BY_DEFAULT)
def test_every_conversation_was_rendered(size: str) -> None:
    assert list(RENDERINGS[size]) == [*CASES, *REFUSED]
    assert len(CASES) >= 90
    assert len(REFUSED) >= 25
    assert sum("tools" in case for case in CASES.values()) >= 9
    assert sum(texts_in_calls(case) for case in CASES.values()) >= 8
    assert sum(has_media(case) for case in CASES.values()) >= 5


def test_the_sizes_differ_where_thinking_is_left_to_them() -> None:
    differ = {name for name in CASES if RENDERINGS["large"][name] != RENDERINGS["small"][name]}
    left = {name for name, case in CASES.items() if "thinking" not in case and case.get("add_generation_prompt", True)}
    assert differ == left


@pytest.mark.parametrize("name", CASES)
def test_the_callers_conversation_stays_as_it_is(name: str) -> None:
    case = copy.deepcopy(CASES[name])
    rendered(template("large"), case)
    assert case == CASES[name]


# Where the demo's own template decides otherwise; its words about tools are its own too, and it takes text only.
DEMO_DIFFERS = {
    "system_empty": "an empty system message is no turn",
    "system_blank": "the same",
    "system_parts": "parts are not trimmed",
    "parts": "the same",
    "thoughts_in_parts": "the same",
    "parts_without_type": "a part needs its type",
    "result_first": "a result has its header, whatever comes before",
    "call_without_name": "a call may lack its name",
}
DEMO_SHARES = [name for name, case in CASES.items() if not (case.get("tools") or has_media(case))]


@pytest.mark.parametrize("name", [name for name in DEMO_SHARES if name not in DEMO_DIFFERS])
def test_the_demos_template_agrees(name: str) -> None:
    assert rendered(DEMO, CASES[name]) == RENDERINGS["small"][name]


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in DEMO_DIFFERS])
def test_the_demos_template_refuses_the_same(name: str) -> None:
    with pytest.raises(PromptError):
        rendered(DEMO, REFUSED[name])
