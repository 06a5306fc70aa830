"""The life of a TrainingRun on a real control plane, with the real training operator; its nodes and pods are played."""

from __future__ import annotations

import json
import re

import pytest

from posttrain.contract.facts import CheckpointSaved, Logged, NonFinite, SignalLost, Started
from posttrain.contract.result import Result, to_termination_message
from tests.cluster.any_cluster import Cluster
from tests.cluster.errors import ClusterError
from tests.support.builders import GRPO, build_report
from tests.support.cluster_runs import ClusterRun, message_of, reasons
from tests.support.operator_process import OperatorProcess

pytestmark = pytest.mark.integration

HELD = "resources.numNodes can change only while the run holds no quota .*: suspend it first"
LOW_ON_MEMORY = "the node was low on memory"
STARTED = Started(world_size=2, max_steps=20, resumed_from_step=0)


def test_a_run_trains_reports_and_succeeds(cluster: Cluster, operator: OperatorProcess, run: ClusterRun) -> None:
    run.apply()
    run.await_running()
    saved = CheckpointSaved(step=5, uri="pvc://shared/demo/checkpoint-5", bytes=10, digest="sha256:0")
    logged = Logged(step=5, metrics={"loss": "0.25"})

    reply = operator.report(cluster, run.namespace, "demo-a1-master-0", build_report(STARTED, logged, saved, step=5))

    assert [(source.source, source.seq) for source in reply.acknowledged] == [("rank-0", 3)]
    training = run.await_status(lambda s: (s.get("checkpoints") or {}).get("latestStep") == 5, what="checkpoint 5")
    assert (training["stage"], training["progress"]["percentage"]) == ("Training", 25)
    columns = run.kubectl("get", "trun", run.name, "--no-headers").split()
    assert columns[:5] == ["demo", "SFT", "pvc://inputs/model", "Training", "25"]
    ended = run.complete()
    assert ended["model"] == {"uri": "pvc://shared/demo/model"}
    assert reasons(ended)["Succeeded"] == ("True", "Completed")
    run.kubectl("wait", "--for=condition=Finished", "trun/demo", "--timeout=10s")
    assert [reason for _, reason in run.events()] == ["Accepted", "AllPodsRunning", "Completed"]


def test_a_failed_pod_restarts_the_whole_gang(run: ClusterRun) -> None:
    run.apply()
    before = {pod["metadata"]["uid"] for pod in run.await_running()}
    result = Result(reason="RankKilled", message="rank 1 was killed by signal 9", rank=1)

    run.end_pod(1, exit_code=138, message=to_termination_message(result))

    after = {pod["metadata"]["uid"] for pod in run.await_running(attempt=2)}
    assert not before & after
    status = run.status()
    assert (status["restarts"]["infrastructure"], status["restarts"]["application"]) == (1, 0)
    assert (status["failure"]["reason"], status["failure"]["rank"]) == ("RankKilled", 1)
    assert ("Warning", "RankKilled") in run.events()
    assert run.complete(attempt=2)["attempt"] == 2


def test_a_deleted_pod_restarts_the_whole_gang(run: ClusterRun) -> None:
    run.apply()
    run.await_running()

    run.kubectl("delete", "pod", "demo-a1-worker-0")

    run.await_running(attempt=2)
    assert run.status()["failure"]["reason"] == "PodDeleted"


def test_an_evicted_pod_costs_the_infrastructure_budget(run: ClusterRun) -> None:
    run.apply(restarts={"maxInfrastructureRestarts": 1})
    run.await_running()
    for attempt in (1, 2):
        run.await_running(attempt=attempt)
        run.kubectl(
            "annotate", "pod", f"demo-a{attempt}-worker-0", "sim.posttrain.dev/evict=the node was low on memory"
        )

    ended = run.await_stage("Failed")

    assert reasons(ended)["Succeeded"] == ("False", "RestartBudgetSpent")
    assert ended["restarts"]["infrastructure"] == 1
    assert LOW_ON_MEMORY in ended["failure"]["message"]


def test_a_user_error_is_never_tried_again(run: ClusterRun) -> None:
    run.apply()
    run.await_running()
    result = Result(reason="ConfigInvalid", message="max_length must be positive", rank=0)

    run.end_pod(0, exit_code=2, message=to_termination_message(result))

    ended = run.await_stage("Failed")
    assert (ended["attempt"], ended["failure"]["reason"]) == (1, "ConfigInvalid")


