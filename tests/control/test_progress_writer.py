"""From reports that a replica took to `status.progress`: when, how often, and what is acknowledged."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from posttrain.api.training_run_status import Acknowledged, Metric, Progress
from posttrain.contract.facts import (
    AcknowledgedSource,
    CheckpointSaved,
    CheckpointSkipped,
    FactBody,
    FactsReply,
    FirstError,
    Logged,
    NonFinite,
    PrepareResult,
    ResultFact,
    Started,
)
from posttrain.contract.progress import KubeflowReport
from posttrain.contract.reports import Report
from posttrain.contract.result import Result
from posttrain.control.kinds import TRAINING_RUN
from posttrain.control.port import Conflict, Rejected, Unavailable
from posttrain.control.progress import ProgressWriter, RunGone, RunIdentity, WriterLimits
from tests.support.builders import T0, at, build_report
from tests.support.clock import Clock
from tests.support.fake_cluster import FakeCluster
from tests.support.reporting_pods import add_run, progress_of

STARTED = Started(world_size=2, max_steps=100, resumed_from_step=0)


def step(number: int, *, attempt: int = 1, **metrics: str) -> KubeflowReport:
    return KubeflowReport(attempt=attempt, step=number, max_steps=100, metrics=metrics)


def logged(number: int) -> Logged:
    return Logged(step=number, metrics={"loss": f"{number}.5"})


class World:
    """A cluster with a run, and one replica's writer."""

    def __init__(self, **limits: Any) -> None:
        self.clock = Clock()
        self.cluster = FakeCluster(clock=self.clock.now)
        self.run = add_run(self.cluster)
        self.writer = self.add_writer(**limits)

    def add_writer(self, **limits: Any) -> ProgressWriter:
        return ProgressWriter(
            self.cluster, limits=WriterLimits(**limits), clock=self.clock.now, monotonic=self.clock.monotonic
        )

    async def take(self, *bodies: FactBody, run: RunIdentity | None = None, **fields: Any) -> FactsReply:
        return await self.writer.take(run or self.run, build_report(*bodies, **fields), size_bytes=100)

    async def note(self, report: Report) -> None:
        """Take a step's post, and let what it set off end."""
        self.writer.note(self.run, report, size_bytes=100)
        for _ in range(10):
            await asyncio.sleep(0)

    @property
    def writes(self) -> int:
        return self.cluster.count("apply_status")

    @property
    def progress(self) -> Progress:
        progress = progress_of(self.cluster, self.run)
        assert progress is not None
        return progress


def acknowledged(seq: int, *, attempt: int = 1, source: str = "rank-0") -> tuple[AcknowledgedSource, ...]:
    return (AcknowledgedSource(attempt=attempt, source=source, seq=seq),)


# --- At once, or in its time -----------------------------------------------------------------------------------------


def test_the_first_report_of_a_run_is_in_status_before_it_is_answered() -> None:
    async def scenario() -> None:
        world = World()
        reply = await world.take(STARTED)

        assert reply == FactsReply(acknowledged=acknowledged(1))
        assert (world.progress.attempt, world.progress.max_steps, world.progress.attempt_start) == (1, 100, T0)
        assert world.progress.acknowledged == [Acknowledged(attempt=1, source="rank-0", seq=1)]

    asyncio.run(scenario())


def test_what_nobody_waits_for_is_taken_and_acknowledged_only_once_it_is_in_status() -> None:
    async def scenario() -> None:
        world = World()
        await world.take(STARTED)
        await world.note(step(1))
        world.clock.advance(10)
        assert await world.take(logged(5), first_seq=2) == FactsReply(
            acknowledged=acknowledged(1), retry_after_seconds=20.0
        )
        assert world.writes == 2

        world.clock.advance(20)
        assert await world.take(logged(5), logged(9), first_seq=2) == FactsReply(acknowledged=acknowledged(3))
        assert (world.writes, world.progress.step, world.progress.last_beat_time) == (3, 9, at(30))

    asyncio.run(scenario())


