"""`next_progress`: what a report changes."""

from __future__ import annotations

import itertools
import json
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.api.training_run_status import HistoryPoint, LatestCheckpoint, Metric, Progress, SkippedCheckpoint
from posttrain.contract.facts import (
    CheckpointSaved,
    CheckpointSkipped,
    FactBody,
    FactsReport,
    FirstError,
    Logged,
    NonFinite,
    PrepareResult,
    ResultFact,
    SignalLost,
    SignalRegained,
    Started,
)
from posttrain.contract.progress import KubeflowReport
from posttrain.contract.result import Result
from posttrain.plan.progress import HISTORY_MAX_POINTS, facts_reply, must_show_at_once, next_progress
from tests.support.builders import T0, at, build_fact, build_report


def take(progress: Progress | None, *reports: FactsReport | KubeflowReport, received_at: datetime = T0) -> Progress:
    for report in reports:
        progress = next_progress(progress, report, received_at=received_at)
    assert progress is not None
    return progress


def started(resumed_from: int = 0, max_steps: int = 100) -> Started:
    return Started(world_size=2, max_steps=max_steps, resumed_from_step=resumed_from, versions={"trl": "1.16.0"})


def step(number: int, *, attempt: int = 1, **metrics: str) -> KubeflowReport:
    return KubeflowReport(attempt=attempt, step=number, max_steps=100, metrics=metrics)


def saved(number: int) -> CheckpointSaved:
    return CheckpointSaved(step=number, uri=f"pvc://c/r/checkpoint-{number}", bytes=10, digest="d")


def logged(number: int, loss: str = "1.0") -> Logged:
    return Logged(step=number, metrics={"loss": loss, "learning_rate": "2e-05", "epoch": "0.5"})


# --- Steps, percentage, time -----------------------------------------------------------------------------------------


def test_percentage_and_eta_follow_from_steps_since_the_start_of_the_attempt() -> None:
    progress = take(None, build_report(started()))
    progress = take(progress, step(25), received_at=at(50))

    assert (progress.step, progress.max_steps, progress.percentage) == (25, 100, 25)
    assert progress.eta_seconds == 150


def test_the_eta_after_a_resume_counts_only_the_steps_of_this_attempt() -> None:
    progress = take(None, build_report(started(resumed_from=80), attempt=2))
    progress = take(progress, step(90, attempt=2), received_at=at(100))

    assert progress.percentage == 90
    assert progress.eta_seconds == 100  # 10 s a step; elapsed time over all 90 steps would say 11


def test_the_eta_is_right_when_the_start_is_heard_late() -> None:
    progress = take(None, step(40), received_at=at(400))
    progress = take(progress, build_report(started()), received_at=at(401))
    progress = take(progress, step(50), received_at=at(501))

    assert progress.eta_seconds == 500


def test_there_is_no_eta_before_a_step_was_timed_and_none_left_at_the_last_step() -> None:
    progress = take(None, build_report(started()))
    assert progress.eta_seconds is None
    assert take(progress, step(100), received_at=at(60)).eta_seconds == 0


@pytest.mark.parametrize(
    ("steps", "seconds", "eta"),
    [(99, 99, "1s"), (40, 40, "1m"), (20, 50, "3m20s"), (1, 76, "2h5m"), (1, 3600, "4d3h"), (100, 1, "0s")],
)
def test_the_eta_is_there_to_be_read_too(steps: int, seconds: int, eta: str) -> None:
    begun = take(None, build_report(started()))

    assert begun.eta is None
    assert take(begun, step(steps), received_at=at(seconds)).eta == eta


@pytest.mark.parametrize(
    ("loss", "text"), [("0.04515746980905533", "0.04516"), ("12345.678", "1.235e+04"), ("3", "3"), ("nan", "nan")]
)
def test_the_loss_is_there_to_be_read_too(loss: str, text: str) -> None:
    progress = take(None, build_report(started(), logged(3, loss)))

    assert progress.metric == text


