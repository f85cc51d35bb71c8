"""Calls in the model's XML: where they end, how their values are typed, what goes back; and functions as tools."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Union  # noqa: UP035

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_mlx.chat.template import render
from qwen_mlx.chat.tools import ToolCall, parameters_of, read_call, schema_of, to_openai
from tests.chat.test_template import TEMPLATE

DEMO_TEMPLATE = (Path(__file__).parents[2] / "qwen_mlx/demo/chat_template.jinja").read_text(encoding="utf-8")
TEMPLATES = pytest.mark.parametrize("template", [DEMO_TEMPLATE, TEMPLATE], ids=["demo", "small"])


def xml(*values: tuple[str, str], name: str = "f") -> str:
    written = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values)
    return f"<tool_call>\n<function={name}>\n{written}</function>"


def read(text: str, schema: Any = None, *, repair: bool = False) -> ToolCall | None:
    found = read_call(text, {} if schema is None else {"f": schema}, repair=repair)
    return found and found[0]


def typed(text: str, schema: Any, **root: Any) -> tuple[Any, bool]:
    """What becomes of `text` as an argument of this schema, and whether it fits."""
    call = read(xml(("x", text)), {"properties": {"x": schema}, **root})
    assert call is not None
    return call.arguments["x"], "x" not in call.unparsed


STRINGS = ["string", "str", ["string"]]


@pytest.mark.parametrize("kind", STRINGS, ids=str)
@pytest.mark.parametrize("text", ["7", "true", "None", "null", '{"a": 1}', "[1]", '"quoted"', "", " a ", "a\nb", "\n"])
def test_a_string_stays_as_it_is(text: str, kind: Any) -> None:
    assert typed(text, {"type": kind}) == (text, True)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("7", "integer", 7),
        (" -7\n", "integer", -7),
        ("+7", "integer", 7),
        ("007", "integer", 7),
        ("3.0", "integer", 3),
        ("1e3", "integer", 1000),
        ("12345678901234567890", "integer", 12345678901234567890),
        ("7", "int", 7),
        ("2.5", "number", 2.5),
        ("2.0", "number", 2.0),
        (".5", "number", 0.5),
        ("5.", "number", 5.0),
        ("-1.5E-3", "number", -0.0015),
        ("7", "number", 7),
        ("7.5", "float", 7.5),
        ("true", "boolean", True),
        ("True", "boolean", True),
        ("false", "boolean", False),
        ("False", "bool", False),
        ("null", "null", None),
        ("None", "null", None),
        ("[1, 2.5, null, true]", "array", [1, 2.5, None, True]),
        (" [] ", "array", []),
        ("['a', None, True, (1,)]", "array", ["a", None, True, [1]]),
        ('{"a": {"b": ["ü<"]}}', "object", {"a": {"b": ["ü<"]}}),
        ("{'a': 1, 2: False}", "object", {"a": 1, "2": False}),
        ("{'a': '\\d'}", "dict", {"a": "\\d"}),
        ("[]", "list", []),
    ],
)
def test_a_value_of_the_schemas_type(text: str, kind: str, value: Any) -> None:
    found, fits = typed(text, {"type": kind})
    assert (found, type(found), fits) == (value, type(value), True)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("seven", "integer"),
        ("7.5", "integer"),
        ("1_000", "integer"),
        ("٣", "integer"),
        ("", "integer"),
        ("9" * 5000, "integer"),
        ("1e999", "number"),
        ("nan", "number"),
        ("Infinity", "number"),
        ("0x10", "number"),
        ("1", "boolean"),
        ("yes", "boolean"),
        ("nothing", "null"),
        ('{"a": 1}', "array"),
        ("a, b", "array"),
        ("[1, 2", "array"),
        ("[1e999]", "array"),
        ("[NaN]", "array"),
        ('["\\ud800"]', "array"),
        (f"[{'9' * 5000}]", "array"),
        ("[" * 100_000, "array"),
        ("[" + "-" * 100_000 + "1]", "array"),
        ("[f()]", "array"),
        ("{1, 2}", "object"),
        ("{b'a': 1}", "object"),
        ('"{}"', "object"),
    ],
    ids=lambda value: value[:12],
)
def test_what_does_not_fit_is_the_raw_text_and_flagged(text: str, kind: str) -> None:
    assert typed(text, {"type": kind}) == (text, False)


@pytest.mark.parametrize("kind", ["integer", "number", "boolean", "array", "object"])
@pytest.mark.parametrize("text", ["null", "None"])
def test_null_is_none_wherever_no_string_is_allowed(text: str, kind: str) -> None:
    assert typed(text, {"type": kind}) == (None, True)


CITY = {"$defs": {"City": {"type": "object"}, "a/b": {"type": "integer"}, "Loop": {"$ref": "#/$defs/Loop"}}}


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("null", {"type": ["string", "null"]}, None),
        ("None", {"type": ["null", "string"]}, None),
        ("none", {"type": ["string", "null"]}, "none"),
        ("2", {"type": ["string", "integer"]}, 2),
        ("2 dollars", {"type": ["string", "integer"]}, "2 dollars"),
        ("null", {"type": ["string", "integer"]}, "null"),
        ("{'a': 1}", {"type": ["string", "object"]}, "{'a': 1}"),
        ("2", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 2),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ('["a"]', {"oneOf": [{"type": "string"}, {"type": "array"}]}, ["a"]),
        ("[a", {"oneOf": [{"type": "string"}, {"type": "array"}]}, "[a"),
        ("7", {"oneOf": [{"type": "integer"}, {"type": "boolean"}]}, 7),
        ("7", {"allOf": [{"description": "one"}, {"type": "integer"}]}, 7),
        ("7", {"enum": ["7", "8"]}, "7"),
        ("7", {"enum": [7, 8]}, 7),
        ("true", {"enum": ["true", "auto"]}, "true"),
        ("auto", {"enum": [True, "auto"]}, "auto"),
        ("True", {"enum": [True, "auto"]}, True),
        ("7", {"const": 7}, 7),
        ("7", {"const": "7"}, "7"),
        ('{"a": 1}', {"$ref": "#/$defs/City"}, {"a": 1}),
        ("7", {"$ref": "#/$defs/a~1b"}, 7),
        ("7", {"anyOf": [{"$ref": "#/$defs/a~1b"}, {"$ref": "#/$defs/City"}]}, 7),
        ("7", {"type": "number", "enum": [7]}, 7),
    ],
)
def test_the_types_that_a_schema_admits(text: str, schema: Any, value: Any) -> None:
    found, fits = typed(text, schema, **CITY)
    assert (found, type(found), fits) == (value, type(value), True)


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        {"description": "Anything."},
        {"$ref": "#/$defs/None"},
        {"$ref": "#/$defs/Loop"},
        {"type": "any"},
        {"type": "string", "enum": [1]},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("text", "value"),
    [("7", "7"), ("true", "true"), ("null", "null"), ("[1]", [1]), ('{"a": 1}', {"a": 1}), ("[1", "[1")],
)
def test_without_a_type_only_json_objects_and_arrays_are_read(text: str, value: Any, schema: Any) -> None:
    assert typed(text, schema, **CITY) == (value, True)


@pytest.mark.parametrize("schema", [{}, {"properties": {"y": {"type": "integer"}}}, {"additionalProperties": False}])
@pytest.mark.parametrize("text", ["7", "null", "[1]"])
def test_what_the_schema_does_not_declare_is_a_string(text: str, schema: dict[str, Any]) -> None:
    assert read(xml(("x", text)), schema) == ToolCall("f", {"x": text})


def test_additional_properties_have_the_type_declared_for_them() -> None:
    schema = {"properties": {"x": {"type": "string"}}, "additionalProperties": {"type": "integer"}}
    assert read(xml(("x", "1"), ("y", "2")), schema) == ToolCall("f", {"x": "1", "y": 2})


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": []},
        {"properties": {"x": 5}},
        {"properties": {"x": {"type": 5, "enum": 5, "anyOf": 5, "allOf": [5], "$ref": 5}}},
        {"properties": {"x": {"type": [{}], "enum": [b""], "const": b"", "$ref": "elsewhere.json"}}},
    ],
    ids=str,
)
def test_a_schema_that_is_none_does_no_harm(schema: Any) -> None:
    assert read(xml(("x", "7")), schema) == ToolCall("f", {"x": "7"})


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (xml(), {}),
        ("<function=f></function>", {}),
        ("<tool_call><function=f><parameter=x>1</parameter></function>", {"x": "1"}),
        ("<tool_call>\n\n<function=f>\n\n<parameter=x>\n1\n</parameter>\n\n</function>", {"x": "1"}),
        (xml(("x", "1"), ("y", "2")), {"x": "1", "y": "2"}),
        (xml(("x", "1"), ("x", "2")), {"x": "2"}),
        (xml(("my key", "1")), {"my key": "1"}),
        (xml(("x", "\n\n1\n\n")), {"x": "\n\n1\n\n"}),
        (xml(("x", "a < b > c </b> <x>")), {"x": "a < b > c </b> <x>"}),
        (xml(("x", "</parameter> is a tag")), {"x": "</parameter> is a tag"}),
        (xml(("x", "</function>\n</tool_call>")), {"x": "</function>\n</tool_call>"}),
        (xml(("x", xml(("y", "1")))), {"x": xml(("y", "1"))}),
        (xml(("x", "say <parameter=y>")), {"x": "say <parameter=y>"}),
        (xml(("x", "格 🦜 é")), {"x": "格 🦜 é"}),
    ],
)
def test_the_values_of_a_call(text: str, arguments: dict[str, str]) -> None:
    assert read_call(text + "\nmore", {}) == (ToolCall("f", arguments), len(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "f",
        "<function=f",
        "<function=f>",
        "<function=>\n</function>",
        "<function=f g>\n</function>",
        f"<function={'f' * 129}>\n</function>",
        "<function=f>\nno parameter\n</function>",
        "<function=f>\n<parameter=x>\n1\n</parameter>",
        "<function=f>\n<parameter=x>\n1\n</function>",
        "<function=f>\n<parameter=x>\n1\n</tool_call>",
        "<function=f>\n</tool_call>",
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    ],
)
def test_what_is_no_complete_call(text: str) -> None:
    assert read(text) is None


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("<function=f>\n<parameter=x>\n1\n</function>", {"x": "1"}),
        ("<function=f>\n<parameter=x>\n1\n</tool_call>", {"x": "1"}),
        (
            "<function=f>\n<parameter=x>\n1\n<parameter=y>\n2\n</parameter>\n</function>\n</tool_call>\n",
            {"x": "1", "y": "2"},
        ),
        ("<function=f>\n<parameter=x>\n1\n<parameter=z>\n</parameter>\n</function>", {"x": "1\n<parameter=z>"}),
        ("<function=f>\n<parameter=x>\nsay <parameter=y>\n</function>", {"x": "say <parameter=y>"}),
        (
            xml(("x", "1")).replace("</function>", "<parameter=y>\n<parameter=x>\n</function>"),
            {"x": "1", "y": "<parameter=x>"},
        ),
        ("<function=f>\n</tool_call>\n<tool_call>\n<function=f>", {}),
    ],
    ids=["no_end_of_value", "nor_of_function", "next_value", "undeclared", "within_a_line", "seen", "another_call"],
)
def test_a_repaired_call(text: str, arguments: dict[str, str]) -> None:
    schema = {"properties": {"x": {"type": "string"}, "y": {"type": "string"}}}
    assert read(text, schema, repair=True) == ToolCall("f", arguments)


@pytest.mark.parametrize(
    "text",
    [
        "<function=f>\n<parameter=x>\n1\n</parameter>",
        "<function=f>\n<parameter=x>\nfirst </function> and so on",
        "<function=f>\n<parameter=x>\n1\n</function>\nDone.",
        f"<function=f>\n<parameter=x>\n{xml(('y', '1'))}\n</tool_call>",
    ],
    ids=["no_end_at_all", "a_tag_in_a_value", "text_follows", "an_example_in_a_value"],
)
def test_a_call_that_may_have_been_cut_off_is_not_repaired(text: str) -> None:
    assert read(text, {"properties": {"x": {"type": "string"}}}, repair=True) is None


@pytest.mark.parametrize("name", ["f" * 128, "Calendar.create_event", "a/b-c:d", "für"])
def test_a_name_may_have_many_characters(name: str) -> None:
    assert read(xml(name=name)) == ToolCall(name, {})


def test_a_call_in_openais_form() -> None:
    call = ToolCall("f", {"city": "Zürich", "days": [1, None], "exact": True})
    assert to_openai(call, "call_1") == {
        "id": "call_1",
        "type": "function",
        "function": {"name": "f", "arguments": '{"city": "Zürich", "days": [1, null], "exact": true}'},
    }


def test_parameters_by_name() -> None:
    schema = {"properties": {}}
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": schema}},
        {"type": "function", "function": {"name": "g", "parameters": None}},
        {"name": "h"},
        {"type": "web_search"},
    ]
    assert parameters_of(tools) == {"f": schema, "g": {}, "h": {}}


def rendered(template: str, call: ToolCall) -> str:
    """The text of the call as the template writes it."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Now:"}]
    turns[1]["tool_calls"] = [to_openai(call, "1")]
    return render(template, turns, add_generation_prompt=False).partition("Now:")[2].strip().removesuffix("<|im_end|>")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = SCALARS | st.text()