def test_what_is_not_sent_again_is_written_in_its_time() -> None:
    async def scenario() -> None:
        world = World()
        await world.take(STARTED)
        await world.note(step(1))
        world.clock.advance(5)
        await world.take(phase="training", step=7)
        world.clock.advance(26)
        await world.writer.write_due()
        assert world.writes == 2  # whoever was told to come again has a moment to do so
        world.clock.advance(1)
        await world.writer.write_due()

        assert (world.writes, world.progress.step, world.progress.last_beat_time) == (3, 7, at(5))
        world.clock.advance(60)
        await world.writer.write_due()
        assert world.writes == 3

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "body",
    [
        CheckpointSaved(step=5, uri="pvc://c/checkpoint-5", bytes=1, digest="d"),
        CheckpointSkipped(step=5, reason="torn"),
        NonFinite(metric="loss", step=5),
        FirstError(rank=1, time=T0, reason="CudaOutOfMemory", message="no memory"),
        PrepareResult(problems=("no column",)),
        ResultFact(result=Result(reason="Completed", message="done"), last_step=100),
        Started(world_size=2, max_steps=100, resumed_from_step=0),
        logged(100),
    ],
)
def test_what_a_condition_depends_on_is_in_status_at_once(body: FactBody) -> None:
    async def scenario() -> None:
        world = World()
        await world.take(STARTED)
        await world.note(step(1))
        await world.take(logged(4), first_seq=2)

        reply = await world.take(logged(4), body, first_seq=2)

        assert reply == FactsReply(acknowledged=acknowledged(3))
        assert world.writes == 3

    asyncio.run(scenario())


def test_a_sender_that_waits_is_not_kept_waiting() -> None:
    async def scenario() -> None:
        world = World()
        await world.take(STARTED)
        assert await world.take(logged(5), first_seq=2, waiting=True) == FactsReply(acknowledged=acknowledged(2))

    asyncio.run(scenario())


def test_steps_are_written_at_the_first_at_the_last_and_at_a_new_attempts() -> None:
    async def scenario() -> None:
        world = World()
        written = []
        for report in (
            step(0),
            step(1),
            step(2),
            step(50),
            step(100),
            step(100),
            step(3, attempt=2),
            step(4, attempt=2),
        ):
            before = world.writes
            await world.note(report)
            written.append(world.writes - before)
        assert written == [1, 1, 0, 0, 1, 0, 1, 0]

    asyncio.run(scenario())


def test_a_step_is_taken_without_waiting_for_the_api_server() -> None:
    async def scenario() -> None:
        world = World()
        world.writer.note(world.run, step(1, loss="2.0"), size_bytes=100)
        assert world.cluster.requests == []
        await world.writer.close()
        assert world.progress.metrics == [Metric(name="loss", value="2.0")]

    asyncio.run(scenario())


def test_a_fact_of_an_ended_attempt_counts() -> None:
    async def scenario() -> None:
        world = World()
        await world.take(STARTED)
        await world.take(STARTED, attempt=2)
        saved = CheckpointSaved(step=5, uri="pvc://c/checkpoint-5", bytes=1, digest="d")
        assert (await world.take(saved, first_seq=2)).acknowledged == acknowledged(2)
        assert world.progress.checkpoint is not None
        assert (world.progress.attempt, world.progress.checkpoint.attempt) == (2, 1)

    asyncio.run(scenario())


# --- Several replicas ------------------------------------------------------------------------------------------------


def test_two_replicas_that_hear_one_run_alternately_lose_and_double_nothing() -> None:
    async def scenario() -> None:
        world = World()
        writers = [world.writer, world.add_writer()]
        bodies: list[FactBody] = [STARTED]
        for number in range(1, 100):
            bodies.append(logged(number))
            if number % 10 == 0:
                bodies.append(CheckpointSaved(step=number, uri=f"pvc://c/{number}", bytes=1, digest="d"))
        done = 0
        for turn in range(1, len(bodies) + 1):
            # As the reporter does: all that is not acknowledged, to whichever replica answers.
            report = build_report(*bodies[done:turn], first_seq=done + 1)
            reply = await writers[turn % 2].take(world.run, report, size_bytes=100)
            done = max(done, *(entry.seq for entry in reply.acknowledged))
            world.clock.advance(1)
        waiting = build_report(*bodies[done:], first_seq=done + 1, waiting=True)
        reply = await writers[0].take(world.run, waiting, size_bytes=100)

        assert reply.acknowledged == acknowledged(len(bodies))
        assert (world.progress.checkpoints_saved, world.progress.step) == (9, 99)
        assert world.writes < 25

    asyncio.run(scenario())


def test_replicas_that_write_at_the_same_time_read_anew_and_fold_anew() -> None:
    async def scenario() -> None:
        world = World()
        writers = [world.writer, world.add_writer(), world.add_writer()]
        replies = await asyncio.gather(
            *(
                writer.take(world.run, build_report(STARTED, source=f"rank-{index}"), size_bytes=100)
                for index, writer in enumerate(writers)
            )
        )

        assert [reply.acknowledged for reply in replies] == [acknowledged(1, source=f"rank-{i}") for i in range(3)]
        assert [entry.source for entry in world.progress.acknowledged or ()] == ["rank-0", "rank-1", "rank-2"]
        assert world.writes > 3

    asyncio.run(scenario())


