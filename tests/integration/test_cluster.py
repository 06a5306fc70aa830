"""The test cluster itself: jobs run on nodes that are played, faults can be made, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.any_cluster import Cluster
from tests.cluster.cluster import TestCluster
from tests.cluster.errors import ClusterError
from tests.cluster.kwok import simulation
from tests.integration.conftest import serve_runs
from tests.support.jobs import build_pytorchjob
from tests.support.processes import await_gone, is_alive, wait_for

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


def pods_of(cluster: Cluster, namespace: str, job: str) -> dict[str, Any]:
    """Return a job's pods by their names without the job's."""
    label = f"training.kubeflow.org/job-name={job}"
    pods = cluster.get("pods", "--namespace", namespace, "--selector", label)["items"]
    return {pod["metadata"]["name"].removeprefix(f"{job}-"): pod for pod in pods}


def uids_of(pods: dict[str, Any]) -> set[str]:
    return {pod["metadata"]["uid"] for pod in pods.values()}


def await_phases(cluster: Cluster, namespace: str, job: str, **phases: str) -> dict[str, Any]:
    """Wait until a job's pods are in these phases; return them."""
    expected = {name.replace("_", "-"): phase for name, phase in phases.items()}

    def look() -> dict[str, Any] | None:
        pods = pods_of(cluster, namespace, job)
        return pods if {name: pod["status"]["phase"] for name, pod in pods.items()} == expected else None

    return wait_for(look, what=f"{job}'s pods to be {expected}", seconds=60) or {}


def await_condition(cluster: Cluster, namespace: str, job: str, kind: str) -> dict[str, Any]:
    """Wait until a job has a condition; return it."""

    def look() -> dict[str, Any] | None:
        status = cluster.get("pytorchjob", job, "--namespace", namespace).get("status", {})
        found = [c for c in status.get("conditions", []) if c["type"] == kind and c["status"] == "True"]
        return found[0] if found else None

    return wait_for(look, what=f"{job} to be {kind}", seconds=60) or {}


def test_a_job_runs_on_nodes_that_are_played(cluster: Cluster, namespace: str) -> None:
    cluster.apply([build_pytorchjob("runs", workers=2, gpus=8)], namespace=namespace)

    pods = await_phases(cluster, namespace, "runs", master_0="Running", worker_0="Running", worker_1="Running")

    assert len({pod["spec"]["nodeName"] for pod in pods.values()}) == 3
    environment = {entry["name"]: entry.get("value") for entry in pods["worker-1"]["spec"]["containers"][0]["env"]}
    assert {name: environment[name] for name in ("MASTER_ADDR", "WORLD_SIZE", "RANK")} == {
        "MASTER_ADDR": "runs-master-0",
        "WORLD_SIZE": "3",
        "RANK": "2",
    }
    assert await_condition(cluster, namespace, "runs", "Running")["reason"] == "PyTorchJobRunning"


def test_a_pod_ends_as_its_annotations_say(cluster: Cluster, namespace: str) -> None:
    cluster.apply([build_pytorchjob("fails")], namespace=namespace)
    await_phases(cluster, namespace, "fails", master_0="Running", worker_0="Running")

    plays = simulation(exit_code="137", reason="OOMKilled", message='{"rank": 1, "error": "out of \\"memory\\""}')
    pairs = [f"{name}={value}" for name, value in plays.items()]
    cluster.kubectl("annotate", "pod/fails-worker-0", "--namespace", namespace, *pairs)

    pods = await_phases(cluster, namespace, "fails", master_0="Running", worker_0="Failed")
    (container,) = pods["worker-0"]["status"]["containerStatuses"]
    ended = container["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"], json.loads(ended["message"])) == (
        137,
        "OOMKilled",
        {"rank": 1, "error": 'out of "memory"'},
    )
    assert container["restartCount"] == 0
    assert await_condition(cluster, namespace, "fails", "Failed")["reason"] == "PyTorchJobFailed"