NESTED = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
TYPED: dict[str, st.SearchStrategy[Any]] = {
    "string": st.text(),
    "integer": st.integers(),
    "number": st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
    "boolean": st.booleans(),
    "null": st.none(),
    "array": st.lists(NESTED),
    "object": st.dictionaries(st.text(), NESTED),
}
ARGUMENTS = st.lists(
    st.sampled_from(sorted(TYPED)).flatmap(lambda kind: TYPED[kind].map(lambda value: (kind, value))), max_size=5
)


@TEMPLATES
@given(arguments=ARGUMENTS)
def test_rendering_what_was_read_gives_the_text_that_was_read(template: str, arguments: list[tuple[str, Any]]) -> None:
    kinds = {f"x{number}": kind for number, (kind, _) in enumerate(arguments)}
    call = ToolCall("f", {f"x{number}": value for number, (_, value) in enumerate(arguments)})
    text = rendered(template, call)
    found = read(text, {"properties": {key: {"type": kind} for key, kind in kinds.items()}})
    assert found is not None
    assert repr(found) == repr(call)  # True is not 1, nor 1 1.0
    assert rendered(template, found) == text


@given(text=st.text(), kind=st.sampled_from(sorted(TYPED)))
def test_any_text_becomes_json(text: str, kind: str) -> None:
    call = read(xml(("x", text)), {"properties": {"x": {"type": kind}}})
    assert call is not None
    sent = json.loads(to_openai(call, "1")["function"]["arguments"])
    assert sent == call.arguments


