"""The JSON schema of a resource as one tree, and what an API server does by it to data.

It owns the tree (references resolved, null left out, defaults and examples in place), the dropping of nulls and the
filling in of defaults; it must not judge data, nor know what else a CRD holds.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel

from posttrain.api.base import ApiModel
from posttrain.api.training_run import TrainingRun

Node = dict[str, Any]
"""A part of a schema: type, properties, items, bounds, description, `examples`, `default`."""

FREE_FORM = "x-kubernetes-preserve-unknown-fields"

# What pydantic says beyond what a structural schema may: titles are noise, map keys and unknown keys are the API
# server's business.
_LEFT_OUT = frozenset(
    {"title", "propertyNames", "additionalProperties", "anyOf", "$ref", "const", "properties", "items", "$defs"}
)


@functools.cache
def resource_schema() -> Node:
    """Return the schema of a TrainingRun; it is shared, so nobody may change it."""
    return schema_of(TrainingRun)


def schema_of(model: type[BaseModel]) -> Node:
    """Return the schema of a model, whole."""
    schema = model.model_json_schema(by_alias=True)
    return _resolve(schema, schema.get("$defs", {}))


def _resolve(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Node:
    while "$ref" in node or "anyOf" in node:
        node = _unwrap(node, definitions)
    resolved = {key: value for key, value in node.items() if key not in _LEFT_OUT}
    if "const" in node:
        resolved["enum"] = [node["const"]]
    if "items" in node:
        resolved["items"] = _resolve(node["items"], definitions)
    if "properties" in node:
        resolved["properties"] = {name: _resolve(part, definitions) for name, part in node["properties"].items()}
    elif node.get("type") == "object":
        values = node.get("additionalProperties", True)
        inner = {} if values is True else _resolve(values, definitions)
        if inner:
            resolved["additionalProperties"] = inner
        else:
            resolved[FREE_FORM] = True
    if resolved.get("default", 0) is None:
        del resolved["default"]
    elif "default" in resolved:
        resolved["default"] = _shortest(resolved["default"], resolved)
    return resolved


def _unwrap(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Node:
    """Replace a reference, or the choice between something and null, by what it stands for."""
    rest = {key: value for key, value in node.items() if key not in {"$ref", "anyOf"}}
    if "$ref" in node:
        return {**definitions[node["$ref"].rpartition("/")[2]], **rest}
    members = [member for member in node["anyOf"] if member != {"type": "null"}]
    if len(members) != 1:
        raise ValueError(f"a structural schema has no choice between types: {node}")
    return {**members[0], **rest}


def _shortest(default: Any, node: Node) -> Any:
    """Return a default without what the defaults of its own fields say."""
    if not isinstance(default, dict) or "properties" not in node:
        return default
    filled = fill_defaults({}, node)
    return {name: value for name, value in drop_nulls(default, node).items() if value != filled.get(name)}


def fill_defaults(data: Any, node: Node) -> Any:
    """Return a copy of `data` with the defaults that an API server would fill in, and without the nulls it drops."""
    if isinstance(data, list):
        return [fill_defaults(item, node.get("items", {})) for item in data]
    if not isinstance(data, dict):
        return data
    filled = {}
    for name, value in data.items():
        part = child(node, name)
        if value is None and part is not None:
            continue
        filled[name] = copy.deepcopy(value) if part is None else fill_defaults(value, part)
    for name, part in node.get("properties", {}).items():
        if name not in filled and "default" in part:
            filled[name] = fill_defaults(part["default"], part)
    return filled


def drop_nulls(data: Any, node: Node) -> Any:
    """Return a copy of `data` without the nulls that an API server drops: all but those within free-form objects."""
    if isinstance(data, list):
        return [drop_nulls(item, node.get("items", {})) for item in data]
    if not isinstance(data, dict):
        return data
    return {
        name: value if part is None else drop_nulls(value, part)
        for name, value in data.items()
        if (part := child(node, name)) is None or value is not None
    }


def child(node: Node, name: str) -> Node | None:
    """Return the schema of a field or of a map's value; None for what a free-form object holds or nobody knows."""
    found: Node | None = node.get("properties", {}).get(name, node.get("additionalProperties"))
    return found


def model_in(annotation: Any) -> type[ApiModel] | None:
    """Return the model in a field's type: `Model`, `Model | None` or `tuple[Model, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation if issubclass(annotation, ApiModel) else None
    return next((model for part in get_args(annotation) if (model := model_in(part)) is not None), None)
