"""A tool call from the model's XML to OpenAI's form, and a Python function to a tool's schema.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

In: text that begins with a call, and tools in OpenAI's form. Out: the call, and where it ends. It knows neither where
in a reply a call may stand nor how to run one.
"""

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_mlx.chat.values import JSON_TYPES, value_of

Tools = Sequence[Mapping[str, Any]]

NAME = r"""[^\s<>{}"']"""
"""One of the characters, at most 128, of a function's name; braces and quotes would be a template, not a name."""
_OPENING = re.compile(rf"(?:<tool_call>\s*)?<function=({NAME}{{1,128}})>")
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>")
_TAG_IN_VALUE = re.compile(r"^[ \t]*<parameter=[^<>\n]+>|</parameter>", re.MULTILINE)
_AFTER_VALUE = re.compile(r"\s*(?:<parameter=[^<>\n]+>|</function>)")
_AFTER_CALL = re.compile(r"\s*(?:</tool_call>)?\s*(?:<tool_call>|<function=|\Z)")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class ToolCall:
    """A complete call. `unparsed` names the arguments whose text is not of the schema's type: they are raw strings."""

    name: str
    arguments: dict[str, Any]
    unparsed: tuple[str, ...] = ()


def to_openai(call: ToolCall, call_id: str) -> dict[str, Any]:
    """The call as OpenAI's API gives it, arguments as JSON text; `render` takes it back in a message's tool_calls."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def parameters_of(tools: Tools) -> dict[str, Mapping[str, Any]]:
    """The schema of each tool's parameters by the tool's name; what is no function has no name and is left out."""
    functions = [tool.get("function") or tool for tool in tools]
    return {function["name"]: function.get("parameters") or {} for function in functions if "name" in function}


def unreadable(name: str, parameters: Mapping[str, Any]) -> str | None:
    """Of a tool's name and the names of its parameters the first that a call could not be read back with."""
    if not re.fullmatch(rf"{NAME}{{1,128}}", name):
        return name
    return next(
        (key for key in parameters.get("properties") or {} if not _PARAMETER.fullmatch(f"<parameter={key}>")), None
    )


def read_call(
    text: str, parameters: Mapping[str, Mapping[str, Any]], *, repair: bool = False
) -> tuple[ToolCall, int] | None:
    """The call that `text` begins with and the place behind its `</function>`; None if it is not complete there.

    A value ends at the `</parameter>` that the next `<parameter=` or `</function>` follows, not counting pairs of such
    tags that begin a line inside the value: a text about tool calls comes through whole. Its first and last newline
    are the form's. Of one key given twice the later value counts.

    `repair` is for a text that has ended: it reads a call that lacks a `</parameter>` or its `</function>`, if nothing
    but further calls comes after it. `parameters` are those of `parameters_of`; a tool that is not there has strings.
    """
    opening = _OPENING.match(text)
    if opening is None:
        return None
    schema = parameters.get(opening[1], {})
    keys = schema.get("properties") if repair else None
    found = _raw_values(text, opening.end(), keys=keys, repair=repair)
    if found is None:
        return None
    raw, end = found
    values = {key: value_of(value, key, schema) for key, value in raw.items()}
    unparsed = tuple(key for key, (_, fits) in values.items() if not fits)
    return ToolCall(opening[1], {key: value for key, (value, _) in values.items()}, unparsed), end


def _raw_values(text: str, start: int, *, keys: Any, repair: bool) -> tuple[dict[str, str], int] | None:
    """The text of each value by its key, and the place where the call that began before `start` ends."""
    at, values = start, dict[str, str]()
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("</function>", at):
            at += len("</function>")
            break
        if repair and text.startswith("</tool_call>", at):
            break
        parameter = _PARAMETER.match(text, at)
        if parameter is None:
            return None
        ends = _loose_ends(text, parameter.end(), keys, values) if repair else _ends(text, parameter.end())
        end = min(ends, default=None)
        if end is None:
            return None
        values[parameter[1]] = text[parameter.end() : end].removeprefix("\n").removesuffix("\n")
        at = end + len("</parameter>") if text.startswith("</parameter>", end) else end
    # A call cut off behind an example of calls in one of its values must not pass for a complete one.
    if repair and (_OPENING.search(text, start, at) or not _AFTER_CALL.match(text, at)):
        return None
    return values, at