def test_the_reward_is_there_to_be_read_in_place_of_the_loss() -> None:
    logged = Logged(step=3, metrics={"loss": "0.0123", "reward": "-0.6015625"})

    assert take(None, build_report(started(), logged)).metric == "-0.6016"


def test_an_attempt_never_moves_backwards() -> None:
    progress = take(None, build_report(started()), step(30, loss="1"))
    behind = take(progress, step(20, loss="2"), received_at=at(9))

    assert (behind.step, behind.percentage, behind.metrics) == (30, 30, [Metric(name="loss", value="1")])
    assert behind.last_beat_time == at(9)
    assert behind.last_updated_time == T0


def test_times_are_the_servers() -> None:
    progress = take(None, build_report(started()), received_at=at(7))

    assert (progress.attempt_start, progress.last_beat_time, progress.last_updated_time) == (at(7), at(7), at(7))


def test_a_beat_moves_phase_step_and_time() -> None:
    progress = take(None, build_report(phase="loading"), received_at=at(1))
    assert (progress.phase, progress.step, progress.last_beat_time) == ("loading", None, at(1))

    progress = take(progress, build_report(started()), build_report(phase="training", step=3), received_at=at(5))
    assert (progress.phase, progress.step, progress.last_beat_time) == ("training", 3, at(5))


def test_once_training_has_started_launch_does_not_say_what_the_phase_is() -> None:
    progress = take(None, build_report(started()), build_report(phase="saving"))

    assert take(progress, build_report(source="launch-0", phase="loading")).phase == "saving"


# --- Attempts --------------------------------------------------------------------------------------------------------


def test_a_new_attempt_begins_anew_but_keeps_what_is_history() -> None:
    first = take(
        None,
        build_report(
            started(), logged(5), saved(5), logged(10), saved(10), logged(15), NonFinite(metric="loss", step=15)
        ),
        step(17),
    )
    second = take(first, build_report(phase="loading", attempt=2))

    assert second.attempt == 2
    assert (second.step, second.percentage, second.phase, second.non_finite) == (None, None, "loading", None)
    assert [point.step for point in second.history or []] == [5, 10, 15]
    assert second.checkpoint is not None
    assert (second.checkpoint.step, second.checkpoints_saved) == (10, 2)

    resumed = take(second, build_report(started(resumed_from=10), attempt=2))
    assert (resumed.step, resumed.attempt_start_step) == (10, 10)
    assert [point.step for point in resumed.history or []] == [5, 10]


def test_steps_lost_are_those_between_the_last_attempts_last_step_and_where_this_one_resumed() -> None:
    progress = take(None, build_report(started()), step(17), build_report(started(resumed_from=10), attempt=2))
    assert progress.steps_lost == 7

    progress = take(progress, step(30, attempt=2), build_report(started(resumed_from=30), attempt=3))
    assert progress.steps_lost == 7


def test_an_attempt_that_never_started_leaves_the_one_before_to_compare_with() -> None:
    progress = take(None, build_report(started()), step(17), build_report(phase="loading", attempt=2))
    progress = take(progress, build_report(started(resumed_from=10), attempt=3))

    assert progress.steps_lost == 7


def test_the_last_word_of_the_attempt_before_may_come_late() -> None:
    ended = ResultFact(result=Result(reason="RankKilled", message=""), last_step=19)
    progress = take(None, build_report(started()), step(17), build_report(started(resumed_from=10), attempt=2))
    late = FactsReport(attempt=2, source="rank-0", facts=(build_fact(ended, seq=1, source="launch-0"),))

    assert take(progress, late).steps_lost == 9
    assert take(progress, late, late).steps_lost == 9


