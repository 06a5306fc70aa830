"""Every reason of the catalogue is reached from facts in the cluster, through the reconciler.

Each case says what happens in the cluster; the reason must then stand in a condition or in the failure. The last test
compares what was reached with the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from posttrain.api.reasons import REASONS
from posttrain.contract.facts import FirstError, NonFinite, PrepareResult, SignalLost, Started
from posttrain.contract.result import Result
from posttrain.control.kinds import CLAIM, DEPLOYMENT, KUEUE, POD, PYTORCHJOB, TRAINING_RUN, WORKLOAD
from posttrain.control.port import Rejected
from posttrain.settings import Settings
from tests.support.bench import Bench
from tests.support.builders import GRPO, build_other_run, rfc3339

Happens = Callable[[Bench], None]
STARTED = Started(world_size=1, max_steps=20, resumed_from_step=0)
NEVER_AGAIN = {"maxInfrastructureRestarts": 0, "maxApplicationRestarts": 0}

UNREACHED = {
    "Restarting": "the stage says it; no condition has it as its reason",
}
"""Reasons that no facts lead to, and why."""


def reasons_of(bench: Bench) -> set[str]:
    """Return every reason that the run's status gives."""
    status = bench.status
    given = {condition.reason for condition in status.conditions or ()}
    return given | ({status.failure.reason} if status.failure else set())


# --- What happens ----------------------------------------------------------------------------------------------------


def starts(bench: Bench, **spec: Any) -> None:
    """Let a gang be made, with its pods waiting."""
    bench.submit(**spec)
    bench.settle()
    bench.others.make_pods()
    bench.settle()


def trains(bench: Bench, **spec: Any) -> None:
    """Let a gang train."""
    starts(bench, **spec)
    bench.others.run_pods(1)
    bench.others.tell(STARTED, attempt=1)
    bench.settle()


def gang_says(reason: str, *, exit_code: int) -> Happens:
    """Let a pod fail, with a reason in its termination message."""

    def happens(bench: Bench) -> None:
        trains(bench)
        bench.others.fail_gang(1, exit_code=exit_code, result=Result(reason=reason, message="as it says"))

    return happens


def rank_reports(reason: str) -> Happens:
    """Let a rank report its error as a fact; its pod ends with code 1 and no words."""

    def happens(bench: Bench) -> None:
        trains(bench)
        error = FirstError(rank=0, time=bench.now, reason=reason, message="as it says")
        bench.others.tell(error, attempt=1)
        bench.others.fail_gang(1, exit_code=1)

    return happens


def prepare_finds(reason: str) -> Happens:
    """Let prepare fail with one problem."""

    def happens(bench: Bench) -> None:
        bench.submit(prepare={"enabled": True})
        bench.settle()
        pod = bench.others.make_prepare_pod()
        bench.others.tell(PrepareResult(problems=(f"{reason}: as it says",)), attempt=0, source="prepare")
        bench.others.end_pod(pod, exit_code=2, result=Result(reason=reason, message="as it says"))
        bench.others.end_prepare("Failed")

    return happens


def pod_has(**status: Any) -> Happens:
    """Let a pod that waits have this status."""

    def happens(bench: Bench) -> None:
        starts(bench)
        bench.others.set_pod_status("demo-a1-master-0", **status)

    return happens


def pod_is_lost(**status: Any) -> Happens:
    """Let a running pod fail with this status."""

    def happens(bench: Bench) -> None:
        trains(bench)
        bench.others.set_pod_status("demo-a1-master-0", phase="Failed", **status)
        bench.others.end_job(1, "Failed")

    return happens


def ends_with(code: int) -> Happens:
    """Let a pod end with a code and no words."""

    def happens(bench: Bench) -> None:
        trains(bench)
        bench.others.fail_gang(1, exit_code=code)

    return happens


def in_progress(bench: Bench) -> None:
    starts(bench)


def pending(bench: Bench) -> None:
    bench.submit(colour="blue")


def preparing(bench: Bench) -> None:
    bench.submit(prepare={"enabled": True})


def prepared(bench: Bench) -> None:
    preparing(bench)
    bench.settle()
    bench.others.tell(PrepareResult(), attempt=0, source="prepare")
    bench.others.end_prepare()


