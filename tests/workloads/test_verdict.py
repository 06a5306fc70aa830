"""How evidence becomes a verdict, in the order in which it counts."""

from __future__ import annotations

import signal
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from posttrain.api.reasons import advice_for
from posttrain.contract.facts import FirstError
from posttrain.contract.result import Result
from posttrain_workloads.runtime import RankError
from posttrain_workloads.verdict import Evidence, judge

NOW = datetime(2026, 3, 14, 9, 26, 53, tzinfo=UTC)
EARLY, LATE = NOW.timestamp() - 60, NOW.timestamp() - 30


def build_error(reason: str, *, rank: int = 0, time: float = EARLY, exit_code: int = 1) -> RankError:
    return RankError(rank=rank, time=time, reason=reason, message=f"{reason} of rank {rank}", exit_code=exit_code)


def outcome(**evidence: Any) -> tuple[str, int, int | None]:
    verdict = judge(Evidence(**{"exit_code": 1, "now": NOW, **evidence}))
    return verdict.result.reason, verdict.exit_code, verdict.result.rank


def test_the_result_of_a_run_that_went_through_is_the_workloads_own() -> None:
    result = Result(reason="Completed", message="6 steps", metrics={"steps": "6"})
    verdict = judge(Evidence(exit_code=0, now=NOW, result=result, terminated=True))
    assert (verdict.result, verdict.exit_code, verdict.first_error) == (result, 0, None)


def test_a_grown_oom_counter_outweighs_every_other_sign() -> None:
    evidence = {
        "oom_kills": 1,
        "errors": (build_error("TrainingFailed"),),
        "exits": {0: (1, LATE), 1: (-signal.SIGKILL, EARLY)},
    }
    assert outcome(**evidence) == ("HostOutOfMemory", 1, 1)


def test_the_earliest_error_counts_and_consequences_never_do() -> None:
    errors = (
        build_error("PeerLost", rank=2, time=EARLY - 5, exit_code=138),
        build_error("ConfigInvalid", rank=1, exit_code=2),
        build_error("TrainingFailed", rank=0, time=LATE),
    )
    assert outcome(errors=errors) == ("ConfigInvalid", 2, 1)
    verdict = judge(Evidence(exit_code=1, now=NOW, errors=errors))
    assert verdict.first_error == FirstError(
        rank=1, time=NOW - timedelta(seconds=60), reason="ConfigInvalid", message="ConfigInvalid of rank 1"
    )


@pytest.mark.parametrize("killed", [signal.SIGKILL, signal.SIGBUS])
def test_a_killed_rank_is_transient_though_its_peers_complain(killed: signal.Signals) -> None:
    evidence = {
        "errors": (build_error("PeerLost", rank=0, exit_code=138),),
        "exits": {0: (138, LATE), 1: (-killed, EARLY)},
    }
    assert outcome(**evidence) == ("RankKilled", 138, 1)


def test_a_crash_of_its_own_is_the_programs_fault_and_quotes_the_log() -> None:
    evidence = Evidence(
        exit_code=1,
        now=NOW,
        exits={0: (-signal.SIGSEGV, EARLY)},
        tails={0: ("loading", "Fatal Python error"), None: ()},
    )
    verdict = judge(evidence)
    assert (verdict.result.reason, verdict.exit_code) == ("RankCrashed", 1)
    assert verdict.result.message == "rank 0 ended by SIGSEGV; the log ends with:\nloading\nFatal Python error"
    assert verdict.result.advice == advice_for("RankCrashed")


def test_told_to_stop_is_no_cause_and_no_error() -> None:
    verdict = judge(Evidence(exit_code=1, now=NOW, terminated=True, exits={0: (-signal.SIGTERM, EARLY)}))
    assert (verdict.result.reason, verdict.exit_code, verdict.first_error) == ("Terminated", 143, None)


def test_ranks_that_stopped_for_another_nodes_sake_end_as_terminated() -> None:
    verdict = judge(Evidence(exit_code=0, now=NOW, errors=(build_error("Terminated", exit_code=143),)))
    assert (verdict.result.reason, verdict.exit_code, verdict.first_error) == ("Terminated", 143, None)


def test_an_error_met_while_stopping_is_an_error() -> None:
    assert outcome(terminated=True, errors=(build_error("DiskFull"),)) == ("DiskFull", 1, 0)


def test_a_sigterm_that_launch_never_saw_is_still_none_of_ours() -> None:
    assert outcome(exits={0: (-signal.SIGTERM, EARLY), 1: (-signal.SIGTERM, EARLY)}) == ("Terminated", 143, None)


def test_torchrun_itself_killed_is_transient() -> None:
    assert outcome(exit_code=-signal.SIGKILL) == ("RankKilled", 138, None)


def test_a_lost_peer_without_a_cause_here_is_transient() -> None:
    errors = (build_error("PeerLost", rank=3, exit_code=138),)
    verdict = judge(Evidence(exit_code=1, now=NOW, errors=errors, exits={3: (138, EARLY)}))
    assert (verdict.result.reason, verdict.exit_code, verdict.first_error) == ("PeerLost", 138, None)


def test_torchrun_that_cannot_begin_is_compared_with_the_plan() -> None:
    assert outcome(planned_world_size=2, given_world_size=1) == ("WorldSizeMismatch", 2, None)
    assert outcome(planned_world_size=2, given_world_size=2) == ("TrainingFailed", 1, None)


def test_a_failure_without_a_word_quotes_the_log_of_the_rank_that_failed_first() -> None:
    evidence = Evidence(
        exit_code=1,
        now=NOW,
        exits={0: (-signal.SIGTERM, EARLY), 1: (3, EARLY)},
        tails={0: ("fine",), 1: ("something odd",), None: ("torchrun",)},
    )
    result = judge(evidence).result
    assert (result.reason, result.rank) == ("TrainingFailed", 1)
    assert result.message == "rank 1 ended with exit code 3; the log ends with:\nsomething odd"
