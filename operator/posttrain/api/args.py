"""The keys of TRL's argument classes, as tables: which there are, of which type, and which posttrain sets itself.

It owns how `args` are checked and coerced without importing TRL; it must not judge whether a value is a good one. The
tables are generated in the trainer's environment by scripts/generate_tables.py.
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

Schema = Mapping[str, JsonValue]
"""A type in the tables' small part of JSON schema: type, anyOf, enum, items, additionalProperties."""


@dataclass(frozen=True, kw_only=True)
class ArgKey:
    """One key of an argument class; `owned` says what to write instead of it, where posttrain sets it itself."""

    type: Schema
    default: JsonValue
    owned: str | None
    deprecated: bool
    replacement: str | None
    help: str


@dataclass(frozen=True, kw_only=True)
class ArgsTable:
    """All keys of one argument class, and what to write for keys that people expect there but that it lacks."""

    class_name: str
    library: Mapping[str, str]
    keys: Mapping[str, ArgKey]
    elsewhere: Mapping[str, str]


@dataclass(frozen=True)
class ArgProblem:
    """What is wrong with one key; the message follows the key's path, and says what to change."""

    key: str
    message: str


@functools.cache
def load_table(name: str) -> ArgsTable:
    """Return the committed table `name`: `sft_config` or `grpo_config`."""
    file = importlib.resources.files("posttrain.api") / "tables" / f"{name}.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    return ArgsTable(
        class_name=data["class"],
        library=data["library"],
        keys={key: ArgKey(**row) for key, row in data["keys"].items()},
        elsewhere=data["elsewhere"],
    )


def check_args(args: Mapping[str, JsonValue], table: ArgsTable, *, path: str) -> list[ArgProblem]:
    """Return every problem of `args`, in their order: an unknown key, an owned key, a value of a wrong type.

    `path` is where they stand in the resource: `spec.sft.args`.
    """
    problems = []
    for key, value in args.items():
        row = table.keys.get(key)
        if row is None:
            problems.append(ArgProblem(key, _explain_unknown(key, table, path=path)))
        elif row.owned is not None:
            problems.append(ArgProblem(key, f"is set by posttrain: {row.owned}"))
        elif not _accepts(row.type, value):
            problems.append(ArgProblem(key, _explain_type(row, value)))
    return problems


def check_deprecated(args: Mapping[str, JsonValue], table: ArgsTable) -> list[ArgProblem]:
    """Return a remark for each key that the class still takes, but with a warning."""
    remarks = []
    for key in args:
        row = table.keys.get(key)
        if row is not None and row.deprecated:
            instead = f": write {row.replacement}" if row.replacement else " and will go in a later release"
            remarks.append(ArgProblem(key, f"is deprecated in {table.class_name}{instead}"))
    return remarks


def coerce_args(args: Mapping[str, JsonValue], table: ArgsTable) -> dict[str, JsonValue]:
    """Return `args` with each integer a float where only a float is allowed, so that `1` and `1.0` are one run.

    `args` must be without problems (`check_args`).
    """
    coerced: dict[str, JsonValue] = {}
    for key, value in args.items():
        kinds = _kinds(table.keys[key].type)
        only_float = "number" in kinds and "integer" not in kinds
        coerced[key] = float(value) if only_float and type(value) is int else value
    return coerced


def describe_type(schema: Schema) -> str:
    """Return a type in plain words: `an integer or null`."""
    if any(isinstance(member, dict) for member in _list(schema.get("anyOf"))):
        return " or ".join(describe_type(member) for member in _members(schema))
    if "enum" in schema:
        values = [json.dumps(value) for value in _list(schema["enum"])]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    kind = schema["type"]
    if kind == "array" and isinstance(items := schema["items"], dict):
        return f"a list, each item {describe_type(items)}"
    if kind == "object" and isinstance(values_schema := schema.get("additionalProperties"), dict):
        return f"a mapping, each value {describe_type(values_schema)}"
    return _WORDS[str(kind)]


_READABLE_CHOICES = 8
_READABLE_LENGTH = 60
_WORDS = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "an integer",
    "null": "null",
    "number": "a number",
    "object": "a mapping",
    "string": "a string",
}


def _list(value: JsonValue) -> list[JsonValue]:
    return value if isinstance(value, list) else []


