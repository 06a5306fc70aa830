"""Why a gang's pods do not all run yet."""

from __future__ import annotations

from typing import Any

from posttrain.plan.attempts import Gang
from posttrain.plan.pods import explain_waiting
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


def test_a_resource_quota_that_refuses_a_pod_is_named() -> None:
    refused = event("FailedCreatePod", f"Error creating: {OVER_QUOTA}")

    assert explain_waiting(gang(build_pod("demo")), job_events=[refused]) == Says(
        "False", "QuotaExceeded", f"1 of 2 pods cannot be created: {OVER_QUOTA}"
    )


def test_any_other_refusal_is_told_in_the_words_of_the_api_server() -> None:
    refused = event("FailedCreatePod", "Error creating: violates PodSecurity")

    assert explain_waiting(gang(), job_events=[refused]) == Says(
        "False", "PodsNotCreated", "2 of 2 pods cannot be created: violates PodSecurity"
    )


def test_the_refusal_seen_last_counts() -> None:
    old = event("FailedCreatePod", "old", seconds=5)
    new = event("FailedCreatePod", "new", seconds=1, series={"lastObservedTime": "2026-03-01T09:00:09.123456Z"})

    assert explain_waiting(gang(), job_events=[old, new]).message.endswith("new")
    assert explain_waiting(gang(), job_events=[new, old]).message.endswith("new")


def test_a_refusal_counts_only_while_a_pod_is_missing() -> None:
    pods = build_pod("demo"), build_pod("demo", node=1, phase="Pending")

    assert explain_waiting(gang(*pods), job_events=[event("FailedCreatePod", OVER_QUOTA)]).reason == "PodsStarting"


def test_events_of_another_attempt_or_of_success_say_nothing() -> None:
    events = [event("FailedCreatePod", OVER_QUOTA, job="demo-a2"), event("SuccessfulCreatePod", "Created pod")]

    assert explain_waiting(gang(), job_events=events).reason == "PodsStarting"
