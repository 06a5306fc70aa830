"""Whose an object is."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.control.observe import Belongings, controller_of, is_of_run, sort_belongings
from posttrain.plan.types import Manifest, ObjectRef
from tests.support.builders import T0, at, build_pod, rfc3339

LABELS = {"app.kubernetes.io/managed-by": "posttrain", "posttrain.dev/run": "demo"}
RUN: Manifest = {
    "apiVersion": "posttrain.dev/v1alpha1",
    "kind": "TrainingRun",
    "metadata": {"name": "demo", "namespace": "team", "uid": "u-2", "creationTimestamp": rfc3339(T0)},
    "spec": {"checkpoints": {"retain": "Always"}},
}


def owner(uid: str, *, kind: str = "TrainingRun", name: str = "demo", controller: bool = True) -> dict[str, Any]:
    return {"kind": kind, "name": name, "uid": uid, "controller": controller}


def build(kind: str, name: str = "demo", *owners: dict[str, Any], labels: dict[str, str] = LABELS) -> Manifest:
    metadata: dict[str, Any] = {"name": name, "namespace": "team", "labels": labels}
    if owners:
        metadata["ownerReferences"] = list(owners)
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata}


def build_trainer_pod(*, seconds: float) -> Manifest:
    return {"apiVersion": "v1", "kind": "Pod", **build_pod("demo", started=at(seconds))}


def test_what_bears_the_label_is_sorted_by_its_controller() -> None:
    own = build("ConfigMap", "demo-a1", owner("u-2"))
    older = build("ConfigMap", "demo-a7", owner("u-1"))
    by_hand = build("ConfigMap", "demo-code")
    of_another = build("Secret", "demo", owner("u-9", kind="Deployment", name="demo"))
    pod = build_trainer_pod(seconds=0)

    assert sort_belongings(RUN, [own, older, by_hand, of_another, pod]) == Belongings(
        objects={ObjectRef("v1", "ConfigMap", "demo-a1"): own},
        pods=(pod,),
        foreign=frozenset({ObjectRef("v1", "ConfigMap", "demo-code"), ObjectRef("v1", "Secret", "demo")}),
        predecessors=(older,),
    )


def test_a_pod_that_is_older_than_the_run_is_a_predecessors() -> None:
    pod = build_trainer_pod(seconds=-1)

    assert sort_belongings(RUN, [pod]) == Belongings(predecessors=(pod,))


def test_a_retained_claim_is_the_runs_by_its_labels() -> None:
    claim = build("PersistentVolumeClaim")

    assert sort_belongings(RUN, [claim]).objects == {ObjectRef.of(claim): claim}


def test_a_claim_that_was_to_be_retained_is_not_taken_by_a_run_that_retains_nothing() -> None:
    run = {**RUN, "spec": {"checkpoints": {"retain": "Never"}}}
    claim = build("PersistentVolumeClaim")

    assert sort_belongings(run, [claim]) == Belongings(foreign=frozenset({ObjectRef.of(claim)}))


@pytest.mark.parametrize("labels", [{}, {"posttrain.dev/run": "demo"}, {**LABELS, "posttrain.dev/run": "other"}])
def test_a_claim_without_the_labels_is_nobodys(labels: dict[str, str]) -> None:
    assert not is_of_run(build("PersistentVolumeClaim", labels=labels), uid="u-2", name="demo", retains=True)


def test_a_claim_that_another_controls_is_the_others_whatever_its_labels_say() -> None:
    claim = build("PersistentVolumeClaim", "demo", owner("u-9", kind="StatefulSet", name="db"))

    assert not is_of_run(claim, uid="u-2", name="demo", retains=True)


def test_the_controller_is_the_owner_that_says_so() -> None:
    manifest = build("ConfigMap", "demo", owner("u-1", controller=False), owner("u-2"))

    assert controller_of(manifest) == owner("u-2")
    assert controller_of(build("ConfigMap", "demo", owner("u-1", controller=False))) is None
    assert controller_of(build("ConfigMap")) is None