def _members(schema: Schema) -> list[dict[str, JsonValue]]:
    return [member for member in _list(schema.get("anyOf")) if isinstance(member, dict)]


def _kinds(schema: Schema) -> set[str]:
    """Return the names of the JSON types that `schema` takes at the top."""
    if "anyOf" in schema:
        return set().union(*(_kinds(member) for member in _members(schema)))
    return {str(schema["type"])} if "type" in schema else set()


def _choices(schema: Schema) -> list[JsonValue]:
    """Return the values of all choices in `schema`."""
    if "anyOf" in schema:
        return [value for member in _members(schema) for value in _choices(member)]
    return _list(schema.get("enum"))


def _accepts(schema: Schema, value: JsonValue) -> bool:
    if "anyOf" in schema:
        return any(_accepts(member, value) for member in _members(schema))
    if "enum" in schema:
        return any(type(choice) is type(value) and choice == value for choice in _list(schema["enum"]))
    match schema["type"]:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return type(value) is int
        case "number":
            return type(value) is int or (type(value) is float and math.isfinite(value))
        case "string":
            return isinstance(value, str)
        case "array":
            items = schema["items"]
            return isinstance(value, list) and isinstance(items, dict) and all(_accepts(items, item) for item in value)
        case "object":
            inner = schema.get("additionalProperties")
            if not isinstance(value, dict):
                return False
            return not isinstance(inner, dict) or all(_accepts(inner, item) for item in value.values())
    raise ValueError(f"unknown type in a table: {schema['type']!r}")


def _explain_unknown(key: str, table: ArgsTable, *, path: str) -> str:
    if key in table.elsewhere:
        return f"is no key of {table.class_name}: {table.elsewhere[key]}"
    near = difflib.get_close_matches(key.lower(), table.keys, n=1)
    if near:
        return f"is no key of {table.class_name}: did you mean {near[0]}?"
    return f"is no key of {table.class_name} (TRL {table.library['trl']}): see `posttrain explain {path}`"


def _explain_type(row: ArgKey, value: JsonValue) -> str:
    near = _nearest_choice(row.type, value)
    hint = f"did you mean {json.dumps(near)}?" if near else _hint(row.type, value)
    choices = _choices(row.type)
    expected = f"one of {len(choices)} names" if near and len(choices) > _READABLE_CHOICES else describe_type(row.type)
    text = f"must be {expected}, not {_describe_value(value)}"
    return f"{text}{f': {hint}' if hint else ''} (default: {json.dumps(row.default)})"


def _describe_value(value: JsonValue) -> str:
    match value:
        case str():
            return f"the string {json.dumps(value, ensure_ascii=False)}"
        case list() | dict():
            text = json.dumps(value, ensure_ascii=False)
            return text if len(text) <= _READABLE_LENGTH else f"{text[: _READABLE_LENGTH - 1]}…"
        case float() if not math.isfinite(value):
            return "a number that is not finite"
        case float():
            return f"the number {value!r}"
    return json.dumps(value)


def _hint(schema: Schema, value: JsonValue) -> str | None:
    """Return what to change, where the likely slip is known."""
    kinds = _kinds(schema)
    if value is None:
        return "leave the key out for the default"
    if isinstance(value, str) and (
        (_is_number(value) and kinds & {"integer", "number"}) or (_is_boolean(value) and "boolean" in kinds)
    ):
        return "write it without quotes"
    if value is False and "no" in _choices(schema):
        return 'write "no" in quotes, because YAML reads a bare no as false'
    if isinstance(value, bool | int | float) and "string" in kinds and not kinds & {"integer", "number"}:
        return "write it in quotes"
    return None


def _nearest_choice(schema: Schema, value: JsonValue) -> str | None:
    """Return the choice that a mistyped string is likely to mean: it begins with it, or has much the same letters."""
    if not isinstance(value, str) or not value:
        return None
    choices = [choice for choice in _choices(schema) if isinstance(choice, str)]
    longer = [choice for choice in choices if choice.startswith(value.lower())]
    near = longer[:1] or difflib.get_close_matches(value.lower(), choices, n=1)
    return near[0] if near else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_boolean(text: str) -> bool:
    return text.lower() in {"true", "false", "yes", "no", "on", "off"}
