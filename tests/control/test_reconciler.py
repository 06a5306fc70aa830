"""What the reconciler asks of the API server, and what it makes of the answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from typing import Any

import orjson
import pytest

from posttrain.api.conditions import TRAINING_RUN_CONDITIONS
from posttrain.contract.facts import CheckpointSaved, PrepareResult, ResultFact, Started
from posttrain.contract.result import Result
from posttrain.control.drift import has_drifted
from posttrain.control.kinds import (
    CLAIM,
    CONFIG_MAP,
    EVENT,
    JOB,
    NETWORK_POLICY,
    POD,
    PYTORCHJOB,
    RESOURCE_FLAVOR,
    SERVICE_ACCOUNT,
    TRAINING_RUN,
    WORKLOAD,
    WORKLOAD_PRIORITY_CLASS,
    Kind,
)
from posttrain.control.port import Conflict, InternalError, ObjectKey, Rejected, Unavailable
from posttrain.plan.types import Manifest
from posttrain.settings import Profile, Settings
from tests.support.bench import RUN, Bench, wait_out_pending_deadline
from tests.support.builders import build_other_run
from tests.support.faults import Call, Crash, Fault

CHILDREN = ["ServiceAccount demo", "PersistentVolumeClaim demo", "NetworkPolicy demo"]
STARTED = Started(world_size=1, max_steps=20, resumed_from_step=0)
_PATIENCE_SECONDS = 30
"""After which the events of a job that makes no pods are read, again and again."""
COMPLETED = Result(reason="Completed", message="20 of 20 steps", artifacts={"model": "pvc://demo/demo/final"})


def key(kind: Kind, name: str = "demo") -> ObjectKey:
    return ObjectKey(*kind, "team", name)


def child(bench: Bench, kind: Kind, name: str = "demo") -> Manifest:
    found = bench.others.find(kind, name)
    assert found is not None, f"{kind[1]} {name} is there"
    return found


def run_gang(bench: Bench, attempt: int = 1) -> None:
    """Let the gang of an attempt be made, run and report."""
    bench.settle()
    bench.others.make_pods()
    bench.others.run_pods(attempt)
    bench.settle()
    bench.others.tell(STARTED, attempt=attempt)
    bench.settle()
    assert bench.status.stage == "Training"


def foreign(kind: Kind, name: str = "demo", **fields: Any) -> Manifest:
    metadata = {"name": name, "namespace": "team", "labels": {"made-by": "hand"}}
    return {"apiVersion": kind[0], "kind": kind[1], "metadata": metadata, **fields}


# --- A whole run -----------------------------------------------------------------------------------------------------


def test_a_run_goes_from_prepare_over_an_attempt_to_its_end_with_one_write_for_each_thing_that_happens() -> None:
    bench = Bench()
    bench.submit(prepare={"enabled": True})
    stages = []

    def happens() -> list[str]:
        bench.wait(30)
        bench.port.clear()
        bench.settle()
        stages.append(bench.status.stage)
        assert [call.text for call in bench.port.calls if call.method == "get"] == []
        return bench.port.writes()

    assert happens() == [
        *(f"create {name}" for name in CHILDREN),
        "create ConfigMap demo-prepare",
        "create Job demo-prepare",
        "apply_status TrainingRun demo",
    ]
    bench.others.make_prepare_pod()
    assert happens() == []
    bench.others.tell(PrepareResult(), attempt=0, source="prepare")
    bench.others.end_prepare()
    assert happens() == [
        "apply_status TrainingRun demo",  # attempt 1 is counted before anything is made of it
        "create ConfigMap demo-a1",
        "create PyTorchJob demo-a1",
        "apply_status TrainingRun demo",
    ]
    bench.others.make_pods()
    assert happens() == []
    bench.others.run_pods(1)
    assert happens() == ["apply_status TrainingRun demo"]
    bench.others.tell(STARTED, attempt=1)
    assert happens() == ["apply_status TrainingRun demo"]
    bench.others.tell(attempt=1, step=7)
    assert happens() == []
    bench.others.tell(CheckpointSaved(step=5, uri="pvc://demo/c", bytes=1, digest="0"), attempt=1)
    assert happens() == ["apply_status TrainingRun demo"]
    bench.others.complete_gang(1, result=COMPLETED)
    assert happens() == ["apply_status TrainingRun demo"]
    assert happens() == []

    assert stages == [
        "Preparing", "Preparing", "Starting", "Starting", "Starting",
        "Training", "Training", "Training", "Succeeded", "Succeeded",
    ]  # fmt: skip
    status = bench.status
    assert (status.attempt, status.model and status.model.uri) == (1, "pvc://demo/demo/final")
    assert [(c.type, c.status, c.reason) for c in status.conditions or ()] == [
        ("Accepted", "True", "Accepted"),
        ("Prepared", "True", "Prepared"),
        ("QuotaReserved", "True", "NoQueue"),
        ("ServerReady", "Unknown", "NoServers"),
        ("PodsReady", "False", "Completed"),
        ("Succeeded", "True", "Completed"),
        ("Finished", "True", "Completed"),
        ("Ready", "True", "Completed"),
        ("Stalled", "False", "Completed"),
    ]
    assert bench.events() == [
        "Accepted: The spec is valid and its references resolve.",
        "Prepared: Checks passed, inputs fetched.",
        "AllPodsRunning: Every pod of the gang runs.",
        "Completed: 20 of 20 steps",
    ]


def test_nothing_is_asked_or_written_where_nothing_changed() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    bench.port.clear()
    for _ in range(5):
        bench.look()

    assert bench.port.calls == []


def test_a_fresh_process_writes_nothing_about_a_run_that_is_on_its_way() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    bench.start()
    bench.port.clear()
    bench.settle()

    assert bench.port.calls == []


def test_every_child_is_created_once_and_owned_by_the_run() -> None:
    bench = Bench()
    run = bench.submit(checkpoints={"storage": {"size": "10Gi"}, "retain": "Never"})
    bench.settle()

    owner = {"apiVersion": TRAINING_RUN[0], "kind": TRAINING_RUN[1], "name": "demo", "uid": run["metadata"]["uid"]}
    created = [body for body in bench.port.sent("create") if body["kind"] != "Event"]
    assert len(created) == 5
    for body in created:
        assert body["metadata"]["ownerReferences"] == [owner | {"controller": True, "blockOwnerDeletion": True}]
    assert not [call for call in bench.port.calls if call.method in ("get", "apply")]
    # Before a gang is made it is seen for certain that no other one lives.
    assert [call.text for call in bench.port.calls if call.method == "list"] == ["list Pod"]


def test_a_status_is_written_under_the_version_that_it_was_planned_from() -> None:
    bench = Bench()
    bench.submit()
    bench.settle()
    bench.others.make_pods()
    bench.others.run_pods(1)
    bench.port.clear()
    bench.see()
    before = bench.run["metadata"]
    bench.look()

    (sent,) = bench.port.sent("apply_status")
    assert sent["metadata"] == {part: before[part] for part in ("name", "namespace", "uid", "resourceVersion")}
    assert "progress" not in sent["status"]


def test_progress_stays_the_progress_servers() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    before = bench.status.progress
    bench.others.fail_gang(1, exit_code=138)
    bench.settle()

    assert before is not None
    assert bench.status.progress == before
    assert all("progress" not in body["status"] for body in bench.port.sent("apply_status"))


def test_conditions_are_complete_from_the_first_status() -> None:
    bench = Bench()
    bench.submit(prepare={"enabled": True})
    bench.look()

    (first,) = bench.port.sent("apply_status")
    assert [condition["type"] for condition in first["status"]["conditions"]] == list(TRAINING_RUN_CONDITIONS)


# --- Children that change --------------------------------------------------------------------------------------------


def test_a_child_that_drifted_is_repaired_under_its_uid() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    policy = child(bench, NETWORK_POLICY)
    opened = deepcopy(policy)
    opened["spec"]["ingress"] = [{}]
    opened["metadata"]["labels"]["team"] = "blue"
    bench.cluster.put(opened)
    bench.port.clear()
    bench.settle()

    assert bench.port.writes() == ["apply NetworkPolicy demo"]
    assert bench.port.sent("apply")[0]["metadata"]["uid"] == policy["metadata"]["uid"]
    repaired = child(bench, NETWORK_POLICY)
    assert repaired["spec"] == policy["spec"]
    assert repaired["metadata"]["labels"]["team"] == "blue", "what others added stays"


@pytest.mark.parametrize("kind", [SERVICE_ACCOUNT, CLAIM, NETWORK_POLICY])
def test_a_child_that_somebody_deleted_comes_back(kind: Kind) -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    bench.others.delete(kind, "demo")
    bench.port.clear()
    bench.settle()

    assert bench.port.writes() == [f"create {kind[1]} demo"]
    assert bench.names(kind) == [f"{kind[1]} demo"]


@pytest.mark.parametrize("label", ["posttrain.dev/run", "app.kubernetes.io/managed-by"])
@pytest.mark.parametrize("kind", [SERVICE_ACCOUNT, CLAIM, NETWORK_POLICY])
def test_a_child_that_lost_a_label_gets_it_back(kind: Kind, label: str) -> None:
    bench = Bench()
    bench.submit(checkpoints={"storage": {"size": "10Gi"}, "retain": "Never"})
    run_gang(bench)
    before = child(bench, kind)
    without = deepcopy(before)
    del without["metadata"]["labels"][label]
    bench.cluster.put(without)
    bench.port.clear()
    bench.settle()

    assert child(bench, kind)["metadata"]["labels"] == before["metadata"]["labels"]
    assert child(bench, kind)["metadata"]["uid"] == before["metadata"]["uid"]
    assert bench.port.writes() == [f"create {kind[1]} demo", f"apply {kind[1]} demo"]
    bench.port.clear()
    bench.settle()
    assert bench.port.calls == []


def test_a_retained_claim_that_lost_its_labels_belongs_to_nobody_until_it_has_them_again() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    claim = child(bench, CLAIM)
    bench.cluster.put({**claim, "metadata": {**claim["metadata"], "labels": {}}})
    bench.settle()
    assert bench.says("Accepted") == ("False", "NameConflict")
    assert "PersistentVolumeClaim demo" in bench.condition("Accepted").message

    bench.cluster.put(claim)
    bench.wait(31)
    bench.settle()
    assert bench.says("Accepted") == ("True", "Accepted")


def test_a_claim_that_somebody_enlarged_stays_so() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    claim = child(bench, CLAIM)
    claim["spec"]["resources"]["requests"]["storage"] = "20Gi"
    bench.cluster.put(claim)
    bench.port.clear()
    bench.settle()
    assert bench.port.writes() == []

    relabelled = child(bench, CLAIM)
    relabelled["spec"]["accessModes"] = ["ReadWriteMany"]
    bench.cluster.put(relabelled)
    bench.settle()
    assert child(bench, CLAIM)["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "20Gi"}},
    }


def test_a_live_attempts_job_is_never_rendered_again() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    job = child(bench, PYTORCHJOB, "demo-a1")
    job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["priorityClassName"] = "high"
    bench.cluster.put(job)
    bench.settings = bench.settings.model_copy(update={"termination_grace_seconds": 5})
    bench.start()
    bench.port.clear()
    bench.settle()

    assert bench.port.writes() == []


def test_an_attempts_config_that_somebody_deleted_comes_back() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    data = child(bench, CONFIG_MAP, "demo-a1")["data"]
    bench.others.delete(CONFIG_MAP, "demo-a1")
    bench.port.clear()
    bench.settle()

    assert bench.port.writes() == ["create ConfigMap demo-a1"]
    assert child(bench, CONFIG_MAP, "demo-a1")["data"] == data


def test_a_job_that_somebody_deleted_ends_its_attempt_and_another_follows_when_its_pods_are_gone() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    bench.others.delete(PYTORCHJOB, "demo-a1")
    bench.settle()
    failure, restarts = bench.status.failure, bench.status.restarts
    assert failure is not None
    assert (failure.reason, failure.attempt, bench.status.attempt) == ("JobDeleted", 1, 2)
    assert restarts is not None
    assert (restarts.infrastructure, restarts.application) == (1, 0)
    assert bench.names(PYTORCHJOB) == [], "the pod of attempt 1 lives"

    bench.others.finish_deletions()
    bench.settle()
    assert bench.names(PYTORCHJOB, CONFIG_MAP) == ["PyTorchJob demo-a2", "ConfigMap demo-a2"]


def test_a_gang_that_nobody_makes_has_its_deadline_from_the_moment_that_its_job_was_made() -> None:
    bench = Bench()
    bench.submit(pendingDeadlineSeconds=100)
    # Only what the operator asks for itself: no controller ever touches the job.
    assert bench.settle() == _PATIENCE_SECONDS
    bench.wait(_PATIENCE_SECONDS)
    assert bench.settle() == _PATIENCE_SECONDS
    bench.wait(100 - _PATIENCE_SECONDS)
    bench.settle()

    assert bench.says("Succeeded") == ("False", "PendingDeadlineExceeded")


def test_a_sandbox_that_never_serves_counts_towards_the_pending_deadline() -> None:
    bench = Bench()
    bench.submit(pendingDeadlineSeconds=100, sft=None, grpo={"rewards": [{"name": "code"}], "args": {"max_steps": 20}})
    bench.settle()
    wait_out_pending_deadline(bench, seconds=100)

    assert "the sandbox is starting" in bench.condition("Succeeded").message


def test_a_gang_that_failed_is_replaced_by_a_whole_new_one() -> None:
    bench = Bench()
    bench.submit(resources={"numNodes": 2, "gpusPerNode": 0})
    run_gang(bench)
    bench.others.fail_gang(1, exit_code=138, node=1)
    bench.settle()
    assert (bench.status.attempt, bench.names(PYTORCHJOB)) == (2, []), "the other pod of the gang still ends"

    bench.others.finish_deletions()
    bench.settle()
    assert bench.names(PYTORCHJOB, CONFIG_MAP) == ["PyTorchJob demo-a2", "ConfigMap demo-a2"]
    assert bench.events()[-1].startswith("RankKilled: attempt 1, pod demo-a1-worker-0")


def test_a_pod_that_only_a_live_list_shows_holds_the_new_gang_back() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    bench.others.fail_gang(1, exit_code=138)
    bench.others.finish_deletions()
    bench.see()
    # The training operator made it just before its job was deleted, and the watch has not told of it yet.
    old = child(bench, POD, "demo-a1-master-0")
    metadata = {part: old["metadata"][part] for part in ("namespace", "labels")} | {"name": "demo-a1-worker-9"}
    late = bench.cluster.put({**old, "metadata": metadata, "status": {"phase": "Running"}})
    bench.port.clear()
    for _ in range(4):
        bench.see(TRAINING_RUN, PYTORCHJOB)
        bench.reconcile()
    assert bench.status.attempt == 2
    assert bench.names(PYTORCHJOB) == []
    listed = [call.body["label_selector"] for call in bench.port.calls if call.text == "list Pod"]
    assert listed == ["posttrain.dev/run=demo,posttrain.dev/role=trainer"]

    bench.others.remove_pod(late["metadata"]["name"])
    bench.settle()
    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a2"]


def test_a_first_gang_whose_creation_got_no_answer_is_not_made_twice() -> None:
    undisturbed = Bench()
    undisturbed.submit()
    undisturbed.settle()
    before = [call.text for call in undisturbed.port.calls].index("create PyTorchJob demo-a1")
    bench = Bench()
    bench.submit()
    lost = Fault(when="after", error=Unavailable("the answer broke off"))
    bench.port.faults.extend([*[None] * before, lost])
    with pytest.raises(Unavailable):
        bench.settle()
    # It was made, and then deleted; its pod ends slowly, and the watch of the pods lags behind.
    bench.others.make_pods()
    bench.others.run_pods(1)
    bench.others.delete(PYTORCHJOB, "demo-a1")
    for _ in range(3):
        bench.see(TRAINING_RUN, PYTORCHJOB)
        bench.reconcile()
    assert bench.names(PYTORCHJOB) == []

    bench.others.finish_deletions()
    bench.settle()
    assert len(bench.names(PYTORCHJOB)) == 1


def test_an_operator_with_other_settings_makes_the_gang_of_an_attempt_that_another_one_began() -> None:
    """The attempt's ConfigMap is immutable, and the job is not there yet: a leader was lost between the two."""
    bench = Bench()
    bench.submit()
    lose_leader_before_the_job(bench)
    data = child(bench, CONFIG_MAP, "demo-a1")["data"]

    bench.settings = bench.settings.model_copy(update={"termination_grace_seconds": 5})
    bench.start()
    bench.port.clear()
    bench.settle()

    assert bench.port.writes() == ["create PyTorchJob demo-a1", "apply_status TrainingRun demo"]
    assert bench.says("Accepted") == ("True", "Accepted")
    assert child(bench, CONFIG_MAP, "demo-a1")["data"] == data
    assert not has_drifted(child(bench, PYTORCHJOB, "demo-a1"), wanted=orjson.loads(data["job.json"]))
    run_gang(bench)
    bench.others.fail_gang(1, exit_code=138)
    bench.settle()
    bench.others.finish_deletions()
    bench.settle()
    assert pod_spec(bench, attempt=2)["terminationGracePeriodSeconds"] == 5


