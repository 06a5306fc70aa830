"""The job controllers of the local run, as pure functions."""

from __future__ import annotations

from datetime import timedelta

import pytest

from posttrain.local.container import Ended
from posttrain.local.jobs import Rendezvous, build_gang, injected_env, reconcile_job
from posttrain.local.pods import ended_status, lost_status
from posttrain.plan.types import Manifest
from tests.support.builders import T0, at
from tests.support.local_cluster import build_batch_job, build_job


def fail_at(pod: Manifest, seconds: float, *, exit_code: int = 1) -> Manifest:
    """Return the pod after its container failed so many seconds after T0."""
    ended = Ended(exit_code=exit_code, signal=None, started_at=T0, finished_at=at(seconds))
    return {**pod, "status": ended_status(pod, ended, message="")}


def job_with_uid(job: Manifest) -> Manifest:
    return {**job, "metadata": {**job["metadata"], "uid": "uid-of-job"}}


def test_the_training_operators_variables_for_a_node() -> None:
    variables = dict(injected_env("8", nodes=4, node=3, address="demo-a1-master-0", port=23456))

    assert variables == {
        "PYTHONUNBUFFERED": "1",
        "PET_NPROC_PER_NODE": "8",
        "MASTER_ADDR": "demo-a1-master-0",
        "MASTER_PORT": "23456",
        "PET_MASTER_ADDR": "demo-a1-master-0",
        "PET_MASTER_PORT": "23456",
        "WORLD_SIZE": "32",
        "RANK": "3",
        "PET_NODE_RANK": "3",
        "PET_NNODES": "4",
    }


def test_auto_processes_count_as_one_in_the_world_size() -> None:
    assert dict(injected_env("auto", nodes=2, node=0, address="a", port=1))["WORLD_SIZE"] == "2"


def test_a_gang_has_a_master_and_numbered_workers_with_kubeflows_labels() -> None:
    job = job_with_uid(build_job("pass", workers=2))

    pods = build_gang(job, rendezvous=Rendezvous(address="127.0.0.1", port=5), now=T0)

    assert [pod["metadata"]["name"] for pod in pods] == ["demo-a1-master-0", "demo-a1-worker-0", "demo-a1-worker-1"]
    assert pods[0]["metadata"]["labels"] == {
        "posttrain.dev/run": "demo",
        "posttrain.dev/attempt": "1",
        "training.kubeflow.org/job-name": "demo-a1",
        "training.kubeflow.org/operator-name": "pytorchjob-controller",
        "training.kubeflow.org/replica-type": "master",
        "training.kubeflow.org/replica-index": "0",
        "training.kubeflow.org/job-role": "master",
    }
    assert [{e["name"]: e["value"] for e in p["spec"]["containers"][0]["env"]}["RANK"] for p in pods] == ["0", "1", "2"]
    assert len({pod["metadata"]["uid"] for pod in pods}) == 3


@pytest.mark.parametrize(("failures", "seconds"), [(1, 10), (2, 20), (3, 40), (9, 360)])
def test_the_delay_before_another_try_doubles_up_to_six_minutes(failures: int, seconds: int) -> None:
    job = job_with_uid(build_batch_job("pass", backoff_limit=10))
    (pod,) = reconcile_job(job, [], now=T0).create
    failed = [{**fail_at(pod, i), "metadata": {**pod["metadata"], "name": f"p{i}"}} for i in range(failures)]

    waiting = reconcile_job(job, failed, now=at(failures))
    due = reconcile_job(job, failed, now=at(failures - 1 + seconds))

    assert waiting.retry_at == at(failures - 1) + timedelta(seconds=seconds)
    assert waiting.create == ()
    assert [created["metadata"]["name"] for created in due.create] == [f"demo-prepare-{failures}"]


def test_a_lost_pod_is_replaced_at_once_and_not_counted() -> None:
    job = job_with_uid(build_batch_job("pass", backoff_limit=0))
    (pod,) = reconcile_job(job, [], now=T0).create
    lost = {**pod, "status": lost_status(pod, now=at(1))}

    outcome = reconcile_job(job, [lost], now=at(2))

    assert outcome.status["failed"] == 0
    assert [created["metadata"]["name"] for created in outcome.create] == ["demo-prepare-1"]