def dry_run(bench: Bench) -> None:
    bench.submit(prepare={"dryRun": True})
    bench.settle()
    bench.others.tell(PrepareResult(), attempt=0, source="prepare")
    bench.others.end_prepare()


def node_is_silent(bench: Bench) -> None:
    trains(bench)
    bench.others.silence("demo-a1-master-0")


def completed(bench: Bench) -> None:
    trains(bench)
    bench.others.complete_gang(1, result=Result(reason="Completed", message="done"))


def suspended(bench: Bench) -> None:
    trains(bench)
    bench.others.change_run(suspend=True)


def spec_invalid(bench: Bench) -> None:
    bench.submit(sft={"args": {"learning_rat": 0.1}})


def spec_changed(bench: Bench) -> None:
    trains(bench)
    bench.others.change_run(sft={"args": {"max_steps": 21}})


def name_taken(bench: Bench) -> None:
    bench.submit()
    metadata = {"name": "demo", "namespace": "team"}
    bench.cluster.put({"apiVersion": CLAIM[0], "kind": CLAIM[1], "metadata": metadata, "spec": {}})


def predecessor_ends(bench: Bench) -> None:
    trains(bench)
    bench.wait(60)
    bench.others.delete(TRAINING_RUN, "demo")
    bench.wait(1)
    bench.submit()


def child_refused(bench: Bench) -> None:
    bench.submit()
    bench.port.refuse = lambda call: Rejected("exceeded quota") if call.kind == PYTORCHJOB else None


def code_is_missing(bench: Bench) -> None:
    bench.submit(code={"configMapName": "my-code"})


def other_run_fails(bench: Bench) -> None:
    bench.cluster.put(build_other_run("sft", stage="Failed", reason="CudaOutOfMemory"))
    bench.submit(model={"runRef": {"name": "sft"}})


def deadline_passes(bench: Bench) -> None:
    trains(bench, activeDeadlineSeconds=600)
    bench.wait(601)


def pending_deadline_passes(bench: Bench) -> None:
    starts(bench, pendingDeadlineSeconds=600)
    bench.wait(601)


def budget_is_spent(bench: Bench) -> None:
    trains(bench, restarts={"maxInfrastructureRestarts": 1})
    bench.others.fail_gang(1, exit_code=138)
    bench.settle()
    bench.others.finish_deletions()
    bench.settle()
    bench.others.make_pods()
    bench.others.run_pods(2)
    bench.settle()
    bench.others.fail_gang(2, exit_code=138)


def nothing_is_heard(bench: Bench) -> None:
    trains(bench)
    bench.wait(3601)


def loss_is_no_number(bench: Bench) -> None:
    trains(bench)
    bench.others.tell(NonFinite(metric="loss", step=7), attempt=1)


def signal_is_lost(reason: str, *, policy: str = "Warn") -> Happens:
    """Let a check of the signal find something, of which the user has chosen what follows."""

    def happens(bench: Bench) -> None:
        fields = ("deadReward", "entropyCollapse", "klDivergence", "clippedCompletions")
        signal = {field: {"policy": policy} for field in fields}
        trains(bench, sft=None, grpo={**GRPO, "args": {"max_steps": 20, "beta": 0.1}, "signal": signal})
        bench.others.tell(SignalLost(reason=reason, message="as it says", step=7), attempt=1)

    return happens


def signal_is_there(bench: Bench) -> None:
    trains(bench, sft=None, grpo=GRPO)


def container_is_killed_for_memory(bench: Bench) -> None:
    trains(bench)
    bench.others.end_pod("demo-a1-master-0", exit_code=137, terminated_reason="OOMKilled")
    bench.others.end_job(1, "Failed")


def pod_is_deleted(bench: Bench) -> None:
    trains(bench)
    bench.others.remove_pod("demo-a1-master-0")


def job_is_deleted(bench: Bench) -> None:
    trains(bench)
    bench.others.delete(PYTORCHJOB, "demo-a1")


def scheduler_says(message: str) -> Happens:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return pod_has(conditions=[condition])


# --- What rollout servers say ----------------------------------------------------------------------------------------