def test_a_job_whose_pods_all_exit_with_zero_succeeds(cluster: Cluster, namespace: str) -> None:
    job = build_pytorchjob("succeeds", annotations=simulation(exit_code="0", message="step=7", after="1s"))
    cluster.apply([job], namespace=namespace)

    pods = await_phases(cluster, namespace, "succeeds", master_0="Succeeded", worker_0="Succeeded")

    ended = pods["master-0"]["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"], ended["message"]) == (0, "Completed", "step=7")
    await_condition(cluster, namespace, "succeeds", "Succeeded")


def test_a_pod_can_be_evicted(cluster: Cluster, namespace: str) -> None:
    cluster.apply([build_pytorchjob("evicted")], namespace=namespace)
    await_phases(cluster, namespace, "evicted", master_0="Running", worker_0="Running")

    (evict,) = simulation(evict="The node was low on resource: memory.").items()
    cluster.kubectl("annotate", "pod/evicted-master-0", "--namespace", namespace, "=".join(evict))

    status = await_phases(cluster, namespace, "evicted", master_0="Failed", worker_0="Running")["master-0"]["status"]
    assert (status["reason"], status["message"]) == ("Evicted", "The node was low on resource: memory.")
    assert [c["reason"] for c in status["conditions"] if c["type"] == "DisruptionTarget"] == ["TerminationByKubelet"]


def test_the_training_operators_webhook_refuses_what_it_cannot_run(cluster: Cluster, namespace: str) -> None:
    with pytest.raises(ClusterError, match=r"denied the request: .* at least one container with name pytorch"):
        cluster.apply([build_pytorchjob("refused", container_name="trainer")], namespace=namespace)


def test_a_node_can_be_taken_away_and_another_fall_silent(cluster: Cluster, namespace: str) -> None:
    removed, silent = cluster.add_fake_nodes(2, gpus=2)
    for name, node in (("orphaned", removed), ("unheard", silent)):
        job = build_pytorchjob(name, gpus=1)
        for replica in job["spec"]["pytorchReplicaSpecs"].values():
            replica["template"]["spec"]["nodeSelector"] = {"kubernetes.io/hostname": node}
        cluster.apply([job], namespace=namespace)
    orphans = await_phases(cluster, namespace, "orphaned", master_0="Running", worker_0="Running")
    unheard = await_phases(cluster, namespace, "unheard", master_0="Running", worker_0="Running")

    cluster.remove_node(removed)
    cluster.silence_node(silent)

    def replaced() -> bool:
        return not uids_of(orphans) & uids_of(pods_of(cluster, namespace, "orphaned"))

    def lost() -> bool:
        conditions = cluster.get("node", silent)["status"]["conditions"]
        return [c["status"] for c in conditions if c["type"] == "Ready"] == ["Unknown"]

    wait_for(replaced, what="the pods of the removed node to go", seconds=150)
    wait_for(lost, what="the silent node to be lost", seconds=90)
    assert removed not in {node["metadata"]["name"] for node in cluster.get("nodes")["items"]}
    still = pods_of(cluster, namespace, "unheard")
    assert uids_of(still) == uids_of(unheard)
    cluster.remove_node(silent)


def test_the_audit_log_says_who_wrote_what(own_cluster: TestCluster, namespace: str) -> None:
    own_cluster.apply([build_pytorchjob("audited")], namespace=namespace)
    await_phases(own_cluster, namespace, "audited", master_0="Running", worker_0="Running")

    written = {
        (event["user"].get("username"), event["verb"], event["objectRef"]["resource"], event["objectRef"].get("name"))
        for event in own_cluster.audit()
        if event.get("objectRef", {}).get("namespace") == namespace and event["verb"] in {"create", "patch"}
    }

    training_operator = "system:serviceaccount:kubeflow:training-operator"
    assert ("admin", "patch", "pytorchjobs", "audited") in written
    assert {
        (verb, name)
        for user, verb, resource, name in written
        if user == training_operator and resource == "pods" and verb == "create"
    } == {("create", "audited-master-0"), ("create", "audited-worker-0")}
    agents = {
        event["userAgent"].partition("/")[0]
        for event in own_cluster.audit()
        if event["user"].get("username") == "admin"
    }
    assert "kubectl" in agents


