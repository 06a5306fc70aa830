"""Facts on their way: into the log, to the server, again after an absence; and nothing of it stops the sender."""

from __future__ import annotations

import socket
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from posttrain.contract.facts import FACT, AcknowledgedSource, CheckpointSaved, Fact, FactsReply, Logged, PhaseChanged
from posttrain_workloads.reporting import FactClient, FactLog, Reporter, open_reporter
from tests.workloads._configs import build_config
from tests.workloads._server import FactsServer

CONFIG = build_config(model=Path("/model"), rows=Path("/rows.jsonl"))
NOW = datetime(2026, 3, 14, 9, 26, 53, tzinfo=UTC)


def build_fact(seq: int, *, attempt: int = 1, source: str = "rank-0") -> Fact:
    return Fact(attempt=attempt, source=source, seq=seq, time=NOW, body=PhaseChanged(phase="loading"))


def build_reporter(log: Path, server: FactsServer | None, *, attempt: int = 1, source: str = "rank-0") -> Reporter:
    client = FactClient(server.url, token_file=None, ca_file=None) if server else None
    return Reporter(attempt=attempt, source=source, log=FactLog(log), client=client)


def steps(facts: list[Fact]) -> list[int]:
    return [fact.body.step for fact in facts if isinstance(fact.body, Logged)]


def test_facts_are_numbered_from_one_and_arrive_in_order(tmp_path: Path) -> None:
    server = FactsServer()
    reporter = build_reporter(tmp_path / "facts.jsonl", server)
    for step in range(600):  # more than one report may hold
        reporter.send(Logged(step=step, metrics={"loss": "1.0"}))
    assert reporter.close(timeout_seconds=20)
    assert steps(server.taken[1, "rank-0"]) == list(range(600))
    assert [fact.seq for fact in server.taken[1, "rank-0"]] == list(range(1, 601))
    assert FactLog(tmp_path / "facts.jsonl").unacknowledged() == []


def test_what_was_not_acknowledged_is_sent_by_the_next_process(tmp_path: Path) -> None:
    log = tmp_path / "facts.jsonl"
    absent = FactsServer(status=503)
    first = build_reporter(log, absent)
    first.send(Logged(step=7, metrics={}))
    assert not first.close(timeout_seconds=0.5)

    server = FactsServer()
    second = build_reporter(log, server, attempt=2, source="launch-0")
    second.resend()
    second.send(PhaseChanged(phase="loading"))
    assert second.close(timeout_seconds=20)
    assert steps(server.taken[1, "rank-0"]) == [7]
    assert len(server.taken[2, "launch-0"]) == 1
    assert FactLog(log).unacknowledged() == []


def test_a_source_that_starts_again_goes_on_counting(tmp_path: Path) -> None:
    log = tmp_path / "facts.jsonl"
    for step in (1, 2):
        reporter = build_reporter(log, None)
        reporter.send(Logged(step=step, metrics={}))
        assert reporter.close()
    assert [(fact.seq, step) for fact, step in zip(FactLog(log).unacknowledged(), (1, 2), strict=True)] == [
        (1, 1),
        (2, 2),
    ]


def test_a_line_torn_by_a_kill_loses_itself_alone(tmp_path: Path) -> None:
    log = FactLog(tmp_path / "facts.jsonl")
    log.append(build_fact(1))
    with log.path.open("ab") as file:
        file.write(FACT.dump_json(build_fact(2))[:40])
    assert log.last_seq(attempt=1, source="rank-0") == 1
    log.append(build_fact(2))
    assert log.unacknowledged() == [build_fact(1), build_fact(2)]


def test_acknowledgements_of_two_processes_do_not_undo_each_other(tmp_path: Path) -> None:
    logs = [FactLog(tmp_path / "facts.jsonl") for _ in range(2)]
    for seq in (1, 2, 3):
        logs[0].append(build_fact(seq))
        logs[0].append(build_fact(seq, source="launch-0"))
    logs[0].acknowledge([AcknowledgedSource(attempt=1, source="rank-0", seq=3)])
    logs[1].acknowledge([AcknowledgedSource(attempt=1, source="rank-0", seq=1)])
    logs[1].acknowledge([AcknowledgedSource(attempt=1, source="launch-0", seq=2)])
    assert logs[0].unacknowledged() == [build_fact(3, source="launch-0")]


def test_a_torn_acknowledgement_only_sends_again(tmp_path: Path) -> None:
    log = FactLog(tmp_path / "facts.jsonl")
    log.append(build_fact(1))
    (tmp_path / "facts.ack.json").write_text('{"acknowledged": [{"att')
    assert log.unacknowledged() == [build_fact(1)]