def _ends(text: str, at: int) -> Iterator[int]:
    """The place of the tag that ends the value at `at`, if it is there."""
    depth = 0
    for tag in _TAG_IN_VALUE.finditer(text, at):
        if tag[0] != "</parameter>":
            depth += 1
        elif depth:
            depth -= 1
        elif _AFTER_VALUE.match(text, tag.end()):
            yield tag.start()
            return


def _loose_ends(text: str, at: int, keys: Any, seen: Mapping[str, str]) -> Iterator[int]:
    """Places that may end the value at `at`: any end tag, or a parameter still missing that begins a line."""
    yield from (end for tag in ("</parameter>", "</function>", "</tool_call>") if (end := text.find(tag, at)) >= 0)
    for parameter in _PARAMETER.finditer(text, at):
        begins_a_line = text[parameter.start() - 1] == "\n"
        if begins_a_line and parameter[1] not in seen and (not isinstance(keys, Mapping) or parameter[1] in keys):
            yield parameter.start()


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The tool that a typed function is, in OpenAI's form, for `render` and for reading its calls.

    Annotations may be int, float, str, bool, None, list, list[T], dict, dict[str, T], Literal, an Enum of such values,
    and unions. A parameter with a default is not required. The docstring up to its first section ("Args:", "Returns:")
    describes the tool, the entries under "Args:" its parameters. ValueError for any other annotation, none at all, or
    a parameter that cannot be given by name.
    """
    description, described = _docstring(inspect.getdoc(function) or "")
    properties, required = dict[str, Any](), []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"{function.__name__}: its parameter {str(parameter)!r} cannot be given by name")
        try:
            properties[name] = _schema_of_type(_resolved(parameter.annotation, function))
        except (TypeError, NameError, AttributeError, SyntaxError) as error:
            missing = parameter.annotation is parameter.empty
            told = "no annotation" if missing else f"the annotation {parameter.annotation!r}"
            raise ValueError(
                f"{function.__name__}: its parameter {name!r} has {told}; a tool's may be int, float, str, bool, None, "
                "list[T], dict[str, T], Literal, an Enum, or a union of them"
            ) from error
        if name in described:
            properties[name]["description"] = described[name]
        if parameter.default is parameter.empty:
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    named = {"name": function.__name__, **({"description": description} if description else {})}
    return {"type": "function", "function": {**named, "parameters": parameters}}


def _resolved(annotation: Any, function: Callable[..., Any]) -> Any:
    """The annotation with the names in it looked up where the function was defined, as under PEP 563."""
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    return typing.get_type_hints(holder, globalns=getattr(inspect.unwrap(function), "__globals__", {}))["it"]


def _schema_of_type(hint: Any) -> dict[str, Any]:
    """The schema of a type; TypeError if it has none here."""
    if hint in JSON_TYPES:
        return {"type": JSON_TYPES[hint]}
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, dict) and not inner:  # typing.List as it stands
        return _schema_of_type(origin)
    if origin is list:
        return {"type": "array", "items": _schema_of_type(inner[0])}
    if origin is dict and inner[0] is str:
        return {"type": "object", "additionalProperties": _schema_of_type(inner[1])}
    if origin is typing.Literal:
        return _choice(inner)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choice([member.value for member in hint])
    if origin in (typing.Union, types.UnionType):
        branches = [_schema_of_type(branch) for branch in inner]
        plain = all(branch.keys() == {"type"} for branch in branches)
        return {"type": [branch["type"] for branch in branches]} if plain else {"anyOf": branches}
    raise TypeError(hint)


def _choice(values: Sequence[Any]) -> dict[str, Any]:
    names = [JSON_TYPES.get(type(value)) for value in values]
    if not set(names) <= {"null", "boolean", "integer", "number", "string"}:
        raise TypeError(values)
    kinds = list(dict.fromkeys(names))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(values)}


_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns?|Yields?|Raises|Examples?|Notes?|See Also|Todo):\s*")
_ENTRY = re.compile(r"(\w+)\s*(?:\(.*?\))?:\s*(.*)")


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """What a Google-style docstring says before its first section, and of each parameter."""
    before, entries = [], dict[str, list[str]]()
    section, margin, name = "", 0, ""
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if header := _SECTION.fullmatch(line):
            section, margin, name = header[1], 0, ""
        elif not section:
            before.append(line)
        elif section in ("Args", "Arguments", "Parameters") and indent:
            margin = margin or indent
            if indent <= margin and (entry := _ENTRY.match(line.strip())):
                name = entry[1]
                entries[name] = [entry[2]]
            elif name:
                entries[name].append(line.strip())
    return "\n".join(before).strip(), {name: " ".join(lines).strip() for name, lines in entries.items()}
