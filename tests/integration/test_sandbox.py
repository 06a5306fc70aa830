"""The sandbox of a run that rewards programs, on a real control plane; its pod is played."""

from __future__ import annotations

import pytest

from posttrain.plan import labels
from tests.cluster.any_cluster import Cluster
from tests.support.cluster_runs import ClusterRun, message_of, reasons

pytestmark = pytest.mark.integration

CODE = {"sft": None, "grpo": {"rewards": [{"name": "code"}], "args": {"max_steps": 20, "num_generations": 2}}}
SANDBOX = f"{labels.RUN}=demo,{labels.ROLE}={labels.ROLE_SANDBOX}"


def test_a_gang_waits_for_its_sandbox_which_goes_while_the_run_is_suspended_and_comes_back(
    cluster: Cluster, run: ClusterRun
) -> None:
    run.kubectl("create", "quota", "none", "--hard=requests.cpu=0")
    run.apply(**CODE)
    waiting = run.await_status(
        lambda status: reasons(status)["PodsReady"] == ("False", "QuotaExceeded"), what="the refusal of the sandbox"
    )
    assert "the sandbox's pod cannot be created" in message_of(waiting, "PodsReady")
    assert run.pods(attempt=1) == []

    run.kubectl("delete", "quota", "none")
    run.await_running()
    (pod,) = cluster.get("pods", "--namespace", run.namespace, "--selector", SANDBOX)["items"]
    assert pod["spec"]["containers"][0]["image"] == "ghcr.io/posttrain/sandbox:0.1.0"
    assert run.status()["provenance"]["imageDigests"]["sandbox"] == "ghcr.io/posttrain/sandbox:0.1.0"

    run.patch({"suspend": True})
    run.await_stage("Suspended")
    cluster.await_json(
        *("pods", "--namespace", run.namespace, "--selector", SANDBOX),
        until=lambda pods: not pods["items"],
        what="the end of the sandbox",
    )
    run.patch({"suspend": False})
    run.await_running(attempt=2)
    run.complete(attempt=2)
    cluster.await_json(
        *("deployments", "--namespace", run.namespace),
        until=lambda deployments: not deployments["items"],
        what="the end of the sandbox",
    )