def test_a_replica_that_starts_does_not_write_every_run_at_once() -> None:
    async def scenario() -> None:
        world = World()
        await world.take(STARTED)
        await world.note(step(1))
        world.clock.advance(10)
        another = world.add_writer()
        reply = await another.take(world.run, build_report(logged(5), first_seq=2), size_bytes=100)

        assert reply == FactsReply(acknowledged=acknowledged(1), retry_after_seconds=20.0)
        assert world.writes == 2

    asyncio.run(scenario())


def test_the_operators_part_of_the_status_stays() -> None:
    async def scenario() -> None:
        world = World()
        found = await world.cluster.get(world.run.key)
        body = {k: found[k] for k in ("apiVersion", "kind", "metadata")}
        await world.cluster.apply_status({**body, "status": {"attempt": 1, "stage": "Training"}}, manager="posttrain")
        await world.take(STARTED)

        status = world.cluster.objects(TRAINING_RUN)[0]["status"]
        assert (status["stage"], status["progress"]["maxSteps"]) == ("Training", 100)

    asyncio.run(scenario())


# --- Trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(6))
def test_the_pods_of_a_run_cost_one_write_however_close_they_report(turns: int) -> None:
    async def scenario() -> None:
        world = World()
        await world.take(STARTED)
        await world.note(step(1))
        before = world.writes
        world.clock.advance(30)

        async def other_pod() -> FactsReply:
            for _ in range(turns):
                await asyncio.sleep(0)
            return await world.take(source="rank-1")

        await asyncio.gather(world.take(logged(5), first_seq=2), other_pod())
        assert world.writes == before + 1

    asyncio.run(scenario())


def test_requests_that_come_during_a_write_go_into_the_next_one_together() -> None:
    async def scenario() -> None:
        world = World()
        await asyncio.gather(*(world.take(STARTED, source=f"rank-{index}") for index in range(40)))

        assert world.writes <= 2
        assert len(world.progress.acknowledged or ()) == 32  # what status keeps

    asyncio.run(scenario())


def test_a_conflict_is_tried_again_and_not_for_ever() -> None:
    async def scenario() -> None:
        world = World()
        world.cluster.fail("apply_status", Conflict("changed"), Conflict("changed"))
        assert (await world.take(STARTED)).acknowledged == acknowledged(1)

        world.cluster.fail("apply_status", *(Conflict("changed") for _ in range(8)))
        saved = CheckpointSaved(step=5, uri="pvc://c/checkpoint-5", bytes=1, digest="d")
        with pytest.raises(Unavailable, match="changed 8 times"):
            await world.take(saved, first_seq=2)
        world.clock.advance(1)
        assert (await world.take(saved, first_seq=2)).acknowledged == acknowledged(2)
        assert world.progress.checkpoints_saved == 1

    asyncio.run(scenario())


def test_an_api_server_in_trouble_is_left_alone_and_what_waits_is_kept() -> None:
    async def scenario() -> None:
        world = World()
        await world.take(STARTED)
        world.cluster.fail("get", Unavailable("too many requests", retry_after=7))
        for _ in range(5):
            with pytest.raises(Unavailable, match="too many requests") as raised:
                await world.take(NonFinite(metric="loss", step=2), first_seq=2)
        assert raised.value.retry_after == 7
        assert world.cluster.count("get") == 3

        world.clock.advance(7)
        await world.note(step(3))
        assert (world.progress.step, world.progress.non_finite is not None) == (3, True)

    asyncio.run(scenario())


def test_a_refused_status_is_told_and_not_asked_for_again_at_once() -> None:
    async def scenario() -> None:
        world = World()
        world.cluster.fail("apply_status", Rejected("status.progress: Invalid value"))
        for _ in range(2):
            with pytest.raises(Unavailable, match=r"status\.progress: Invalid value") as raised:
                await world.take(STARTED)
        assert (raised.value.retry_after, world.writes) == (30, 1)

    asyncio.run(scenario())


def test_a_run_that_is_gone_is_forgotten() -> None:
    async def scenario() -> None:
        world = World()
        await world.take(STARTED, logged(1))
        await world.take(logged(5), first_seq=3)
        await world.cluster.delete(world.run.key, uid=world.run.uid)
        with pytest.raises(RunGone, match="TrainingRun team/demo does not exist any more"):
            await world.take(NonFinite(metric="loss", step=6), first_seq=4)

        requests = len(world.cluster.requests)
        world.clock.advance(60)
        await world.writer.write_due()
        assert len(world.cluster.requests) == requests

    asyncio.run(scenario())


