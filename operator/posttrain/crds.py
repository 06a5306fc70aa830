"""Write what is generated from the models: the CustomResourceDefinition and the reference pages.

    python -m posttrain.crds [--check] [FOLDER]

FOLDER is the repository, by default the current folder. It owns what a CRD says beyond the models (list types, rules of
immutability, columns); it must not define any field.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.api.base import GROUP, RUN_NAME_MAX_LENGTH, VERSION, ApiModel
from posttrain.api.conditions import QUOTA_RESERVED
from posttrain.api.loader import dump_document
from posttrain.api.rules import Rule
from posttrain.api.schema import FREE_FORM, Node, model_in, resource_schema
from posttrain.api.spelling import write_value
from posttrain.api.training_run import (
    KIND,
    MUTABLE_FIELDS,
    MUTABLE_PARTS,
    MUTABLE_RESOURCES_FIELDS,
    NAME_RULE,
    PLURAL,
    TrainingRun,
    TrainingRunSpec,
)
from posttrain.reference import render_reasons, render_rewards, render_training_run

HEADER = "# Generated from the models in operator/posttrain/api by `make generate`: edit those.\n"
IMMUTABLE = "cannot change while the run lives: give the changed run another name, or delete this one first"
HELD = (
    "can change only while the run holds no quota (it waits in its queue, or is suspended and its pods have ended): "
    "suspend it first, or give the changed run another name"
)

_RULES = "x-kubernetes-validations"
_LIST_TYPE = "x-kubernetes-list-type"

# A status has at most 16 KiB in all, so nothing in it is longer; its numbers are exact in every JSON reader.
_STATUS_BOUNDS: dict[str, Node] = {
    "string": {"maxLength": 16384},
    "integer": {"minimum": -(2**53), "maximum": 2**53, "format": "int64"},
    "array": {"maxItems": 256},
    "map": {"maxProperties": 256},
}
_STATUS_MAP_LISTS = {"conditions": "type", "metrics": "name"}


class Unfinished(Exception):
    """A model lacks something that its CRD needs; the message names the field."""


def generated_files() -> dict[str, str]:
    """Return the text of each generated file by its path in the repository."""
    return {
        f"crds/{GROUP}_{PLURAL}.yaml": HEADER + dump_document(build_crd()),
        "docs/reasons.md": render_reasons(),
        "docs/rewards.md": render_rewards(),
        "docs/trainingrun.md": render_training_run(),
    }


def build_crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition of TrainingRun.

    Raises:
        Unfinished: a field of the spec has no description or example, or something is not bounded.
    """
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": TrainingRun.LIST_KIND,
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["trun"],
                "categories": ["posttrain"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _root_schema()},
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": _columns(),
                }
            ],
        },
    }


def _columns() -> list[dict[str, Any]]:
    summary = '.status.conditions[?(@.type=="Succeeded")]'
    return [
        _column("METHOD", "string", ".status.method", "How the model is trained."),
        _column("MODEL", "string", ".spec.model['source','runRef']", "The model, or the run, that it starts from."),
        _column("STATE", "string", ".status.stage", "Where the run is."),
        _column("PROGRESS", "integer", ".status.progress.percentage", "Percentage of the steps."),
        _column("STEP", "integer", ".status.progress.step", "Optimizer steps so far."),
        _column("ETA", "string", ".status.progress.eta", "Time to the end."),
        _column("METRIC", "string", ".status.progress.metric", "The training loss, or the mean reward of grpo."),
        _column("GPUS", "integer", ".status.gpus", "GPUs of the whole gang."),
        _column("AGE", "date", ".metadata.creationTimestamp", "Time since the run was made."),
        _column("REASON", "string", f"{summary}.reason", "Why the run is where it is.", wide=True),
        _column("RESTARTS", "integer", ".status.restarts.infrastructure", "Restarts after lost pods.", wide=True),
        _column("CHECKPOINT", "integer", ".status.checkpoints.latestStep", "Newest verified checkpoint.", wide=True),
    ]