class Unit(enum.Enum):
    C = "celsius"
    F = "fahrenheit"


class Level(enum.IntEnum):
    LOW = 1


class Mixed(enum.Enum):
    ONE = 1
    NOBODY = None


class Pair(enum.Enum):
    ONE = (1, 2)


def annotated(hint: Any) -> Any:
    def tool(x):  # type: ignore[no-untyped-def]
        pass

    tool.__annotations__["x"] = hint
    return tool


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (str, {"type": "string"}),
        (bool, {"type": "boolean"}),
        (None, {"type": "null"}),
        (list, {"type": "array"}),
        (dict, {"type": "object"}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (List[str], {"type": "array", "items": {"type": "string"}}),  # noqa: UP006
        (List, {"type": "array"}),  # noqa: UP006
        (Dict, {"type": "object"}),  # noqa: UP006
        (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
        (
            list[dict[str, bool]],
            {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "boolean"}}},
        ),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (Literal[1, "a", None], {"type": ["integer", "string", "null"], "enum": [1, "a", None]}),
        (Unit, {"type": "string", "enum": ["celsius", "fahrenheit"]}),
        (Level, {"type": "integer", "enum": [1]}),
        (Mixed, {"type": ["integer", "null"], "enum": [1, None]}),
        (Optional[int], {"type": ["integer", "null"]}),  # noqa: UP045
        (int | str, {"type": ["integer", "string"]}),
        (Union[list[int], str], {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "string"}]}),  # noqa: UP007
        ("int | None", {"type": ["integer", "null"]}),
        ("Unit", {"type": "string", "enum": ["celsius", "fahrenheit"]}),
        (list["Unit"], {"type": "array", "items": {"type": "string", "enum": ["celsius", "fahrenheit"]}}),
    ],
    ids=str,
)
def test_the_schema_of_an_annotation(hint: Any, schema: dict[str, Any]) -> None:
    assert schema_of(annotated(hint))["function"]["parameters"] == {
        "type": "object",
        "properties": {"x": schema},
        "required": ["x"],
    }