@pytest.mark.timeout(60)
def test_sending_never_waits_for_a_server_that_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = FactClient(f"http://127.0.0.1:{silent.getsockname()[1]}/facts", token_file=None, ca_file=None)
        reporter = Reporter(attempt=1, source="rank-0", log=FactLog(tmp_path / "facts.jsonl"), client=client)
        # One that waited would not be through within an hour.
        for step in range(1000):
            reporter.send(Logged(step=step, metrics={}))
            reporter.beat(step=step)
        assert not reporter.close(timeout_seconds=1)


def test_a_storage_that_cannot_be_written_keeps_no_fact_from_the_server(tmp_path: Path) -> None:
    server = FactsServer()
    reporter = build_reporter(tmp_path / "missing" / "facts.jsonl", server)
    reporter.send(Logged(step=3, metrics={}))
    assert reporter.close(timeout_seconds=20)
    assert steps(server.taken[1, "rank-0"]) == [3]


def test_posts_come_at_most_once_a_second(tmp_path: Path) -> None:
    server = FactsServer()
    reporter = build_reporter(tmp_path / "facts.jsonl", server)
    deadline = time.monotonic() + 2.5
    step = 0
    while time.monotonic() < deadline:
        reporter.send(Logged(step=step, metrics={}))
        step += 1
        server.wait_for(lambda _: False, seconds=0.05)
    assert 2 <= len(server.reports) <= 4
    reporter.close()


def test_a_beat_tells_phase_and_step_and_the_token_comes_from_its_file(tmp_path: Path) -> None:
    server = FactsServer()
    token = tmp_path / "token"
    token.write_text("secret\n")
    client = FactClient(server.url, token_file=token, ca_file=tmp_path / "no-ca")
    reporter = Reporter(attempt=4, source="rank-0", log=FactLog(tmp_path / "facts.jsonl"), client=client)
    reporter.beat(phase="training", step=12)
    reporter.send(PhaseChanged(phase="training", step=12))
    assert reporter.close(timeout_seconds=20)
    report = server.reports[-1]
    assert (report.attempt, report.source, report.phase, report.step) == (4, "rank-0", "training", 12)
    assert server.headers[-1]["Authorization"] == "Bearer secret"


def test_a_process_whose_steps_stand_still_sends_no_beat(tmp_path: Path) -> None:
    server = FactsServer()
    client = FactClient(server.url, token_file=None, ca_file=None)
    reporter = Reporter(attempt=1, source="rank-0", log=None, client=client, beat_seconds=0.2)
    reporter.beat(phase="loading")
    assert server.wait_for(lambda s: len(s.reports) >= 3)  # nothing ticks while a model is loaded
    reporter.beat(phase="training", step=1)
    assert server.wait_for(lambda s: any(report.step == 1 for report in s.reports))
    count = len(server.reports)
    assert not server.wait_for(lambda s: len(s.reports) > count + 1, seconds=3)
    reporter.beat(step=2)
    assert server.wait_for(lambda s: any(report.step == 2 for report in s.reports))
    reporter.close()


def test_a_reporter_of_another_runs_storage_writes_nothing_there(tmp_path: Path) -> None:
    server = FactsServer()
    environ = {"POSTTRAIN_STORAGE": str(tmp_path), "POSTTRAIN_FACTS_URL": server.url}
    reporter = open_reporter(CONFIG, environ=environ, source="launch-0", keep=False)
    reporter.send(Logged(step=1, metrics={}))
    assert reporter.close(timeout_seconds=20)
    assert list(tmp_path.iterdir()) == []
    assert steps(server.taken[1, "launch-0"]) == [1]


def test_a_run_that_is_applied_again_over_its_storage_numbers_its_facts_from_one(tmp_path: Path) -> None:
    server = FactsServer()
    environ = {"POSTTRAIN_STORAGE": str(tmp_path), "POSTTRAIN_FACTS_URL": server.url}
    for uid, sent in (("first", [1, 2]), ("second", [3])):
        run = CONFIG.run.model_copy(update={"uid": uid})
        reporter = open_reporter(CONFIG.model_copy(update={"run": run}), environ=environ, source="rank-0", node=1)
        for step in sent:
            reporter.send(logged(step))
        assert reporter.close(timeout_seconds=20)
        server.taken.clear()  # the second is another resource, whose status has acknowledged nothing

    kept = {path.name: FactLog(path).last_seq(attempt=1, source="rank-0") for path in tmp_path.glob("*.jsonl")}
    assert kept == {"facts-first-1.jsonl": 2, "facts-second-1.jsonl": 1}


