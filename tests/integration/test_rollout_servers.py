"""A TrainingRun with rollout servers on a real control plane: who waits for whom, and what is left at the end."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.any_cluster import Cluster
from tests.support.cluster_runs import ClusterRun, enforce_gpu_quota, message_of, reasons
from tests.support.operator_process import OperatorProcess

pytestmark = pytest.mark.integration


def served(*, gpus: int, nodes: int = 1) -> dict[str, Any]:
    """Return what makes of a run one with two servers of so many nodes with so many GPUs."""
    rollout = {"mode": "Server", "server": {"replicas": 2, "nodesPerReplica": nodes, "gpusPerNode": gpus}}
    return {
        "sft": None,
        "grpo": {"rewards": [{"name": "format"}], "rollout": rollout},
        "resources": {"numNodes": 1, "gpusPerNode": 1},
    }


def objects_of(run: ClusterRun, kind: str) -> list[str]:
    """Return the names of the run's objects of a kind."""
    found = run.cluster.get(kind, "--namespace", run.namespace, f"--selector=posttrain.dev/run={run.name}")["items"]
    return sorted(item["metadata"]["name"] for item in found)


def test_a_gang_is_made_when_its_servers_answer_and_they_go_with_the_runs_end(
    cluster: Cluster, operator: OperatorProcess, run: ClusterRun
) -> None:
    run.apply(**served(gpus=1, nodes=2))
    run.await_running(pods=1)

    status = run.status()
    assert reasons(status)["ServerReady"] == ("True", "ServersReady")
    assert status["gpus"] == 5
    assert objects_of(run, "pods") == ["demo-a1-master-0", *(f"demo-server-{index}" for index in range(4))]
    pods = cluster.get("pods", "--namespace", run.namespace)["items"]
    [job] = cluster.get("pytorchjobs", "--namespace", run.namespace)["items"]
    answered = [
        condition["lastTransitionTime"]
        for pod in pods
        if pod["metadata"]["name"].startswith("demo-server-")
        for condition in pod["status"]["conditions"]
        if condition["type"] == "Ready"
    ]
    assert max(answered) <= job["metadata"]["creationTimestamp"]

    ended = run.complete(pods=1)
    assert reasons(ended)["ServerReady"] == ("False", "Completed")
    run.await_status(lambda _: objects_of(run, "statefulsets,configmaps") == ["demo-a1"], what="the servers' end")
    run.await_status(lambda _: objects_of(run, "pods") == ["demo-a1-master-0"], what="the end of their pods")


def test_a_gang_is_not_made_while_a_server_finds_no_node(
    cluster: Cluster, operator: OperatorProcess, run: ClusterRun
) -> None:
    run.apply(**served(gpus=64))

    status = run.await_status(
        lambda status: reasons(status).get("ServerReady") == ("False", "Unschedulable"), what="a server without a node"
    )

    assert "pod demo-server-" in message_of(status, "ServerReady")
    assert (status["stage"], reasons(status)["PodsReady"]) == ("Starting", ("False", "Unschedulable"))
    assert objects_of(run, "pytorchjobs") == []


def test_a_server_that_a_quota_refuses_is_told_in_its_words(
    cluster: Cluster, operator: OperatorProcess, run: ClusterRun
) -> None:
    enforce_gpu_quota(cluster, run.namespace, gpus=1)
    run.apply(**served(gpus=1))

    waiting = run.await_status(lambda status: reasons(status)["ServerReady"][1] == "QuotaExceeded", what="the wait")
    message = message_of(waiting, "ServerReady")
    assert message.startswith('1 of 2 pods cannot be created: pods "demo-server-')
    assert "exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=1" in message
    assert objects_of(run, "pytorchjobs") == []


def test_servers_live_over_a_restart_of_the_gang_and_not_over_a_suspension(
    cluster: Cluster, operator: OperatorProcess, run: ClusterRun
) -> None:
    run.apply(**served(gpus=1))
    run.await_running(pods=1)
    before = server_uids(run)

    run.end_pod(0, exit_code=138)
    run.await_running(attempt=2, pods=1)
    assert server_uids(run) == before

    run.patch({"suspend": True})
    run.await_stage("Suspended")
    run.await_status(lambda _: server_uids(run) == {}, what="the end of the servers")
    run.patch({"suspend": False})
    run.await_running(attempt=3, pods=1)
    assert not set(server_uids(run).values()) & set(before.values())


def server_uids(run: ClusterRun) -> dict[str, str]:
    """Return the uid of each server's pod by its name."""
    selector = f"posttrain.dev/run={run.name},posttrain.dev/role=server"
    pods = run.cluster.get("pods", "--namespace", run.namespace, "--selector", selector)["items"]
    return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in pods}
