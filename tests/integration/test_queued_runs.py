"""TrainingRuns in a real Kueue: they wait for quota, hold it over restarts, lose it, and give it back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.contract.result import Result, to_termination_message
from posttrain.plan.names import workload_name
from tests.cluster.cluster import TestCluster
from tests.cluster.kwok import NODE_SELECTOR, TOLERATION
from tests.integration.conftest import serve_runs
from tests.support.cluster_runs import ClusterRun, message_of, reasons
from tests.support.operator_process import NAMESPACE, OperatorProcess, add_claim
from tests.support.queues import QUEUE, build_local_queue, build_priority, condition_of, serve_queue

pytestmark = [pytest.mark.integration, pytest.mark.kueue]

# Where the pods go is the flavor's to say, not the profile's.
PROFILE = {"cpu": "1", "memory": "1Gi"}
Make = Callable[..., ClusterRun]


@pytest.fixture(scope="module", autouse=True)
def operator(kueue_cluster: TestCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """The operator, in the cluster with Kueue."""
    serve_runs(kueue_cluster)
    kueue_cluster.create_namespace(NAMESPACE)
    folder = tmp_path_factory.mktemp("operator")
    operator = OperatorProcess(
        kueue_cluster, folder, python=Path(sys.executable), settings={"profiles": {"default": PROFILE}}
    )
    try:
        operator.process.start()
        yield operator
    finally:
        operator.close()


@pytest.fixture
def queue(kueue_cluster: TestCluster, kueue_namespace: str) -> Iterator[str]:
    """A queue of the test's own, with two GPUs behind it."""
    with serve_queue(kueue_cluster, kueue_namespace, gpus=2) as name:
        yield name


@pytest.fixture
def make(kueue_cluster: TestCluster, kueue_namespace: str) -> Make:
    """Makes runs of two nodes with a GPU each: two do not fit the queue."""
    for claim in ("inputs", "shared"):
        add_claim(kueue_cluster, kueue_namespace, claim)

    def apply(name: str, *, spec: Mapping[str, Any] = {}, **resources: Any) -> ClusterRun:
        run = ClusterRun(kueue_cluster, kueue_namespace, name)
        run.apply(**spec, resources={"numNodes": 2, "gpusPerNode": 1, "queueName": QUEUE, **resources})
        return run

    return apply


def workload_of(run: ClusterRun) -> dict[str, Any]:
    found: dict[str, Any] = run.cluster.get("workload", workload_name(run.name), "--namespace", run.namespace)
    return found


def await_reason(run: ClusterRun, reason: str, *, said: str = "") -> dict[str, Any]:
    """Wait until a run has no quota for that reason, and says that about it; return its status."""
    return run.await_status(
        lambda status: (
            reasons(status)["QuotaReserved"] == ("False", reason) and said in message_of(status, "QuotaReserved")
        ),
        what=f"QuotaReserved=False {reason} ({said})",
    )


def await_no_pods(run: ClusterRun, **own_labels: str) -> None:
    wanted = {"run": run.name, **own_labels}
    run.cluster.await_json(
        *("pods", "--namespace", run.namespace),
        *("--selector", ",".join(f"posttrain.dev/{name}={value}" for name, value in wanted.items())),
        until=lambda found: not found["items"],
        what=f"the pods of {run.name} to go",
    )


def test_a_run_waits_for_quota_is_preempted_resumes_and_finishes(
    kueue_cluster: TestCluster, kueue_namespace: str, queue: str, make: Make
) -> None:
    urgent = f"{kueue_namespace}-urgent"
    kueue_cluster.apply([build_priority(urgent, value=1000)])
    first = make("first")
    first.await_running()

    demo = make("demo")
    waiting = await_reason(demo, "QuotaPending", said="insufficient unused quota for nvidia.com/gpu")
    assert (waiting["stage"], waiting["attempt"]) == ("Queued", 1)
    assert "2 more needed" in message_of(waiting, "QuotaReserved")
    assert demo.pods(attempt=1) == []

    first.complete()
    demo.await_running()
    admitted = demo.status()
    assert reasons(admitted)["QuotaReserved"] == ("True", "QuotaReserved")
    assert message_of(admitted, "QuotaReserved") == f"admitted by ClusterQueue {kueue_namespace}, in {kueue_namespace}"

    other = make("urgent", workloadPriorityClass=urgent)
    preempted = await_reason(demo, "Preempted", said="Preempted to accommodate a workload")
    assert preempted["stage"] in {"Restarting", "Queued"}
    other.await_running()
    queued = demo.await_stage("Queued", attempt=2)
    assert reasons(queued)["QuotaReserved"] == ("False", "Preempted")
    assert demo.pods(attempt=1) + demo.pods(attempt=2) == []

    other.complete()
    demo.await_running(attempt=2)
    ended = demo.complete(attempt=2)
    assert ended["restarts"] == {"infrastructure": 0, "application": 0, "stepsLost": 0}
    assert ("Warning", "Preempted") in demo.events()
    kueue_cluster.kubectl("delete", "workloadpriorityclass", urgent)