def _column(name: str, type_: str, path: str, description: str, *, wide: bool = False) -> dict[str, Any]:
    return {"name": name, "type": type_, "jsonPath": path, "description": description, "priority": int(wide)}


# --- Schema -----------------------------------------------------------------------------------------------------------


def _root_schema() -> Node:
    fields = resource_schema()["properties"]
    name_rule = (
        f"self.metadata.name.size() <= {RUN_NAME_MAX_LENGTH} && "
        "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')"
    )
    spec = spec_schema(fields["spec"], TrainingRunSpec, path="spec")
    spec[_RULES] += _immutability(fields["spec"])
    return {
        "type": "object",
        "description": resource_schema()["description"],
        "required": ["spec"],
        _RULES: [{"rule": name_rule, "message": NAME_RULE}, *_immutability_under_quota(fields["spec"])],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": _status_schema(fields["status"]),
        },
    }


def spec_schema(node: Node, model: type[ApiModel] | None, *, path: str) -> Node:
    """Return a part of the spec's schema as a CRD has it.

    Raises:
        Unfinished: as `build_crd`.
    """
    schema = {key: value for key, value in node.items() if key not in {"examples", "properties", "items"}}
    _require_bounds(schema, path=path)
    if model is not None and model.RULES:
        schema[_RULES] = [_validation(rule) for rule in model.RULES]
    if "additionalProperties" in schema:
        schema["additionalProperties"] = spec_schema(schema["additionalProperties"], None, path=f"{path}.*")
    if "items" in node:
        schema.setdefault(_LIST_TYPE, "atomic")
        schema["items"] = spec_schema(node["items"], model, path=f"{path}[]")
        schema.pop(_RULES, None)
    if "properties" in node:
        models = {field.alias: model_in(field.annotation) for field in model.model_fields.values()} if model else {}
        schema["properties"] = {
            name: _field_schema(part, models.get(name), path=f"{path}.{name}")
            for name, part in node["properties"].items()
        }
    return schema


def _field_schema(node: Node, model: type[ApiModel] | None, *, path: str) -> Node:
    if not node.get("description") or not node.get("examples"):
        raise Unfinished(f"{path}: a field of the spec has a description and an example")
    schema = spec_schema(node, model, path=path)
    schema["description"] = _with_example(node)
    return schema


def _require_bounds(schema: Node, *, path: str) -> None:
    bounds = {
        "string": schema.keys() & {"maxLength", "enum"},
        "integer": schema.keys() >= {"minimum", "maximum"},
        "array": schema.keys() & {"maxItems"},
        "object": schema.keys() & {"maxProperties"} or not schema.keys() & {"additionalProperties", FREE_FORM},
        "boolean": True,
    }
    if not bounds[schema["type"]]:
        raise Unfinished(f"{path}: a {schema['type']} without bounds")


def _validation(rule: Rule) -> Node:
    validation: Node = {"rule": rule.cel, "message": rule.message}
    if rule.field:
        validation["fieldPath"] = f".{rule.field}"
    return validation


def _immutability(spec: Node) -> list[Node]:
    """Return a rule for each field that must stay as it is, also if it was added or removed."""
    parts = {**MUTABLE_PARTS, "resources": MUTABLE_RESOURCES_FIELDS}
    paths = [name for name in spec["properties"] if name not in MUTABLE_FIELDS | parts.keys()]
    for part, mutable in parts.items():
        paths += [f"{part}.{name}" for name in spec["properties"][part]["properties"] if name not in mutable]
    return [
        {
            "rule": _held(path, spec),
            "message": f"{path} {IMMUTABLE}",
            "fieldPath": f".{path}",
        }
        for path in paths
    ]


