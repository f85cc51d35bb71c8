"""The text of a tool's argument to the value that the tool's JSON Schema makes of it.

In: text as the model wrote it, the schema of a tool's parameters. Out: a value that can be written as JSON, and whether
it is of a type that the schema admits. It reads types only: no bounds, no patterns, no required keys.
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

JSON_TYPES: Mapping[type, str] = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
_NAMED: Mapping[str, frozenset[str]] = {  # what a schema's "type" admits; Python's names stand in hand-written schemas
    **{name: frozenset({name}) for name in ("null", "boolean", "integer", "string", "array", "object")},
    **{"bool": frozenset({"boolean"}), "int": frozenset({"integer"}), "str": frozenset({"string"})},
    **{"list": frozenset({"array"}), "dict": frozenset({"object"})},
    **{"number": frozenset({"integer", "number"}), "float": frozenset({"integer", "number"})},
}
_ANY: frozenset[str] = frozenset(JSON_TYPES.values())


def value_of(text: str, key: str, schema: Mapping[str, Any]) -> tuple[Any, bool]:
    """The value of `text` as the argument `key` under the `schema` of a tool's parameters, and whether it fits.

    Of several types the first in this order that the text can be read as: null, boolean, number, array or object,
    string ("2" for string or integer is 2, as for llama.cpp). Scalars may have Python's spelling, which the template
    writes; where no string is allowed, so may arrays and objects, and null is None even if the schema does not allow
    it (both as for vLLM and SGLang). What fits no type is the text as it stands.

    A key that the schema does not declare is a string, as for vLLM, SGLang and mlx-lm. One that it declares without a
    type is an array or object if it is one in JSON, else a string, as for mlx-lm.
    """
    admitted = _types_of(key, schema)
    bare, is_text = text.strip(), "string" in admitted
    if admitted == _ANY:
        admitted = frozenset({"array", "object"})
    elif bare in ("null", "None") and ("null" in admitted or not is_text):
        return None, True
    elif "boolean" in admitted and bare.lower() in ("true", "false"):
        return bare.lower() == "true", True
    number = _number(bare)
    if number is not None and "number" in admitted:
        return number, True
    if number is not None and "integer" in admitted and number == int(number):
        return int(number), True
    container = _container(bare, python=not is_text)
    if container is not None and JSON_TYPES[type(container)] in admitted:
        return container, True
    return text, is_text


def _types_of(key: str, schema: Mapping[str, Any]) -> frozenset[str]:
    properties, others = schema.get("properties"), schema.get("additionalProperties")
    if isinstance(properties, Mapping) and key in properties:
        return _types(properties[key], schema)
    return _types(others, schema) if isinstance(others, Mapping) else frozenset({"string"})


def _types(schema: Any, root: Mapping[str, Any], seen: frozenset[str] = frozenset()) -> frozenset[str]:
    """The JSON types that a schema admits by every keyword that says something about them; all if none does."""
    if not isinstance(schema, Mapping):
        return _ANY
    admitted, reference, named = _ANY, schema.get("$ref"), schema.get("type")
    if isinstance(reference, str) and reference not in seen:
        seen = seen | {reference}
        admitted &= _types(_resolve(reference, root), root, seen)
    names = named if isinstance(named, list) else [named]
    admitted &= _union(_NAMED.get(name, _ANY) for name in names if isinstance(name, str))
    members = [*_list(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
    admitted &= _union(_NAMED[JSON_TYPES[type(member)]] for member in members if type(member) in JSON_TYPES)
    for keyword in ("anyOf", "oneOf"):
        admitted &= _union(_types(branch, root, seen) for branch in _list(schema.get(keyword)))
    for branch in _list(schema.get("allOf")):
        admitted &= _types(branch, root, seen)
    return admitted or _ANY


def _resolve(reference: str, root: Any) -> Any:
    """What a pointer like `#/$defs/City` points at (RFC 6901); None if nothing is there."""
    for part in reference.removeprefix("#").split("/")[1:]:
        root = root.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
    return root


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _union(types: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset[str]().union(*types) or _ANY


def _number(text: str) -> int | float | None:
    if re.fullmatch(r"[+-]?[0-9]{1,4000}", text):  # Python reads no integers beyond 4300 digits
        return int(text)
    if re.fullmatch(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", text):
        return float(text) if math.isfinite(float(text)) else None
    return None


def _container(text: str, *, python: bool) -> dict[str, Any] | list[Any] | None:
    """A JSON object or array, or with `python` one in Python's spelling, if it can be written as JSON again."""
    if not text.startswith(("{", "[")):
        return None
    for read in (json.loads, _literal) if python else (json.loads,):
        try:
            value = read(text)
            # Infinity, NaN and half a surrogate pair can be read, but not sent on.
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            return value
        except (ValueError, RecursionError):
            continue
    return None


def _literal(text: str) -> Any:
    """A Python literal, as JSON would give it back; ValueError if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash that escapes nothing
            return json.loads(json.dumps(ast.literal_eval(text)))
    except (SyntaxError, TypeError, MemoryError) as error:
        raise ValueError("not a literal") from error