def test_of_two_runs_with_servers_in_a_queue_for_one_and_a_half_one_waits_and_holds_no_gpu(
    kueue_cluster: TestCluster, kueue_namespace: str, make: Make
) -> None:
    with serve_queue(kueue_cluster, kueue_namespace, gpus=6):
        first = make("first", spec=served(replicas=2), numNodes=2)
        first.await_running()
        sets = workload_of(first)["status"]["admission"]["podSetAssignments"]
        assert [(part["name"], part["count"]) for part in sets] == [("trainer", 2), ("server", 2)]

        second = make("second", spec=served(replicas=2), numNodes=2)
        waiting = await_reason(second, "QuotaPending", said="insufficient unused quota for nvidia.com/gpu")
        assert waiting["stage"] == "Queued"
        await_no_pods(second)

        first.complete()
        second.await_running()
        await_no_pods(first, role="server")
        second.complete()


def served(*, replicas: int) -> dict[str, Any]:
    """Return what makes of a run one with servers of a GPU each."""
    rollout = {"mode": "Server", "server": {"replicas": replicas, "gpusPerNode": 1, "cpu": "1", "memory": "1Gi"}}
    return {"sft": None, "grpo": {"rewards": [{"name": "format"}], "rollout": rollout}}


def test_a_killed_rank_costs_no_reservation_while_another_run_waits(queue: str, make: Make) -> None:
    demo = make("demo")
    demo.await_running()
    before = workload_of(demo)
    waiter = make("waiter")
    await_reason(waiter, "QuotaPending", said="insufficient unused quota")

    result = Result(reason="RankKilled", message="rank 1 was killed by signal 9", rank=1)
    demo.end_pod(1, exit_code=138, message=to_termination_message(result))

    demo.await_running(attempt=2)
    after = workload_of(demo)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert condition_of(after, "QuotaReserved") == condition_of(before, "QuotaReserved")
    assert condition_of(workload_of(waiter), "QuotaReserved")["status"] == "False"
    assert waiter.pods(attempt=1) == []
    assert demo.status()["restarts"]["infrastructure"] == 1
    demo.complete(attempt=2)
    waiter.await_running()


def test_a_suspended_run_gives_its_quota_to_the_one_that_waits(queue: str, make: Make) -> None:
    demo = make("demo")
    demo.await_running()
    waiter = make("waiter")
    await_reason(waiter, "QuotaPending")

    demo.patch({"suspend": True})

    waiter.await_running()
    suspended = demo.await_stage("Suspended")
    assert reasons(suspended)["QuotaReserved"] == ("False", "Suspended")
    demo.patch({"suspend": False})
    await_reason(demo, "QuotaPending", said="insufficient unused quota")
    waiter.complete()
    demo.await_running(attempt=2)


def test_a_run_that_fails_frees_its_quota(queue: str, make: Make) -> None:
    demo = make("demo")
    demo.await_running()
    waiter = make("waiter")
    await_reason(waiter, "QuotaPending")

    demo.end_pod(0, exit_code=2, message=to_termination_message(Result(reason="ConfigInvalid", message="wrong")))

    demo.await_stage("Failed")
    waiter.await_running()
    assert condition_of(workload_of(demo), "Finished")["reason"] == "Failed"


def test_a_run_that_is_deleted_frees_its_quota(queue: str, make: Make) -> None:
    demo = make("demo")
    demo.await_running()
    waiter = make("waiter")
    await_reason(waiter, "QuotaPending")

    demo.kubectl("delete", "trun", demo.name)

    waiter.await_running()
    await_no_pods(demo)


def test_a_run_that_waits_can_ask_for_less(queue: str, make: Make) -> None:
    demo = make("demo", numNodes=3)
    await_reason(demo, "QuotaPending", said="insufficient quota for nvidia.com/gpu")

    demo.patch({"resources": {"numNodes": 1}})

    demo.await_running(pods=1)


def test_pods_go_where_the_flavor_says(queue: str, make: Make) -> None:
    demo = make("demo")

    for pod in demo.await_running():
        assert pod["spec"]["nodeSelector"] == NODE_SELECTOR
        assert TOLERATION in pod["spec"]["tolerations"]
        assert pod["spec"]["nodeName"].startswith("fake-")


def test_a_queue_that_does_not_exist_is_waited_for(
    kueue_cluster: TestCluster, kueue_namespace: str, queue: str, make: Make
) -> None:
    demo = make("demo", queueName="later")
    waiting = await_reason(demo, "QueueUnavailable", said="LocalQueue later doesn't exist")
    assert waiting["stage"] == "Queued"

    kueue_cluster.apply([build_local_queue(kueue_namespace, name="later")])

    demo.await_running()


def test_a_priority_that_does_not_exist_is_waited_for(
    kueue_cluster: TestCluster, kueue_namespace: str, queue: str, make: Make
) -> None:
    priority = f"{kueue_namespace}-later"
    demo = make("demo", workloadPriorityClass=priority)
    waiting = demo.await_status(lambda s: reasons(s)["Accepted"][1] == "ReferencePending", what="the wait")
    assert f"there is no WorkloadPriorityClass {priority}" in message_of(waiting, "Accepted")

    kueue_cluster.apply([build_priority(priority, value=7)])

    demo.await_running()
    assert workload_of(demo)["spec"]["priority"] == 7
    kueue_cluster.kubectl("delete", "workloadpriorityclass", priority)
