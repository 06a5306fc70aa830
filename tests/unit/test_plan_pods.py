"""Whether a gang's pods all run, or why not yet."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.plan.attempts import Gang
from posttrain.plan.pods import explain_running, explain_waiting, find_refusal
from posttrain.plan.status import Says
from posttrain.plan.types import Manifest
from tests.support.builders import at, build_pod, rfc3339

OVER_QUOTA = 'pods "demo-a1-worker-0" is forbidden: exceeded quota: team, requested: pods=1, limited: pods=8'


def gang(*pods: Manifest, size: int = 2) -> Gang:
    return Gang(
        run="demo",
        attempt=1,
        size=size,
        ranks_per_node=1,
        job=None,
        pods=pods,
        hash_when_running=None,
        first_error=None,
        result=None,
    )


def event(reason: str, message: str, *, seconds: float = 0, job: str = "demo-a1", **fields: Any) -> Manifest:
    return {
        "metadata": {"name": f"{job}.{seconds}", "creationTimestamp": rfc3339(at(0))},
        "involvedObject": {"kind": "PyTorchJob", "name": job},
        "reason": reason,
        "message": message,
        "lastTimestamp": rfc3339(at(seconds)),
        **fields,
    }


def waiting(reason: str, *, node: int = 0, **fields: str) -> Manifest:
    """Return a pod that is bound to a node, and whose container waits."""
    pod = build_pod("demo", node=node, phase="Pending")
    state = {"waiting": {"reason": reason, **fields}}
    pod["status"]["containerStatuses"] = [{"name": "pytorch", "ready": False, "state": state}]
    return pod


def test_a_resource_quota_that_refuses_a_pod_is_named() -> None:
    refused = event("FailedCreatePod", f"Error creating: {OVER_QUOTA}")

    assert explain_waiting(gang(build_pod("demo")), creation_events=[refused]) == Says(
        "False", "QuotaExceeded", f"1 of 2 pods cannot be created: {OVER_QUOTA}"
    )


def test_a_refusal_of_a_servers_pod_is_told_without_the_words_of_its_controller() -> None:
    told = f"Create Pod demo-server-1 in StatefulSet demo-server failed error: {OVER_QUOTA}"
    events = [event("FailedCreate", told, job="demo-server"), event("FailedCreatePod", "another")]

    assert find_refusal(events, of="demo-server", missing=1, size=3) == Says(
        "False", "QuotaExceeded", f"1 of 3 pods cannot be created: {OVER_QUOTA}"
    )


def test_any_other_refusal_is_told_in_the_words_of_the_api_server() -> None:
    refused = event("FailedCreatePod", "Error creating: violates PodSecurity")

    assert explain_waiting(gang(), creation_events=[refused]) == Says(
        "False", "PodsNotCreated", "2 of 2 pods cannot be created: violates PodSecurity"
    )


def test_the_refusal_seen_last_counts() -> None:
    old = event("FailedCreatePod", "old", seconds=5)
    new = event("FailedCreatePod", "new", seconds=1, series={"lastObservedTime": "2026-03-01T09:00:09.123456Z"})

    assert explain_waiting(gang(), creation_events=[old, new]).message.endswith("new")
    assert explain_waiting(gang(), creation_events=[new, old]).message.endswith("new")


def test_a_refusal_counts_only_while_a_pod_is_missing() -> None:
    pods = build_pod("demo"), build_pod("demo", node=1, phase="Pending")

    assert explain_waiting(gang(*pods), creation_events=[event("FailedCreatePod", OVER_QUOTA)]).reason == "PodsStarting"


def test_events_of_another_attempt_or_of_success_say_nothing() -> None:
    events = [event("FailedCreatePod", OVER_QUOTA, job="demo-a2"), event("SuccessfulCreatePod", "Created pod")]

    assert explain_waiting(gang(), creation_events=events).reason == "PodsStarting"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("ErrImagePull", "ImagePullFailed"),
        ("ImagePullBackOff", "ImagePullFailed"),
        ("InvalidImageName", "ImagePullFailed"),
        ("ErrImageNeverPull", "ImagePullFailed"),
        ("ImageInspectError", "ImagePullFailed"),
        ("RegistryUnavailable", "ImagePullFailed"),
        ("SignatureValidationFailed", "ImagePullFailed"),
        ("CreateContainerConfigError", "ContainerNotStarted"),
        ("CreateContainerError", "ContainerNotStarted"),
        ("PreCreateHookError", "ContainerNotStarted"),
        ("PreStartHookError", "ContainerNotStarted"),
        ("RunContainerError", "ContainerNotStarted"),
    ],
)
def test_what_keeps_a_container_from_starting_is_told_in_the_kubelets_words(state: str, reason: str) -> None:
    told, silent = (waiting(state, message='secret "hub" not found'), waiting(state))

    assert explain_waiting(gang(told, size=1)) == Says("False", reason, 'pod demo-a1-master-0: secret "hub" not found')
    assert explain_waiting(gang(silent, size=1)) == Says("False", reason, f"pod demo-a1-master-0: {state}")


def test_a_container_that_is_only_being_created_is_no_obstacle() -> None:
    pods = build_pod("demo"), waiting("ContainerCreating", node=1)

    assert explain_waiting(gang(*pods)) == Says("False", "PodsStarting", "1 of 2 pods run")


def silent(pod: Manifest) -> Manifest:
    """Return a running pod as the node controller leaves it when the kubelet tells nothing any more."""
    conditions = [{"type": "Ready", "status": "False"}, {"type": "ContainersReady", "status": "True"}]
    return {**pod, "status": {**pod["status"], "conditions": conditions, "containerStatuses": [{"ready": True}]}}


def test_a_pod_on_a_node_that_does_not_answer_is_not_said_to_run() -> None:
    pods = build_pod("demo"), silent(build_pod("demo", node=1, node_name="node-1"))

    assert explain_running(gang(*pods)) == Says(
        "Unknown",
        "NodeUnreachable",
        "node node-1 does not answer: whether demo-a1-worker-0 still runs is not known, and is waited for",
    )


def test_a_pod_whose_own_kubelet_says_that_it_is_not_ready_runs() -> None:
    pod = silent(build_pod("demo"))
    pod["status"]["containerStatuses"] = [{"ready": False}]

    assert explain_running(gang(pod, size=1)) == Says("True", "AllPodsRunning")
