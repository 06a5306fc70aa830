"""How Kueue's Workload is written, read and answered, and what the golden cases do not show of quota."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.api.conditions import find_condition
from posttrain.api.training_run import TrainingRun
from posttrain.plan import labels
from posttrain.plan.kueue import (
    Ask,
    build_assignment,
    build_finish,
    build_pods_ready,
    build_release,
    missing_flavors,
    parse_workload,
    workload_ref,
)
from posttrain.plan.training_run import plan_training_run, preview_training_run
from posttrain.plan.types import Manifest, ObjectRef, Observed, Plan, StatusPatch
from posttrain.settings import Profile, Settings
from tests.support.builders import T0, at, build_observed_job, build_pod, build_run, rfc3339

REF = workload_ref("demo")
QUEUE = {"gpusPerNode": 8, "queueName": "team-a"}
PREEMPTION = "Preempted to accommodate a workload"


def condition(type_: str, status: str, reason: str = "Because", message: str = "", *, seconds: float = 0) -> Manifest:
    return {
        "type": type_,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": rfc3339(at(seconds)),
    }


RESERVED = condition("QuotaReserved", "True", "QuotaReserved")
ADMITTED = condition("Admitted", "True", "Admitted")
PENDING = condition("QuotaReserved", "False", "Pending", "4 more needed", seconds=3)


def evicted(reason: str = "Preempted", message: str = PREEMPTION) -> Manifest:
    return condition("Evicted", "True", reason, message, seconds=50)


def build_observed_workload(*conditions: Manifest, nodes: int = 1, status: Any = None, **spec: Any) -> Manifest:
    return {
        "apiVersion": REF.api_version,
        "kind": REF.kind,
        "metadata": {
            "name": "demo",
            "uid": "uid-w",
            "resourceVersion": "42",
            "generation": 3,
            "creationTimestamp": rfc3339(T0),
            "labels": {labels.PROFILE: ""},
        },
        "spec": {"queueName": "team-a", "podSets": [{"name": "trainer", "count": nodes}], **spec},
        "status": {"conditions": list(conditions), **(status or {})},
    }


def admission(*flavors: str, **fields: Any) -> dict[str, Any]:
    named = {f"resource-{i}": flavor for i, flavor in enumerate(flavors)}
    return {"admission": {"clusterQueue": "cq", "podSetAssignments": [{"name": "trainer", "flavors": named, **fields}]}}


def status_of(patch: StatusPatch | None) -> dict[str, Any]:
    assert patch is not None
    assert patch.payload["metadata"] == {"uid": "uid-w", "resourceVersion": "42"}
    status = dict(patch.body["status"])
    status["conditions"] = {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}
    return status


# --- Written ---------------------------------------------------------------------------------------------------------


def preview(**spec: Any) -> dict[str, Manifest]:
    settings = Settings(
        profiles={"default": Profile(), "h100": Profile(runtime_class_name="nvidia", topology_key="rack")}
    )
    return {m["kind"]: m for m in preview_training_run(build_run(**spec), now=T0, settings=settings)}


def test_a_workload_asks_for_what_kueue_reads_of_the_pods_and_nothing_else() -> None:
    resources = {
        **QUEUE,
        "numNodes": 2,
        "profile": "h100",
        "devices": {"rdma/ib": "8"},
        "priorityClassName": "batch",
        "cpu": "16",
        "memory": "128Gi",
    }
    workload = preview(resources=resources, podOverrides={"nodeSelector": {"pool": "a"}, "env": []})["Workload"]

    amounts = {"cpu": "16", "memory": "128Gi", "nvidia.com/gpu": "8", "rdma/ib": "8"}
    assert workload["spec"] == {
        "queueName": "team-a",
        "podSets": [
            {
                "name": "trainer",
                "count": 2,
                "template": {
                    "spec": {
                        "restartPolicy": "Never",
                        "containers": [{"name": "pytorch", "resources": {"limits": amounts, "requests": amounts}}],
                        "nodeSelector": {"pool": "a"},
                        "priorityClassName": "batch",
                        "runtimeClassName": "nvidia",
                    }
                },
            }
        ],
    }
    assert workload["metadata"]["ownerReferences"][0]["controller"]
    assert "finalizers" not in workload["metadata"]
    assert workload["metadata"]["labels"][labels.PROFILE] == "h100"


def test_no_child_carries_a_queue_label() -> None:
    for manifest in preview(resources=QUEUE).values():
        assert not [key for key in manifest["metadata"]["labels"] if "kueue" in key]


def test_without_a_queue_and_on_one_machine_there_is_no_workload() -> None:
    assert "Workload" not in preview()
    alone = preview_training_run(build_run(resources=QUEUE), now=T0, settings=Settings(queues=False))
    assert "Workload" not in [m["kind"] for m in alone]


# --- Read ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditions", "reserved", "admitted"),
    [
        ([], False, False),
        ([PENDING], False, False),
        ([RESERVED], True, False),
        ([RESERVED, condition("Admitted", "False")], True, False),
        ([RESERVED, ADMITTED], True, True),
        ([RESERVED, ADMITTED, condition("Evicted", "False", "QuotaReserved")], True, True),
        ([RESERVED, ADMITTED, evicted()], True, False),
        ([PENDING, ADMITTED], False, False),
        ([RESERVED, ADMITTED, condition("Finished", "True", "Succeeded")], True, False),
    ],
)
def test_a_workload_is_admitted_only_while_nobody_wants_it_back(
    conditions: list[Manifest], reserved: bool, admitted: bool
) -> None:
    state = parse_workload(build_observed_workload(*conditions))

    assert (state.reserved, state.admitted) == (reserved, admitted)


def test_a_deactivated_or_deleted_workload_is_not_admitted() -> None:
    assert not parse_workload(build_observed_workload(RESERVED, ADMITTED, active=False)).admitted
    deleted = build_observed_workload(RESERVED, ADMITTED)
    deleted["metadata"]["deletionTimestamp"] = rfc3339(T0)
    assert not parse_workload(deleted).admitted


def test_the_wait_begins_with_the_workload_and_anew_when_it_was_released() -> None:
    assert parse_workload(build_observed_workload(PENDING)).pending_since == T0
    assert parse_workload(build_observed_workload(PENDING, evicted())).pending_since == at(3)


def test_what_is_asked_for_is_read_back() -> None:
    assert parse_workload(build_observed_workload(nodes=4)).ask == Ask(queue="team-a", pods=4, profile="")


@pytest.mark.parametrize("reason", ["Inadmissible", "Misconfigured", "Suspended"])
def test_a_queue_that_is_missing_or_stopped_is_told_from_a_full_one(reason: str) -> None:
    gone = condition("QuotaReserved", "False", reason, "LocalQueue team-a doesn't exist")

    assert parse_workload(build_observed_workload(gone)).unavailable
    assert not parse_workload(build_observed_workload(PENDING)).unavailable


def test_awaited_admission_checks_are_named() -> None:
    checks = [{"name": "ready", "state": "Ready"}, {"name": "provision", "state": "Pending", "message": "2 nodes"}]
    state = parse_workload(build_observed_workload(RESERVED, status={"admissionChecks": checks}))

    assert state.message == "quota is reserved; admission checks are awaited (provision: 2 nodes)"


def test_pods_go_where_flavors_and_admission_checks_say() -> None:
    taint = {"key": "gpu", "operator": "Exists"}
    flavors = {
        "cpu": {"spec": {"nodeLabels": {"zone": "a"}}},
        "gpu": {"spec": {"nodeLabels": {"pool": "gpu"}, "tolerations": [taint]}},
        "unused": {"spec": {"nodeLabels": {"zone": "b"}}},
    }
    update = {"name": "trainer", "annotations": {"consume": "x"}, "labels": {"l": "1"}, "nodeSelector": {"n": "1"}}
    checks = [
        {"name": "provision", "state": "Ready", "podSetUpdates": [update, {"name": "server", "labels": {"m": "1"}}]}
    ]
    state = parse_workload(
        build_observed_workload(
            RESERVED, ADMITTED, status={**admission("gpu", "cpu", "gpu"), "admissionChecks": checks}
        )
    )
    assignment = build_assignment(state, flavors, pod_set="trainer")

    assert assignment.node_selector == {"zone": "a", "pool": "gpu", "n": "1"}
    assert assignment.tolerations == (taint,)
    assert (assignment.labels, assignment.annotations) == ({"l": "1"}, {"consume": "x"})
    assert missing_flavors(state, {"cpu": {}}) == ("gpu",)


# --- Answered --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "requeued"),
    [
        ("Preempted", "True"),
        ("NodeFailures", "True"),
        ("PodsReadyTimeout", "False"),
        ("AdmissionCheck", "False"),
        ("Deactivated", "False"),
        ("ClusterQueueStopped", "False"),
        ("LocalQueueStopped", "False"),
    ],
)
def test_a_release_frees_the_quota_and_queues_again_what_kueue_does_not(reason: str, requeued: str) -> None:
    workload = build_observed_workload(RESERVED, ADMITTED, evicted(reason))

    assert status_of(build_release(parse_workload(workload), now=at(99))) == {
        "admission": None,
        "reclaimablePods": None,
        "conditions": {
            "QuotaReserved": ("False", "Pending"),
            "Admitted": ("False", "NoReservation"),
            "Evicted": ("True", reason),
            "Requeued": (requeued, reason),
        },
    }


def test_a_release_resets_pods_ready_where_it_is_and_leaves_the_rest_as_it_was() -> None:
    workload = build_observed_workload(RESERVED, ADMITTED, condition("PodsReady", "True", "Started"), evicted())
    patch = build_release(parse_workload(workload), now=at(99))

    by_type = {c["type"]: c for c in patch.body["status"]["conditions"]}
    assert by_type["PodsReady"]["reason"] == "WaitForStart"
    assert by_type["Evicted"] == evicted()
    assert by_type["QuotaReserved"] == {
        **condition("QuotaReserved", "False", "Pending", PREEMPTION, seconds=99),
        "observedGeneration": 3,
    }


def test_the_transition_time_of_what_does_not_change_stays() -> None:
    workload = build_observed_workload(RESERVED, ADMITTED, condition("Requeued", "True", seconds=7), evicted())
    patch = build_release(parse_workload(workload), now=at(99))

    requeued = next(c for c in patch.body["status"]["conditions"] if c["type"] == "Requeued")
    assert requeued["lastTransitionTime"] == rfc3339(at(7))


@pytest.mark.parametrize(
    ("known", "ready", "told"),
    [
        (None, False, None),
        (None, True, ("True", "Started")),
        (("True", "Started"), True, None),
        (("True", "Started"), False, ("False", "WaitForRecovery")),
        (("False", "WaitForRecovery"), False, None),
        (("False", "WaitForRecovery"), True, ("True", "Recovered")),
        (("False", "WaitForStart"), False, None),
        (("False", "WaitForStart"), True, ("True", "Started")),
    ],
)
def test_kueue_is_told_only_of_changes_whether_the_gang_runs(
    known: tuple[str, str] | None, ready: bool, told: tuple[str, str] | None
) -> None:
    conditions = [RESERVED, ADMITTED, *([condition("PodsReady", *known)] if known else [])]
    patch = build_pods_ready(parse_workload(build_observed_workload(*conditions)), ready=ready, now=at(9))

    assert (status_of(patch)["conditions"]["PodsReady"] if patch else None) == told


def test_a_workload_is_finished_once() -> None:
    state = parse_workload(build_observed_workload(RESERVED, ADMITTED))
    assert status_of(build_finish(state, good=False, message="why", now=T0))["conditions"]["Finished"] == (
        "True",
        "Failed",
    )
    ended = parse_workload(build_observed_workload(RESERVED, condition("Finished", "True", "Succeeded")))
    assert build_finish(ended, good=True, message="", now=T0) is None


# --- Decisions -------------------------------------------------------------------------------------------------------


def observe(*manifests: Manifest, **fields: Any) -> Observed:
    return Observed(
        objects={ObjectRef.of(m): m for m in manifests if "kind" in m},
        pods=tuple(m for m in manifests if "kind" not in m),
        **{"kueue": True, **fields},
    )


def plan(run: TrainingRun, observed: Observed, *, seconds: float = 0, settings: Settings | None = None) -> Plan:
    return plan_training_run(run, observed, now=at(seconds), settings=settings or Settings())


def after(run: TrainingRun, *observed: Observed, seconds: float = 0) -> TrainingRun:
    """Return the run when plans for these observations were written, one after the other."""
    for seen in observed:
        run = run.model_copy(update={"status": plan(run, seen, seconds=seconds).status})
    return run


def queued(**spec: Any) -> TrainingRun:
    run = build_run(prepare={"enabled": False}, **{"resources": QUEUE, **spec})
    return after(run, observe(priorities={"high": 1000}))


def says(planned: Plan, type_: str = "QuotaReserved") -> tuple[str, str, str]:
    assert planned.status is not None
    found = find_condition(planned.status.conditions, type_)
    assert found is not None
    return found.status, found.reason, found.message


def kinds(planned: Plan) -> set[str]:
    return {manifest["kind"] for manifest in planned.objects}


JOB, POD = build_observed_job("demo", attempt=1), build_pod("demo")
HELD = build_observed_workload(RESERVED, ADMITTED)
LOST = build_observed_workload(RESERVED, ADMITTED, evicted())


def test_a_machine_without_queues_ignores_the_queue_and_says_so() -> None:
    run = build_run(prepare={"enabled": False}, resources=QUEUE)
    alone = Settings(queues=False)
    first = plan(run, Observed(), settings=alone)
    run = run.model_copy(update={"status": first.status})

    assert says(first) == ("True", "NoQueue", "spec.resources.queueName (team-a) is ignored: there are no queues here")
    assert "PyTorchJob" in kinds(plan(run, Observed(), settings=alone))


def test_prepare_runs_before_quota_is_asked_for() -> None:
    first = plan(build_run(resources=QUEUE), observe())

    assert "Job" in kinds(first)
    assert "Workload" not in kinds(first)
    assert says(first)[:2] == ("False", "QuotaPending")


def test_a_priority_that_kueue_took_over_is_kept_and_that_of_another_class_looked_up() -> None:
    run = queued(resources={**QUEUE, "workloadPriorityClass": "high"})
    class_ref = {"group": "kueue.x-k8s.io", "kind": "WorkloadPriorityClass", "name": "high"}
    pending = build_observed_workload(PENDING, priorityClassRef=class_ref, priority=20)
    moved = build_observed_workload(PENDING, priorityClassRef={**class_ref, "name": "low"}, priority=1)

    def priority(workload: Manifest, **fields: Any) -> Any:
        objects = plan(run, observe(workload, **fields)).objects
        return next((m["spec"]["priority"] for m in objects if m["kind"] == "Workload"), None)

    assert priority(pending, priorities={"high": 1000}) == 20
    assert priority(pending) == 20
    assert priority(moved, priorities={"high": 1000}) == 1000
    assert priority(moved) is None
    assert says(plan(run, observe(moved)), "PodsReady")[1] == "ReferencePending"


def test_a_reservation_is_never_rewritten() -> None:
    run = queued()
    for workload in (build_observed_workload(RESERVED), HELD, LOST):
        assert "Workload" not in kinds(plan(run, observe(workload)))


def test_a_missing_flavor_is_waited_for() -> None:
    run = queued()
    workload = build_observed_workload(RESERVED, ADMITTED, status=admission("h100"))
    waiting = plan(run, observe(workload))

    assert "PyTorchJob" not in kinds(waiting)
    assert says(waiting)[0] == "True"
    assert says(waiting, "PodsReady")[1:] == ("FlavorMissing", "quota is reserved; there is no ResourceFlavor h100")
    assert "PyTorchJob" in kinds(plan(run, observe(workload, flavors={"h100": {"metadata": {"name": "h100"}}})))


SERVED = {
    "sft": None,
    "grpo": {"rewards": [{"name": "format"}], "rollout": {"mode": "Server", "server": {}}, "args": {"max_steps": 20}},
}


def test_rollout_servers_wait_for_a_missing_flavor_too() -> None:
    run = queued(**SERVED)
    workload = build_observed_workload(RESERVED, ADMITTED, nodes=2, status=admission("h100"))
    flavor = {"h100": {"metadata": {"name": "h100"}}}

    assert "StatefulSet" not in kinds(plan(run, observe(workload)))
    assert "StatefulSet" in kinds(plan(run, observe(workload, flavors=flavor)))


GONE = condition("QuotaReserved", "False", "Inadmissible", "LocalQueue team-a doesn't exist")
LATE = evicted("PodsReadyTimeout", "too late")
LIMIT = evicted("Deactivated", "deactivated due to exceeding the limit")


@pytest.mark.parametrize(
    ("workload", "reason", "message"),
    [
        (build_observed_workload(GONE), "QueueUnavailable", "LocalQueue team-a doesn't exist"),
        (build_observed_workload(), "QuotaPending", "waiting in the queue team-a"),
        (LOST, "Preempted", PREEMPTION),
        (build_observed_workload(PENDING, evicted()), "Preempted", f"4 more needed (before that: {PREEMPTION})"),
        (build_observed_workload(PENDING, LATE), "QuotaLost", "4 more needed (before that: too late)"),
        (
            build_observed_workload(PENDING, LIMIT, active=False),
            "WorkloadDeactivated",
            "deactivated due to exceeding the limit",
        ),
    ],
)
def test_why_quota_is_waited_for(workload: Manifest, reason: str, message: str) -> None:
    waiting = plan(queued(), observe(workload))

    assert says(waiting) == ("False", reason, message)
    assert says(waiting, "Succeeded") == ("False", "InProgress", f"attempt 1: waiting for quota: {message}")
    assert waiting.status is not None
    assert waiting.status.stage == "Queued"


@pytest.mark.parametrize("reason", ["Preempted", "PodsReadyTimeout", "ClusterQueueStopped", "Deactivated"])
def test_an_eviction_ends_the_attempt_and_costs_no_budget(reason: str) -> None:
    run = after(queued(restarts={"maxInfrastructureRestarts": 0}), observe(HELD), observe(HELD, JOB, POD))
    lost = build_observed_workload(RESERVED, ADMITTED, evicted(reason))
    ended = plan(run, observe(lost, JOB, POD), seconds=60)

    assert ended.status is not None
    assert (ended.status.attempt, ended.status.completion_time, ended.status.failure) == (2, None, None)
    assert ended.status_first
    assert {ref.kind for ref in ended.deletes} == {"PyTorchJob"}
    assert not any(o["kind"] == "PyTorchJob" for o in ended.objects)


def test_a_workload_that_somebody_deleted_ends_the_attempt_too() -> None:
    run = after(queued(), observe(HELD), observe(HELD, JOB, POD))
    ended = plan(run, observe(JOB, POD))

    assert ended.status is not None
    assert ended.status.attempt == 2


def test_without_kueue_a_gang_that_runs_goes_on() -> None:
    run = after(queued(), observe(HELD), observe(HELD, JOB, POD))
    on = plan(run, observe(JOB, POD, kueue=False))

    assert on.status is not None
    assert (on.status.attempt, on.status.stage) == (1, "Starting")
    assert says(on)[:2] == ("False", "KueueMissing")


def test_without_kueue_a_gang_that_runs_keeps_its_rollout_servers() -> None:
    held = build_observed_workload(RESERVED, ADMITTED, nodes=2)
    servers = [m for m in plan(queued(**SERVED), observe(held)).objects if m["kind"] in ("StatefulSet", "ConfigMap")]
    run = after(queued(**SERVED), observe(held, *servers, JOB, POD))
    on = plan(run, observe(*servers, JOB, POD, kueue=False))

    assert [ref.name for ref in on.deletes] == []
    assert [m["metadata"]["name"] for m in on.objects if m["kind"] == "StatefulSet"] == ["demo-server"]


def test_a_gang_that_ended_well_before_its_eviction_is_not_started_again() -> None:
    run = after(queued(), observe(HELD), observe(HELD, JOB, POD))
    succeeded = {**JOB, "status": {"conditions": [condition("Succeeded", "True", seconds=59)]}}
    waiting = plan(run, observe(LOST, succeeded), seconds=60)

    assert waiting.status is not None
    assert waiting.status.attempt == 1


def test_quota_is_released_only_when_no_pod_and_no_job_is_left() -> None:
    run = after(queued(), observe(HELD), observe(HELD, JOB, POD), observe(LOST, JOB, POD))

    assert plan(run, observe(LOST, JOB, POD)).patches == ()
    assert plan(run, observe(LOST, POD)).patches == ()
    assert plan(run, observe(LOST, JOB)).patches == ()
    (patch,) = plan(run, observe(LOST)).patches
    assert status_of(patch)["conditions"]["QuotaReserved"] == ("False", "Pending")


def test_a_user_who_changes_the_shape_under_a_new_reservation_gets_the_new_shape() -> None:
    run = after(queued(), observe(HELD), observe(HELD, JOB, POD))
    resources = run.spec.resources.model_copy(update={"num_nodes": 2})
    run = run.model_copy(update={"spec": run.spec.model_copy(update={"resources": resources})})

    ended = plan(run, observe(HELD, JOB, POD))
    assert ended.status is not None
    assert ended.status.attempt == 2
    run = after(run, observe(HELD, JOB, POD))
    assert plan(run, observe(HELD, JOB, POD)).deletes == (ObjectRef.of(JOB),)
    assert plan(run, observe(HELD)).deletes == (REF,)
    asked = next(m for m in plan(run, observe()).objects if m["kind"] == "Workload")
    assert asked["spec"]["podSets"][0]["count"] == 2


def test_another_profile_is_pinned_while_the_run_waits_and_not_while_it_runs() -> None:
    settings = Settings(profiles={"default": Profile(), "big": Profile(memory="512Gi")})
    run = queued()
    resources = run.spec.resources.model_copy(update={"profile": "big"})
    run = run.model_copy(update={"spec": run.spec.model_copy(update={"resources": resources})})
    waiting = plan(run, observe(build_observed_workload(PENDING)), settings=settings)

    assert waiting.status is not None
    assert waiting.status.provenance is not None
    assert waiting.status.provenance.profile_name == "big"
    asked = next(m for m in waiting.objects if m["kind"] == "Workload")
    limits = asked["spec"]["podSets"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["memory"] == "512Gi"


def test_what_may_change_in_the_queue_is_not_in_the_config_hash() -> None:
    changed = queued(resources={**QUEUE, "queueName": "team-b", "numNodes": 2, "workloadPriorityClass": "high"})
    other = queued(resources={**QUEUE, "gpusPerNode": 4})
    hashes = [run.status.provenance.config_hash for run in (queued(), changed, other) if run.status.provenance]

    assert hashes[0] == hashes[1] != hashes[2]


def test_the_pending_deadline_counts_the_wait_for_quota() -> None:
    run = after(queued(pendingDeadlineSeconds=100), observe(build_observed_workload(PENDING)), seconds=10)

    assert plan(run, observe(build_observed_workload(PENDING)), seconds=40).requeue_after == 60
    over = plan(run, observe(build_observed_workload(PENDING)), seconds=100)
    assert over.status is not None
    assert over.status.failure is not None
    assert over.status.failure.reason == "PendingDeadlineExceeded"
    assert over.status.failure.message.endswith("4 more needed")
    run = run.model_copy(update={"status": over.status})
    (patch,) = plan(run, observe(build_observed_workload(PENDING)), seconds=101).patches
    assert status_of(patch)["conditions"]["Finished"] == ("True", "Failed")


def test_the_sandbox_is_there_only_while_quota_is() -> None:
    run = queued(sft=None, grpo={"rewards": [{"name": "code"}], "args": {"max_steps": 20}})
    (sandbox,) = (m for m in plan(run, observe(HELD)).objects if m["kind"] == "Deployment")
    waiting = build_observed_workload(PENDING)

    assert kinds(plan(run, observe(waiting))).isdisjoint({"Deployment", "PyTorchJob"})
    assert ObjectRef.of(sandbox) in plan(run, observe(waiting, sandbox)).deletes
    assert ObjectRef.of(sandbox) not in plan(run, observe(HELD, sandbox)).deletes


def test_a_gang_that_was_evicted_before_it_ran_has_waited_since_it_was_queued() -> None:
    pending = build_observed_workload(PENDING)
    waiting = build_pod("demo", phase="Pending")
    run = after(queued(), observe(pending), observe(HELD), observe(HELD, JOB, waiting), observe(LOST, JOB, waiting))

    assert (run.status.attempt, run.status.attempt_queued_time) == (2, T0)


def test_a_suspended_run_has_waited_for_nothing() -> None:
    run = after(queued(), observe(build_observed_workload(PENDING)))
    run = run.model_copy(update={"spec": run.spec.model_copy(update={"suspend": True})})
    suspending = plan(run, observe(build_observed_workload(PENDING)))

    assert suspending.deletes == (REF,)
    run = after(run, observe())
    assert run.status.attempt_queued_time is None
    assert says(plan(run, observe()))[:2] == ("False", "Suspended")


def test_gpu_seconds_of_a_preempted_gang_are_counted_to_its_end_and_none_is_waste() -> None:
    pod = build_pod("demo", started=T0)
    run = after(queued(), observe(HELD), observe(HELD, JOB, pod))
    run = after(run, observe(LOST, JOB, pod), seconds=100)
    gone = {**pod, "metadata": {**pod["metadata"], "deletionTimestamp": rfc3339(at(220))}}
    run = after(run, observe(LOST, gone), seconds=101)
    ended = {
        **gone,
        "status": {
            **pod["status"],
            "phase": "Failed",
            "containerStatuses": [
                {"name": "pytorch", "state": {"terminated": {"exitCode": 143, "finishedAt": rfc3339(at(130))}}}
            ],
        },
    }
    run = after(run, observe(LOST, ended), observe(LOST), seconds=131)

    usage = run.status.usage
    assert usage is not None
    assert (usage.gpu_seconds, usage.wasted_gpu_seconds) == ("1040.0", "0.0")


def test_a_foreign_workload_of_that_name_is_never_adopted() -> None:
    refused = plan(build_run(resources=QUEUE), observe(foreign=frozenset({REF})))

    assert says(refused, "Accepted")[1] == "NameConflict"
