"""The cache knows the newest state of each object, and rings only for what a plan may act upon."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from posttrain.control.cache import Cache, RunKey
from posttrain.control.kinds import (
    CONFIG_MAP,
    POD,
    PYTORCHJOB,
    SERVICE_ACCOUNT,
    STATEFUL_SET,
    TRAINING_RUN,
    WORKLOAD,
    Kind,
)
from posttrain.control.port import ObjectKey
from posttrain.control.wakes import PROMPT_SECONDS
from posttrain.plan.types import Manifest

DEMO: RunKey = ("team", "demo")
OTHER: RunKey = ("team", "other")
RUN_KEY = ObjectKey(*TRAINING_RUN, *DEMO)


class Bells:
    """Who was told of a change, since this was looked at last."""

    def __init__(self) -> None:
        self.cache = Cache(on_change=self._rung_add)
        self._rung: list[RunKey] = []
        self.patience: float | None = None
        """Of the last one."""

    def _rung_add(self, run: RunKey, patience: float) -> None:
        self._rung.append(run)
        self.patience = patience

    def rung(self) -> list[RunKey]:
        rung, self._rung = self._rung, []
        return rung


def build(
    kind: Kind = CONFIG_MAP,
    *,
    name: str = "demo-a1",
    uid: str = "u-1",
    version: int = 10,
    run: str | None = "demo",
    **fields: Any,
) -> Manifest:
    metadata: dict[str, Any] = {"name": name, "namespace": "team", "uid": uid, "resourceVersion": str(version)}
    if run is not None:
        metadata["labels"] = {"posttrain.dev/run": run}
    return {"apiVersion": kind[0], "kind": kind[1], "metadata": metadata, **fields}


def build_run(*, version: int = 10, uid: str = "r-1", status: Any = None, **metadata: Any) -> Manifest:
    known = {"name": "demo", "namespace": "team", "uid": uid, "resourceVersion": str(version), "generation": 1}
    run = {"apiVersion": TRAINING_RUN[0], "kind": TRAINING_RUN[1], "metadata": known | metadata, "spec": {}}
    return run if status is None else {**run, "status": status}


# --- What is known ---------------------------------------------------------------------------------------------------


def test_an_object_is_read_as_it_was_put() -> None:
    cache = Bells().cache
    manifest = build(data={"ä": "ö"})
    cache.put(manifest)

    assert cache.get(ObjectKey.of(manifest)) == manifest
    assert cache.get(ObjectKey(*CONFIG_MAP, "other", "demo-a1")) is None
    assert cache.get(ObjectKey(*SERVICE_ACCOUNT, "team", "demo-a1")) is None


def test_an_older_or_the_same_version_never_replaces_what_is_known() -> None:
    bells = Bells()
    newer = build(version=10, data={"x": "10"})
    bells.cache.put(newer)
    bells.rung()
    for version in (9, 10):
        bells.cache.put(build(version=version, data={"x": "old"}))

    assert bells.cache.get(ObjectKey.of(newer)) == newer
    assert bells.rung() == []


def test_versions_are_numbers() -> None:
    cache = Bells().cache
    cache.put(build(version=9))
    cache.put(build(version=10, data={"x": "10"}))

    assert cache.children(DEMO) == [build(version=10, data={"x": "10"})]


def test_a_late_answer_about_the_predecessor_does_not_replace_the_object_made_anew() -> None:
    cache = Bells().cache
    cache.put(build(uid="u-2", version=20))
    cache.put(build(uid="u-1", version=15))

    assert cache.children(DEMO) == [build(uid="u-2", version=20)]


def test_a_run_that_is_deleted_and_made_anew_is_the_new_one_whatever_comes_late() -> None:
    bells = Bells()
    bells.cache.put(build_run(uid="r-1", version=10))
    bells.cache.put(build_run(uid="r-2", version=20))
    assert bells.rung() == [DEMO, DEMO]
    bells.cache.drop(build_run(uid="r-1", version=15))

    assert bells.cache.get(RUN_KEY) == build_run(uid="r-2", version=20)
    assert bells.rung() == []
    assert bells.cache.runs() == [DEMO]
    assert bells.cache.count(TRAINING_RUN) == 1


def test_a_late_answer_to_a_write_brings_nothing_back() -> None:
    bells = Bells()
    bells.cache.put(build(version=10))
    bells.cache.drop(build(version=12))
    bells.rung()
    bells.cache.put(build(version=11), own=True)

    assert bells.cache.children(DEMO) == []
    assert bells.rung() == []


def test_what_was_dropped_before_it_was_known_does_not_come_either() -> None:
    cache = Bells().cache
    cache.drop(build(version=12))
    cache.put(build(version=11))

    assert cache.children(DEMO) == []


def test_what_a_read_did_not_find_is_gone_for_good() -> None:
    bells = Bells()
    bells.cache.put(build(version=10))
    bells.cache.forget(ObjectKey.of(build()))
    bells.cache.put(build(version=11), own=True)

    assert bells.cache.children(DEMO) == []
    assert bells.rung() == [DEMO, DEMO]
    bells.cache.forget(ObjectKey.of(build()))
    assert bells.rung() == []


def test_a_list_drops_what_is_not_in_it() -> None:
    bells = Bells()
    kept, gone = build(name="demo-a1", uid="u-1"), build(name="demo-a2", uid="u-2")
    for manifest in (kept, gone):
        bells.cache.put(manifest)
    bells.rung()
    bells.cache.retain(CONFIG_MAP, {"u-1"}, version="15")
    bells.cache.put(build(name="demo-a2", uid="u-2", version=14))

    assert bells.cache.children(DEMO) == [kept]
    assert bells.rung() == [DEMO]


def test_a_list_does_not_drop_what_is_newer_than_it() -> None:
    bells = Bells()
    made_meanwhile = build(version=16)
    bells.cache.put(made_meanwhile, own=True)
    bells.cache.retain(CONFIG_MAP, (), version="15")

    assert bells.cache.children(DEMO) == [made_meanwhile]
    assert bells.rung() == []


def test_a_list_concerns_its_kind_alone() -> None:
    cache = Bells().cache
    cache.put(build(SERVICE_ACCOUNT))
    cache.retain(CONFIG_MAP, (), version="15")

    assert cache.children(DEMO) == [build(SERVICE_ACCOUNT)]
    assert (cache.is_listed(CONFIG_MAP), cache.is_listed(SERVICE_ACCOUNT)) == (True, False)


def test_nothing_is_left_of_a_kind_that_is_gone() -> None:
    bells = Bells()
    bells.cache.put(build(PYTORCHJOB))
    bells.rung()
    bells.cache.retain(PYTORCHJOB, (), version=None)

    assert bells.cache.children(DEMO) == []
    assert bells.cache.is_listed(PYTORCHJOB)
    assert bells.rung() == [DEMO]


# --- Labels ----------------------------------------------------------------------------------------------------------


def test_children_are_what_bears_the_label_in_the_runs_namespace() -> None:
    cache = Bells().cache
    mine = [build(name="demo-a1", uid="u-1"), build(SERVICE_ACCOUNT, name="demo", uid="u-2")]
    elsewhere = build(name="demo-a1", uid="u-4")
    elsewhere["metadata"]["namespace"] = "others"
    for manifest in (*mine, build(name="other-a1", uid="u-3", run="other"), elsewhere, build_run()):
        cache.put(manifest)

    assert cache.children(DEMO) == mine
    assert cache.children(("others", "demo")) == [elsewhere]
    assert cache.children(("team", "nobody")) == []


def test_an_object_that_loses_its_label_leaves_its_run_and_comes_back_with_the_label() -> None:
    bells = Bells()
    bells.cache.put(build(version=10))
    bells.rung()
    # What a watch with a label selector says of an object that does not match any more.
    bells.cache.drop(build(version=11))
    assert (bells.cache.children(DEMO), bells.rung()) == ([], [DEMO])

    bells.cache.put(build(version=12))
    assert (bells.cache.children(DEMO), bells.rung()) == ([build(version=12)], [DEMO])


def test_an_object_without_the_label_is_not_kept() -> None:
    bells = Bells()
    bells.cache.put(build(version=10))
    bells.rung()
    bells.cache.put(build(version=11, run=None))

    assert bells.cache.get(ObjectKey.of(build())) is None
    assert (bells.cache.children(DEMO), bells.rung()) == ([], [DEMO])
    bells.cache.put(build(version=12))
    assert bells.cache.children(DEMO) == [build(version=12)]


def test_an_object_that_changes_its_run_is_the_new_ones_alone() -> None:
    bells = Bells()
    bells.cache.put(build(version=10))
    bells.rung()
    bells.cache.put(build(version=11, run="other"))

    assert (bells.cache.children(DEMO), bells.cache.children(OTHER)) == ([], [build(version=11, run="other")])
    assert sorted(bells.rung()) == [DEMO, OTHER]


# --- Who is told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": {"generation": 2}},
        {"metadata": {"deletionTimestamp": "2026-03-01T09:00:00Z"}},
        {"metadata": {"labels": {"posttrain.dev/run": "demo", "a": "b"}}},
        {"metadata": {"ownerReferences": [{"uid": "x"}]}},
        {"status": {"phase": "Failed"}},
        {"spec": {"a": 1}},
        {"data": {"a": "1"}},
        {"automountServiceAccountToken": True},
    ],
)
def test_a_change_of_a_child_that_a_plan_may_act_upon_rings(change: dict[str, Any]) -> None:
    bells = Bells()
    bells.cache.put(build(version=10))
    bells.rung()
    changed = build(version=11)
    changed["metadata"] |= change.get("metadata", {})
    bells.cache.put({**changed, **{name: value for name, value in change.items() if name != "metadata"}})

    assert bells.rung() == [DEMO]


def test_a_server_that_answers_rings() -> None:
    bells = Bells()
    loading = {"name": "vllm", "ready": False, "state": {"running": {}}}
    bells.cache.put(build(POD, version=10, status={"phase": "Running", "containerStatuses": [loading]}))
    bells.rung()
    answers = {**loading, "ready": True}
    bells.cache.put(build(POD, version=11, status={"phase": "Running", "containerStatuses": [answers]}))

    assert bells.rung() == [DEMO]


def test_a_change_that_no_plan_reads_is_silent() -> None:
    bells = Bells()
    bells.cache.put(build(version=10))
    bells.rung()
    noted = build(version=11)
    noted["metadata"] |= {"annotations": {"a": "b"}}
    bells.cache.put(noted)

    assert bells.rung() == []
    assert bells.cache.children(DEMO) == [noted]


def test_what_no_plan_reads_is_not_kept() -> None:
    bells = Bells()
    pod = build(POD, spec={"nodeName": "node-1", "containers": [{"name": "trainer"}]}, status={"phase": "Running"})
    pod["metadata"]["managedFields"] = [{"manager": "kubelet"}]
    bells.cache.put(pod)

    assert bells.cache.children(DEMO) == [
        build(POD, spec={"nodeName": "node-1"}, status={"phase": "Running"}),
    ]


ENDED = {"name": "trainer", "state": {"terminated": {"exitCode": 1}}}
DISRUPTED = {"type": "DisruptionTarget", "status": "True"}


@pytest.mark.parametrize(
    ("child", "waits"),
    [
        (build(POD, status={"phase": "Pending"}), True),
        (build(POD, status={"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]}), True),
        (build(POD, status={"phase": "Running", "containerStatuses": [ENDED]}), False),
        (build(POD, status={"phase": "Running", "conditions": [DISRUPTED]}), False),
        (build(POD, status={"phase": "Failed"}), False),
        (build(PYTORCHJOB, status={"conditions": [{"type": "Running", "status": "True"}]}), True),
        (build(PYTORCHJOB, status={"conditions": [{"type": "Failed", "status": "True"}]}), False),
        (build(CONFIG_MAP), True),
        (build(STATEFUL_SET), True),
        (build(WORKLOAD), False),
    ],
)
def test_what_is_on_its_way_waits_for_more_of_it_and_what_ended_does_not(child: Manifest, waits: bool) -> None:
    bells = Bells()
    bells.cache.put(child)
    assert bells.patience is not None
    assert (bells.patience > PROMPT_SECONDS) == waits

    child = deepcopy(child)
    child["metadata"] |= {"resourceVersion": "11", "deletionTimestamp": "2026-03-01T09:00:00Z"}
    bells.cache.put(child)
    assert bells.patience == PROMPT_SECONDS


def test_a_child_that_somebody_changed_waits_for_nothing() -> None:
    bells = Bells()
    bells.cache.put(build(data={"a": "1"}))
    bells.cache.put(build(version=11, data={"a": "2"}))

    assert bells.patience == PROMPT_SECONDS


def test_of_a_job_only_its_end_rings() -> None:
    bells = Bells()
    told: list[dict[str, str]] = []
    rung = []
    for version, type_ in enumerate(("Created", "Running", "Failed"), start=10):
        told.append({"type": type_, "status": "True"})
        bells.cache.put(build(PYTORCHJOB, version=version, status={"conditions": list(told)}))
        rung.append(bells.rung())

    assert rung == [[DEMO], [], [DEMO]]


def test_the_answer_to_a_write_of_ours_is_silent_and_so_is_the_watch_that_repeats_it() -> None:
    bells = Bells()
    bells.cache.put(build(version=10), own=True)
    bells.cache.put(build(version=10))

    assert bells.rung() == []


PROGRESS: dict[str, Any] = {"attempt": 1, "attemptStart": "2026-03-01T09:00:00Z", "step": 5, "maxSteps": 20}


@pytest.mark.parametrize(
    "change",
    [
        {"step": 6, "percentage": 30, "etaSeconds": 7, "eta": "7s", "metric": "0.3", "epoch": "0.3"},
        {"metrics": [{"name": "loss", "value": "1"}], "history": [{"step": 5, "loss": "1"}]},
        {"lastUpdatedTime": "2026-03-01T09:00:09Z", "lastBeatTime": "2026-03-01T09:00:09Z"},
        {"phase": "saving", "acknowledged": [{"attempt": 1, "source": "rank-0", "seq": 3}]},
    ],
)
def test_a_beat_a_step_or_a_point_of_a_curve_is_silent(change: dict[str, Any]) -> None:
    bells = Bells()
    bells.cache.put(build_run(version=10, status={"progress": PROGRESS}))
    bells.rung()
    bells.cache.put(build_run(version=11, status={"progress": PROGRESS | change}))

    assert bells.rung() == []


@pytest.mark.parametrize(
    "change",
    [
        {"attempt": 2},
        {"attemptStart": "2026-03-01T09:30:00Z"},
        {"nonFinite": {"metric": "loss", "step": 5}},
        {"firstError": {"rank": 0}},
        {"prepare": {"problems": []}},
        {"result": {"reason": "Completed", "message": ""}},
        {"checkpoint": {"step": 5, "uri": "pvc://a/b"}, "checkpointsSaved": 1},
        {"worldSize": 2, "versions": {"trl": "1"}},
    ],
)
def test_a_fact_that_a_plan_acts_upon_rings(change: dict[str, Any]) -> None:
    bells = Bells()
    bells.cache.put(build_run(version=10, status={"progress": PROGRESS}))
    bells.rung()
    bells.cache.put(build_run(version=11, status={"progress": PROGRESS | change}))

    assert bells.rung() == [DEMO]


def test_the_operators_own_part_of_a_status_is_silent() -> None:
    bells = Bells()
    bells.cache.put(build_run(version=10))
    bells.rung()
    bells.cache.put(build_run(version=11, status={"stage": "Training", "attempt": 1, "conditions": []}))

    assert bells.rung() == []


@pytest.mark.parametrize("metadata", [{"generation": 2}, {"deletionTimestamp": "2026-03-01T09:00:00Z"}, {"uid": "r-2"}])
def test_a_new_spec_a_deletion_and_a_new_run_ring(metadata: dict[str, Any]) -> None:
    bells = Bells()
    bells.cache.put(build_run(version=10))
    bells.rung()
    bells.cache.put(build_run(version=11, **metadata))

    assert bells.rung() == [DEMO]


def test_the_end_of_a_run_and_of_a_child_ring_once() -> None:
    bells = Bells()
    bells.cache.put(build_run(version=10))
    bells.cache.put(build(version=10))
    bells.rung()
    for _ in range(2):
        bells.cache.drop(build(version=12))
        bells.cache.drop(build_run(version=12))

    assert bells.rung() == [DEMO, DEMO]
    assert bells.cache.runs() == []


def test_what_is_kept_does_not_change_with_the_callers_object() -> None:
    cache = Bells().cache
    manifest = build(data={"a": "1"})
    before = deepcopy(manifest)
    cache.put(manifest)
    manifest["data"]["a"] = "2"
    cache.children(DEMO)[0]["data"]["a"] = "3"

    assert cache.children(DEMO) == [before]


# --- What is gone ----------------------------------------------------------------------------------------------------


def disrupted_pod(*, version: int) -> Manifest:
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC"}
    return build(POD, version=version, status={"conditions": [condition]})


def test_a_pod_that_the_cluster_took_is_remembered_as_it_was_last() -> None:
    bells = Bells()
    bells.cache.put(build_run())
    bells.cache.put(build(POD, version=11))

    bells.cache.drop(disrupted_pod(version=12))

    assert bells.cache.departed(("team", "demo")) == [disrupted_pod(version=12)]
    assert bells.cache.children(("team", "demo")) == []
    bells.cache.drop(build_run(version=13))
    assert bells.cache.departed(("team", "demo")) == []


def deleted_pod(name: str, *, attempt: int, version: int) -> Manifest:
    pod = build(POD, name=name, version=version)
    metadata = pod["metadata"]
    deleted = {
        "deletionTimestamp": "2026-03-01T09:00:30Z",
        "labels": {**metadata["labels"], "posttrain.dev/attempt": str(attempt)},
    }
    return {**pod, "metadata": {**metadata, **deleted}}


def test_of_the_pods_that_somebody_deleted_the_first_of_each_attempt_is_remembered() -> None:
    bells = Bells()
    bells.cache.put(build_run())
    first, other, later = (
        deleted_pod("a", attempt=1, version=12),
        deleted_pod("b", attempt=1, version=13),
        deleted_pod("c", attempt=2, version=14),
    )

    bells.cache.drop(build(POD, version=11))
    for pod in (first, other, later):
        bells.cache.drop(pod)

    assert bells.cache.departed(("team", "demo")) == [first, later]