def lose_leader_before_the_job(bench: Bench) -> None:
    """Let the operator come as far as the ConfigMap of the first attempt."""

    def answer(call: Call) -> BaseException | None:
        return Unavailable("the leader was lost") if call.text == "create PyTorchJob demo-a1" else None

    bench.port.refuse = answer
    with pytest.raises(Unavailable):
        bench.settle()
    bench.port.refuse = lambda call: None
    assert bench.names(PYTORCHJOB, CONFIG_MAP) == ["ConfigMap demo-a1"]


def pod_spec(bench: Bench, *, attempt: int) -> Manifest:
    """Return the spec of the pods of an attempt's job."""
    job = child(bench, PYTORCHJOB, f"demo-a{attempt}")
    spec: Manifest = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    return spec


def test_a_config_that_is_about_to_go_begins_no_gang() -> None:
    bench = Bench()
    bench.submit()
    lose_leader_before_the_job(bench)
    held = child(bench, CONFIG_MAP, "demo-a1")
    bench.cluster.put({**held, "metadata": {**held["metadata"], "finalizers": ["slow/collector"]}})
    bench.others.delete(CONFIG_MAP, "demo-a1")
    bench.settle()
    assert bench.names(PYTORCHJOB) == []

    gone = child(bench, CONFIG_MAP, "demo-a1")
    bench.cluster.put({**gone, "metadata": {**gone["metadata"], "finalizers": []}})
    bench.settle()
    assert bench.names(PYTORCHJOB, CONFIG_MAP) == ["PyTorchJob demo-a1", "ConfigMap demo-a1"]


# --- Obstacles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "there",
    [
        foreign(CONFIG_MAP, "demo-a1", data={"config.json": "{}"}),
        foreign(CLAIM, spec={"accessModes": ["ReadOnlyMany"]}),
        foreign(SERVICE_ACCOUNT),
    ],
    ids=lambda manifest: str(manifest["kind"]),
)
def test_an_object_that_somebody_made_meanwhile_is_never_touched_and_told_of_once(there: Manifest) -> None:
    bench = Bench()
    bench.submit()
    bench.see()
    before = bench.cluster.put(there)  # after the look at the cluster, before the write
    bench.settle()

    assert bench.says("Accepted") == ("False", "NameConflict")
    assert bench.says("Stalled") == ("True", "NameConflict")
    name = f"{there['kind']} {there['metadata']['name']}"
    assert bench.condition("Accepted").message.startswith(f"{name} exists and does not belong to this run")
    versions, told = bench.run["metadata"]["resourceVersion"], bench.events()
    for _ in range(10):
        bench.wait(31)
        again = bench.settle()
        assert again == 30
    assert bench.run["metadata"]["resourceVersion"] == versions, "the status does not flap"
    assert bench.events() == told

    bench.others.delete(TRAINING_RUN, "demo")
    bench.settle()
    assert bench.cluster.objects((there["apiVersion"], there["kind"])) == [before]