SERVED = {
    "sft": None,
    "grpo": {
        "rewards": [{"name": "format"}],
        "rollout": {"mode": "Server", "server": {"replicas": 2, "gpusPerNode": 0}},
    },
}


def servers_load(bench: Bench, *, restarts: int = 0, ready: bool = False) -> None:
    """Let the servers of a run be made, and each of them say the same."""
    bench.submit(**SERVED)
    bench.settle()
    end = {"terminated": {"exitCode": 1, "reason": "Error", "message": "no memory for keys and values"}}
    for name in bench.others.make_server_pods():
        container = {"name": "vllm", "ready": ready, "restartCount": restarts, "lastState": end if restarts else {}}
        conditions = [{"type": "Ready", "status": str(ready)}]
        bench.others.set_pod_status(name, phase="Running", conditions=conditions, containerStatuses=[container])
    bench.settle()


def servers_answer(bench: Bench) -> None:
    servers_load(bench, ready=True)


def a_server_ends_again_and_again(bench: Bench) -> None:
    servers_load(bench, restarts=2)


def a_server_never_answers(bench: Bench) -> None:
    servers_load(bench, restarts=5)


def servers_wait_for_quota(bench: Bench) -> None:
    bench.submit(**SERVED, resources=QUEUE)
    bench.settle()


def nobody_enforces_policies(bench: Bench) -> None:
    bench.settings = Settings(enforces_network_policies=False)
    bench.start()
    bench.submit(**SERVED)


# --- What Kueue answers ----------------------------------------------------------------------------------------------

QUEUE = {"gpusPerNode": 0, "cpu": "2", "memory": "4Gi", "queueName": "team-a"}
RESERVED = {"type": "QuotaReserved", "status": "True", "reason": "QuotaReserved", "message": ""}
ADMITTED = {"type": "Admitted", "status": "True", "reason": "Admitted", "message": ""}


def queues(bench: Bench) -> None:
    bench.submit(resources=QUEUE)
    bench.settle()


def kueue_says(*conditions: dict[str, Any], flavor: str = "cpu", active: bool = True, **assigned: Any) -> Happens:
    """Let Kueue write these conditions into the run's Workload, with an assignment of the flavor."""

    def happens(bench: Bench) -> None:
        if bench.others.find(WORKLOAD, "demo") is None:
            bench.cluster.put({"apiVersion": KUEUE, "kind": "ResourceFlavor", "metadata": {"name": "cpu"}, "spec": {}})
            queues(bench)
        workload = bench.others.find(WORKLOAD, "demo")
        assert workload is not None
        told = [{**condition, "lastTransitionTime": rfc3339(bench.now)} for condition in conditions]
        pod_set = {"name": "trainer", "flavors": {"cpu": flavor}, **assigned}
        admission = {"clusterQueue": "cq", "podSetAssignments": [pod_set]}
        spec = {**workload["spec"], "active": active}
        bench.cluster.put({**workload, "spec": spec, "status": {"conditions": told, "admission": admission}})
        bench.settle()

    return happens


def evicted(reason: str, **how: Any) -> Happens:
    """Let Kueue admit the run, its gang start, and Kueue want the quota back."""

    def happens(bench: Bench) -> None:
        kueue_says(RESERVED, ADMITTED)(bench)
        bench.others.make_pods()
        bench.settle()
        bench.others.run_pods(1)
        bench.settle()
        eviction = {"type": "Evicted", "status": "True", "reason": reason, "message": "another run comes first"}
        kueue_says(RESERVED, ADMITTED, eviction, **how)(bench)

    return happens


def kueue_is_missing(bench: Bench) -> None:
    bench.cluster.missing_kinds = frozenset({WORKLOAD})
    bench.start()
    queues(bench)


def job_event(message: str) -> Happens:
    """Let the training operator say why it makes no pods."""

    def happens(bench: Bench) -> None:
        bench.submit()
        bench.settle()
        bench.others.put_event(PYTORCHJOB, "demo-a1", reason="FailedCreatePod", message=message)
        bench.wait(60)

    return happens


