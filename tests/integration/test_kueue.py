"""Kueue in the test cluster: it admits what fits its quota, and holds back the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.cluster import TestCluster
from tests.cluster.errors import ClusterError
from tests.cluster.kwok import NODE_SELECTOR
from tests.support.jobs import build_pytorchjob
from tests.support.processes import wait_for
from tests.support.queues import VERSION, serve_queue

pytestmark = pytest.mark.kueue


@pytest.fixture
def queue(kueue_cluster: TestCluster, kueue_namespace: str) -> Iterator[str]:
    """A LocalQueue of the test's own, with twelve GPUs behind it."""
    with serve_queue(kueue_cluster, kueue_namespace, gpus=12) as name:
        yield name


def build_workload(name: str, *, gpus: int) -> dict[str, Any]:
    limits = {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": str(gpus)}
    container = {"name": "pytorch", "image": "registry.test/trainer:1", "resources": {"limits": limits}}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    return {
        "apiVersion": VERSION,
        "kind": "Workload",
        "metadata": {"name": name},
        "spec": {"queueName": "queue", "podSets": [{"name": "trainer", "count": 1, "template": template}]},
    }


def await_condition(cluster: TestCluster, namespace: str, name: str, kind: str, status: str) -> dict[str, Any]:
    """Wait until a Workload has a condition with this status; return it."""

    def look() -> dict[str, Any] | None:
        conditions = cluster.get("workload", name, "--namespace", namespace).get("status", {}).get("conditions", [])
        found = [c for c in conditions if (c["type"], c["status"]) == (kind, status)]
        return found[0] if found else None

    return wait_for(look, what=f"{kind}={status} of {name}", seconds=60) or {}


def test_a_workload_is_admitted_and_the_next_waits_for_its_quota(
    kueue_cluster: TestCluster, kueue_namespace: str, queue: str
) -> None:
    kueue_cluster.apply([build_workload("first", gpus=8)], namespace=kueue_namespace)
    await_condition(kueue_cluster, kueue_namespace, "first", "Admitted", "True")
    first = kueue_cluster.get("workload", "first", "--namespace", kueue_namespace)
    (assigned,) = first["status"]["admission"]["podSetAssignments"]
    assert (assigned["count"], assigned["flavors"]["nvidia.com/gpu"]) == (1, kueue_namespace)
    assert assigned["resourceUsage"]["nvidia.com/gpu"] == "8"

    kueue_cluster.apply([build_workload("second", gpus=8)], namespace=kueue_namespace)
    waiting = await_condition(kueue_cluster, kueue_namespace, "second", "QuotaReserved", "False")
    assert waiting["reason"] == "Pending"
    assert "insufficient unused quota for nvidia.com/gpu" in waiting["message"]
    assert "4 more needed" in waiting["message"]

    finished = {
        "type": "Finished",
        "status": "True",
        "reason": "Succeeded",
        "message": "done",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    conditions = [*first["status"]["conditions"], finished]
    patch = json.dumps({"status": {"conditions": conditions}})
    into = ("--namespace", kueue_namespace, "--subresource=status", "--type=merge")
    kueue_cluster.kubectl("patch", "workload", "first", *into, "--patch", patch)

    await_condition(kueue_cluster, kueue_namespace, "second", "Admitted", "True")


def test_a_job_with_a_queue_starts_where_its_flavor_says(
    kueue_cluster: TestCluster, kueue_namespace: str, queue: str
) -> None:
    job = build_pytorchjob("queued", gpus=4)
    job["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": queue}
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        del replica["template"]["spec"]["nodeSelector"], replica["template"]["spec"]["tolerations"]

    kueue_cluster.apply([job], namespace=kueue_namespace)

    def running() -> list[Any] | None:
        pods = kueue_cluster.get("pods", "--namespace", kueue_namespace)["items"]
        return pods if [pod["status"]["phase"] for pod in pods] == ["Running", "Running"] else None

    pods = wait_for(running, what="both pods to run", seconds=60) or []
    assert [pod["spec"]["nodeSelector"] for pod in pods] == [NODE_SELECTOR, NODE_SELECTOR]


def test_a_job_without_a_queue_is_left_alone(kueue_cluster: TestCluster, kueue_namespace: str) -> None:
    kueue_cluster.apply([build_pytorchjob("free", gpus=8)], namespace=kueue_namespace)

    def running() -> bool:
        status = kueue_cluster.get("pytorchjob", "free", "--namespace", kueue_namespace).get("status", {})
        return "Running" in {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}

    wait_for(running, what="the job to run", seconds=60)
    assert kueue_cluster.get("workloads", "--namespace", kueue_namespace)["items"] == []


def test_kueues_webhook_refuses_a_workload_that_makes_no_sense(
    kueue_cluster: TestCluster, kueue_namespace: str, queue: str
) -> None:
    kueue_cluster.apply([build_workload("immutable", gpus=1)], namespace=kueue_namespace)
    await_condition(kueue_cluster, kueue_namespace, "immutable", "QuotaReserved", "True")

    with pytest.raises(ClusterError, match="field is immutable"):
        kueue_cluster.apply([build_workload("immutable", gpus=2)], namespace=kueue_namespace)