def test_a_run_goes_on_when_what_stood_in_its_way_is_removed() -> None:
    bench = Bench()
    bench.submit()
    bench.cluster.put(foreign(CONFIG_MAP, "demo-a1"))
    bench.settle()
    assert bench.says("Accepted") == ("False", "NameConflict")
    bench.others.delete(CONFIG_MAP, "demo-a1")
    bench.settle()
    assert bench.says("Accepted") == ("False", "NameConflict"), "nobody tells of what bears no label"

    bench.wait(31)
    bench.settle()
    assert bench.says("Accepted") == ("True", "Accepted")
    assert bench.names() == ["PyTorchJob demo-a1", "ConfigMap demo-a1", *(CHILDREN)]


def test_an_object_that_bears_the_label_and_no_owner_stands_in_the_way_until_it_is_removed() -> None:
    bench = Bench()
    bench.submit()
    by_hand = foreign(CONFIG_MAP, "demo-a1")
    by_hand["metadata"]["labels"] = {"app.kubernetes.io/managed-by": "posttrain", "posttrain.dev/run": "demo"}
    before = bench.cluster.put(by_hand)
    bench.settle()
    assert bench.says("Accepted") == ("False", "NameConflict")
    assert child(bench, CONFIG_MAP, "demo-a1") == before
    assert not bench.names(PYTORCHJOB)

    bench.others.delete(CONFIG_MAP, "demo-a1")
    bench.settle()
    assert bench.says("Accepted") == ("True", "Accepted")


def lose_owner(bench: Bench) -> Manifest:
    """Take the owner from the run's NetworkPolicy: it is somebody else's from then on; return it as it stands."""
    policy = child(bench, NETWORK_POLICY)
    del policy["metadata"]["ownerReferences"]
    lost = bench.cluster.put(policy)
    bench.settle()
    assert bench.says("Accepted") == bench.says("Succeeded") == ("False", "NameConflict")
    return lost


def test_a_run_that_ends_is_complete_although_something_stands_in_its_way() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    lost = lose_owner(bench)
    assert (bench.status.stage, bench.says("PodsReady")) == ("Training", ("True", "AllPodsRunning"))
    bench.others.complete_gang(1, result=COMPLETED)
    bench.settle()

    assert bench.says("Succeeded") == bench.says("Finished") == bench.says("Ready") == ("True", "Completed")
    assert bench.says("Stalled") == ("False", "Completed")
    assert bench.says("Accepted") == ("False", "NameConflict")
    assert bench.status.stage == "Succeeded"
    assert child(bench, NETWORK_POLICY) == lost
    assert [event.partition(":")[0] for event in bench.events()] == [
        "Accepted",
        "AllPodsRunning",
        "NameConflict",
        "Completed",
    ]


def test_a_gang_that_fails_beside_a_conflict_is_charged_at_once_and_replaced_when_the_conflict_is_over() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    lost = lose_owner(bench)
    bench.others.fail_gang(1, exit_code=138)
    bench.settle()
    bench.others.finish_deletions()
    bench.settle()

    restarts, failure = bench.status.restarts, bench.status.failure
    assert (bench.status.attempt, restarts and restarts.infrastructure, failure and failure.reason) == (
        2,
        1,
        "RankKilled",
    )
    assert bench.says("Accepted") == bench.says("Succeeded") == ("False", "NameConflict")
    assert bench.names(PYTORCHJOB, CONFIG_MAP) == [], "the old gang is cleared away, and no new one is made"
    assert child(bench, NETWORK_POLICY) == lost
    version = bench.run["metadata"]["resourceVersion"]
    bench.wait(31)
    bench.settle()
    assert bench.run["metadata"]["resourceVersion"] == version, "the status does not flap"

    bench.others.delete(NETWORK_POLICY, "demo")
    bench.settle()
    assert bench.says("Accepted") == ("True", "Accepted")
    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a2"]
    assert bench.status.attempt == 2


def test_a_run_is_suspended_and_its_gang_ends_although_something_stands_in_its_way() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    lose_owner(bench)
    bench.others.change_run(suspend=True)
    bench.settle()
    bench.others.finish_deletions()
    bench.settle()

    assert (bench.status.stage, bench.status.attempt) == ("Suspended", 2)
    assert bench.says("PodsReady") == ("False", "Suspended")
    assert bench.says("Accepted") == ("False", "NameConflict")
    assert bench.names(PYTORCHJOB) == []
    bench.others.change_run(suspend=False)
    bench.settle()
    assert bench.names(PYTORCHJOB) == []


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"activeDeadlineSeconds": 600}, "DeadlineExceeded"),
        ({"restarts": {"progressDeadlineSeconds": 600, "maxInfrastructureRestarts": 0}}, "ProgressStalled"),
    ],
)
def test_a_deadline_ends_a_run_although_something_stands_in_its_way(spec: dict[str, Any], reason: str) -> None:
    bench = Bench()
    bench.submit(**spec)
    run_gang(bench)
    lose_owner(bench)
    bench.wait(601)
    bench.settle()

    assert bench.says("Finished") == ("True", reason)
    assert bench.names(PYTORCHJOB) == []


def test_a_gang_that_a_conflict_keeps_from_being_made_has_the_runs_deadline() -> None:
    bench = Bench()
    bench.submit(activeDeadlineSeconds=600)
    run_gang(bench)
    lose_owner(bench)
    bench.others.fail_gang(1, exit_code=138)
    bench.settle()
    bench.others.finish_deletions()
    bench.settle()
    assert bench.says("Finished") == ("False", "NameConflict")

    bench.wait(601)
    bench.settle()
    assert bench.says("Finished") == ("True", "DeadlineExceeded")


def test_what_prepare_found_ends_a_run_although_something_stands_in_its_way() -> None:
    bench = Bench()
    bench.submit(prepare={"enabled": True})
    bench.settle()
    lose_owner(bench)
    bench.others.tell(PrepareResult(problems=("DatasetEmpty: no row is left",)), attempt=0, source="prepare")
    bench.others.end_prepare("Failed")
    bench.settle()

    assert bench.says("Finished") == ("True", "DatasetEmpty")


def refuse_run_that_is_prepared() -> Bench:
    """Let a run be prepared, and its profile be taken away meanwhile."""
    bench = bench_with_profiles()
    bench.submit(prepare={"enabled": True}, resources={"gpusPerNode": 1, "profile": "h200"})
    bench.settle()
    take_profile_away(bench)
    return bench


def test_a_run_whose_spec_is_refused_while_it_is_prepared_is_suspended_all_the_same() -> None:
    bench = refuse_run_that_is_prepared()
    bench.settle()
    assert (bench.status.stage, bench.says("Accepted")) == ("Preparing", ("False", "InvalidSpec"))
    bench.others.change_run(suspend=True)
    bench.settle()

    assert (bench.status.stage, bench.names(JOB)) == ("Suspended", [])
    assert bench.says("Accepted") == ("False", "InvalidSpec")


def test_what_prepare_found_ends_a_run_although_its_spec_is_refused() -> None:
    bench = refuse_run_that_is_prepared()
    bench.others.tell(PrepareResult(problems=("DatasetEmpty: no row is left",)), attempt=0, source="prepare")
    bench.others.end_prepare("Failed")
    bench.settle()

    assert bench.says("Finished") == ("True", "DatasetEmpty")


def test_a_run_whose_spec_is_refused_begins_nothing_when_it_is_prepared() -> None:
    bench = refuse_run_that_is_prepared()
    bench.others.tell(PrepareResult(problems=()), attempt=0, source="prepare")
    bench.others.end_prepare()
    bench.settle()
    assert (bench.status.attempt, bench.says("Accepted")) == (None, ("False", "InvalidSpec"))
    assert bench.names(PYTORCHJOB) == []

    bench.settings = bench_with_profiles().settings
    bench.start()
    bench.settle()
    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a1"]


def test_a_gang_is_not_made_beside_a_configuration_that_is_somebody_elses() -> None:
    bench = Bench()
    bench.submit()
    bench.cluster.put(foreign(CONFIG_MAP, "demo-a1", data={"config.json": "{}"}))
    bench.settle()

    assert bench.says("Accepted") == ("False", "NameConflict")
    assert bench.names(PYTORCHJOB) == []


def assert_accepted_when_nothing_is_refused(bench: Bench) -> None:
    """Let the server take everything again, and see that the run is accepted once its children are tried anew."""
    bench.port.refuse = lambda call: None
    bench.wait(31)
    bench.settle()
    assert bench.says("Accepted") == ("True", "Accepted")


def refuse(kind: Kind, words: str) -> Any:
    def answer(call: Call) -> BaseException | None:
        return Rejected(words) if call.kind == kind and call.method in ("create", "apply") else None

    return answer


def test_a_child_that_the_server_refuses_is_told_in_its_words_and_tried_again_now_and_then() -> None:
    bench = Bench()
    bench.submit()
    bench.port.refuse = refuse(CLAIM, 'exceeded quota: storage, requested: 10Gi, limited: "5Gi"')
    again = bench.settle()

    assert again == 30
    assert bench.says("Accepted") == ("False", "ChildRejected")
    assert bench.says("Succeeded") == ("False", "ChildRejected")
    message = bench.condition("Accepted").message
    assert message == 'PersistentVolumeClaim demo was refused: exceeded quota: storage, requested: 10Gi, limited: "5Gi"'
    told, version = bench.events(), bench.run["metadata"]["resourceVersion"]
    bench.port.clear()
    for _ in range(3):
        bench.look()
    assert bench.port.calls == [], "a look meanwhile tries nothing"
    for _ in range(10):
        bench.wait(31)
        bench.settle()
    assert [text for text in bench.port.writes() if "PersistentVolumeClaim" not in text] == []
    assert len(bench.port.writes()) == 10
    assert (bench.events(), bench.run["metadata"]["resourceVersion"]) == (told, version)

    assert_accepted_when_nothing_is_refused(bench)
    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a1"]


def test_everything_that_is_refused_is_named_at_once() -> None:
    bench = Bench()
    bench.submit()
    bench.port.refuse = lambda call: Rejected("denied by policy") if call.kind in (CLAIM, NETWORK_POLICY) else None
    bench.settle()

    assert bench.condition("Accepted").message == (
        "NetworkPolicy demo was refused: denied by policy\nPersistentVolumeClaim demo was refused: denied by policy"
    )