def test_a_service_account_may_do_what_its_roles_say(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("create", "serviceaccount", "reader", "--namespace", namespace)
    kubeconfig = cluster.service_account_kubeconfig(namespace, "reader")
    list_pods = ("get", "pods", "--namespace", namespace)
    with pytest.raises(ClusterError, match="Forbidden"):
        cluster.kubectl(*list_pods, kubeconfig=kubeconfig)

    account = f"--serviceaccount={namespace}:reader"
    cluster.kubectl("create", "rolebinding", "reader", "--clusterrole=view", account, "--namespace", namespace)

    assert cluster.kubectl(*list_pods, "--output", "name", kubeconfig=kubeconfig) == ""


def test_the_api_server_comes_back_as_it_went(own_cluster: TestCluster, namespace: str) -> None:
    own_cluster.kubectl("create", "configmap", "kept", "--namespace", namespace)
    url = own_cluster.url

    own_cluster.api_server.stop()
    with pytest.raises(ClusterError, match="refused"):
        own_cluster.kubectl("get", "nodes")
    own_cluster.api_server.start()

    assert own_cluster.url == url
    assert own_cluster.kubectl("get", "configmap/kept", "-o", "name", "--namespace", namespace) == "configmap/kept\n"
    own_cluster.apply([build_pytorchjob("after")], namespace=namespace)
    await_phases(own_cluster, namespace, "after", master_0="Running", worker_0="Running")


def test_a_component_can_be_paused(own_cluster: TestCluster) -> None:
    own_cluster.api_server.pause()
    try:
        with pytest.raises(ClusterError, match=r"(?i)timeout"):
            own_cluster.kubectl("get", "nodes", "--request-timeout=1s")
    finally:
        own_cluster.api_server.resume()

    own_cluster.api_server.await_ready()
    assert len(own_cluster.get("nodes")["items"]) >= 4


def test_the_custom_resource_and_every_example_are_accepted(cluster: Cluster, namespace: str) -> None:
    serve_runs(cluster)
    assert len(EXAMPLES) >= 10

    created = [
        cluster.kubectl("create", "--dry-run=server", "--output=name", "--filename", file, "--namespace", namespace)
        for file in EXAMPLES
    ]

    assert all(re.fullmatch(r"(trainingrun\.posttrain\.dev/\S+\n)+", name) for name in created), created


def test_a_folder_with_something_else_in_it_is_left_alone(own_cluster: TestCluster, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()

    with pytest.raises(ClusterError, match="would be emptied"):
        TestCluster.start(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


START_AND_WAIT = """
import signal, sys
from pathlib import Path
from tests.cluster.cluster import TestCluster
cluster = TestCluster.start(Path(sys.argv[1]))
print(*(process.pid for process in cluster.processes.values()), flush=True)
signal.pause()
"""


def test_nothing_outlives_whoever_started_a_cluster(own_cluster: TestCluster, tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    starting = subprocess.Popen(
        [sys.executable, "-c", START_AND_WAIT, folder], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert starting.stdout is not None
    pids = [int(pid) for pid in starting.stdout.readline().split()]
    assert len(pids) == 6
    assert all(map(is_alive, pids))
    with pytest.raises(ClusterError, match="runs already"):
        TestCluster.start(folder)

    os.kill(starting.pid, signal.SIGKILL)
    starting.communicate()

    await_gone(pids, seconds=30)
    with TestCluster.start(folder) as again:
        assert again.get("nodes")["items"] == []
        pids = [process.pid for process in again.processes.values()]
    assert not any(map(is_alive, pids))
    assert own_cluster.get("nodes")["items"]