def test_a_report_of_an_ended_attempt_moves_no_step_but_its_facts_count() -> None:
    progress = take(None, build_report(started(resumed_from=10), attempt=2), received_at=at(5))
    late = take(
        progress,
        build_report(saved(10), CheckpointSkipped(step=5, reason="torn"), logged(8), step=99, phase="saving"),
        step(50),
        received_at=at(90),
    )

    assert (late.attempt, late.step, late.phase, late.last_beat_time) == (2, 10, None, at(5))
    assert late.checkpoints_saved == 1
    assert late.skipped_checkpoints == [SkippedCheckpoint(step=5, reason="torn", attempt=1)]
    assert late.history == [HistoryPoint(step=8, loss="1.0", learning_rate="2e-05")]
    assert [(a.attempt, a.source, a.seq) for a in late.acknowledged or []] == [(1, "rank-0", 3), (2, "rank-0", 1)]


def test_steps_that_were_done_again_are_no_history_of_the_ended_attempt() -> None:
    progress = take(None, build_report(started(resumed_from=10), attempt=2))

    assert take(progress, build_report(logged(12))).history is None


def test_prepares_facts_count_in_any_attempt() -> None:
    progress = take(None, build_report(started(), attempt=1))
    found = PrepareResult(problems=("a",), commits={"model": "c" * 40})
    progress = take(progress, build_report(found, attempt=0, source="prepare"))

    assert progress.attempt == 1
    assert progress.prepare is not None
    assert (progress.prepare.problems, progress.prepare.commits) == (["a"], {"model": "c" * 40})


# --- Facts -----------------------------------------------------------------------------------------------------------


def test_a_fact_is_taken_once_however_often_it_is_sent() -> None:
    report = build_report(started(), saved(5), saved(10))
    progress = take(None, report, report, report)

    assert progress.checkpoints_saved == 2
    reply = facts_reply(progress, report)
    assert [(a.attempt, a.source, a.seq) for a in reply.acknowledged] == [(1, "rank-0", 3)]


def test_what_follows_a_gap_waits_until_the_gap_is_sent() -> None:
    ahead = build_report(saved(10), first_seq=3)
    progress = take(None, build_report(started()), ahead)
    assert progress.checkpoints_saved is None
    assert [a.seq for a in facts_reply(progress, ahead).acknowledged] == [1]

    progress = take(progress, build_report(saved(5), saved(10), first_seq=2))
    assert progress.checkpoints_saved == 2


def test_facts_of_a_later_attempt_than_the_senders_are_not_taken() -> None:
    foreign = FactsReport(attempt=1, source="rank-0", facts=(build_fact(saved(5), seq=1, attempt=2),))

    assert take(None, foreign).checkpoints_saved is None


@given(order=st.permutations(range(6)), repeats=st.lists(st.integers(0, 5), max_size=10))
def test_any_order_and_repetition_of_posts_ends_in_the_same_counts(order: list[int], repeats: list[int]) -> None:
    bodies: list[FactBody] = [started(), *(saved(5 * i) for i in range(1, 6))]
    posts = [build_report(body, first_seq=i + 1) for i, body in enumerate(bodies)]
    progress = take(None, *(posts[i] for i in (*order, *repeats)), *posts)

    assert progress.checkpoints_saved == 5
    assert progress.checkpoint == LatestCheckpoint(
        step=25, uri="pvc://c/r/checkpoint-25", bytes=10, digest="d", attempt=1
    )


def test_a_checkpoint_that_failed_its_verification_is_no_longer_the_newest() -> None:
    progress = take(None, build_report(started(), saved(10)))
    skipped = CheckpointSkipped(step=10, reason="a file is shorter than its marker says")
    progress = take(progress, build_report(skipped, started(resumed_from=5), attempt=2))
    assert progress.checkpoint is None

    progress = take(progress, build_report(saved(10), attempt=2, first_seq=3))
    assert progress.checkpoint is not None
    assert progress.checkpoint.attempt == 2