def test_a_repair_that_the_server_refuses_is_told_as_well() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    policy = child(bench, NETWORK_POLICY)
    policy["spec"]["ingress"] = [{}]
    bench.cluster.put(policy)
    bench.port.refuse = refuse(NETWORK_POLICY, "denied by policy")
    bench.settle()

    assert bench.says("Accepted") == ("False", "ChildRejected")
    assert bench.condition("Accepted").message == "NetworkPolicy demo was refused: denied by policy"


def test_a_cluster_without_the_training_operator_is_told_to_the_user() -> None:
    bench = Bench(missing_kinds=frozenset({PYTORCHJOB}))
    bench.submit()
    bench.settle()

    assert bench.says("Accepted") == ("False", "ChildRejected")
    assert "PyTorchJob demo-a1 was refused: the server has no kubeflow.org/v1" in bench.condition("Accepted").message
    bench.cluster.missing_kinds = frozenset()
    bench.wait(31)
    bench.settle()
    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a1"]


# --- The server fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "error",
    [Unavailable("timeout", retry_after=3), InternalError("etcdserver: leader changed"), Crash()],
    ids=["unavailable", "internal", "crash"],
)
def test_whichever_call_of_a_start_breaks_the_run_ends_up_the_same(when: Any, error: BaseException) -> None:
    undisturbed = Bench()
    undisturbed.submit()
    undisturbed.settle()
    for number in range(len(undisturbed.port.calls)):
        bench = Bench()
        bench.submit()
        bench.port.faults.extend([*[None] * number, Fault(when=when, error=error)])
        with suppress(Unavailable, Crash):
            bench.settle()
        assert not bench.port.faults
        if isinstance(error, Crash):
            bench.start()
        bench.settle()

        assert bench.names() == undisturbed.names()
        assert (bench.status.attempt, bench.status.stage) == (1, "Starting")
        assert bench.status == undisturbed.status


def test_an_answer_that_the_server_owes_is_the_queues_to_wait_for() -> None:
    bench = Bench()
    bench.submit()
    bench.port.faults.append(Fault(when="before", error=Unavailable("overloaded", retry_after=7)))

    with pytest.raises(Unavailable) as raised:
        bench.look()
    assert raised.value.retry_after == 7


WEBHOOK = 'Internal error occurred: failed calling webhook "v.example.com": connection refused (HTTP 500)'


def break_webhook(bench: Bench, *kinds: Kind, methods: tuple[str, ...] = ("create", "apply", "patch")) -> None:
    """Let every write of these kinds fail as where a webhook does not answer (failurePolicy: Fail)."""
    bench.port.refuse = lambda call: InternalError(WEBHOOK) if call.kind in kinds and call.method in methods else None


def look_for(bench: Bench, seconds: float) -> None:
    """Look as the queue does at what failed: again and again, and later each time."""
    until, delay = bench.now.timestamp() + seconds, 0.2
    while bench.now.timestamp() < until:
        try:
            bench.settle()
        except Unavailable:
            bench.wait(delay)
            delay *= 2
        else:
            return


def test_a_child_at_which_the_server_goes_on_failing_is_told_in_its_words_and_made_when_it_does_not() -> None:
    bench = Bench()
    bench.submit(prepare={"enabled": True})
    break_webhook(bench, NETWORK_POLICY)
    look_for(bench, seconds=10)

    assert [condition.type for condition in bench.status.conditions or ()] == list(TRAINING_RUN_CONDITIONS)
    assert bench.says("Accepted") == bench.says("Succeeded") == ("False", "ChildRejected")
    assert bench.says("Stalled") == ("True", "ChildRejected")
    assert bench.condition("Accepted").message == f"NetworkPolicy demo was refused: {WEBHOOK}"
    assert bench.names(JOB) == [], "no pod runs without it"
    told, version = bench.events(), bench.run["metadata"]["resourceVersion"]
    assert [event.partition(":")[0] for event in told] == ["ChildRejected"]
    bench.start()  # a new operator finds it as the old one left it
    for _ in range(5):
        bench.wait(31)
        bench.port.clear()
        assert bench.settle() == 30
        assert bench.port.writes() == ["create NetworkPolicy demo"]
    assert (bench.events(), bench.run["metadata"]["resourceVersion"]) == (told, version)

    assert_accepted_when_nothing_is_refused(bench)
    assert bench.names(JOB) == ["Job demo-prepare"]


def test_a_webhook_that_is_away_for_a_moment_is_no_news() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    told, before = bench.events(), bench.status
    bench.others.delete(NETWORK_POLICY, "demo")
    break_webhook(bench, NETWORK_POLICY)
    for _ in range(6):
        with pytest.raises(InternalError):
            bench.look()
        bench.wait(0.8)
    bench.port.refuse = lambda call: None
    bench.settle()

    assert bench.names(NETWORK_POLICY) == ["NetworkPolicy demo"]
    assert (bench.events(), bench.status) == (told, before)
    bench.others.delete(NETWORK_POLICY, "demo")
    break_webhook(bench, NETWORK_POLICY)
    bench.wait(10)
    with pytest.raises(InternalError):
        bench.look()


def test_a_gang_that_cannot_be_made_is_told_of_and_its_attempt_is_counted_once() -> None:
    bench = Bench()
    bench.submit()
    break_webhook(bench, PYTORCHJOB)
    look_for(bench, seconds=10)
    assert bench.condition("Accepted").message == f"PyTorchJob demo-a1 was refused: {WEBHOOK}"
    assert bench.status.attempt == 1

    bench.port.refuse = lambda call: None
    bench.wait(31)
    run_gang(bench)
    assert bench.says("Accepted") == ("True", "Accepted")
    assert (bench.status.attempt, bench.names(PYTORCHJOB)) == (1, ["PyTorchJob demo-a1"])


@pytest.mark.parametrize("fails", ["before", "after"])
def test_what_is_observed_is_told_although_something_cannot_be_carried_out(fails: str) -> None:
    bench = Bench()
    bench.submit(restarts={"progressDeadlineSeconds": 600, "maxInfrastructureRestarts": 0})
    bench.settle()
    bench.others.make_pods()
    bench.others.run_pods(1)
    if fails == "after":
        bench.settle()
    bench.others.delete(NETWORK_POLICY, "demo")
    break_webhook(bench, NETWORK_POLICY)
    bench.others.tell(STARTED, attempt=1)
    with pytest.raises(InternalError):
        bench.look()

    assert bench.says("Accepted") == ("True", "Accepted")
    assert (bench.status.stage, bench.says("PodsReady")) == ("Training", ("True", "AllPodsRunning"))
    assert bench.status.attempt_running_time == bench.now
    look_for(bench, seconds=10)
    assert bench.says("Accepted") == ("False", "ChildRejected")
    assert (bench.status.stage, bench.says("PodsReady")) == ("Training", ("True", "AllPodsRunning"))
    bench.wait(601)
    look_for(bench, seconds=10)
    assert bench.says("Finished") == ("True", "ProgressStalled")


def test_pods_that_cannot_be_listed_are_told_of_and_no_gang_is_made_meanwhile() -> None:
    bench = Bench()
    bench.submit()
    bench.port.refuse = lambda call: InternalError(WEBHOOK) if call.text == "list Pod" else None
    look_for(bench, seconds=10)

    assert bench.condition("Accepted").message == f"PyTorchJob demo-a1 was refused: {WEBHOOK}"
    assert bench.names(PYTORCHJOB) == []
    assert_accepted_when_nothing_is_refused(bench)
    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a1"]


@pytest.mark.parametrize("error", [InternalError(WEBHOOK), Rejected("configmaps is forbidden")])
def test_own_code_that_cannot_be_read_is_told_in_the_servers_words_and_asked_for_now_and_then(error: Exception) -> None:
    bench = Bench()
    bench.cluster.put(foreign(CONFIG_MAP, "my-code", data={"a.py": "x = 1\n"}))
    bench.submit(code={"configMapName": "my-code"})
    bench.port.refuse = lambda call: error if call.text == "get ConfigMap my-code" else None
    look_for(bench, seconds=10)

    assert bench.says("Accepted") == ("False", "ChildRejected")
    assert bench.condition("Accepted").message == f"ConfigMap my-code cannot be read: {error}"
    told, version = bench.events(), bench.run["metadata"]["resourceVersion"]
    bench.port.clear()
    look_for(bench, seconds=25)
    assert len([call for call in bench.port.calls if call.method == "get"]) <= 1
    bench.wait(31)
    bench.settle()
    assert (bench.events(), bench.run["metadata"]["resourceVersion"]) == (told, version), "the status does not flap"

    assert_accepted_when_nothing_is_refused(bench)
    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a1"]


def test_a_failure_beside_a_conflict_does_not_hide_it() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    bench.others.delete(SERVICE_ACCOUNT, "demo")
    bench.cluster.put(foreign(SERVICE_ACCOUNT))
    bench.settle()
    told, version = bench.events(), bench.run["metadata"]["resourceVersion"]
    bench.others.delete(NETWORK_POLICY, "demo")
    break_webhook(bench, NETWORK_POLICY)
    bench.wait(31)
    bench.settle()

    assert bench.says("Accepted") == ("False", "NameConflict")
    assert (bench.events(), bench.run["metadata"]["resourceVersion"]) == (told, version)


def test_an_api_server_that_fails_at_everything_refuses_no_child() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    told = bench.events()
    bench.others.delete(NETWORK_POLICY, "demo")
    bench.port.refuse = lambda call: InternalError("etcdserver: no leader")
    for _ in range(20):
        with pytest.raises(InternalError):
            bench.look()
        bench.wait(7)
    bench.port.refuse = lambda call: Unavailable("connection refused")
    for _ in range(20):
        with pytest.raises(Unavailable):
            bench.look()
        bench.wait(7)
    bench.port.refuse = lambda call: None
    bench.look()

    assert bench.names(NETWORK_POLICY) == ["NetworkPolicy demo"]
    assert bench.says("Accepted") == ("True", "Accepted")
    assert bench.events() == told