@pytest.mark.parametrize(
    ("hint", "told"),
    [
        (bytes, "bytes"),
        (tuple[int, int], r"tuple\[int, int\]"),
        (set[int], r"set\[int\]"),
        (dict[int, str], r"dict\[int, str\]"),
        (list[bytes], r"list\[bytes\]"),
        (int | bytes, r"int \| bytes"),
        (Any, "Any"),
        (Pair, "Pair"),
        (Literal[b"a"], "Literal"),
        ("Nowhere", "'Nowhere'"),
        ("no type", "'no type'"),
        ("json.nothing", "'json.nothing'"),
    ],
    ids=str,
)
def test_an_annotation_without_a_schema_is_refused(hint: Any, told: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^tool: its parameter 'x' has the annotation .*{told}.*; a tool's may be int"
    ):
        schema_of(annotated(hint))


def test_a_parameter_without_annotation_is_refused() -> None:
    def tool(x):  # type: ignore[no-untyped-def]
        pass

    with pytest.raises(ValueError, match=r"^tool: its parameter 'x' has no annotation; a tool's may be"):
        schema_of(tool)


def some(*numbers: int) -> None: ...


def named(**numbers: int) -> None: ...


def by_place(number: int, /) -> None: ...


@pytest.mark.parametrize(
    ("function", "told"),
    [(some, r"'\*numbers: 'int''"), (named, r"'\*\*numbers: 'int''"), (by_place, "\"number: 'int'\"")],
    ids=["some", "named", "by_place"],
)
def test_a_parameter_that_has_no_name_is_refused(function: Any, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{function.__name__}: its parameter .*number.* cannot be given by name"):
        schema_of(function)


def forecast(city: str, unit: Unit = Unit.C, *, days: int | None = None, hours: list[int]) -> str:
    """The weather to come.

    From the nearest station, if there is one:
    else from the model.

    Args:
        city: Name of the city, and behind it its
            country: "Bern, Switzerland".
        unit (Unit, optional): For the temperature.
        hours (list[int]):
            Of the day.

            Local time.

    Returns:
        city: This is no parameter.

    Raises:
        ValueError: Nor is this.
    """
    return f"{city} {unit} {days} {hours}"


def test_a_function_as_a_tool() -> None:
    city = 'Name of the city, and behind it its country: "Bern, Switzerland".'
    assert schema_of(forecast) == {
        "type": "function",
        "function": {
            "name": "forecast",
            "description": "The weather to come.\n\nFrom the nearest station, if there is one:\nelse from the model.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": city},
                    "unit": {
                        "type": "string",
                        "enum": ["celsius", "fahrenheit"],
                        "description": "For the temperature.",
                    },
                    "days": {"type": ["integer", "null"]},
                    "hours": {"type": "array", "items": {"type": "integer"}, "description": "Of the day. Local time."},
                },
                "required": ["city", "hours"],
            },
        },
    }


class Station:
    def measure(self, depth: float) -> None: ...


def test_a_method_has_no_self_and_without_docstring_no_description() -> None:
    parameters = {"type": "object", "properties": {"depth": {"type": "number"}}, "required": ["depth"]}
    assert schema_of(Station().measure)["function"] == {"name": "measure", "parameters": parameters}


@TEMPLATES
def test_a_function_can_be_offered_and_its_call_read(template: str) -> None:
    tools = [schema_of(forecast)]
    prompt = render(template, [{"role": "user", "content": "Hi"}], tools=tools)
    assert json.dumps(tools[0], ensure_ascii=False) in prompt
    values = [("city", "7"), ("days", "None"), ("hours", "[1, 2]"), ("unit", "celsius")]
    found = read_call(xml(*values, name="forecast"), parameters_of(tools))
    assert found is not None
    assert found[0].arguments == {"city": "7", "days": None, "hours": [1, 2], "unit": "celsius"}