def test_the_first_number_that_is_not_finite_is_kept() -> None:
    progress = take(
        None, build_report(started(), NonFinite(metric="loss", step=7), NonFinite(metric="grad_norm", step=9))
    )

    assert progress.non_finite is not None
    assert (progress.non_finite.metric, progress.non_finite.step) == ("loss", 7)


def test_what_a_check_of_the_signal_finds_is_known_until_it_is_over_or_another_attempt_begins() -> None:
    dead = SignalLost(reason="RewardSignalDead", message="dead " * 99, step=7)
    clipped = SignalLost(reason="CompletionsClipped", message="clipped", step=8)
    lost = take(None, build_report(started(), dead, clipped))
    over = take(lost, build_report(SignalRegained(reason="RewardSignalDead", step=9), first_seq=4))

    assert [(report.reason, report.step) for report in lost.lost_signals or ()] == [
        ("RewardSignalDead", 7),
        ("CompletionsClipped", 8),
    ]
    assert max(len(report.message) for report in lost.lost_signals or ()) == 200
    assert [report.reason for report in over.lost_signals or ()] == ["CompletionsClipped"]
    assert take(over, build_report(started(), attempt=2)).lost_signals is None
    assert must_show_at_once(lost, build_report(SignalRegained(reason="RewardSignalDead", step=9), first_seq=4))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_first_error_is_the_earliest_that_is_no_consequence(order: tuple[int, ...]) -> None:
    errors = [
        FirstError(rank=0, time=at(1), reason="Terminated", message="told to stop"),
        FirstError(rank=1, time=at(3), reason="CudaOutOfMemory", message="out of memory"),
        FirstError(rank=2, time=at(9), reason="TrainingFailed", message="later"),
    ]
    progress = take(None, *(build_report(errors[i], source=f"launch-{i}") for i in order))

    assert progress.first_error is not None
    assert progress.first_error.reason == "CudaOutOfMemory"


def test_a_result_is_not_replaced_by_the_end_that_follows_it() -> None:
    completed = ResultFact(result=Result(reason="Completed", message="done", artifacts={"model": "pvc://c/r/model"}))
    terminated = ResultFact(result=Result(reason="Terminated", message=""))
    both = take(None, build_report(terminated, source="launch-1"), build_report(completed, source="launch-0"))

    assert take(both, build_report(terminated, source="launch-2")).result == both.result
    assert both.result is not None
    assert both.result.artifacts == {"model": "pvc://c/r/model"}


@pytest.mark.parametrize("first", ["launch-0", "launch-1"])
def test_the_result_that_names_the_model_counts_whichever_node_ends_first(first: str) -> None:
    told = {
        "launch-0": Result(reason="Completed", message="done", artifacts={"model": "pvc://c/r/model"}),
        "launch-1": Result(reason="Completed", message="The run is complete."),
    }
    order = sorted(told, key=lambda source: source != first)
    progress = take(None, *(build_report(ResultFact(result=told[source]), source=source) for source in order))

    assert progress.result is not None
    assert (progress.result.message, progress.result.artifacts) == ("done", {"model": "pvc://c/r/model"})


def test_logged_numbers_are_metrics_and_points_of_the_curves() -> None:
    progress = take(None, build_report(started(), logged(5, "2.0"), logged(10, "1.5")))

    assert progress.step == 10
    assert progress.epoch == "0.5"
    assert progress.metrics == [Metric(name="learning_rate", value="2e-05"), Metric(name="loss", value="1.5")]
    assert progress.history == [
        HistoryPoint(step=5, loss="2.0", learning_rate="2e-05"),
        HistoryPoint(step=10, loss="1.5", learning_rate="2e-05"),
    ]


def test_an_evaluation_is_a_metric_but_no_point() -> None:
    progress = take(None, build_report(started(), Logged(step=5, metrics={"eval_loss": "1.1"})))

    assert progress.history is None
    assert progress.metrics == [Metric(name="eval_loss", value="1.1")]


