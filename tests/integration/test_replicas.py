"""Two replicas: the one that leads is killed or cut off while runs are submitted, and the other goes on alone.

$POSTTRAIN_REPLICA_RUNS says how many runs. Each replica has a user of its own, so the audit log tells them apart.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import TestCluster
from tests.support.api_proxy import ApiProxy
from tests.support.cluster_runs import ClusterRun
from tests.support.operator_process import NAMESPACE, Replicas
from tests.support.processes import wait_for

pytestmark = pytest.mark.integration

RUNS = int(os.environ.get("POSTTRAIN_REPLICA_RUNS", "40"))
GPUS = 64
TAKEOVER_SECONDS_MAX = 20.0
RUNNING_SECONDS = 60.0 + 2.0 * RUNS
NO_WORK = frozenset({"leases", "tokenreviews", "subjectaccessreviews", "selfsubjectaccessreviews"})


@pytest.fixture(scope="module")
def users(faulty_cluster: TestCluster) -> dict[str, Path]:
    """Two replicas' kubeconfigs by their names, each with a ServiceAccount of its own."""
    made = {}
    for name in ("first", "second"):
        account = f"--serviceaccount={NAMESPACE}:{name}"
        faulty_cluster.kubectl("create", "serviceaccount", name, "--namespace", NAMESPACE)
        faulty_cluster.kubectl("create", "clusterrolebinding", name, "--clusterrole=cluster-admin", account)
        made[name] = faulty_cluster.service_account_kubeconfig(NAMESPACE, name)
    return made


@pytest.fixture(scope="module", autouse=True)
def room(faulty_cluster: TestCluster) -> None:
    """Nodes for every run's GPU."""
    missing = RUNS - GPUS
    if missing > 0:
        faulty_cluster.add_fake_nodes(-(-missing // 8))


@pytest.fixture
def runs(faulty_cluster: TestCluster, faulty_namespace: str) -> list[ClusterRun]:
    """The runs, none of which is applied yet."""
    return [ClusterRun(faulty_cluster, faulty_namespace, f"r{number}") for number in range(RUNS)]


@pytest.fixture
def submitting() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def submit(runs: list[ClusterRun]) -> None:
    """Apply the runs one after the other: a node and a GPU each."""
    for run in runs:
        run.apply(resources={"numNodes": 1, "gpusPerNode": 1})


def statuses(cluster: TestCluster, namespace: str) -> list[dict[str, Any]]:
    return [run.get("status") or {} for run in cluster.get("trainingruns", "--namespace", namespace)["items"]]


def await_some_running(cluster: TestCluster, namespace: str, count: int) -> None:
    """Wait until so many runs have all their pods running."""

    def look() -> bool:
        return sum(1 for status in statuses(cluster, namespace) if status.get("attemptRunningTime")) >= count

    wait_for(look, what=f"{count} runs to run", seconds=RUNNING_SECONDS)


def written_by(cluster: TestCluster, user: str) -> list[dict[str, Any]]:
    """Return the audit events of a replica's writes, refused ones among them, but for those of its election."""
    account = f"system:serviceaccount:{NAMESPACE}:{user}"
    return [
        event
        for event in cluster.audit()
        if event["user"].get("username") == account
        and event["verb"] in ("create", "patch", "update", "delete")
        and event["objectRef"]["resource"] not in NO_WORK
    ]


def second_of(event: dict[str, Any], field: str = "requestReceivedTimestamp") -> float:
    return datetime.fromisoformat(event[field]).timestamp()


def jobs_created(cluster: TestCluster, namespace: str) -> Counter[str]:
    """Return how often each PyTorchJob of a namespace was created."""
    return Counter(
        event["objectRef"]["name"]
        for event in cluster.audit()
        if event["verb"] == "create"
        and event["objectRef"].get("resource") == "pytorchjobs"
        and event["objectRef"].get("namespace") == namespace
        and event["responseStatus"].get("code") == 201
    )


def test_the_leader_is_killed_while_runs_are_submitted(
    faulty_cluster: TestCluster,
    faulty_namespace: str,
    replicas: Replicas,
    users: dict[str, Path],
    runs: list[ClusterRun],
    submitting: ThreadPoolExecutor,
) -> None:
    leader = replicas.add("first", kubeconfig=users["first"])
    replicas.add("second", kubeconfig=users["second"])
    submitted = submitting.submit(submit, runs)
    await_some_running(faulty_cluster, faulty_namespace, RUNS // 4)
    earlier = len(written_by(faulty_cluster, "second"))

    leader.kill()
    killed = time.time()
    submitted.result()
    await_some_running(faulty_cluster, faulty_namespace, RUNS)

    new = written_by(faulty_cluster, "second")
    assert earlier == 0
    takeover = second_of(new[0]) - killed
    print(f"\nkilled: takeover after {takeover:.1f} s, {RUNS} runs")
    assert takeover < TAKEOVER_SECONDS_MAX
    assert max(second_of(event) for event in written_by(faulty_cluster, "first")) < second_of(new[0])
    assert jobs_created(faulty_cluster, faulty_namespace) == Counter({f"{run.name}-a1": 1 for run in runs})


def test_the_leaders_connection_freezes_while_runs_are_submitted(
    faulty_cluster: TestCluster,
    faulty_namespace: str,
    replicas: Replicas,
    users: dict[str, Path],
    runs: list[ClusterRun],
    submitting: ThreadPoolExecutor,
) -> None:
    begun = {name: len(written_by(faulty_cluster, name)) for name in users}
    with ApiProxy(faulty_cluster, kubeconfig=users["first"], name="frozen") as proxy:
        old = replicas.add("first", kubeconfig=proxy.kubeconfig)
        other = replicas.add("second", kubeconfig=users["second"])
        submitted = submitting.submit(submit, runs)
        await_some_running(faulty_cluster, faulty_namespace, RUNS // 4)
        pid = old.process.pid

        proxy.freeze()
        frozen = time.time()
        wait_for(lambda: old.readiness()[0] == 503, what="the old leader to notice", seconds=TAKEOVER_SECONDS_MAX)
        assert "lease: " in old.readiness()[1]
        submitted.result()
        await_some_running(faulty_cluster, faulty_namespace, RUNS)
        proxy.thaw()
        wait_for(old.is_ready, what="the old leader to wait its turn", seconds=60)

        written = {name: written_by(faulty_cluster, name)[begun[name] :] for name in users}
        takeover = second_of(written["second"][0]) - frozen
        print(f"\nfrozen: takeover after {takeover:.1f} s, {RUNS} runs")
        assert takeover < TAKEOVER_SECONDS_MAX
        assert max(map(second_of, written["first"])) < second_of(written["second"][0])
        assert jobs_created(faulty_cluster, faulty_namespace) == Counter({f"{run.name}-a1": 1 for run in runs})

        # It never ended, and leads again when it is its turn.
        other.kill()
        runs[0].end_pod(0, exit_code=138)
        runs[0].await_running(attempt=2, pods=1)
        assert old.process.pid == pid