def test_a_container_that_was_killed_for_memory_is_named_with_advice(run: ClusterRun) -> None:
    run.apply()
    run.await_running()

    run.end_pod(1, exit_code=137, reason="OOMKilled")

    ended = run.await_stage("Failed")
    assert ended["failure"]["reason"] == "HostOutOfMemory"
    assert "spec.resources.memory" in ended["failure"]["advice"]


def test_a_run_is_suspended_and_goes_on_as_a_new_attempt(run: ClusterRun) -> None:
    run.apply()
    run.await_running()

    run.patch({"suspend": True})
    run.await_stage("Suspended")
    run.cluster.await_json(
        "pods", "--namespace", run.namespace, until=lambda pods: not pods["items"], what="the pods to go"
    )
    run.patch({"suspend": False})

    run.await_running(attempt=2)
    assert run.status()["restarts"] == {"infrastructure": 0, "application": 0, "stepsLost": 0}


def test_without_a_queue_the_gang_takes_another_shape_while_the_run_is_suspended(run: ClusterRun) -> None:
    run.apply()
    run.await_running()
    smaller = {"resources": {"numNodes": 1, "profile": "default"}}
    with pytest.raises(ClusterError, match=HELD):
        run.patch(smaller)

    run.patch({"suspend": True})
    run.await_status(lambda s: reasons(s)["QuotaReserved"] == ("False", "Suspended"), what="the end of its hold")
    assert run.pods(attempt=1) == []
    run.patch(smaller)
    run.patch({"suspend": False})

    run.await_running(attempt=2, pods=1)
    status = run.status()
    assert (reasons(status)["QuotaReserved"], status["provenance"]["profileName"]) == (("True", "NoQueue"), "default")
    with pytest.raises(ClusterError, match=HELD):
        run.patch({"resources": {"numNodes": 2}})
    assert run.complete(attempt=2, pods=1)["attempt"] == 2


def test_without_a_queue_a_run_whose_profile_is_not_there_takes_another_one(run: ClusterRun) -> None:
    run.apply(suspend=True)
    run.await_status(lambda s: reasons(s)["QuotaReserved"] == ("False", "Suspended"), what="the suspension")
    run.patch({"resources": {"profile": "gone"}})
    run.patch({"suspend": False})
    refused = run.await_status(lambda s: reasons(s)["Accepted"] == ("False", "InvalidSpec"), what="the refusal")
    assert "there is no profile 'gone' here: take one of default" in message_of(refused, "Accepted")

    run.patch({"resources": {"profile": "default"}})

    run.await_running()
    assert reasons(run.status())["QuotaReserved"] == ("True", "NoQueue")


def test_a_loss_that_is_no_number_ends_the_run(cluster: Cluster, operator: OperatorProcess, run: ClusterRun) -> None:
    run.apply()
    run.await_running()

    report = build_report(STARTED, NonFinite(metric="loss", step=7))
    operator.report(cluster, run.namespace, "demo-a1-master-0", report)

    ended = run.await_stage("Failed")
    assert (ended["failure"]["reason"], "step 7" in ended["failure"]["message"]) == ("NonFiniteLoss", True)
    run.cluster.await_json(
        "pods", "--namespace", run.namespace, until=lambda pods: not pods["items"], what="the GPUs to be free"
    )


def test_a_lost_signal_is_a_warning_until_its_owner_asks_for_more(
    cluster: Cluster, operator: OperatorProcess, run: ClusterRun
) -> None:
    run.apply(sft=None, grpo=GRPO)
    run.await_running()

    report = build_report(STARTED, SignalLost(reason="RewardSignalDead", message="all alike", step=7))
    operator.report(cluster, run.namespace, "demo-a1-master-0", report)

    lost = ("False", "RewardSignalDead")
    warned = run.await_status(lambda s: reasons(s).get("SignalHealthy") == lost, what="the warning")
    assert warned["stage"] == "Training"
    run.await_event("RewardSignalDead")
    described = run.kubectl("describe", "trun", run.name)
    assert re.search(r"Warning +RewardSignalDead .*all alike", described)
    run.patch({"grpo": {"signal": {"deadReward": {"policy": "Suspend"}}}})
    held = run.await_stage("Suspended")
    assert reasons(held)["Succeeded"] == lost