@pytest.mark.parametrize("error", [InternalError(WEBHOOK), Rejected("denied by policy")], ids=["fails", "refuses"])
def test_what_cannot_be_deleted_is_told_and_tried_until_it_can(error: Exception) -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    bench.port.refuse = lambda call: error if (call.method, call.kind) == ("delete", PYTORCHJOB) else None
    bench.others.change_run(suspend=True)
    look_for(bench, seconds=10)
    assert (bench.status.stage, bench.status.attempt) == ("Suspended", 2)
    assert bench.condition("Accepted").message == f"PyTorchJob demo-a1 was refused: {error}"
    bench.port.clear()
    bench.wait(31)
    assert bench.settle() == 30
    assert bench.port.writes() == ["delete PyTorchJob demo-a1"]

    assert_accepted_when_nothing_is_refused(bench)
    assert bench.names(PYTORCHJOB) == []


def test_whoever_wrote_in_between_wins_and_is_planned_with() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    bench.others.fail_gang(1, exit_code=138)
    bench.see()
    bench.others.change_run(suspend=True)
    bench.port.clear()
    bench.reconcile()

    assert [call.text for call in bench.port.calls][:2] == ["apply_status TrainingRun demo", "get TrainingRun demo"]
    restarts = bench.status.restarts
    assert restarts is not None
    assert (restarts.infrastructure, bench.status.attempt, bench.status.stage) == (0, 2, "Suspended")


def test_a_run_that_never_stands_still_is_left_to_the_queue() -> None:
    bench = Bench()
    bench.submit()

    def somebody_writes(call: Call) -> BaseException | None:
        if call.method == "apply_status":
            bench.others.change_run(ttlSecondsAfterFinished=len(bench.port.calls))
        return None

    bench.port.refuse = somebody_writes
    with pytest.raises(Conflict, match="team/demo changed 5 times"):
        bench.look()
    bench.port.refuse = lambda call: None
    bench.settle()
    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a1"]


def test_a_child_that_was_made_anew_by_somebody_is_not_repaired_under_the_old_uid() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    policy = child(bench, NETWORK_POLICY)
    policy["spec"]["ingress"] = [{}]
    bench.cluster.put(policy)
    bench.see()
    bench.others.delete(NETWORK_POLICY, "demo")
    before = bench.cluster.put(foreign(NETWORK_POLICY))
    bench.reconcile()

    assert child(bench, NETWORK_POLICY) == before
    assert bench.says("Accepted") == ("False", "NameConflict")


def test_a_conflict_does_not_hide_an_object_that_is_still_the_same() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    policy = child(bench, NETWORK_POLICY)
    policy["spec"]["ingress"] = [{}]
    bench.cluster.put(policy)
    bench.port.faults.append(Fault(when="before", error=Conflict("the object has been modified")))
    bench.settle()

    assert child(bench, NETWORK_POLICY)["spec"]["ingress"] != [{}]
    bench.others.delete(NETWORK_POLICY, "demo")
    bench.settle()
    assert bench.names(NETWORK_POLICY) == ["NetworkPolicy demo"]


# --- Runs that come and go -------------------------------------------------------------------------------------------


def test_a_run_that_is_being_deleted_is_left_alone() -> None:
    bench = Bench()
    run = bench.submit()
    run["metadata"]["deletionTimestamp"] = "2026-03-01T09:00:00Z"
    run["metadata"]["finalizers"] = ["somebody/else"]
    bench.cluster.put(run)

    assert bench.settle() is None
    assert bench.port.calls == []


def test_a_run_that_is_gone_is_nothing_to_look_at() -> None:
    bench = Bench()

    assert bench.settle() is None
    assert bench.port.calls == []


def test_a_run_that_goes_while_it_is_looked_at_leaves_nothing_but_its_claim() -> None:
    bench = Bench()
    bench.submit()
    bench.see()
    bench.others.delete(TRAINING_RUN, "demo")
    bench.reconcile()
    bench.settle()

    assert bench.names() == []


def test_what_the_predecessor_of_the_same_name_left_is_waited_for() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    pod = child(bench, POD, "demo-a1-master-0")
    bench.wait(60)
    bench.others.delete(TRAINING_RUN, "demo")
    bench.wait(1)
    bench.submit()
    bench.port.clear()
    bench.settle()
    assert bench.port.writes() == ["apply_status TrainingRun demo"], "the old pod still writes to the storage"
    assert child(bench, POD, "demo-a1-master-0")["metadata"]["uid"] == pod["metadata"]["uid"]
    assert [condition.type for condition in bench.status.conditions or ()] == list(TRAINING_RUN_CONDITIONS)
    for type_ in ("Accepted", "Succeeded", "Finished"):
        assert bench.says(type_) == ("False", "PredecessorEnding")
    assert bench.says("Stalled") == ("False", "PredecessorEnding")
    waited = "waiting for Pod demo-a1-master-0, which an earlier run of this name left"
    assert bench.condition("Accepted").message == waited

    bench.rung.clear()
    bench.others.finish_deletions()
    bench.see()
    assert RUN in bench.rung, "nobody has to ask again and again whether it is gone"
    run_gang(bench)
    assert bench.status.attempt == 1


def test_a_pod_of_the_predecessor_that_never_goes_is_told_of_once_and_then_what_a_person_can_do() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    bench.wait(60)
    bench.others.delete(TRAINING_RUN, "demo")  # the pod's node is dead: it is being deleted for ever
    bench.wait(1)
    told = len(bench.events())
    bench.submit()
    assert bench.settle() == 119
    first = bench.run["metadata"]["resourceVersion"]
    bench.wait(60)
    assert bench.settle() == 59
    assert bench.run["metadata"]["resourceVersion"] == first

    bench.wait(60)
    assert bench.settle() is None
    assert bench.says("Stalled") == ("True", "PredecessorEnding")
    assert bench.condition("Accepted").message == (
        "waiting for Pod demo-a1-master-0, which an earlier run of this name left: it was deleted, and node node-0 "
        "does not say that it has ended. A pod of this run would bear its name. When that node is surely off, delete "
        "its Node object, or the pod by: kubectl delete pod demo-a1-master-0 -n team --force"
    )
    bench.port.clear()
    for _ in range(5):
        bench.wait(86400)
        assert bench.look() is None
    assert bench.port.calls == []
    assert [event.partition(":")[0] for event in bench.events()[told:]] == ["PredecessorEnding"]

    bench.others.finish_deletions()
    run_gang(bench)


def test_a_pod_of_the_predecessor_whose_name_nobody_bears_again_is_given_up_with_its_silent_node() -> None:
    bench = Bench()
    bench.submit(prepare={"enabled": True})
    bench.settle()
    bench.others.make_prepare_pod()
    bench.see()
    bench.wait(60)
    bench.others.delete(TRAINING_RUN, "demo")
    bench.wait(1)
    bench.submit(prepare={"enabled": True})
    assert bench.settle() == 119
    assert bench.condition("Accepted").message.startswith("waiting for Pod demo-prepare-x7k2p, which")
    assert bench.names(JOB) == []
    bench.wait(119)
    bench.settle()

    assert bench.says("Accepted") == ("True", "Accepted")
    assert bench.names(JOB) == ["Job demo-prepare"]


def test_a_run_whose_spec_is_wrong_is_told_so_although_its_predecessor_is_still_there() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    bench.wait(60)
    bench.others.delete(TRAINING_RUN, "demo")
    bench.wait(1)
    bench.submit(sft={"args": {"learning_rat": 0.1}})
    bench.settle()

    assert bench.says("Accepted") == ("False", "InvalidSpec")


def test_children_of_the_predecessor_are_not_the_new_runs() -> None:
    bench = Bench()
    old = bench.submit(uid="00000000-0000-4000-8000-00000000aaaa")
    bench.settle()
    held = child(bench, CONFIG_MAP, "demo-a1")
    bench.cluster.put({**held, "metadata": {**held["metadata"], "finalizers": ["slow/collector"]}})
    bench.others.delete(TRAINING_RUN, "demo")
    run = bench.submit()
    assert run["metadata"]["uid"] != old["metadata"]["uid"]
    bench.port.clear()
    bench.settle()
    assert bench.port.writes() == ["apply_status TrainingRun demo"]
    waited = "waiting for ConfigMap demo-a1, which an earlier run of this name left"
    assert bench.condition("Accepted").message == waited

    gone = child(bench, CONFIG_MAP, "demo-a1")
    bench.cluster.put({**gone, "metadata": {**gone["metadata"], "finalizers": []}})
    bench.settle()
    assert child(bench, CONFIG_MAP, "demo-a1")["metadata"]["ownerReferences"][0]["uid"] == run["metadata"]["uid"]


def test_the_claim_of_a_run_that_retained_it_serves_the_next_one_of_its_name() -> None:
    bench = Bench()
    bench.submit()
    bench.settle()
    claim = child(bench, CLAIM)
    bench.others.delete(TRAINING_RUN, "demo")
    bench.settle()
    bench.submit()
    bench.settle()

    assert child(bench, CLAIM) == claim
    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a1"]


def test_a_run_is_deleted_when_its_time_after_the_end_is_over() -> None:
    bench = Bench()
    bench.submit(ttlSecondsAfterFinished=100)
    run_gang(bench)
    bench.others.complete_gang(1, result=COMPLETED)
    assert bench.settle() == 100
    bench.wait(95)
    assert bench.settle() == 5
    bench.wait(5)
    bench.port.clear()
    bench.settle()

    assert bench.port.writes() == ["delete TrainingRun demo"]
    assert bench.names(TRAINING_RUN, PYTORCHJOB, CONFIG_MAP, CLAIM) == ["PersistentVolumeClaim demo"]


# --- What is stored --------------------------------------------------------------------------------------------------


def test_a_stored_spec_that_todays_schema_refuses_is_told_by_field_and_not_tried_again() -> None:
    bench = Bench()
    bench.submit(restarts={"maxInfrastructureRestarts": "many"}, colour="blue")
    assert bench.settle() is None

    for type_ in ("Accepted", "Succeeded", "Ready"):
        assert bench.says(type_) == ("False", "InvalidSpec")
    assert bench.says("Stalled") == ("True", "InvalidSpec")
    assert bench.says("PodsReady") == ("Unknown", "Pending")
    message = bench.condition("Accepted").message
    assert "spec.restarts.maxInfrastructureRestarts" in message
    assert "spec.colour" in message
    assert bench.names() == []
    bench.port.clear()
    bench.wait(1000)
    assert bench.settle() is None
    assert bench.port.calls == []


