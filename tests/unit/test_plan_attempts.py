"""How the end of a gang is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from posttrain.api.training_run_status import FirstErrorReport, ResultReport
from posttrain.contract.result import Result
from posttrain.plan.attempts import Gang, completed_result, find_cause, gang_hash, settling_until
from posttrain.plan.pytorchjob import parse_job_state
from posttrain.plan.types import Manifest
from tests.support.builders import at, build_observed_job, build_pod, end_pod, ended_status, rfc3339

FAILED = ended_status("Failed", at_time=at(100))


def gang(
    pods: Sequence[Manifest],
    *,
    job: dict[str, Any] | None = FAILED,
    first_error: FirstErrorReport | None = None,
    result: ResultReport | None = None,
    hash_when_running: str | None = None,
    size: int | None = None,
    departed: Sequence[Manifest] = (),
) -> Gang:
    observed = build_observed_job("demo", attempt=1, status=job) if job is not None else None
    return Gang(
        run="demo",
        attempt=1,
        size=size or len(pods),
        ranks_per_node=2,
        job=parse_job_state(observed) if observed else None,
        pods=tuple(pods),
        hash_when_running=hash_when_running,
        first_error=first_error,
        result=result,
        departed=tuple(departed),
    )


def failed(node: int, code: int, *, at_second: float = 100, reason: str | None = None, **kwargs: Any) -> Manifest:
    result = Result(reason=reason, message=f"node {node} says so", rank=2 * node) if reason else None
    pod = build_pod("demo", node=node, node_name=f"node-{node}")
    return end_pod(pod, exit_code=code, finished=at(at_second), result=result, **kwargs)


def disrupted(node: int, reason: str, *, at_second: float = 100) -> Manifest:
    pod = build_pod("demo", node=node, node_name=f"node-{node}", phase="Failed")
    condition = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": reason,
        "lastTransitionTime": rfc3339(at(at_second)),
    }
    return {**pod, "status": {**pod["status"], "conditions": [condition]}}


@pytest.mark.parametrize(
    ("code", "reason", "budget"),
    [
        (1, "TrainingFailed", "application"),
        (2, "ConfigInvalid", "none"),
        (134, "RankCrashed", "application"),
        (137, "RankKilled", "infrastructure"),
        (138, "RankKilled", "infrastructure"),
        (139, "RankCrashed", "application"),
        (143, "Terminated", "infrastructure"),
        (77, "TrainingFailed", "application"),
    ],
)
def test_an_exit_code_without_a_message_says_reason_and_budget(code: int, reason: str, budget: str) -> None:
    cause = find_cause(gang([failed(0, code)]), now=at(200))

    assert cause is not None
    assert (cause.reason, cause.budget, cause.exit_code) == (reason, budget, code)
    assert (cause.pod, cause.node) == ("demo-a1-master-0", "node-0")


@pytest.mark.parametrize(
    ("reason", "code", "budget"),
    [
        ("CudaOutOfMemory", 1, "application"),
        ("HostOutOfMemory", 1, "application"),
        ("HostOutOfMemory", 137, "application"),
        ("NcclTimeout", 138, "infrastructure"),
        ("PeerLost", 138, "infrastructure"),
        ("CodeImportFailed", 2, "none"),
    ],
)
def test_the_containers_own_reason_stands_and_its_exit_code_says_the_budget(
    reason: str, code: int, budget: str
) -> None:
    cause = find_cause(gang([failed(0, code, reason=reason)]), now=at(200))

    assert cause is not None
    assert (cause.reason, cause.budget, cause.rank) == (reason, budget, 0)
    assert "node 0 says so" in cause.message


def test_a_reason_that_no_catalogue_explains_becomes_a_training_failure_in_its_own_words() -> None:
    cause = find_cause(gang([failed(0, 1, reason="Gremlins")]), now=at(200))

    assert cause is not None
    assert cause.reason == "TrainingFailed"
    assert "node 0 says so" in cause.message


def test_the_kubelets_oom_kill_is_the_applications_whatever_the_code() -> None:
    cause = find_cause(gang([failed(0, 137, terminated_reason="OOMKilled")]), now=at(200))

    assert cause is not None
    assert (cause.reason, cause.budget) == ("HostOutOfMemory", "application")


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        ("DeletionByTaintManager", "NodeLost"),
        ("DeletionByPodGC", "NodeLost"),
        ("EvictionByEvictionAPI", "Evicted"),
        ("PreemptionByScheduler", "Evicted"),
        ("TerminationByKubelet", "Evicted"),
    ],
)
def test_what_the_cluster_did_to_a_pod_is_infrastructure(condition: str, reason: str) -> None:
    cause = find_cause(gang([disrupted(0, condition)]), now=at(200))

    assert cause is not None
    assert (cause.reason, cause.budget, cause.node) == (reason, "infrastructure", "node-0")


@pytest.mark.parametrize(("status_reason", "reason"), [("Evicted", "Evicted"), ("NodeLost", "NodeLost")])
def test_a_pods_own_reason_is_read(status_reason: str, reason: str) -> None:
    pod = build_pod("demo", phase="Failed")
    pod["status"]["reason"] = status_reason

    cause = find_cause(gang([pod]), now=at(200))

    assert cause is not None
    assert (cause.reason, cause.budget) == (reason, "infrastructure")


def test_the_earliest_error_over_pods_is_the_cause() -> None:
    pods = [
        failed(0, 1, at_second=12, reason="CudaOutOfMemory"),
        failed(1, 1, at_second=11, reason="DiskFull"),
        failed(2, 143, at_second=10, reason="Terminated"),
    ]

    cause = find_cause(gang(pods), now=at(200))

    assert cause is not None
    assert cause.reason == "DiskFull"


@pytest.mark.parametrize(("noise", "code"), [("TrainingFailed", 1), ("NcclTimeout", 138), ("PeerLost", 138)])
def test_what_follows_from_a_killed_rank_is_not_the_cause_though_it_was_noticed_earlier(noise: str, code: int) -> None:
    pods = [failed(0, code, at_second=10, reason=noise), failed(1, 138, at_second=14, reason="RankKilled")]

    cause = find_cause(gang(pods), now=at(200))

    assert cause is not None
    assert (cause.reason, cause.pod, cause.budget) == ("RankKilled", "demo-a1-worker-0", "infrastructure")


def test_a_lost_node_is_the_cause_of_its_peers_timeouts() -> None:
    pods = [failed(0, 138, at_second=10, reason="NcclTimeout"), disrupted(1, "DeletionByPodGC", at_second=90)]

    cause = find_cause(gang(pods), now=at(200))

    assert cause is not None
    assert (cause.reason, cause.node) == ("NodeLost", "node-1")


def test_an_error_reported_as_a_fact_names_the_rank_and_takes_its_pods_code() -> None:
    reported = FirstErrorReport(rank=3, time=at(9), reason="CudaOutOfMemory", message="rank 3 wanted 2 GiB")
    pods = [failed(0, 1, at_second=8, reason="PeerLost"), failed(1, 1, at_second=10, reason="CudaOutOfMemory")]

    cause = find_cause(gang(pods, first_error=reported), now=at(200))

    assert cause is not None
    assert (cause.reason, cause.rank, cause.pod, cause.exit_code) == ("CudaOutOfMemory", 3, "demo-a1-worker-0", 1)
    assert cause.message == "attempt 1: rank 3 wanted 2 GiB"


def test_an_error_reported_as_a_fact_is_the_cause_when_no_pod_is_left() -> None:
    reported = FirstErrorReport(rank=None, time=at(9), reason="RankKilled", message="a rank was killed")

    cause = find_cause(gang([], first_error=reported, size=2), now=at(200))

    assert cause is not None
    assert (cause.reason, cause.budget) == ("RankKilled", "infrastructure")


def test_a_failed_job_without_any_trace_is_charged_to_the_infrastructure() -> None:
    cause = find_cause(gang([], size=1), now=at(200))

    assert cause is not None
    assert (cause.reason, cause.budget) == ("PodDeleted", "infrastructure")


def test_a_running_gang_has_not_ended() -> None:
    pods = [build_pod("demo", node=node) for node in range(2)]

    assert find_cause(gang(pods, job={}, hash_when_running=gang_hash(tuple(pods))), now=at(200)) is None


def test_pods_that_are_replaced_or_missing_end_a_gang_that_ran() -> None:
    pods = [build_pod("demo", node=node) for node in range(2)]
    ran = gang_hash(tuple(pods))

    replaced = find_cause(
        gang([pods[0], build_pod("demo", node=1, uid="another")], job={}, hash_when_running=ran), now=at(200)
    )
    missing = find_cause(gang(pods[:1], job={}, hash_when_running=ran, size=2), now=at(200))

    assert replaced is not None
    assert (replaced.reason, replaced.budget) == ("PodDeleted", "infrastructure")
    assert missing is not None
    assert (missing.reason, missing.pod) == ("PodDeleted", "demo-a1-worker-0")


def test_pods_that_come_and_go_before_the_gang_ran_end_nothing() -> None:
    assert find_cause(gang([build_pod("demo", phase="Pending")], job={}, size=2), now=at(200)) is None


def test_a_job_that_somebody_deletes_ends_the_attempt() -> None:
    gone = find_cause(gang([], job=None, size=1), now=at(200))

    assert gone is not None
    assert (gone.reason, gone.budget) == ("JobDeleted", "infrastructure")


# --- The good end, and waiting before a judgement --------------------------------------------------------------------


def succeeded(*, result: Result | None) -> list[Manifest]:
    return [end_pod(build_pod("demo"), exit_code=0, finished=at(100), result=result)]


def test_a_gang_is_complete_when_its_job_succeeded_and_it_says_so_itself() -> None:
    done = Result(reason="Completed", message="20 steps", artifacts={"model": "pvc://c/r/model"})
    status = ended_status("Succeeded", at_time=at(100))
    by_message = completed_result(gang(succeeded(result=done), job=status))
    by_fact = completed_result(
        gang(succeeded(result=None), job=status, result=ResultReport(reason="Completed", message="20 steps"))
    )

    assert by_message is not None
    assert by_message.artifacts == {"model": "pvc://c/r/model"}
    assert by_fact is not None


def test_a_result_alone_is_no_success() -> None:
    says = ResultReport(reason="Completed", message="20 steps")

    assert completed_result(gang([build_pod("demo")], job={}, result=says)) is None
    assert completed_result(gang(succeeded(result=None), job=FAILED, result=says)) is None


def test_a_job_that_succeeds_without_a_result_is_waited_for_and_then_failed() -> None:
    silent = gang(succeeded(result=None), job=ended_status("Succeeded", at_time=at(100)))

    assert settling_until(silent, now=at(101)) == at(160)
    assert settling_until(silent, now=at(160)) is None
    cause = find_cause(silent, now=at(160))
    assert cause is not None
    assert (cause.reason, cause.budget) == ("TrainingFailed", "application")


def test_a_failed_gang_is_judged_when_all_its_pods_have_ended_or_ten_seconds_later() -> None:
    first = failed(1, 138, at_second=100, reason="PeerLost")

    assert settling_until(gang([build_pod("demo"), first]), now=at(101)) == at(110)
    assert settling_until(gang([build_pod("demo"), first]), now=at(110)) is None
    assert settling_until(gang([failed(0, 1), first]), now=at(101)) is None


def test_a_pod_that_went_with_its_node_is_the_nodes_end_and_no_deletion() -> None:
    gone = disrupted(1, "DeletionByPodGC")
    for pods in ([build_pod("demo")], [build_pod("demo"), build_pod("demo", node=1, uid="another")]):
        cause = find_cause(gang(pods, job={}, hash_when_running="other", size=2, departed=[gone]), now=at(101))

        assert cause is not None
        assert (cause.reason, cause.budget, cause.node, cause.pod) == (
            "NodeLost",
            "infrastructure",
            "node-1",
            "demo-a1-worker-0",
        )


def deleted(pod: Manifest, *, at_second: float) -> Manifest:
    """Return a pod whose deletion was asked for then, with the half minute that it has to end."""
    metadata = {"deletionTimestamp": rfc3339(at(at_second + 30)), "deletionGracePeriodSeconds": 30}
    return {**pod, "metadata": {**pod["metadata"], **metadata}}


def test_a_pod_that_was_deleted_is_named_before_what_followed_from_it() -> None:
    gone = deleted(failed(1, 143, at_second=99), at_second=98)
    followed = failed(0, 138, reason="PeerLost", at_second=100)
    for pods, departed in (([followed], [gone]), ([followed, gone], []), ([], [gone])):
        cause = find_cause(gang(pods, size=2, departed=departed), now=at(101))

        assert cause is not None
        assert (cause.reason, cause.budget, cause.node, cause.pod) == (
            "PodDeleted",
            "infrastructure",
            None,
            "demo-a1-worker-0",
        )
        assert cause.message == "attempt 1: pod demo-a1-worker-0 was deleted while the gang ran"


def test_pods_that_were_deleted_within_one_second_are_all_named_with_what_the_job_says() -> None:
    pods = [deleted(build_pod("demo", node=node), at_second=98) for node in (0, 1)]
    job = ended_status("Failed", at_time=at(98), message="1 Worker replica(s) failed")

    cause = find_cause(gang(pods, job=job), now=at(99))

    assert cause is not None
    assert (cause.reason, cause.pod) == ("PodDeleted", None)
    assert cause.message == (
        "attempt 1: pods demo-a1-master-0, demo-a1-worker-0 were deleted in the same second while the gang ran "
        "(the job says: 1 Worker replica(s) failed)"
    )


def test_a_pod_that_was_deleted_when_another_had_failed_is_no_cause() -> None:
    ended = failed(0, 138, reason="PeerLost", at_second=100)
    cleaned_up = deleted(build_pod("demo", node=1), at_second=102)

    cause = find_cause(gang([ended], size=2, departed=[cleaned_up]), now=at(112))

    assert cause is not None
    assert (cause.reason, cause.pod) == ("PeerLost", "demo-a1-master-0")