def _held(path: str, spec: Node) -> str:
    """Return the rule that a field of the spec, or of an object in it, stays as it is.

    An object that is not always there, as grpo, cannot come or go: then sft, which has a rule, would go or come.
    """
    names = path.split(".")
    unchanged = _unchanged(path, always_there=_is_always_there(spec, names))
    if len(names) == 1 or _is_always_there(spec, names[:1]):
        return unchanged
    return f"!has(self.{names[0]}) || !has(oldSelf.{names[0]}) || ({unchanged})"


def _immutability_under_quota(spec: Node) -> list[Node]:
    """Return a rule for each field that must stay as it is while quota is held.

    They stand at the root, where alone the status is seen. A run without a queue counts as one that holds its quota, as
    long as it is to have a gang, or has one.
    """
    held = (
        "has(oldSelf.status) && has(oldSelf.status.conditions) && "
        f"oldSelf.status.conditions.exists(c, c.type == '{QUOTA_RESERVED}' && c.status == 'True')"
    )
    rules = []
    for name in spec["properties"]["resources"]["properties"]:
        if name in MUTABLE_RESOURCES_FIELDS:
            there = _is_always_there(spec, ["resources", name])
            unchanged = _unchanged(f"spec.resources.{name}", always_there=there)
            path = f"resources.{name}"
            rules.append(
                {"rule": f"!({held}) || ({unchanged})", "message": f"{path} {HELD}", "fieldPath": f".spec.{path}"}
            )
    return rules


def _is_always_there(node: Node, names: Sequence[str]) -> bool:
    """Return whether a field has a value wherever the object that it is a field of is there."""
    *before, name = names
    for part in before:
        node = node["properties"][part]
    return "default" in node["properties"][name] or name in node.get("required", ())


def _unchanged(path: str, *, always_there: bool) -> str:
    same = f"self.{path} == oldSelf.{path}"
    return same if always_there else f"has(self.{path}) == has(oldSelf.{path}) && (!has(self.{path}) || {same})"


def _status_schema(node: Node, *, name: str = "", path: str = "status") -> Node:
    """Return a part of the status' schema: bounded, nothing required at its top, no defaults.

    Raises:
        Unfinished: as `build_crd`.
    """
    is_map = node["type"] == "object" and "properties" not in node
    schema: Node = {"type": node["type"]}
    schema |= {key: node[key] for key in ("description", "enum", "format", "required", FREE_FORM) if key in node}
    if not schema.keys() & {"enum", "format"}:
        schema |= _STATUS_BOUNDS.get("map" if is_map else node["type"], {})
    if "additionalProperties" in node:
        schema["additionalProperties"] = _status_schema(node["additionalProperties"])
    if "properties" in node:
        schema["properties"] = {
            field: _status_field(part, name=field, path=f"{path}.{field}") for field, part in node["properties"].items()
        }
    if "items" in node:
        schema["items"] = _status_schema(node["items"], path=f"{path}[]")
        schema[_LIST_TYPE] = "map" if name in _STATUS_MAP_LISTS else "atomic"
        if name in _STATUS_MAP_LISTS:
            schema["x-kubernetes-list-map-keys"] = [_STATUS_MAP_LISTS[name]]
    return schema


def _status_field(node: Node, *, name: str, path: str) -> Node:
    schema = _status_schema(node, name=name, path=path)
    if "properties" in node or "properties" in node.get("items", {}):
        return schema  # the fields inside have their own
    if not node.get("description") or not node.get("examples"):
        raise Unfinished(f"{path}: a field of the status has a description and an example")
    return {**schema, "description": _with_example(node)}


def _with_example(node: Node) -> str:
    return f"{node['description']} Example: {write_value(node['examples'][0])}"


# --- Command ----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Write the generated files, or with --check tell which differ."""
    parser = argparse.ArgumentParser(prog="python -m posttrain.crds", description="Write the CRDs and their reference.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help="the repository")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a file is not up to date")
    arguments = parser.parse_args(argv)
    stale = []
    for name, text in generated_files().items():
        path = arguments.folder / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if arguments.check and stale:
        print(f"not up to date: {', '.join(stale)}: run `make generate`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