def test_a_run_whose_spec_is_mended_goes_on_with_what_was_known_of_it() -> None:
    bench = Bench()
    run = bench.submit()
    run_gang(bench)
    bench.others.change_run(colour="blue")
    bench.settle()
    assert bench.says("Accepted") == ("False", "InvalidSpec")
    assert (bench.status.attempt, bench.status.stage) == (1, "Training")
    bench.cluster.put({**bench.run, "spec": run["spec"]})
    bench.settle()

    assert bench.says("Accepted") == ("True", "Accepted")
    assert (bench.status.attempt, bench.status.stage) == (1, "Training")


def test_a_stored_status_that_todays_schema_refuses_loses_nothing() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    run = bench.run
    run["status"]["usage"] = {"gpuSeconds": 17}
    bench.cluster.put(run)
    bench.settle()

    status = bench.run["status"]
    assert status["usage"] == {"gpuSeconds": 17}
    assert {name: status[name] for name in ("attempt", "restarts", "provenance")} == {
        name: run["status"][name] for name in ("attempt", "restarts", "provenance")
    }
    accepted = next(c for c in status["conditions"] if c["type"] == "Accepted")
    assert accepted["reason"] == "InvalidSpec"
    bench.port.clear()
    bench.settle()
    assert bench.port.calls == []


def test_a_spec_that_cannot_be_carried_out_is_told_by_field() -> None:
    bench = Bench()
    bench.submit(sft={"args": {"learning_rat": 0.1}}, resources={"gpusPerNode": 0, "profile": "h200"})
    assert bench.settle() is None

    assert bench.says("Accepted") == ("False", "InvalidSpec")
    message = bench.condition("Accepted").message
    assert "spec.sft.args.learning_rat" in message
    assert "spec.resources.profile: there is no profile 'h200' here" in message


def take_profile_away(bench: Bench) -> None:
    """Begin anew as an operator in whose settings the run's profile is no more."""
    bench.settings = Settings()
    bench.start()


def misspell_argument(bench: Bench) -> None:
    """Let the operator find an argument that it does not know, as a stricter one would in the spec as it was."""
    bench.others.change_run(sft={"args": {"learning_rat": 0.1}})


def refuse_live_run(bench: Bench, refuse: Callable[[Bench], None], **spec: Any) -> None:
    """Let an attempt train, and its spec be refused then."""
    bench.submit(resources={"gpusPerNode": 1, "profile": "h200"}, **spec)
    run_gang(bench)
    refuse(bench)
    bench.settle()
    assert bench.says("Accepted") == bench.says("Succeeded") == ("False", "InvalidSpec")
    assert (bench.status.stage, bench.says("PodsReady")) == ("Training", ("True", "AllPodsRunning"))


REFUSALS = pytest.mark.parametrize("refused", [take_profile_away, misspell_argument])


def bench_with_profiles() -> Bench:
    return Bench(settings=Settings(profiles={"default": Profile(), "h200": Profile(price_per_gpu_hour="2")}))


@REFUSALS
def test_a_gang_whose_spec_is_refused_while_it_trains_goes_on_and_ends_the_run(
    refused: Callable[[Bench], None],
) -> None:
    bench = bench_with_profiles()
    refuse_live_run(bench, refused)
    job = child(bench, PYTORCHJOB, "demo-a1")
    bench.wait(3600)
    bench.others.tell(CheckpointSaved(step=5, uri="pvc://demo/c", bytes=1, digest="0"), attempt=1)
    bench.settle()
    usage, checkpoints = bench.status.usage, bench.status.checkpoints
    assert (usage and usage.cost, checkpoints and checkpoints.latest_step) == ("2.00", 5)
    assert child(bench, PYTORCHJOB, "demo-a1") == job
    bench.others.complete_gang(1, result=COMPLETED)
    bench.settle()

    assert bench.says("Succeeded") == bench.says("Finished") == ("True", "Completed")
    assert bench.says("Stalled") == ("False", "Completed")
    assert bench.says("Accepted") == ("False", "InvalidSpec")
    assert bench.says("Prepared") == ("True", "PrepareDisabled")
    assert bench.status.model and bench.status.model.uri == "pvc://demo/demo/final"


@REFUSALS
def test_a_gang_that_fails_under_a_refused_spec_is_charged_and_no_other_is_made_until_it_is_mended(
    refused: Callable[[Bench], None],
) -> None:
    bench = bench_with_profiles()
    refuse_live_run(bench, refused)
    bench.others.fail_gang(1, exit_code=138)
    bench.settle()
    bench.others.finish_deletions()
    bench.settle()

    restarts, failure = bench.status.restarts, bench.status.failure
    charged = (bench.status.attempt, restarts and restarts.infrastructure, failure and failure.reason)
    assert charged == (2, 1, "RankKilled")
    assert bench.says("Accepted") == bench.says("Succeeded") == bench.says("Finished") == ("False", "InvalidSpec")
    assert bench.says("Stalled") == ("True", "InvalidSpec")
    assert bench.names(PYTORCHJOB, CONFIG_MAP) == []
    version = bench.run["metadata"]["resourceVersion"]
    bench.wait(1000)
    bench.settle()
    assert bench.run["metadata"]["resourceVersion"] == version, "the status does not flap"

    bench.others.change_run(sft={"args": {"max_steps": 20}})
    bench.settings = bench_with_profiles().settings
    bench.start()
    bench.settle()
    assert bench.says("Accepted") == ("True", "Accepted")
    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a2"]


def test_a_gang_that_fails_under_a_refused_spec_ends_the_run_when_the_budget_is_spent() -> None:
    bench = bench_with_profiles()
    refuse_live_run(bench, take_profile_away, restarts={"maxInfrastructureRestarts": 0})
    bench.others.fail_gang(1, exit_code=138)
    bench.settle()

    assert bench.says("Finished") == ("True", "RankKilled")
    assert bench.status.stage == "Failed"


def test_a_gang_whose_spec_is_refused_is_suspended_and_has_its_deadline() -> None:
    bench = bench_with_profiles()
    refuse_live_run(bench, misspell_argument, activeDeadlineSeconds=600)
    bench.others.change_run(suspend=True)
    bench.settle()
    bench.others.finish_deletions()
    bench.settle()
    assert (bench.status.stage, bench.names(PYTORCHJOB)) == ("Suspended", [])
    bench.others.change_run(suspend=False)
    bench.settle()
    assert bench.names(PYTORCHJOB) == []

    bench.wait(601)
    bench.settle()
    assert bench.says("Finished") == ("True", "DeadlineExceeded")


def test_a_profile_that_is_not_there_is_not_pinned_instead_of_the_one_that_is() -> None:
    bench = bench_with_profiles()
    refuse_live_run(bench, take_profile_away)
    bench.others.fail_gang(1, exit_code=138)
    bench.settle()
    bench.others.finish_deletions()
    bench.settle()
    pinned = bench.status.provenance
    assert pinned is not None
    bench.others.change_run(resources={"gpusPerNode": 1, "profile": "h201"})
    bench.settle()
    assert "spec.resources.profile: there is no profile 'h201' here" in bench.condition("Accepted").message
    assert bench.status.provenance == pinned

    bench.others.change_run(resources={"gpusPerNode": 1})
    bench.settle()
    assert bench.says("Accepted") == ("True", "Accepted")
    provenance = bench.status.provenance
    assert provenance and provenance.profile_name is None
    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a2"]


def test_a_gang_that_ends_while_the_spec_cannot_be_read_is_told_so_and_judged_later() -> None:
    bench = Bench()
    run = bench.submit()
    run_gang(bench)
    bench.others.change_run(colour="blue")
    bench.settle()
    assert (bench.status.stage, bench.says("PodsReady")) == ("Training", ("True", "AllPodsRunning"))
    bench.others.complete_gang(1, result=COMPLETED)
    bench.settle()

    assert bench.status.stage == "Pending"
    assert bench.says("PodsReady") == ("False", "InvalidSpec")
    told = "attempt 1: its PyTorchJob has ended (Succeeded), which is judged when the spec can be read again"
    assert bench.condition("PodsReady").message == told
    bench.cluster.put({**bench.run, "spec": run["spec"]})
    bench.settle()
    assert bench.says("Succeeded") == ("True", "Completed")


def test_a_run_whose_spec_cannot_be_read_keeps_every_condition() -> None:
    bench = Bench()
    bench.submit(sft=None, grpo={"rewards": [{"name": "format"}], "args": {"max_steps": 20}})
    run_gang(bench)
    assert bench.says("SignalHealthy") == ("True", "SignalHealthy")
    bench.others.change_run(colour="blue")
    bench.settle()

    assert bench.says("Accepted") == ("False", "InvalidSpec")
    assert bench.says("SignalHealthy") == ("True", "SignalHealthy")


def test_a_run_that_ended_stays_so_when_its_spec_cannot_be_read_any_more() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    bench.others.complete_gang(1, result=COMPLETED)
    bench.settle()
    status = bench.run["status"]
    bench.others.change_run(colour="blue")
    bench.settle()

    assert bench.run["status"] == status


def test_own_code_is_waited_for_and_kept_as_it_was_when_it_came() -> None:
    bench = Bench()
    bench.submit(code={"configMapName": "my-code"})
    assert bench.settle() == 15
    assert bench.says("Accepted") == ("False", "ReferencePending")
    assert bench.condition("Accepted").message == "waiting for the code: there is no ConfigMap my-code"

    bench.cluster.put(foreign(CONFIG_MAP, "my-code", data={"rewards..math.py": "x = 1\n"}))
    bench.settle()
    assert bench.says("Accepted") == ("True", "Accepted")
    assert child(bench, CONFIG_MAP, "demo-code")["data"] == {"rewards..math.py": "x = 1\n"}
    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a1"]

    bench.cluster.put(foreign(CONFIG_MAP, "my-code", data={"rewards..math.py": "x = 2\n"}))
    bench.port.clear()
    run_gang(bench)
    assert child(bench, CONFIG_MAP, "demo-code")["data"] == {"rewards..math.py": "x = 1\n"}
    assert not [call for call in bench.port.calls if call.method == "get"]


