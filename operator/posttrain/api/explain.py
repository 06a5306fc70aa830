"""What a field is, for `posttrain explain PATH`: read from the schema and from the table of training arguments.

It owns how a path finds its field; it must not print.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from posttrain.api.args import ArgsTable, describe_type
from posttrain.api.methods import METHODS, args_path, table_of
from posttrain.api.schema import FREE_FORM, Node, resource_schema
from posttrain.api.spelling import first_sentence, join_names, nearest, plain, write_value
from posttrain.api.training_run import (
    KIND,
    MUTABLE_FIELDS,
    MUTABLE_PARTS,
    MUTABLE_RESOURCES_FIELDS,
)
from posttrain.errors import UserError

_FEW = 4


class UnknownField(UserError):
    """There is no such field; the message names the nearest."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One field inside the explained one; `summary` is its first sentence."""

    name: str
    type: str
    required: bool
    summary: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a field is; `default` and `example` are written as they may stand in YAML."""

    path: str
    type: str
    description: str
    required: bool = False
    mutable: bool | None = None
    """Whether it may change while the run lives; None for what is not in the spec."""
    mutable_without_quota: bool = False
    """Whether it may change while the run holds no quota."""
    default: str | None = None
    example: str | None = None
    fields: tuple[Entry, ...] = ()

    def render(self) -> str:
        """Return the explanation as plain text."""
        notes = ["required"] if self.required else []
        notes += ["may change while the run lives"] if self.mutable else []
        notes += ["may change while the run holds no quota"] if self.mutable_without_quota else []
        lines = [f"{self.path}  ({'; '.join([self.type, *notes])})", "", f"  {self.description}"]
        if self.default is not None and "Default: " not in self.description:
            lines += ["", f"  Default: {self.default}"]
        if self.example is not None:
            lines += ["", f"  Example: {self.example}"]
        if self.fields:
            width = max(len(entry.name) for entry in self.fields)
            lines += ["", "  Fields:"]
            for entry in self.fields:
                needed = " Required." if entry.required else ""
                lines.append(f"    {entry.name:{width}}  ({entry.type}){needed} {entry.summary}".rstrip())
        return "\n".join(lines) + "\n"


def explain(path: str) -> Explanation:
    """Return what is at a dotted path such as `spec.datasets[].fraction`; `TrainingRun` and `` are the whole.

    Raises:
        UnknownField: there is nothing at the path.
    """
    steps = _steps(path)
    for method in METHODS:
        path_of_args = args_path(method)
        if tuple(steps[:3]) == path_of_args:
            table = table_of(method)
            if len(steps) == 3:
                return _explain_args(table, path=path_of_args)
            return _explain_arg(".".join(steps[3:]), table, path=".".join(path_of_args))
    node, required = resource_schema(), False
    for index, name in enumerate(steps):
        fields = _inside(node)
        if name not in fields:
            raise UnknownField(_not_found(name, steps[:index], fields))
        required = name in _object(node).get("required", ())
        node = fields[name]
    return Explanation(
        path=".".join(steps) or KIND,
        type=describe_field(node),
        description=node.get("description", ""),
        required=required,
        mutable=_is_mutable(steps),
        mutable_without_quota=steps[:2] == ["spec", "resources"] and steps[-1] in MUTABLE_RESOURCES_FIELDS,
        default=write_value(node["default"]) if "default" in node and not node.get("properties") else None,
        example=write_value(node["examples"][0]) if "examples" in node else None,
        fields=_entries(node),
    )


def describe_field(node: Node) -> str:
    """Return the type of a field in words, with its bounds: `integer, 1 to 1024`."""
    if "enum" in node:
        values = [str(value) for value in node["enum"]]
        return values[0] if len(values) == 1 else f"one of {join_names(values, conjunction='or')}"
    at_most = f", at most {node['maxItems']}" if "maxItems" in node else ""
    match node["type"]:
        case "integer" if "maximum" in node:
            return f"integer, {node['minimum']} to {node['maximum']}"
        case "string" if node.get("format") == "date-time":
            return "time"
        case "string" if "maxLength" in node:
            return f"string, at most {node['maxLength']} characters"
        case "array":
            return f"list of {node['items']['type']}s{at_most}"
        case "object" if FREE_FORM in node:
            return "free-form object"
        case "object" if "additionalProperties" in node:
            return f"map of {node['additionalProperties']['type']}s"
    return str(node["type"])


def _steps(path: str) -> list[str]:
    """Return the names in a path, without indices and a leading kind."""
    names = [name for name in re.sub(r"\[[^\]]*\]", "", path.strip()).split(".") if name and not name.isdecimal()]
    return names[1:] if names and names[0].lower() in {KIND.lower(), "trun"} else names


def _object(node: Node) -> Node:
    """Return the schema of the objects in a list, or the schema itself."""
    inner: Node = node.get("items", node)
    return inner


def _inside(node: Node) -> dict[str, Node]:
    fields: dict[str, Node] = _object(node).get("properties", {})
    return fields


def _entries(node: Node) -> tuple[Entry, ...]:
    needed = _object(node).get("required", ())
    return tuple(
        Entry(
            name=name,
            type=describe_field(part),
            required=name in needed,
            summary=first_sentence(part.get("description", "")),
        )
        for name, part in _inside(node).items()
    )


def _is_mutable(steps: list[str]) -> bool | None:
    if len(steps) < 2 or steps[0] != "spec":
        return None
    return steps[1] in MUTABLE_FIELDS or (len(steps) > 2 and steps[2] in MUTABLE_PARTS.get(steps[1], ()))


def _not_found(name: str, before: list[str], fields: dict[str, Node]) -> str:
    place = ".".join(before)
    near = nearest(name, fields)
    if near is not None:
        return f"{'.'.join([*before, name])}: no such field, did you mean {'.'.join([*before, near])}?"
    if not before:
        places = [*_places_of(name), *(".".join((*args_path(m), name)) for m in METHODS if name in table_of(m).keys)]
        if places:
            return f"{name}: no such field, did you mean {join_names(places[:_FEW], conjunction='or')}?"
        return f"{name}: no such field: a path begins with {join_names(list(fields), conjunction='or')}"
    if not fields:
        return f"{place}.{name}: no such field: {place} has no fields"
    return f"{place}.{name}: no such field; {place} has {join_names(list(fields))}"


def _places_of(name: str) -> list[str]:
    """Return the paths in the spec that end with a name, the shortest first."""

    def search(node: Node, path: str) -> Iterator[str]:
        for field, part in _inside(node).items():
            if plain(field) == plain(name):
                yield f"{path}.{field}"
            yield from search(part, f"{path}.{field}")

    return sorted(search(resource_schema()["properties"]["spec"], "spec"), key=lambda path: path.count("."))


# --- Training arguments -----------------------------------------------------------------------------------------------


def _explain_args(table: ArgsTable, *, path: tuple[str, ...]) -> Explanation:
    field = resource_schema()
    for name in path:
        field = field["properties"][name]
    return Explanation(
        path=".".join(path),
        type=f"keys of {table.class_name}, TRL {table.library['trl']}",
        description=field["description"],
        mutable=False,
        default=write_value(field["default"]),
        example=write_value(field["examples"][0]),
        fields=tuple(
            Entry(name=key, type=_default_of(row.default), required=False, summary=row.help)
            for key, row in table.keys.items()
            if row.owned is None
        ),
    )


def _default_of(default: object) -> str:
    return f"default {write_value(default)}"


def _explain_arg(key: str, table: ArgsTable, *, path: str) -> Explanation:
    row = table.keys.get(key)
    if row is None:
        if key in table.elsewhere:
            raise UnknownField(f"{path}.{key}: is no key of {table.class_name}: {table.elsewhere[key]}")
        near = nearest(key, table.keys)
        hint = f", did you mean {path}.{near}?" if near else f"; `posttrain explain {path}`"
        raise UnknownField(f"{path}.{key}: is no key of {table.class_name}{hint}")
    description = row.help
    if row.owned is not None:
        description = f"Set by posttrain: {row.owned}. ({row.help})"
    elif row.deprecated:
        instead = f": write {row.replacement}" if row.replacement else ""
        description = f"{row.help} Deprecated in {table.class_name}{instead}."
    return Explanation(
        path=f"{path}.{key}",
        type=describe_type(row.type),
        description=description,
        mutable=False,
        default=write_value(row.default),
    )