def logged(step: int) -> Logged:
    return Logged(step=step, metrics={})


def with_facts(server: FactsServer) -> list[list[int]]:
    """Return the sequence numbers that came, report by report."""
    return [[fact.seq for fact in report.facts] for report in server.reports if report.facts]


def test_what_the_server_has_taken_is_not_sent_again_before_its_time(tmp_path: Path) -> None:
    server = FactsServer(hold_seconds=30)
    reporter = build_reporter(tmp_path / "facts.jsonl", server)
    reporter.send(logged(1))
    assert server.wait_for(lambda s: s.reports)
    reporter.send(logged(2))

    assert not server.wait_for(lambda s: len(s.reports) > 1, seconds=2.5)
    assert len(FactLog(tmp_path / "facts.jsonl").unacknowledged()) == 2
    reporter.close()


def test_what_the_server_has_taken_is_sent_again_when_it_asks_for_it(tmp_path: Path) -> None:
    server = FactsServer(hold_seconds=1.5)
    reporter = build_reporter(tmp_path / "facts.jsonl", server)
    reporter.send(logged(1))
    assert server.wait_for(lambda s: s.reports)
    reporter.send(logged(2))

    assert server.wait_for(lambda s: len(with_facts(s)) >= 2)
    assert with_facts(server)[:2] == [[1], [1, 2]]
    reporter.close()


def test_urgent_news_goes_at_once_with_all_that_waits(tmp_path: Path) -> None:
    server = FactsServer(hold_seconds=30)
    reporter = build_reporter(tmp_path / "facts.jsonl", server)
    reporter.send(logged(1))
    assert server.wait_for(lambda s: s.reports)
    reporter.send(logged(2))
    reporter.send(CheckpointSaved(step=2, uri="pvc://c/checkpoint-2", bytes=1, digest="d"))

    assert server.wait_for(lambda s: s.taken)
    assert with_facts(server) == [[1], [1, 2, 3]]
    assert FactLog(tmp_path / "facts.jsonl").last_seq(attempt=1, source="rank-0") == 3
    assert reporter.close(timeout_seconds=20)
    assert FactLog(tmp_path / "facts.jsonl").unacknowledged() == []


def test_a_process_that_ends_waits_for_what_the_server_has_taken(tmp_path: Path) -> None:
    server = FactsServer(hold_seconds=30)
    reporter = build_reporter(tmp_path / "facts.jsonl", server)
    reporter.send(logged(1))
    assert server.wait_for(lambda s: s.reports)

    assert reporter.close(timeout_seconds=20)
    assert [report.waiting for report in server.reports if report.facts] == [False, True]


def test_a_server_that_holds_even_what_is_waited_for_is_not_asked_without_a_pause(tmp_path: Path) -> None:
    class Holding(FactsServer):
        def _take(self, body: bytes, headers: dict[str, str]) -> bytes:
            super()._take(body, headers)
            return b'{"retry_after_seconds": 30}'

    server = Holding()
    reporter = build_reporter(tmp_path / "facts.jsonl", server)
    reporter.send(logged(1))

    assert not reporter.close(timeout_seconds=2.5)
    assert 1 <= len(with_facts(server)) <= 4


def test_more_than_a_report_holds_is_waited_for(tmp_path: Path) -> None:
    server = FactsServer(hold_seconds=30)
    for seq in range(1, 301):
        FactLog(tmp_path / "facts.jsonl").append(build_fact(seq))
    reporter = build_reporter(tmp_path / "facts.jsonl", server, attempt=2)
    reporter.resend()

    assert server.wait_for(lambda s: len(with_facts(s)) == 2)
    assert [(len(report.facts), report.waiting) for report in server.reports[:2]] == [(256, True), (44, False)]
    reporter.close()


def test_beats_go_on_while_facts_wait(tmp_path: Path) -> None:
    server = FactsServer(hold_seconds=30)
    client = FactClient(server.url, token_file=None, ca_file=None)
    reporter = Reporter(attempt=1, source="rank-0", log=None, client=client, beat_seconds=0.2)
    reporter.send(PhaseChanged(phase="loading"))
    assert server.wait_for(lambda s: len(s.reports) >= 3)
    assert with_facts(server) == [[1]]
    reporter.close()


def test_an_answer_of_a_newer_server_is_understood(tmp_path: Path) -> None:
    reply = FactsReply.model_validate_json('{"acknowledged": [], "something_new": 1}')

    assert reply == FactsReply()
