"""Messages to prompt text, by the checkpoint's own Jinja template.

In: the template, messages in OpenAI's form, tools. Out: one text, special tokens written in it. It does not know
tokens, nor the reply that will come.
"""

from __future__ import annotations

import functools
import json
import reprlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_mlx.errors import PromptError

_NO_SPECIAL_TOKENS: Mapping[str, str] = {}
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
CUT = "\x00cut\x00"
"""Put into a message where the rendered prompt is to be cut in two."""


def render(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool | None = None,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] = _NO_SPECIAL_TOKENS,
) -> str:
    """The prompt for `messages`, with the filters and functions that `transformers` gives to a chat template.

    `thinking` None leaves the choice to the template: Qwen3.5's sizes differ in their default. Tool calls may carry
    their arguments as JSON text, as OpenAI's do; the template sees objects. Thoughts may be named `thinking` or
    `reasoning`, as other programs name them; the template sees `reasoning_content`. The template comes from a download
    and runs in Jinja's sandbox. Raises PromptError if there is no template, if it is broken, if it refuses the
    messages, or if one of them lacks its role or content (an assistant may have none); ValueError if `thinking` is no
    bool.
    """
    if thinking is not None and not isinstance(thinking, bool):
        raise ValueError(f"thinking must be True, False or None, not {thinking!r}.")
    if template is None:
        raise PromptError("The model has no chat template: give the prompt as text, or add a chat_template.jinja.")
    variables: dict[str, Any] = {
        **special_tokens,
        "messages": [_parse_message(message) for message in messages],
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
    }
    if thinking is not None:
        variables["enable_thinking"] = thinking
    try:
        return _compile(template).render(variables)
    except jinja2.TemplateSyntaxError as error:
        raise PromptError(f"The chat template is broken at line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages)) or "none"
        raise PromptError(f"The chat template refuses these messages (roles: {roles}): {error}") from error


@functools.lru_cache(maxsize=4)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML and sorts the keys, which would change every tool description.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _parse_message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message as templates read it: thoughts by one name, arguments as objects. The caller's stays as it is."""
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    # A template takes what is missing for an empty text. An assistant that only calls tools may say nothing.
    if not isinstance(role, str) or (content is None and role != "assistant"):
        raise PromptError(f"A message is an object with a role and a content, not {reprlib.repr(message)}.")
    if not isinstance(content, (str, list, tuple, type(None))):
        raise PromptError(f"The content of a message is text or a list of parts, not {reprlib.repr(content)}.")
    # The first name that is given wins, as in transformers.
    thoughts = [message[name] for name in _THOUGHTS if message.get(name) is not None]
    if thoughts:
        message = {**message, "reasoning_content": thoughts[0]}
    calls = message.get("tool_calls")
    if calls is None:
        return message
    if not isinstance(calls, Sequence):
        raise PromptError(f"The tool_calls of a message are a list, not {calls!r}.")
    return {**message, "tool_calls": [_parse_call(call) for call in calls]}


def _parse_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(call, Mapping):
        raise PromptError(f"A tool call is an object with a function, not {call!r}.")
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _parse_call(call["function"])}
    text = call.get("arguments")
    if not isinstance(text, str):
        return call
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptError(
            f"The arguments of tool call {call.get('name')!r} are not JSON ({error}): {text!r}"
        ) from error
    if not isinstance(arguments, dict):
        raise PromptError(f"The arguments of tool call {call.get('name')!r} must be a JSON object, not {text!r}.")
    return {**call, "arguments": arguments}