def test_a_run_that_waits_for_anothers_model_is_woken_when_that_one_ends() -> None:
    bench = Bench()
    bench.cluster.put(build_other_run("sft", stage="Training"))
    bench.submit(model={"runRef": {"name": "sft"}})
    bench.settle()
    assert bench.says("Accepted") == ("False", "ReferencePending")
    assert bench.names(PYTORCHJOB) == []

    bench.rung.clear()
    bench.cluster.put(build_other_run("sft", stage="Succeeded"))
    bench.see()
    assert RUN in bench.rung
    bench.settle()
    assert bench.says("Accepted") == ("True", "Accepted")
    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a1"]


def test_a_run_is_kept_past_its_ttl_until_those_that_start_from_it_have_ended() -> None:
    bench = Bench()
    bench.submit(ttlSecondsAfterFinished=60, status=build_other_run("demo", stage="Succeeded")["status"])
    bench.cluster.put(build_other_run("grpo", stage="Training", model={"runRef": {"name": "demo"}}))
    bench.wait(61)
    assert bench.look() == 60
    assert bench.others.find(TRAINING_RUN, "demo") is not None

    bench.cluster.put(build_other_run("grpo", stage="Succeeded", model={"runRef": {"name": "demo"}}))
    bench.look()
    assert bench.others.find(TRAINING_RUN, "demo") is None


def test_code_whose_snapshot_is_gone_and_that_changed_since_is_asked_for_until_it_is_back() -> None:
    bench = Bench()
    bench.cluster.put(foreign(CONFIG_MAP, "my-code", data={"a.py": "x = 1\n"}))
    bench.submit(code={"configMapName": "my-code"})
    run_gang(bench)
    bench.cluster.put(foreign(CONFIG_MAP, "my-code", data={"a.py": "x = 2\n"}))
    bench.others.delete(CONFIG_MAP, "demo-code")
    assert bench.settle() == 15
    assert bench.says("Accepted") == ("False", "SpecChanged")
    assert bench.status.stage == "Training"

    bench.cluster.put(foreign(CONFIG_MAP, "my-code", data={"a.py": "x = 1\n"}))
    bench.settle()
    assert bench.says("Accepted") == ("True", "Accepted")
    assert child(bench, CONFIG_MAP, "demo-code")["data"] == {"a.py": "x = 1\n"}


def test_a_run_whose_code_is_lost_while_it_trains_ends_as_its_gang_does() -> None:
    bench = Bench()
    bench.cluster.put(foreign(CONFIG_MAP, "my-code", data={"a.py": "x = 1\n"}))
    bench.submit(code={"configMapName": "my-code"})
    run_gang(bench)
    bench.others.delete(CONFIG_MAP, "my-code")
    bench.others.delete(CONFIG_MAP, "demo-code")
    assert bench.settle() == 15
    assert bench.says("Accepted") == ("False", "ReferencePending")
    assert (bench.status.stage, bench.says("PodsReady")) == ("Training", ("True", "AllPodsRunning"))
    bench.others.complete_gang(1, result=COMPLETED)
    bench.settle()

    assert bench.says("Finished") == ("True", "Completed")


def test_a_run_with_own_code_that_ended_is_not_looked_at_any_more() -> None:
    bench = Bench()
    bench.cluster.put(foreign(CONFIG_MAP, "my-code", data={"a.py": "x = 1\n"}))
    bench.submit(code={"configMapName": "my-code"})
    run_gang(bench)
    bench.others.complete_gang(1, result=COMPLETED)

    assert bench.settle() is None


# --- Queues ----------------------------------------------------------------------------------------------------------

QUEUE = {"gpusPerNode": 0, "cpu": "2", "memory": "4Gi", "queueName": "team-a"}


def kueue_object(kind: Kind, name: str, **fields: Any) -> Manifest:
    return {"apiVersion": kind[0], "kind": kind[1], "metadata": {"name": name}, **fields}


def admit(bench: Bench, *, flavor: str) -> None:
    """Let Kueue admit the run's Workload."""
    told = [
        {"type": type_, "status": "True", "reason": type_, "message": ""} for type_ in ("QuotaReserved", "Admitted")
    ]
    pod_set = {"name": "trainer", "flavors": {"cpu": flavor}}
    admission = {"clusterQueue": "cq", "podSetAssignments": [pod_set]}
    bench.cluster.put({**child(bench, WORKLOAD), "status": {"conditions": told, "admission": admission}})


def test_a_flavor_that_is_missing_is_looked_for_soon_because_its_quota_is_held() -> None:
    bench = Bench()
    bench.submit(resources=QUEUE)
    bench.settle()
    admit(bench, flavor="later")
    assert bench.settle() == 5
    assert bench.says("PodsReady") == ("False", "FlavorMissing")

    bench.cluster.put(kueue_object(RESOURCE_FLAVOR, "later", spec={}))
    bench.wait(5)
    bench.settle()
    assert bench.names(PYTORCHJOB) == ["PyTorchJob demo-a1"]


def put_flavor(bench: Bench, name: str) -> None:
    """Make a flavor whose pods go to nodes of their own."""
    bench.cluster.put(kueue_object(RESOURCE_FLAVOR, name, spec={"nodeLabels": {"pool": name}}))


def begin_in_queue(bench: Bench) -> None:
    """Let the operator come as far as the ConfigMap of an attempt that has its quota in the flavor `first`."""
    put_flavor(bench, "first")
    bench.submit(resources=QUEUE)
    bench.settle()
    admit(bench, flavor="first")
    lose_leader_before_the_job(bench)


def preempt(bench: Bench) -> None:
    """Let Kueue ask for the quota back."""
    workload = child(bench, WORKLOAD)
    evicted = {"type": "Evicted", "status": "True", "reason": "Preempted", "message": "for a higher priority"}
    workload["status"]["conditions"].append(evicted)
    bench.cluster.put(workload)


def fail_flavors(bench: Bench) -> None:
    """Let no flavor be read, as when the webhook that converts them between versions is away."""
    bench.port.refuse = lambda call: InternalError(WEBHOOK) if call.text == "list ResourceFlavor" else None


@pytest.mark.parametrize("anew", [False, True], ids=["same operator", "new operator"])
def test_a_gang_ends_as_it_does_although_the_flavors_cannot_be_read(anew: bool) -> None:
    bench = Bench()
    put_flavor(bench, "first")
    bench.submit(resources=QUEUE)
    bench.settle()
    admit(bench, flavor="first")
    run_gang(bench)
    fail_flavors(bench)
    bench.wait(100)
    if anew:
        bench.start()
    bench.settle()
    assert bench.says("Accepted") == ("True", "Accepted")
    bench.others.complete_gang(1, result=COMPLETED)
    bench.settle()

    assert bench.says("Succeeded") == ("True", "Completed")


def test_a_gang_whose_flavor_cannot_be_read_is_not_made_and_that_is_told() -> None:
    bench = Bench()
    put_flavor(bench, "first")
    bench.submit(resources=QUEUE)
    bench.settle()
    fail_flavors(bench)
    admit(bench, flavor="first")
    look_for(bench, seconds=10)

    assert bench.says("Accepted") == ("False", "ChildRejected")
    assert bench.condition("Accepted").message == f"ResourceFlavor first cannot be read: {WEBHOOK}"
    assert bench.condition("PodsReady").message == "quota is reserved; ResourceFlavor first cannot be read"
    assert bench.names(PYTORCHJOB) == []
    assert_accepted_when_nothing_is_refused(bench)
    assert pod_spec(bench, attempt=1)["nodeSelector"] == {"pool": "first"}


def test_flavors_that_are_known_are_believed_while_they_cannot_be_read() -> None:
    bench = Bench()
    put_flavor(bench, "first")
    bench.submit(resources=QUEUE)
    bench.settle()
    admit(bench, flavor="first")
    bench.settle()
    bench.others.delete(PYTORCHJOB, "demo-a1")
    fail_flavors(bench)
    bench.wait(100)
    bench.settle()

    assert bench.status.attempt == 2
    assert pod_spec(bench, attempt=2)["nodeSelector"] == {"pool": "first"}


def test_a_gang_is_not_made_for_the_nodes_of_a_reservation_that_was_lost_before() -> None:
    bench = Bench()
    begin_in_queue(bench)
    preempt(bench)
    bench.start()
    bench.port.clear()
    bench.settle()
    assert bench.port.writes() == ["delete ConfigMap demo-a1", "apply_status TrainingRun demo", "patch Workload demo"]
    assert bench.names(CONFIG_MAP) == []

    put_flavor(bench, "second")
    admit(bench, flavor="second")
    bench.wait(5)
    bench.settle()
    assert pod_spec(bench, attempt=1)["nodeSelector"] == {"pool": "second"}
    assert bench.status.attempt == 1


def test_a_reservation_is_not_given_back_before_what_was_made_for_it_is_gone() -> None:
    bench = Bench()
    begin_in_queue(bench)
    bench.port.refuse = lambda call: Rejected("denied by policy") if call.method == "delete" else None
    preempt(bench)
    bench.start()
    bench.port.clear()
    for _ in range(3):
        bench.settle()
        bench.wait(31)
    assert bench.says("Accepted") == ("False", "ChildRejected")
    assert [text for text in bench.port.writes() if "Workload" in text] == []

    assert_accepted_when_nothing_is_refused(bench)
    assert bench.names(CONFIG_MAP) == []


def test_a_run_that_leaves_its_queue_while_it_is_suspended_has_no_nodes_of_it() -> None:
    bench = Bench()
    begin_in_queue(bench)
    bench.others.change_run(suspend=True)
    bench.settle()
    assert bench.names(WORKLOAD, CONFIG_MAP) == []
    bench.others.change_run(suspend=False, resources={**QUEUE, "queueName": None})
    bench.settle()

    assert "nodeSelector" not in pod_spec(bench, attempt=1)


def test_a_priority_that_is_missing_is_looked_for_now_and_then() -> None:
    bench = Bench()
    bench.submit(resources={**QUEUE, "workloadPriorityClass": "high"})
    assert bench.settle() == 15
    assert bench.says("Accepted") == ("False", "ReferencePending")

    bench.cluster.put(kueue_object(WORKLOAD_PRIORITY_CLASS, "high", value=7))
    bench.wait(15)
    bench.settle()
    assert child(bench, WORKLOAD)["spec"]["priority"] == 7