@given(steps=st.lists(st.integers(1, 5000), min_size=1, max_size=300, unique=True).map(sorted))
def test_history_is_thinned_evenly(steps: list[int]) -> None:
    progress = take(None, build_report(started(max_steps=5000)))
    for i, number in enumerate(steps):
        progress = take(progress, build_report(logged(number), first_seq=i + 2))
    kept = [point.step for point in progress.history or []]

    assert len(kept) == min(len(steps), HISTORY_MAX_POINTS)
    assert kept[0] == steps[0]
    assert kept[-1] == steps[-1]


def test_the_points_of_a_long_run_lie_about_equally_far_apart() -> None:
    progress = take(None, build_report(started(max_steps=3000)))
    for number in range(1, 3001):
        progress = take(progress, build_report(logged(number), first_seq=number + 1))
    kept = [point.step for point in progress.history or []]
    gaps = [b - a for a, b in itertools.pairwise(kept[:-1])]

    assert len(kept) == HISTORY_MAX_POINTS
    assert max(gaps) <= 4 * 3000 / HISTORY_MAX_POINTS
    assert min(gaps) >= 3000 / HISTORY_MAX_POINTS / 4


def test_progress_stays_small_whatever_is_reported() -> None:
    problems = tuple("p" * 2000 for _ in range(50))
    progress = take(
        None,
        build_report(PrepareResult(problems=problems, warnings=problems), attempt=0, source="prepare"),
        build_report(started(), NonFinite(metric="m" * 500, step=1)),
        build_report(*(CheckpointSkipped(step=1, reason="r" * 9000) for _ in range(20)), first_seq=3),
        KubeflowReport(attempt=1, step=1, metrics={f"{i}" * 20: "v" * 60 for i in range(256)}),
    )
    for i in range(1, 200):
        progress = take(
            progress,
            build_report(
                FirstError(rank=i, time=T0, reason="TrainingFailed", message="m" * 9000), source=f"launch-{i}"
            ),
            build_report(logged(i, loss="-2.2250738585072014e-308"), first_seq=i + 22),
        )

    assert len(json.dumps(progress.to_data())) < 12_500
    assert len(progress.acknowledged or []) <= 32
    assert ("rank-0", 221) in [(a.source, a.seq) for a in progress.acknowledged or []]


# --- What status must have at once -----------------------------------------------------------------------------------


TRAINING = take(None, build_report(started(resumed_from=10)), step(20))
"""Attempt 1 of 100 steps, which began at step 10 and is at step 20; fact 1 is acknowledged."""


@pytest.mark.parametrize(
    ("known", "report", "at_once"),
    [
        (None, build_report(phase="loading"), True),
        (Progress(), step(1), True),
        (TRAINING, build_report(phase="loading", attempt=2), True),
        (TRAINING, step(21), False),
        (TRAINING, step(100), True),
        (take(TRAINING, step(100)), step(100), False),
        (take(None, build_report(started(resumed_from=10))), step(10), False),
        (take(None, build_report(started(resumed_from=10))), step(11), True),
        (TRAINING, build_report(phase="training", step=30), False),
        (TRAINING, build_report(logged(30), first_seq=2), False),
        (TRAINING, build_report(logged(100), first_seq=2), True),
        (TRAINING, build_report(logged(30), first_seq=2, waiting=True), True),
        (TRAINING, build_report(logged(30), first_seq=1, waiting=True), False),
        (TRAINING, build_report(saved(30), first_seq=2), True),
        (TRAINING, build_report(saved(30), first_seq=1), False),
        (TRAINING, build_report(logged(30), saved(30), first_seq=7), True),
        (take(TRAINING, build_report(attempt=2)), step(100), False),
        (take(TRAINING, build_report(attempt=2)), build_report(saved(30), first_seq=2), True),
    ],
)
def test_status_has_at_once_what_a_condition_or_a_person_waits_for(
    known: Progress | None, report: FactsReport | KubeflowReport, at_once: bool
) -> None:
    assert must_show_at_once(known, report) is at_once
