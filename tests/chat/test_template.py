"""The renderer: what it hands to a template, what it refuses, and that a template cannot reach outside."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mlx.chat.template import CUT, render
from qwen_mlx.errors import PromptError
from qwen_mlx.hub import resolve

# A small template with the turns of Qwen3.5: no default system prompt, trimmed contents, thinking unless told not to,
# tool calls in XML with Python's spelling of scalars and JSON for the rest, tool results in a user turn.
TEMPLATE = r"""
{%- macro text(content) %}
    {%- if content is string %}{{- content | trim }}{%- elif content is not none %}
        {{- raise_exception('Unexpected content type.') }}
    {%- endif %}
{%- endmacro %}
{%- if not messages %}
    {{- raise_exception('No messages provided.') }}
{%- endif %}
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' ~ (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' ~ text(message.content) ~ '\n</tool_response><|im_end|>\n' }}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ text(message.content) }}
    {%- for call in message.tool_calls or [] %}
        {%- if call.function is defined %}
            {%- set call = call.function %}
        {%- endif %}
        {{- '<tool_call>\n<function=' ~ call.name ~ '>\n' }}
        {%- for name, value in call.arguments | items %}
            {%- set plain = value is string or value is not sequence and value is not mapping %}
            {%- set value = value if plain else value | tojson %}
            {{- '<parameter=' ~ name ~ '>\n' ~ value ~ '\n</parameter>\n' }}
        {%- endfor %}
        {{- '</function>\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- else %}
        {{- '<think>\n' }}
    {%- endif %}
{%- endif %}
"""
HELLO = [{"role": "user", "content": "  Hello \n"}]
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Wetter <für> & 天气", "a": 1}}
CALL_TURN = (
    "<|im_start|>assistant\n<tool_call>\n<function=weather>\n<parameter=city>\nZürich\n</parameter>\n"
    "<parameter=days>\n[1, 2]\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n"
    "</function>\n</tool_call><|im_end|>\n"
)
ARGUMENTS = '{"city": "Zürich", "days": [1, 2], "exact": true}'


def call_message(arguments: object) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def test_turns_and_generation_prompt() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert render(TEMPLATE, messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_no_generation_prompt() -> None:
    assert render(TEMPLATE, HELLO, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"


@pytest.mark.parametrize(("thinking", "end"), [(True, "<think>\n"), (False, "<think>\n\n</think>\n\n")])
def test_thinking_reaches_the_template(thinking: bool, end: str) -> None:
    assert render(TEMPLATE, HELLO, thinking=thinking).endswith("<|im_start|>assistant\n" + end)


@pytest.mark.parametrize(
    ("thinking", "seen"), [(None, "default"), (True, "on"), (False, "off")], ids=["none", "true", "false"]
)
def test_thinking_none_leaves_the_choice_to_the_template(thinking: bool | None, seen: str) -> None:
    template = (
        "{% if enable_thinking is not defined %}default{% elif enable_thinking is true %}on{% else %}off{% endif %}"
    )
    assert render(template, HELLO, thinking=thinking) == seen


def test_tools_are_one_json_per_line_as_they_are_written() -> None:
    # Neither sorted nor escaped: the model saw plain json.dumps in training.
    line = '{"type": "function", "function": {"name": "weather", "description": "Wetter <für> & 天气", "a": 1}}'
    assert f"# Tools\n<tools>\n{line}\n</tools>" in render(TEMPLATE, HELLO, tools=[WEATHER])


def test_without_tools_the_template_sees_none() -> None:
    assert render("{{ tools is none }}", HELLO) == "True"


@pytest.mark.parametrize(
    "arguments", [ARGUMENTS, {"city": "Zürich", "days": [1, 2], "exact": True}], ids=["json_text", "object"]
)
def test_tool_call_arguments(arguments: object) -> None:
    assert CALL_TURN in render(TEMPLATE, [*HELLO, call_message(arguments)])


def test_tool_call_without_function_wrapper() -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": ARGUMENTS}]}
    assert CALL_TURN in render(TEMPLATE, [*HELLO, message])


def test_the_callers_messages_stay_as_they_are() -> None:
    message = call_message(ARGUMENTS)
    render(TEMPLATE, [*HELLO, message])
    assert message == call_message(ARGUMENTS)


def test_tool_result_is_a_user_turn() -> None:
    prompt = render(TEMPLATE, [*HELLO, call_message(ARGUMENTS), {"role": "tool", "content": "sunny"}])
    assert "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n" in prompt


@pytest.mark.parametrize("arguments", ["{city: Paris}", "", "[1]", "null", '"Paris"'])
def test_arguments_that_are_no_json_object_are_refused(arguments: str) -> None:
    with pytest.raises(PromptError, match=r"arguments of tool call 'weather'"):
        render(TEMPLATE, [*HELLO, call_message(arguments)])


@pytest.mark.parametrize("calls", [7, "weather", ["weather"]], ids=["number", "text", "list_of_text"])
def test_tool_calls_of_a_wrong_kind_are_refused(calls: object) -> None:
    with pytest.raises(PromptError, match="tool"):
        render(TEMPLATE, [{"role": "assistant", "content": "", "tool_calls": calls}])


def test_message_that_is_no_object_is_refused() -> None:
    with pytest.raises(PromptError, match="Hello"):
        render(TEMPLATE, ["Hello"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"content": "Hello"},
        {"role": None, "content": "Hello"},
        {"role": 5, "content": "Hello"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "tool", "content": None},
    ],
    ids=str,
)
def test_a_message_without_role_or_content_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=r"A message is an object with a role and a content, not \{"):
        render("{{ messages }}", [*HELLO, message])


@pytest.mark.parametrize("message", [{"role": "assistant"}, {"role": "assistant", "content": None}], ids=str)
def test_an_assistant_may_have_said_nothing(message: dict[str, Any]) -> None:
    assert render("{{ messages | length }}", [*HELLO, message]) == "2"


@pytest.mark.parametrize("content", [5, b"Hello", {"type": "text", "text": "Hello"}], ids=repr)
def test_a_content_that_is_neither_text_nor_parts_is_refused(content: object) -> None:
    with pytest.raises(PromptError, match=r"The content of a message is text or a list of parts, not .*(5|Hello)"):
        render("{{ messages }}", [{"role": "user", "content": content}])


@pytest.mark.parametrize("thinking", ["on", "", 1, 0])
def test_thinking_is_a_bool_or_none(thinking: Any) -> None:
    with pytest.raises(ValueError, match=f"thinking must be True, False or None, not {thinking!r}"):
        render(TEMPLATE, HELLO, thinking=thinking)


def test_missing_template() -> None:
    with pytest.raises(PromptError, match="no chat template"):
        render(None, HELLO)


def test_refusal_of_the_template_is_passed_on() -> None:
    with pytest.raises(PromptError, match=re.escape("refuses these messages (roles: none): No messages provided.")):
        render(TEMPLATE, [])


def test_a_refusal_tells_the_roles() -> None:
    # Of a role that they do not know, templates say no more than that.
    messages = [*HELLO, {"role": "narrator", "content": "Night fell."}, *HELLO]
    with pytest.raises(PromptError, match=re.escape("(roles: user, narrator): Unexpected message role.")):
        render("{{ raise_exception('Unexpected message role.') }}", messages)


@pytest.mark.parametrize("template", ["\n{% if %}", "\n{{ 1 | nofilter }}", "\n{% nosuchtag %}"])
def test_broken_template_is_named_with_its_line(template: str) -> None:
    with pytest.raises(PromptError, match="broken at line 2"):
        render(template, HELLO)


ENDLESS = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{{ [1] | tojson(indent=7 / 0) }}",
        ENDLESS,
    ],
)
def test_template_that_fails_while_it_runs_is_a_prompt_error(template: str) -> None:
    with pytest.raises(PromptError, match="refuses these messages"):
        render(template, HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{% include 'README.md' %}",
    ],
)
def test_template_cannot_reach_outside(template: str) -> None:
    with pytest.raises(PromptError):
        render(template, HELLO)


def test_special_tokens_are_variables() -> None:
    tokens = {"eos_token": "<|im_end|>"}
    assert render("{{ eos_token }}{{ bos_token }}", HELLO, special_tokens=tokens) == "<|im_end|>"


def test_block_lines_leave_no_white_space() -> None:
    template = "a\n    {% if true %}\nb\n    {% endif %}\nc"
    assert render(template, HELLO) == "a\nb\nc"


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("tojson", '{"b": "ü<", "a": [1, 2]}'),
        ("tojson(indent=2)", '{\n  "b": "ü<",\n  "a": [\n    1,\n    2\n  ]\n}'),
        ("tojson(separators=(',', ':'))", '{"b":"ü<","a":[1,2]}'),
        ("tojson(sort_keys=true)", '{"a": [1, 2], "b": "ü<"}'),
        ("tojson(ensure_ascii=true)", '{"b": "\\u00fc<", "a": [1, 2]}'),
    ],
)
def test_tojson_is_plain_json(call: str, expected: str) -> None:
    message = {"role": "user", "content": [{"b": "ü<", "a": [1, 2]}]}
    assert render("{{ messages[0].content[0] | " + call + " }}", [message]) == expected


def test_loop_controls() -> None:
    template = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    )
    assert render(template, HELLO) == "023"


def test_strftime_now_is_todays_date() -> None:
    before, said, after = datetime.now(), render("{{ strftime_now('%Y-%m-%d') }}", HELLO), datetime.now()
    assert f"{before:%Y-%m-%d}" <= said <= f"{after:%Y-%m-%d}"


DEMO = (resolve("demo") / "chat_template.jinja").read_text(encoding="utf-8")
# What is not empty for a template that trims; a whole tool result is no question, and half of one is.
SAID = st.text(max_size=40).filter(lambda text: text.strip() and "tool_response" not in text)


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("template", [TEMPLATE, DEMO], ids=["small", "demo"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(beginning=SAID, rest=SAID, system=st.none() | SAID)
def test_cut_in_two_it_is_the_whole(
    template: str, thinking: bool | None, beginning: str, rest: str, system: str | None
) -> None:
    before = [] if system is None else [{"role": "system", "content": system}]

    def rendered(said: str) -> str:
        return render(template, [*before, {"role": "user", "content": said}], thinking=thinking)

    head, _, _ = rendered(beginning + CUT).rpartition(CUT)
    _, _, tail = rendered(CUT + rest).partition(CUT)
    assert head + tail == rendered(beginning + rest)


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["no_tools", "tools"])
def test_equals_transformers(thinking: bool | None, tools: list[dict[str, Any]] | None) -> None:
    peer = pytest.importorskip("transformers.utils.chat_template_utils", reason="compares with transformers' renderer")
    messages = [*HELLO, call_message({"city": "Zürich", "days": {"a": [1]}}), {"role": "tool", "content": "sunny"}]
    options = {} if thinking is None else {"enable_thinking": thinking}
    (expected,), _ = peer.render_jinja_template(
        [messages], tools=tools, chat_template=TEMPLATE, add_generation_prompt=True, **options
    )
    assert render(TEMPLATE, messages, tools=tools, thinking=thinking) == expected