@pytest.mark.parametrize("error", [InternalError(WEBHOOK), Rejected("denied by policy")], ids=["fails", "refuses"])
def test_a_gang_runs_although_kueue_cannot_be_told_so(error: Exception) -> None:
    bench = Bench()
    bench.submit(resources=QUEUE, pendingDeadlineSeconds=60)
    bench.settle()
    admit(bench, flavor="default")
    bench.cluster.put(kueue_object(RESOURCE_FLAVOR, "default", spec={}))
    bench.port.refuse = lambda call: error if call.kind == WORKLOAD and call.method == "patch" else None
    look_for(bench, seconds=10)
    bench.others.make_pods()
    bench.others.run_pods(1)
    bench.others.tell(STARTED, attempt=1)
    look_for(bench, seconds=10)

    assert (bench.status.stage, bench.says("PodsReady")) == ("Training", ("True", "AllPodsRunning"))
    assert bench.says("Accepted") == ("False", "ChildRejected")
    assert bench.condition("Accepted").message == f"Workload demo was refused: {error}"
    bench.wait(61)
    look_for(bench, seconds=10)
    assert bench.says("Finished") == ("False", "ChildRejected"), "it ran in time"

    assert_accepted_when_nothing_is_refused(bench)
    told = {condition["type"]: condition["status"] for condition in child(bench, WORKLOAD)["status"]["conditions"]}
    assert told["PodsReady"] == "True"


def test_a_gang_that_a_conflict_keeps_from_its_quota_has_its_pending_deadline_and_is_told_why() -> None:
    bench = Bench()
    bench.submit(resources=QUEUE, pendingDeadlineSeconds=600)
    bench.settle()
    admit(bench, flavor="default")
    bench.cluster.put(kueue_object(RESOURCE_FLAVOR, "default", spec={}))
    by_hand = foreign(CONFIG_MAP, "demo-a1")
    by_hand["metadata"]["labels"] = {"app.kubernetes.io/managed-by": "posttrain", "posttrain.dev/run": "demo"}
    bench.cluster.put(by_hand)
    bench.wait(5)
    bench.settle()
    assert bench.says("Succeeded") == ("False", "NameConflict")
    bench.wait(600)
    bench.settle()

    assert bench.says("Finished") == ("True", "PendingDeadlineExceeded")
    assert "ConfigMap demo-a1 exists and does not belong to this run" in bench.condition("Succeeded").message


def test_a_run_that_waits_in_its_queue_waits_for_news() -> None:
    bench = Bench()
    bench.submit(resources=QUEUE)

    assert bench.settle() is None
    assert bench.says("QuotaReserved") == ("False", "QuotaPending")


# --- Events ----------------------------------------------------------------------------------------------------------


def test_events_are_told_once() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)
    told = bench.events()
    bench.start()
    bench.wait(30)
    bench.settle()

    assert bench.events() == told
    assert [event.partition(":")[0] for event in told] == ["Accepted", "AllPodsRunning"]


def test_a_node_that_is_silent_for_a_while_is_told_and_costs_nothing() -> None:
    bench = Bench()
    bench.submit()
    run_gang(bench)

    bench.others.silence("demo-a1-master-0")
    bench.settle()
    unseen = bench.says("PodsReady")
    bench.wait(60)
    bench.others.silence("demo-a1-master-0", answers=True)
    bench.settle()

    assert unseen == ("Unknown", "NodeUnreachable")
    assert bench.says("PodsReady") == ("True", "AllPodsRunning")
    assert bench.status.attempt == 1
    assert [event.partition(":")[0] for event in bench.events()] == [
        "Accepted",
        "AllPodsRunning",
        "NodeUnreachable",
        "AllPodsRunning",
    ]


def test_an_event_that_cannot_be_written_costs_a_line_and_nothing_else() -> None:
    bench = Bench()
    bench.submit()
    bench.port.refuse = lambda call: Rejected("events is forbidden") if call.kind == EVENT else None
    run_gang(bench)
    bench.others.complete_gang(1, result=COMPLETED)
    bench.settle()

    assert bench.says("Succeeded") == ("True", "Completed")
    assert bench.events() == []


def test_nothing_is_told_before_the_status_stands() -> None:
    bench = Bench()
    bench.submit()
    bench.port.refuse = lambda call: Unavailable("timeout") if call.method == "apply_status" else None
    with pytest.raises(Unavailable):
        bench.look()

    assert bench.events() == []


def test_the_model_of_the_node_that_knows_it_is_told_although_another_one_was_heard_first() -> None:
    bench = Bench()
    bench.submit(resources={"numNodes": 2, "gpusPerNode": 1})
    run_gang(bench)
    of_a_worker = Result(reason="Completed", message="The run is complete.")
    bench.others.tell(ResultFact(result=of_a_worker), attempt=1, source="launch-1")
    bench.others.end_pod("demo-a1-worker-0", exit_code=0, result=of_a_worker)
    bench.others.end_pod("demo-a1-master-0", exit_code=0, result=COMPLETED)
    bench.others.end_job(1, "Succeeded")
    bench.settle()

    assert bench.condition("Succeeded").message == COMPLETED.message
    assert bench.status.model and bench.status.model.uri == "pvc://demo/demo/final"


# --- Prepare ---------------------------------------------------------------------------------------------------------


def test_a_problem_that_prepare_found_ends_the_run_before_any_gang() -> None:
    bench = Bench()
    bench.submit(prepare={"enabled": True})
    bench.settle()
    pod = bench.others.make_prepare_pod()
    problem = "DatasetColumnMissing: column `text` is not among a, b"
    bench.others.tell(PrepareResult(problems=(problem,)), attempt=0, source="prepare")
    result = Result(reason="DatasetColumnMissing", message="column `text` is not among a, b")
    bench.others.end_pod(pod, exit_code=2, result=result)
    bench.others.end_prepare("Failed")
    bench.settle()

    assert bench.says("Prepared") == bench.says("Succeeded") == ("False", "DatasetColumnMissing")
    assert bench.says("Finished") == ("True", "DatasetColumnMissing")
    assert bench.names(PYTORCHJOB) == []
    assert bench.names(JOB) == ["Job demo-prepare"], "its log is kept"


TWO_PROFILES = {"default": Profile(), "h200": Profile()}


CODE = foreign(CONFIG_MAP, "my-code", data={"a.py": "x = 1\n"})


def give_profile_back(bench: Bench) -> None:
    bench.settings = Settings(profiles=TWO_PROFILES)
    bench.start()


def change_argument(bench: Bench) -> None:
    bench.others.change_run(sft={"args": {"max_steps": 30}})


def change_argument_back(bench: Bench) -> None:
    bench.others.change_run(sft={"args": {"max_steps": 20}})


def lose_code(bench: Bench) -> None:
    bench.others.delete(CONFIG_MAP, "my-code")
    bench.others.delete(CONFIG_MAP, "demo-code")


def bring_code_back(bench: Bench) -> None:
    bench.cluster.put(CODE)


def lose_gang_that_no_other_may_follow(
    bench: Bench, *, spoil: Callable[[Bench], None] = take_profile_away, reason: str = "InvalidSpec"
) -> None:
    """Let a gang fail after something is not as it was: another attempt is counted, and cannot begin."""
    run_gang(bench)
    spoil(bench)
    bench.settle()
    bench.others.fail_gang(1, exit_code=138)
    bench.settle()
    bench.others.finish_deletions()
    bench.settle()
    assert (bench.status.attempt, bench.says("Accepted")) == (2, ("False", reason))


@pytest.mark.parametrize(
    ("spoil", "mend", "reason"),
    [
        (take_profile_away, give_profile_back, "InvalidSpec"),
        (change_argument, change_argument_back, "SpecChanged"),
        (lose_code, bring_code_back, "ReferencePending"),
    ],
)
def test_an_attempt_that_cannot_be_made_before_something_is_mended_holds_no_quota(
    spoil: Callable[[Bench], None], mend: Callable[[Bench], None], reason: str
) -> None:
    bench = Bench(settings=Settings(profiles=TWO_PROFILES))
    put_flavor(bench, "first")
    bench.cluster.put(CODE)
    bench.submit(resources={**QUEUE, "profile": "h200"}, code={"configMapName": "my-code"})
    bench.settle()
    admit(bench, flavor="first")
    lose_gang_that_no_other_may_follow(bench, spoil=spoil, reason=reason)
    assert bench.names(WORKLOAD, PYTORCHJOB) == []
    assert bench.status.stage == "Pending"
    assert bench.says("QuotaReserved") == bench.says("PodsReady") == ("False", reason)
    (told,) = [event for event in bench.events() if event.startswith("RankKilled")]
    assert told.endswith("; attempt 2 follows when what keeps it from being made is mended")
    version = bench.run["metadata"]["resourceVersion"]
    bench.wait(1000)
    bench.settle()
    assert bench.run["metadata"]["resourceVersion"] == version, "the status does not flap"

    mend(bench)
    bench.settle()
    assert bench.says("Accepted") == ("True", "Accepted")
    admit(bench, flavor="first")
    bench.settle()
    assert bench.others.job_runs(2)


def test_an_attempt_whose_spec_is_refused_waits_no_longer_than_its_deadline() -> None:
    bench = Bench(settings=Settings(profiles=TWO_PROFILES))
    bench.submit(resources={"gpusPerNode": 1, "profile": "h200"}, pendingDeadlineSeconds=100)
    lose_gang_that_no_other_may_follow(bench)
    bench.wait(101)
    bench.settle()

    assert bench.says("Succeeded") == ("False", "PendingDeadlineExceeded")
    assert "h200" in bench.condition("Succeeded").message


def test_settings_that_were_mended_reach_an_attempt_whose_job_is_refused() -> None:
    bench = Bench(settings=Settings(termination_grace_seconds=6000))

    def policy(call: Call) -> Rejected | None:
        if call.text != "create PyTorchJob demo-a1":
            return None
        template = call.body["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
        return Rejected("at most 600") if template["spec"]["terminationGracePeriodSeconds"] > 600 else None

    bench.port.refuse = policy
    bench.submit()
    bench.settle()
    assert bench.condition("Accepted").message == "PyTorchJob demo-a1 was refused: at most 600"

    bench.settings = Settings(termination_grace_seconds=600)
    bench.start()
    for _ in range(3):
        bench.settle()
        bench.wait(31)
    assert (bench.says("Accepted"), bench.others.job_runs(1)) == (("True", "Accepted"), True)
