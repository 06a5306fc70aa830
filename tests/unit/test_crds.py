"""The CustomResourceDefinition that is generated from the models."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from posttrain import crds
from posttrain.api.base import ApiModel
from posttrain.api.loader import load_documents
from posttrain.api.patterns import known_patterns
from posttrain.api.rules import Rule
from posttrain.api.schema import model_in, resource_schema, schema_of
from posttrain.api.training_run import (
    MUTABLE_CHECKPOINT_FIELDS,
    MUTABLE_FIELDS,
    MUTABLE_GRPO_FIELDS,
    MUTABLE_RESOURCES_FIELDS,
    NAME_RULE,
    TrainingRunSpec,
)

ROOT = Path(__file__).parents[2]
Node = dict[str, Any]


def root_schema() -> Node:
    (version,) = crds.build_crd()["spec"]["versions"]
    schema: Node = version["schema"]["openAPIV3Schema"]
    return schema


def walk(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    yield path, node
    for name, part in node.get("properties", {}).items():
        yield from walk(part, f"{path}.{name}")
    if "items" in node:
        yield from walk(node["items"], f"{path}[]")
    if "additionalProperties" in node:
        yield from walk(node["additionalProperties"], f"{path}.*")


def models(model: type[ApiModel]) -> Iterator[type[ApiModel]]:
    yield model
    for field in model.model_fields.values():
        inner = model_in(field.annotation)
        if inner is not None:
            yield from models(inner)


def test_the_committed_files_are_the_generated_ones() -> None:
    for name, text in crds.generated_files().items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name}: run `make generate`"


def test_check_fails_on_a_stale_file_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "posttrain.crds"]

    missing = subprocess.run([*command, "--check", tmp_path], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert "crds/posttrain.dev_trainingruns.yaml" in missing.stderr
    assert list(tmp_path.iterdir()) == []

    assert subprocess.run([*command, tmp_path], check=False).returncode == 0
    assert subprocess.run([*command, "--check", tmp_path], check=False).returncode == 0

    (tmp_path / "docs" / "reasons.md").write_text("edited by hand\n", encoding="utf-8")
    stale = subprocess.run([*command, "--check", tmp_path], capture_output=True, text=True, check=False)
    assert (stale.returncode, stale.stderr) == (1, "not up to date: docs/reasons.md: run `make generate`\n")


def test_the_file_is_read_back_as_it_was_built() -> None:
    text = crds.generated_files()["crds/posttrain.dev_trainingruns.yaml"]
    (document,) = load_documents(text, origin="crd")

    assert document.data == crds.build_crd()


def test_names_and_scope() -> None:
    crd = crds.build_crd()

    assert crd["metadata"] == {"name": "trainingruns.posttrain.dev"}
    assert crd["spec"]["scope"] == "Namespaced"
    assert crd["spec"]["names"] == {
        "kind": "TrainingRun",
        "listKind": "TrainingRunList",
        "plural": "trainingruns",
        "singular": "trainingrun",
        "shortNames": ["trun"],
        "categories": ["posttrain"],
    }
    assert crd["spec"]["versions"][0]["subresources"] == {"status": {}}


def test_columns_show_fields_that_the_schema_has() -> None:
    columns = crds.build_crd()["spec"]["versions"][0]["additionalPrinterColumns"]

    assert [column["name"] for column in columns if column["priority"] == 0] == [
        "METHOD", "MODEL", "STATE", "PROGRESS", "STEP", "ETA", "METRIC", "GPUS", "AGE",
    ]  # fmt: skip
    assert [column["name"] for column in columns if column["priority"] == 1] == ["REASON", "RESTARTS", "CHECKPOINT"]
    known = {path for path, _ in walk(root_schema())} | {".metadata.creationTimestamp"}
    for column in columns:
        path = re.sub(r"\[\?\(@\.(\w+)==\"\w+\"\)\]", "[]", column["jsonPath"])
        parent, _, either = path.partition("['")
        paths = {f"{parent}.{name}" for name in either.removesuffix("']").split("','")} if either else {path}
        assert paths <= known, column["name"]


def test_the_schema_is_structural() -> None:
    allowed = {
        "type", "description", "properties", "required", "items", "additionalProperties", "enum", "default", "format",
        "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "maxProperties",
        "x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
        "x-kubernetes-preserve-unknown-fields",
    }  # fmt: skip
    for path, node in walk(root_schema()):
        assert node.keys() <= allowed, path
        assert node["type"] in {"object", "array", "string", "integer", "boolean"}, path
        assert not ("properties" in node and "additionalProperties" in node), path
        assert set(node.get("required", [])) <= node.get("properties", {}).keys(), path


def test_every_list_says_how_it_is_merged() -> None:
    for path, node in walk(root_schema()):
        if node["type"] != "array":
            continue
        kind = node["x-kubernetes-list-type"]
        assert kind in {"map", "set", "atomic"}, path
        if kind == "set":
            assert node["items"]["type"] == "string", path
        if kind == "map":
            for key in node["x-kubernetes-list-map-keys"]:
                assert key in node["items"]["required"], path


def test_everything_is_bounded() -> None:
    for path, node in walk(root_schema()):
        match node["type"]:
            case "string" if path not in {".apiVersion", ".kind"}:
                assert node.keys() & {"maxLength", "enum"} or node.get("format") == "date-time", path
            case "integer":
                assert node.keys() >= {"minimum", "maximum"}, path
            case "array":
                assert "maxItems" in node, path
            case "object" if path != ".metadata" and "properties" not in node:
                assert "maxProperties" in node, path


def test_patterns_can_be_read_by_go_and_by_people() -> None:
    for path, node in walk(root_schema()):
        pattern = node.get("pattern", "")
        assert all(int(count) <= 1000 for count in re.findall(r"\{\d+,(\d+)\}", pattern)), path
        assert "(?" not in pattern, path
    for path, node in walk(resource_schema()["properties"]["spec"], "spec"):
        if "pattern" in node:
            # The validators of base.py word their own patterns.
            own_words = node["maxLength"] in {20, 22, 32}
            assert own_words or node["pattern"] in known_patterns(), path


def test_every_field_of_the_spec_is_described_with_an_example() -> None:
    for path, node in walk(root_schema()["properties"]["spec"], "spec"):
        if not path.endswith(("spec", "[]", ".*")):
            assert re.search(r"\. Example: \S", node["description"]), path


def test_every_field_of_the_status_that_has_no_fields_has_an_example() -> None:
    for path, node in walk(root_schema()["properties"]["status"], "status"):
        inside = "properties" in node or "properties" in node.get("items", {})
        if not inside and not path.endswith(("[]", ".*")):
            assert re.search(r"\. Example: \S", node["description"]), path


def test_a_field_without_an_example_stops_the_generator() -> None:
    class Bare(ApiModel):
        size: int = Field(ge=0, le=1, description="How much.")

    node = schema_of(Bare)
    with pytest.raises(
        crds.Unfinished, match=r"spec\.bare\.size: a field of the spec has a description and an example"
    ):
        crds.spec_schema(node, Bare, path="spec.bare")


def test_a_field_without_bounds_stops_the_generator() -> None:
    class Endless(ApiModel):
        text: str = Field(description="Any text.", examples=["a"])

    node = schema_of(Endless)
    with pytest.raises(crds.Unfinished, match=r"spec\.endless\.text: a string without bounds"):
        crds.spec_schema(node, Endless, path="spec.endless")


def test_every_rule_of_the_models_is_in_the_schema_in_the_same_words() -> None:
    wanted = {(rule.cel, rule.message) for model in models(TrainingRunSpec) for rule in model.RULES}
    written = {
        (validation["rule"], validation["message"])
        for _, node in walk(root_schema())
        for validation in node.get("x-kubernetes-validations", [])
    }

    assert wanted <= written
    assert {message for rule, message in written if "metadata.name" in rule} == {NAME_RULE}


def test_rules_name_fields_that_exist() -> None:
    for path, node in walk(root_schema()):
        known = {inner.removeprefix(path).removeprefix(".") for inner, _ in walk(node, path)}
        for validation in node.get("x-kubernetes-validations", []):
            rule = Rule(field="", message="", cel=validation["rule"].replace("oldSelf.", "self."), holds=bool)
            if path:
                assert rule.reads <= known, (path, validation)
            assert validation.get("fieldPath", "").removeprefix(".") in known, (path, validation)
            assert "\n" not in validation["message"]


def test_every_field_but_the_mutable_ones_has_a_rule_that_keeps_it() -> None:
    spec = root_schema()["properties"]["spec"]
    rules = {
        validation["fieldPath"].removeprefix("."): validation["rule"]
        for validation in spec["x-kubernetes-validations"]
        if "oldSelf" in validation["rule"]
    }
    checkpoints = spec["properties"]["checkpoints"]["properties"]
    grpo = spec["properties"]["grpo"]["properties"]
    resources = spec["properties"]["resources"]["properties"]

    assert rules.keys() == (
        (spec["properties"].keys() - MUTABLE_FIELDS - {"checkpoints", "grpo", "resources"})
        | {f"checkpoints.{name}" for name in checkpoints.keys() - MUTABLE_CHECKPOINT_FIELDS}
        | {f"grpo.{name}" for name in grpo.keys() - MUTABLE_GRPO_FIELDS}
        | {f"resources.{name}" for name in resources.keys() - MUTABLE_RESOURCES_FIELDS}
    )
    assert rules["model"] == "self.model == oldSelf.model"
    assert rules["grpo.trainerClass"] == (
        "!has(self.grpo) || !has(oldSelf.grpo) || (has(self.grpo.trainerClass) == has(oldSelf.grpo.trainerClass) && "
        "(!has(self.grpo.trainerClass) || self.grpo.trainerClass == oldSelf.grpo.trainerClass))"
    )
    assert rules["peft"] == "has(self.peft) == has(oldSelf.peft) && (!has(self.peft) || self.peft == oldSelf.peft)"


def test_what_is_asked_of_a_queue_stays_while_quota_is_held() -> None:
    rules = {
        validation["fieldPath"].removeprefix(".spec.resources."): validation["rule"]
        for validation in root_schema()["x-kubernetes-validations"]
        if "oldSelf" in validation["rule"]
    }

    assert rules.keys() == MUTABLE_RESOURCES_FIELDS
    assert rules["numNodes"] == (
        "!(has(oldSelf.status) && has(oldSelf.status.conditions) && oldSelf.status.conditions.exists(c, "
        "c.type == 'QuotaReserved' && c.status == 'True')) || "
        "(self.spec.resources.numNodes == oldSelf.spec.resources.numNodes)"
    )


def test_the_status_requires_nothing_and_has_no_defaults() -> None:
    status = root_schema()["properties"]["status"]

    assert "required" not in status
    assert "required" not in status["properties"]["progress"]
    for path, node in walk(status, "status"):
        assert "default" not in node, path