def kubelet_says(reason: str, message: str) -> Happens:
    """Let a pod's kubelet say why it does not create the containers."""

    def happens(bench: Bench) -> None:
        starts(bench)
        bench.others.bind_pod("demo-a1-master-0")
        bench.others.put_event(POD, "demo-a1-master-0", reason=reason, message=message)
        bench.wait(60)

    return happens


def sandbox_has(state: dict[str, Any] | None) -> Happens:
    """Let the sandbox of a run that rewards programs have a pod whose container is in this state; None: no pod yet."""

    def happens(bench: Bench) -> None:
        bench.submit(sft=None, grpo={"rewards": [{"name": "code"}], "args": {"max_steps": 20}})
        bench.settle()
        assert bench.others.job(1) is None
        made = bench.others.find(DEPLOYMENT, "demo-sandbox")
        assert made is not None
        if state is not None:
            bench.others.make_sandbox_pod(containerStatuses=[{"name": "sandbox", "ready": False, "state": state}])

    return happens


DISRUPTED = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drained"}
PULL = {"name": "pytorch", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
CREATION = {
    "name": "pytorch",
    "state": {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "hub" not found'}},
}

CASES: list[tuple[str, Happens]] = [
    # On the way
    ("Pending", pending),
    ("InProgress", in_progress),
    ("Accepted", in_progress),
    ("PodsStarting", in_progress),
    ("PrepareDisabled", in_progress),
    ("Preparing", preparing),
    ("Prepared", prepared),
    ("DryRun", dry_run),
    ("AllPodsRunning", trains),
    ("NodeUnreachable", node_is_silent),
    ("Suspended", suspended),
    ("Completed", completed),
    # The spec and what it refers to
    ("InvalidSpec", spec_invalid),
    ("InvalidSpec", pending),
    ("SpecChanged", spec_changed),
    ("NameConflict", name_taken),
    ("PredecessorEnding", predecessor_ends),
    ("ChildRejected", child_refused),
    ("ReferencePending", code_is_missing),
    ("ReferenceFailed", other_run_fails),
    # Prepare
    *(
        (reason, prepare_finds(reason))
        for reason in (
            "ModelNotFound", "DatasetNotFound", "PrepareFailed", "DatasetColumnMissing", "DatasetColumnsDiffer",
            "DatasetRowsInvalid", "DatasetEmpty", "TokenizerMissing", "ChatTemplateMissing", "UnsafeWeights",
            "GatedModel", "HubAuthenticationFailed", "HubUnreachable", "PackageMissing", "CodeImportFailed",
            "BatchNotDivisible", "EstimateExceedsMemory", "ConfigInvalid", "StorageHoldsAnotherRun",
            "SandboxUnreachable",
        )
    ),
    # The sandbox
    ("SandboxStarting", sandbox_has(None)),
    ("SandboxFailed", sandbox_has({"terminated": {"exitCode": 2, "message": "there is no Landlock"}})),
    # Waiting
    ("Unschedulable", scheduler_says("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")),
    ("VolumePending", scheduler_says("pod has unbound immediate PersistentVolumeClaims")),
    ("VolumePending", kubelet_says("FailedMount", 'MountVolume.SetUp failed for volume "data": timed out')),
    ("ImagePullFailed", pod_has(containerStatuses=[PULL])),
    ("ContainerNotStarted", pod_has(containerStatuses=[CREATION])),
    ("QuotaExceeded", job_event('pods "demo-a1-master-0" is forbidden: exceeded quota: team, requested: cpu=2')),
    ("PodsNotCreated", job_event("admission webhook denied the request: no host network")),
    # Quota
    ("NoQueue", in_progress),
    ("KueueMissing", kueue_is_missing),
    ("QuotaPending", queues),
    ("QueueUnavailable", kueue_says({**RESERVED, "status": "False", "reason": "Inadmissible", "message": "no queue"})),
    ("QuotaReserved", kueue_says(RESERVED, ADMITTED)),
    ("FlavorMissing", kueue_says(RESERVED, ADMITTED, flavor="gone")),
    ("TopologyUnsupported", kueue_says(RESERVED, ADMITTED, topologyAssignment={"levels": ["host"], "domains": []})),
    ("Preempted", evicted("Preempted")),
    ("QuotaLost", evicted("PodsReadyTimeout")),
    ("WorkloadDeactivated", evicted("Deactivated", active=False)),
    # Rollout servers
    ("NoServers", starts),
    ("ServersWanted", servers_wait_for_quota),
    ("Loading", servers_load),
    ("ServersReady", servers_answer),
    ("CrashLooping", a_server_ends_again_and_again),
    ("CrashLooping", a_server_never_answers),
    ("NetworkPolicyNotEnforced", nobody_enforces_policies),
    # Ends that the operator finds itself
    ("DeadlineExceeded", deadline_passes),
    ("PendingDeadlineExceeded", pending_deadline_passes),
    ("RestartBudgetSpent", budget_is_spent),
    ("ProgressStalled", nothing_is_heard),
    ("NonFiniteLoss", loss_is_no_number),
    # What a grpo run learns from
    ("SignalHealthy", signal_is_there),
    *(
        (reason, signal_is_lost(reason, policy=policy))
        for reason in ("RewardSignalDead", "EntropyCollapsed", "KlTooLarge", "CompletionsClipped")
        for policy in ("Warn", "Suspend", "Fail")
    ),
    ("HostOutOfMemory", container_is_killed_for_memory),
    ("PodDeleted", pod_is_deleted),
    ("JobDeleted", job_is_deleted),
    ("NodeLost", pod_is_lost(reason="NodeLost", message="node-0 is unresponsive")),
    ("NodeLost", pod_is_lost(conditions=[{**DISRUPTED, "reason": "DeletionByPodGC"}])),
    ("Evicted", pod_is_lost(reason="Evicted", message="the node was low on memory")),
    ("Evicted", pod_is_lost(conditions=[DISRUPTED])),
    ("ConfigInvalid", ends_with(2)),
    ("RankKilled", ends_with(137)),
    ("RankKilled", ends_with(138)),
    ("RankCrashed", ends_with(139)),
    ("Terminated", ends_with(143)),
    ("TrainingFailed", ends_with(1)),
    # Ends that the workload gives, in its termination message or as a fact
    *(
        (reason, gang_says(reason, exit_code=code))
        for reason, code in (
            ("CudaOutOfMemory", 1), ("HostOutOfMemory", 1), ("NcclTimeout", 138), ("PeerLost", 138),
            ("RankCrashed", 1), ("WorldSizeMismatch", 1), ("StrategyMismatch", 1), ("CheckpointCorrupt", 1),
            ("CheckpointUnusable", 2), ("StorageHoldsAnotherRun", 2), ("CodeImportFailed", 2), ("ConfigInvalid", 2),
            ("DiskFull", 1), ("NonFiniteLoss", 1), ("RewardFunctionFailed", 1), ("RolloutFunctionFailed", 2),
            ("StaleRolloutWeights", 1), ("RolloutFailed", 1), ("ServerLost", 138), ("TrainingFailed", 1),
        )
    ),
    *(
        (reason, rank_reports(reason))
        for reason in ("CudaOutOfMemory", "WorldSizeMismatch", "StrategyMismatch", "CheckpointCorrupt", "DiskFull")
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "happens"),
    CASES,
    ids=[f"{number}-{reason}" for number, (reason, _) in enumerate(CASES)],
)
def test_a_reason_is_reached_from_facts_in_the_cluster(reason: str, happens: Happens) -> None:
    bench = Bench()
    happens(bench)
    bench.settle()

    assert reason in reasons_of(bench)
    for condition in bench.status.conditions or ():
        assert condition.reason in REASONS
        assert condition.message


def test_a_word_that_no_catalogue_explains_never_becomes_a_reason() -> None:
    bench = Bench()
    gang_says("SomethingNew", exit_code=1)(bench)
    bench.settle()

    failure = bench.status.failure
    assert failure is not None
    assert (failure.reason, failure.message) == (
        "TrainingFailed",
        "attempt 1, pod demo-a1-master-0 on node node-0: as it says (exit code 1)",
    )


def test_every_reason_of_the_catalogue_is_reached_or_it_is_said_why_not() -> None:
    reached = {reason for reason, _ in CASES}

    assert reached | UNREACHED.keys() == REASONS.keys()
    assert not reached & UNREACHED.keys()