def test_what_a_run_reported_does_not_reach_another_of_its_name() -> None:
    async def scenario() -> None:
        world = World()
        await world.cluster.delete(world.run.key, uid=world.run.uid)
        successor = add_run(world.cluster)
        with pytest.raises(RunGone):
            await world.take(STARTED)
        assert progress_of(world.cluster, successor) is None

    asyncio.run(scenario())


# --- Bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{"reports_per_run": 4}, {"bytes_per_run": 400}])
def test_what_would_be_too_much_to_keep_is_written(limits: dict[str, int]) -> None:
    async def scenario() -> None:
        world = World(**limits)
        await world.note(step(1))
        for number in range(2, 22):
            await world.note(step(number))
        assert (world.writes, world.progress.step) == (6, 21)

    asyncio.run(scenario())


def test_what_cannot_be_kept_or_written_is_refused() -> None:
    async def scenario() -> None:
        world = World(reports_per_run=3)
        await world.note(step(1))
        world.cluster.fail("get", Unavailable("down"))
        for number in (2, 3, 4):
            await world.note(step(number))
        with pytest.raises(Unavailable, match="down"):
            world.writer.note(world.run, step(5), size_bytes=100)
        world.clock.advance(6)
        await world.note(step(6))
        assert world.progress.step == 6

    asyncio.run(scenario())


def test_a_slow_api_server_does_not_let_reports_pile_up() -> None:
    async def scenario() -> None:
        world = World(reports_per_run=3)
        for number in (1, 2, 3):
            world.writer.note(world.run, step(number), size_bytes=100)
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="slow to take the progress of TrainingRun team/demo"):
            world.writer.note(world.run, step(4), size_bytes=100)
        await world.writer.close()
        assert world.progress.step == 3

    asyncio.run(scenario())


def test_runs_that_have_nothing_to_write_make_room_for_others() -> None:
    async def scenario() -> None:
        world = World(runs=2)
        runs = [world.run, *(add_run(world.cluster, name=name) for name in ("b", "c"))]
        for run in runs:
            await world.take(STARTED, logged(1), run=run)
        await world.take(logged(5), first_seq=3, run=runs[1])
        await world.take(logged(5), first_seq=3, run=runs[2])
        with pytest.raises(Unavailable, match="reports of 2 runs wait"):
            await world.take(logged(5), first_seq=3)
        await world.writer.close()
        assert await world.take(logged(5), first_seq=3, waiting=True) == FactsReply(acknowledged=acknowledged(3))

    asyncio.run(scenario())


def test_progress_stays_bounded_whatever_is_sent() -> None:
    async def scenario() -> None:
        world = World()
        await world.take(STARTED)
        for number in range(1, 200):
            metrics = {f"a-metric-with-a-long-name-{number}-{index}": "9" * 64 for index in range(40)}
            world.writer.note(world.run, step(number, **metrics), size_bytes=5000)
        await world.writer.close()
        assert len(json.dumps(world.cluster.objects(TRAINING_RUN)[0]["status"])) < 16 * 1024

    asyncio.run(scenario())


# --- The end ---------------------------------------------------------------------------------------------------------


def test_everything_that_waits_is_written_at_the_end() -> None:
    async def scenario() -> None:
        world = World()
        runs = [world.run, *(add_run(world.cluster, name=f"run-{index}") for index in range(50))]
        for run in runs:
            await world.take(STARTED, logged(1), run=run)
            await world.take(logged(5), first_seq=3, run=run)
        assert world.writes == 51
        await world.writer.close()
        steps = [progress.step for run in runs if (progress := progress_of(world.cluster, run))]
        assert steps == [5] * 51

    asyncio.run(scenario())


def test_the_end_does_not_wait_for_an_api_server_that_does_not_answer() -> None:
    class Silent(FakeCluster):
        silent = False

        async def get(self, key: Any) -> Any:
            if self.silent:
                await asyncio.Event().wait()
            return await super().get(key)

    async def scenario() -> None:
        world = World()
        world.cluster = Silent()
        world.run = add_run(world.cluster)
        world.writer = world.add_writer()
        await world.take(STARTED, logged(1))
        await world.take(logged(5), first_seq=3)
        world.cluster.silent = True
        with capture_logs() as logs:
            await world.writer.close(timeout_seconds=0.1)
        assert logs == [
            {"event": "progress was not written in time", "runs": 1, "seconds": 0.1, "log_level": "warning"}
        ]

    asyncio.run(scenario())
