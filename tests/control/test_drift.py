"""A write is saved where the object is what the plan wants, and only there."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from posttrain.control.drift import has_drifted
from posttrain.plan.types import Manifest

OWNER = {
    "apiVersion": "posttrain.dev/v1alpha1",
    "kind": "TrainingRun",
    "name": "demo",
    "uid": "u-1",
    "controller": True,
}
WANTED: Manifest = {
    "apiVersion": "v1",
    "kind": "Thing",
    "metadata": {"name": "demo", "labels": {"app": "demo"}, "ownerReferences": [OWNER]},
    "spec": {
        "ports": [{"name": "a", "port": 1}, {"name": "b", "port": 2}],
        "resources": {"requests": {"memory": "1024Mi", "cpu": "1"}},
        "securityContext": {},
        "volumes": [],
        "enabled": False,
    },
}


def observed(**spec: Any) -> Manifest:
    there = deepcopy(WANTED)
    there["spec"] |= spec
    return there


def test_what_the_server_and_others_added_is_no_drift() -> None:
    there = observed(clusterIP="10.0.0.1")
    there["metadata"] |= {"uid": "x", "resourceVersion": "7", "annotations": {"a": "b"}}
    there["metadata"]["labels"] |= {"team": "blue"}
    there["spec"]["ports"][0]["protocol"] = "TCP"
    there["status"] = {"phase": "Bound"}

    assert not has_drifted(there, wanted=WANTED)


@pytest.mark.parametrize(
    "requests",
    [{"memory": "1Gi", "cpu": "1"}, {"memory": "1073741824", "cpu": "1000m"}, {"memory": "1Gi", "cpu": 1, "x": "2"}],
)
def test_a_quantity_may_be_spelled_differently(requests: dict[str, Any]) -> None:
    assert not has_drifted(observed(resources={"requests": requests}), wanted=WANTED)


@pytest.mark.parametrize("requests", [{"memory": "1G", "cpu": "1"}, {"memory": "1Gi"}, {}, None])
def test_another_or_a_missing_quantity_is_drift(requests: dict[str, Any] | None) -> None:
    assert has_drifted(observed(resources={"requests": requests}), wanted=WANTED)


def test_owners_of_others_beside_ours_are_no_drift() -> None:
    there = deepcopy(WANTED)
    there["metadata"]["ownerReferences"] = [{"kind": "Other", "name": "o", "uid": "u-2"}, {**OWNER, "extra": True}]

    assert not has_drifted(there, wanted=WANTED)


@pytest.mark.parametrize("owners", [None, [], [{**OWNER, "uid": "u-2"}], [{**OWNER, "controller": False}]])
def test_our_owner_missing_or_changed_is_drift(owners: list[dict[str, Any]] | None) -> None:
    there = deepcopy(WANTED)
    there["metadata"]["ownerReferences"] = owners

    assert has_drifted(there, wanted=WANTED)


def test_what_is_empty_may_have_been_dropped_by_the_server() -> None:
    there = deepcopy(WANTED)
    del there["spec"]["securityContext"], there["spec"]["volumes"]

    assert not has_drifted(there, wanted=WANTED)


@pytest.mark.parametrize(
    "change",
    [
        {"enabled": True},
        {"enabled": None},
        {"ports": [{"name": "a", "port": 9}, {"name": "b", "port": 2}]},
        {"ports": [{"name": "b", "port": 2}, {"name": "a", "port": 1}]},
        {"ports": [{"name": "a", "port": 1}]},
        {"ports": [{"name": "a", "port": 1}, {"name": "b", "port": 2}, {"name": "c", "port": 3}]},
        {"ports": {"name": "a"}},
        {"volumes": [{"name": "added"}]},
        {"resources": "1"},
    ],
)
def test_a_field_of_the_plan_with_another_value_is_drift(change: dict[str, Any]) -> None:
    assert has_drifted(observed(**change), wanted=WANTED)


def test_a_removed_field_is_drift() -> None:
    there = deepcopy(WANTED)
    del there["spec"]["enabled"]

    assert has_drifted(there, wanted=WANTED)


def test_a_removed_label_is_drift() -> None:
    there = deepcopy(WANTED)
    del there["metadata"]["labels"]

    assert has_drifted(there, wanted=WANTED)


def test_an_object_has_not_drifted_from_itself() -> None:
    assert not has_drifted(deepcopy(WANTED), wanted=WANTED)
