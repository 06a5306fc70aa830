"""What a run does when the cluster fails it: nodes that go, a quota that refuses pods, an operator that restarts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.any_cluster import Cluster
from tests.cluster.cluster import TestCluster
from tests.cluster.kwok import simulation
from tests.support.cluster_runs import ClusterRun, enforce_gpu_quota, message_of, reasons
from tests.support.operator_process import OperatorProcess

pytestmark = pytest.mark.integration

# A node that is deleted is believed to be so after 40 s, one that is silent after 50 s.
NODE_SECONDS = 180.0
LOST_SOON = [
    {"key": f"node.kubernetes.io/{taint}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1}
    for taint in ("unreachable", "not-ready")
]
ONE_GPU = {"numNodes": 1, "gpusPerNode": 1}


def label(cluster: Cluster, namespace: str, node: str) -> None:
    """Let the test's runs go to a node."""
    cluster.kubectl("label", "node", node, f"{namespace}=yes")


@pytest.fixture
def own_node(cluster: Cluster, namespace: str) -> Iterator[str]:
    """A node that nobody else's run goes to, and that the test may break."""
    (node,) = cluster.add_fake_nodes(1)
    label(cluster, namespace, node)
    yield node
    cluster.kubectl("delete", "node", node, "--ignore-not-found", "--wait=false")


def only_here(namespace: str, **overrides: Any) -> dict[str, Any]:
    return {"nodeSelector": {namespace: "yes"}, **overrides}


def node_of(run: ClusterRun, attempt: int) -> list[str]:
    return [pod["spec"]["nodeName"] for pod in run.pods(attempt=attempt)]


def test_a_node_that_is_taken_away_restarts_the_gang_elsewhere(
    cluster: Cluster, run: ClusterRun, own_node: str
) -> None:
    run.apply(resources=ONE_GPU, podOverrides=only_here(run.namespace))
    run.await_running(pods=1)
    assert node_of(run, 1) == [own_node]
    other = cluster.fake_nodes[0]
    label(cluster, run.namespace, other)

    cluster.remove_node(own_node)

    status = run.await_status(
        lambda s: s["attempt"] == 2 and s.get("attemptRunningTime"), what="attempt 2 running", seconds=NODE_SECONDS
    )
    assert node_of(run, 2) == [other]
    assert (status["failure"]["reason"], status["restarts"]["infrastructure"]) == ("NodeLost", 1)
    assert own_node in status["failure"]["message"]


def test_a_node_that_falls_silent_restarts_the_gang_elsewhere(cluster: Cluster, run: ClusterRun, own_node: str) -> None:
    run.apply(resources=ONE_GPU, podOverrides=only_here(run.namespace, tolerations=LOST_SOON))
    run.await_running(pods=1)
    other = cluster.fake_nodes[1]
    label(cluster, run.namespace, other)

    cluster.silence_node(own_node)

    status = run.await_status(lambda s: s["attempt"] == 2, what="attempt 2", seconds=NODE_SECONDS)
    assert (status["failure"]["reason"], status["restarts"]["infrastructure"]) == ("NodeLost", 1)
    assert own_node in status["failure"]["message"]
    # For two minutes the old pod may still run: who knows that it does not, says so.
    assert "attempt 2 waits for the end of the one before (live pods: 1)" in message_of(run.status(), "Succeeded")
    run.kubectl("delete", "pod", "demo-a1-master-0", "--force", "--grace-period=0")
    run.await_running(attempt=2, pods=1)
    assert node_of(run, 2) == [other]


def test_a_node_that_failed_a_run_twice_is_avoided(cluster: Cluster, run: ClusterRun) -> None:
    bad, good = cluster.fake_nodes[2:4]
    label(cluster, run.namespace, bad)
    run.apply(resources=ONE_GPU, podOverrides=only_here(run.namespace))
    (evict,) = simulation(evict="the node was low on memory").items()
    for attempt in (1, 2):
        run.await_running(attempt=attempt, pods=1)
        run.kubectl("annotate", "pod", f"demo-a{attempt}-master-0", "=".join(evict))

    waiting = run.await_status(
        lambda s: s["attempt"] == 3 and reasons(s)["PodsReady"][1] == "Unschedulable", what="attempt 3 without a node"
    )
    assert waiting["restarts"]["avoidedNodes"] == [bad]
    label(cluster, run.namespace, good)

    run.await_running(attempt=3, pods=1)
    assert node_of(run, 3) == [good]


def test_a_quota_that_refuses_pods_is_told_in_its_words_and_waited_for(cluster: Cluster, run: ClusterRun) -> None:
    enforce_gpu_quota(cluster, run.namespace, gpus=1)
    run.apply()

    waiting = run.await_status(lambda s: reasons(s)["PodsReady"][1] == "QuotaExceeded", what="the wait")
    message = message_of(waiting, "PodsReady")
    assert message.startswith("1 of 2 pods cannot be created: pods ")
    assert "exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=1" in message
    assert message in message_of(waiting, "Succeeded")
    enforce_gpu_quota(cluster, run.namespace, gpus=2)
    run.await_status(lambda s: s.get("attemptRunningTime"), what="the gang running", seconds=NODE_SECONDS)


def test_an_operator_that_is_restarted_writes_nothing_about_a_run_that_trains(
    own_cluster: TestCluster, operator: OperatorProcess, run: ClusterRun
) -> None:
    run.apply()
    run.await_running()
    before = writes_of_the_operator(own_cluster, run.namespace)
    assert ("create", "pytorchjobs", "demo-a1") in before

    operator.process.stop()
    operator.process.start()

    canary = ClusterRun(own_cluster, run.namespace, "canary")
    canary.apply()
    canary.await_running()
    after = writes_of_the_operator(own_cluster, run.namespace)[len(before) :]
    assert [write for write in after if not write[2].startswith("canary")] == []


def writes_of_the_operator(cluster: TestCluster, namespace: str) -> list[tuple[str, str, str]]:
    """Return verb, resource and name of everything that the operator wrote in a namespace."""
    return [
        (event["verb"], event["objectRef"]["resource"], event["objectRef"].get("name", ""))
        for event in cluster.audit()
        if event.get("userAgent", "").startswith("posttrain-operator")
        and event["verb"] not in {"get", "list", "watch"}
        and event.get("objectRef", {}).get("namespace") == namespace
    ]