def test_a_run_that_is_deleted_takes_everything_with_it_but_its_claim(run: ClusterRun) -> None:
    run.apply(checkpoints={"storage": {"size": "1Gi"}})
    run.await_status(lambda s: reasons(s)["PodsReady"][1] == "VolumePending", what="the claim pending")

    run.kubectl("delete", "trun", run.name)

    def left(kinds: str) -> list[str]:
        names = run.kubectl("get", kinds, "--output", "name", "--selector", "posttrain.dev/run=demo")
        return names.split()

    run.cluster.await_json(
        "pytorchjobs,pods,configmaps,serviceaccounts,networkpolicies",
        "--namespace",
        run.namespace,
        "--selector",
        "posttrain.dev/run=demo",
        until=lambda found: not found["items"],
        what="the garbage collector",
    )
    assert left("persistentvolumeclaims") == ["persistentvolumeclaim/demo"]


def test_a_gang_without_room_says_what_it_waits_for(run: ClusterRun) -> None:
    run.apply(resources={"numNodes": 1, "gpusPerNode": 16}, pendingDeadlineSeconds=8)

    waiting = run.await_status(lambda s: reasons(s)["PodsReady"][1] == "Unschedulable", what="the wait")

    message = next(c["message"] for c in waiting["conditions"] if c["type"] == "PodsReady")
    assert "Insufficient nvidia.com/gpu" in message
    assert reasons(run.await_stage("Failed"))["Succeeded"] == ("False", "PendingDeadlineExceeded")


def test_a_prepare_that_gets_no_pod_says_why_and_waits_no_longer_than_it_may(run: ClusterRun) -> None:
    run.kubectl("create", "quota", "none", "--hard=requests.cpu=0")
    run.apply(prepare={"enabled": True}, pendingDeadlineSeconds=600)

    waiting = run.await_status(lambda s: reasons(s)["Prepared"][1] == "QuotaExceeded", what="the refusal")

    assert message_of(waiting, "Prepared").startswith("1 of 1 pods cannot be created: pods ")
    assert "exceeded quota: none" in message_of(waiting, "Succeeded")
    run.patch({"pendingDeadlineSeconds": 1})
    ended = run.await_stage("Failed")
    assert reasons(ended)["Succeeded"] == reasons(ended)["Prepared"] == ("False", "PendingDeadlineExceeded")
    run.cluster.await_json(
        "jobs", "--namespace", run.namespace, until=lambda found: not found["items"], what="the end of prepare"
    )


def test_ttl_removes_a_finished_run(run: ClusterRun) -> None:
    run.apply(ttlSecondsAfterFinished=1)
    run.await_running()
    run.complete()

    run.cluster.await_json(
        "trainingruns", "--namespace", run.namespace, until=lambda found: not found["items"], what="the TTL"
    )


def test_a_run_waits_for_the_one_whose_model_it_starts_from(run: ClusterRun) -> None:
    following = ClusterRun(run.cluster, run.namespace, "next")
    following.apply(model={"runRef": {"name": run.name}})
    waiting = following.await_status(lambda s: reasons(s)["Accepted"] == ("False", "ReferencePending"), what="the wait")
    assert message_of(waiting, "Accepted") == "waiting for the model of run demo: there is no such run"
    assert '{"name":"demo"}' in following.kubectl("get", "trun", following.name)
    run.apply()
    run.await_running()
    following.await_status(lambda s: "which is Starting" in message_of(s, "Accepted"), what="the wait")

    run.complete()

    following.await_running()
    config = following.cluster.get("configmap", "next-a1", "--namespace", run.namespace)["data"]["config.json"]
    assert json.loads(config)["model"] == {"kind": "Mounted", "mount": "claim-shared", "path": "demo/model"}
    assert following.complete()["provenance"]["modelSource"] == "pvc://shared/demo/model"


def test_an_edited_job_is_what_it_was_made_as_again_and_no_pod_notices(run: ClusterRun) -> None:
    run.apply()
    before = {pod["metadata"]["uid"] for pod in run.await_running()}
    made = run.cluster.get("pytorchjob", "demo-a1", "--namespace", run.namespace)["spec"]

    run.kubectl("patch", "pytorchjob", "demo-a1", "--type=merge", "--patch", '{"spec": {"nprocPerNode": "7"}}')

    run.cluster.await_json(
        *("pytorchjob", "demo-a1", "--namespace", run.namespace),
        until=lambda job: job["metadata"]["generation"] > 2 and job["spec"] == made,
        what="the repair",
    )
    assert {pod["metadata"]["uid"] for pod in run.pods(attempt=1)} == before
    assert run.status()["attempt"] == 1
