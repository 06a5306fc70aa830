"""What a person sees of a run, on a terminal and without one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from posttrain.api.training_run import TrainingRun
from posttrain.api.training_run_status import Metric, Progress, RestartsStatus, TrainingRunStatus
from posttrain.local.display import open_view
from posttrain.local.state import RunFolder
from posttrain.local.status_text import align, detail_lines, format_bytes, format_duration, table_row
from posttrain.plan.types import Event
from tests.support.recorded_run import START, build_recorded_run, write_recorded_storage


class _Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def _run_at(
    stage: str, *, step: int | None = None, attempt: int = 1, restarts: int = 0, **progress: Any
) -> TrainingRun:
    metrics = [Metric(name="loss", value="1.2345678"), Metric(name="learning_rate", value="0.00004")]
    told = Progress(
        step=step, max_steps=400, percentage=step // 4, eta_seconds=400 - step, metrics=metrics, **progress
    ) if step is not None else None  # fmt: skip
    status = TrainingRunStatus(
        stage=stage,  # type: ignore[arg-type]
        attempt=attempt,
        progress=told,
        restarts=RestartsStatus(infrastructure=restarts),
    )
    return build_recorded_run().model_copy(update={"status": status})


def _plain(act: Callable[[Any, _Clock], None]) -> list[str]:
    out, clock = io.StringIO(), _Clock()
    with open_view(plain=True, console=Console(file=out), clock=clock) as view:
        act(view, clock)
    return [line.strip() for line in out.getvalue().splitlines()]


def test_without_a_terminal_each_stage_and_event_is_a_line() -> None:
    def act(view: Any, clock: _Clock) -> None:
        view.stage("making the environment trainer-0123")
        clock.seconds = 61
        for _ in range(3):
            view.update(_run_at("Preparing"))
        view.event(Event(type="Normal", reason="Prepared", message="Checks passed."))
        clock.seconds = 75
        view.update(_run_at("Starting"))
        view.event(Event(type="Warning", reason="RankKilled", message="rank 1 was ended by SIGKILL"))
        view.update(_run_at("Restarting", attempt=2))
        view.message("Stopped. To resume: posttrain run x.yaml")

    assert _plain(act) == [
        "[         0 s] making the environment trainer-0123",
        "[  1 min 01 s] Prepare",
        "[  1 min 01 s] Prepared: Checks passed.",
        "[  1 min 15 s] Starting",
        "[  1 min 15 s] Warning: RankKilled: rank 1 was ended by SIGKILL",
        "[  1 min 15 s] Restarting (attempt 2)",
        "Stopped. To resume: posttrain run x.yaml",
    ]


def test_without_a_terminal_progress_comes_every_five_percent_or_ten_seconds() -> None:
    def act(view: Any, clock: _Clock) -> None:
        for step in range(0, 61):  # a step a second, 20 steps are 5 %
            clock.seconds = step
            view.update(_run_at("Training", step=step, restarts=1, phase="saving" if step == 60 else "training"))

    assert _plain(act) == [
        "[         0 s] Training",
        "[         0 s] step 0/400 (0%), 6 min 40 s left, loss 1.235, learning rate 4e-5, 1 restart",
        "[        10 s] step 10/400 (2%), 6 min 30 s left, loss 1.235, learning rate 4e-5, 1 restart",
        "[        20 s] step 20/400 (5%), 6 min 20 s left, loss 1.235, learning rate 4e-5, 1 restart",
        "[        30 s] step 30/400 (7%), 6 min 10 s left, loss 1.235, learning rate 4e-5, 1 restart",
        "[        40 s] step 40/400 (10%), 6 min 00 s left, loss 1.235, learning rate 4e-5, 1 restart",
        "[        50 s] step 50/400 (12%), 5 min 50 s left, loss 1.235, learning rate 4e-5, 1 restart",
        "[  1 min 00 s] step 60/400 (15%), 5 min 40 s left, loss 1.235, learning rate 4e-5, 1 restart, saving",
    ]


def test_a_run_that_stands_still_prints_nothing() -> None:
    def act(view: Any, clock: _Clock) -> None:
        for second in range(100):
            clock.seconds = second
            view.update(_run_at("Training", step=7))

    assert len(_plain(act)) == 2


def _folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "stratos-demo")
    write_recorded_storage(folder.storage)
    (folder.storage / "model").mkdir()
    folder.logs.mkdir()
    folder.log_file("stratos-demo-a2-master-0").write_text("".join(f"[rank 0] line {i}\n" for i in range(100)))
    return folder


def test_the_end_names_numbers_and_paths_and_writes_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = _folder(tmp_path)
    lines = _plain(lambda view, clock: view.finish(build_recorded_run(), folder))
    assert lines == [
        "",
        "stratos-demo succeeded after 51 min 12 s",
        "",
        "Warning            datasets[0]: 212 of 16710 rows are longer than max_length 4096 and are cut",
        "Loss               0.6012 (from 1.375 at step 5)",
        "Held-out loss      0.6354 (from 1.058 at step 50)",
        "Steps              400 (of 400)",
        "Tokens per second  10,856 (median between logs)",
        "Restarts           1 (35 steps trained again)",
        "",
        "Trained model      stratos-demo/storage/model",
        "Report             stratos-demo/report.html",
        "Storage            stratos-demo/storage",
        "Logs               stratos-demo/logs",
        "",
        "More: posttrain status stratos-demo, posttrain logs stratos-demo, posttrain compare stratos-demo OTHER-RUN",
    ]
    assert "<svg" in (folder.path / "report.html").read_text()


def test_a_number_that_is_zero_at_the_end_is_told_and_no_restart_is_not(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    history = [{"step": 1, "reward": -0.5, "loss": 0.25}, {"step": 2, "reward": 0.0, "loss": 0.0}]
    (folder.storage / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": history}))
    (folder.storage / "facts.jsonl").unlink()
    run = build_recorded_run()
    run = run.model_copy(update={"status": run.status.model_copy(update={"restarts": None})})

    lines = _plain(lambda view, clock: view.finish(run, folder))

    assert [line.split() for line in lines if line.startswith(("Reward", "Loss"))] == [
        ["Reward", "0", "(from", "-0.5", "at", "step", "1)"],
        ["Loss", "0", "(from", "0.25", "at", "step", "1)"],
    ]
    assert not any("Restarts" in line for line in lines)


FAILURE = {
    "reason": "NonFiniteLoss",
    "message": "loss is nan at step 120",
    "advice": "Lower the learning rate.",
    "pod": "stratos-demo-a2-master-0",
    "rank": 0,
    "exitCode": 1,
}


def test_a_failure_comes_with_its_cause_its_remedy_and_the_end_of_its_log(tmp_path: Path) -> None:
    run = build_recorded_run(stage="Failed", failure=FAILURE)
    lines = _plain(lambda view, clock: view.finish(run, _folder(tmp_path)))
    assert lines[1:5] == [
        "stratos-demo failed after 51 min 12 s",
        "NonFiniteLoss: loss is nan at step 120",
        "Where: rank 0, exit code 1, stratos-demo-a2-master-0",
        "What to do: Lower the learning rate.",
    ]
    end = lines.index("The end of that log:")
    assert lines[end + 1 : end + 13] == [f"[rank 0] line {i}" for i in range(88, 100)]


def test_on_a_terminal_the_bar_shows_where_the_run_is_and_what_is_over_stays(tmp_path: Path) -> None:
    out, clock = io.StringIO(), _Clock()
    console = Console(file=out, force_terminal=True, color_system=None, width=110)
    with open_view(plain=False, console=console, clock=clock) as view:
        view.stage("making the environment trainer-0123")
        clock.seconds = 90
        view.update(_run_at("Preparing"))
        clock.seconds = 102
        view.update(_run_at("Training", step=120, restarts=1, phase="evaluating"))
        console.print("-" * 30)  # the live part is drawn below every print
        view.finish(build_recorded_run(), _folder(tmp_path))
    shown = out.getvalue()
    for text in (
        "stratos-demo  Qwen/Qwen2.5-1.5B-Instruct · 2 ranks · ZeRO3",
        "✓ Environment 1 min 30 s",
        "✓ Prepare     12 s",
        "120/400  30%  4 min 40 s left",
        "loss 1.235 · learning rate 4e-5 · 1 restart · evaluating",
        "✓ stratos-demo succeeded after 51 min 12 s",
    ):
        assert text in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is shown again"


def test_the_terminal_is_given_back_when_the_run_breaks_off() -> None:
    out = io.StringIO()
    with (
        pytest.raises(KeyboardInterrupt),
        open_view(plain=False, console=Console(file=out, force_terminal=True)) as view,
    ):
        view.update(_run_at("Training", step=120))
        raise KeyboardInterrupt
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


def test_a_run_that_nobody_executes_is_shown_as_stopped() -> None:
    run = _run_at("Training", step=120)
    assert table_row(run, executed=False, now=START)[2:6] == ("Training (stopped)", "120/400", "1.235", "")
    assert table_row(run, executed=True, now=START)[2:6] == ("Training", "120/400", "1.235", "4 min 40 s")


def test_the_details_of_a_run_name_what_it_came_to() -> None:
    assert detail_lines(build_recorded_run(), executed=True, now=START) == [
        "Name:          stratos-demo",
        "State:         Succeeded",
        "Model:         Qwen/Qwen2.5-1.5B-Instruct",
        "Data:          HuggingFaceH4/Bespoke-Stratos-17k",
        "Gang:          2 ranks, ZeRO3",
        "Attempt:       2",
        "Progress:      step 400/400 (100%), loss 0.61",
        "Duration:      51 min 12 s",
        "Restarts:      1 by the infrastructure, 0 by the program, 35 steps trained again",
        "Checkpoint:    step 400 in pvc://stratos-demo/stratos-demo/checkpoint-400",
        "Trained model: pvc://stratos-demo/stratos-demo/model",
        "",
        "Latest restart:",
        "  RankKilled: rank 1 was ended by SIGKILL at step 235",
        "  Where: rank 1, exit code 138",
        "  What to do: Usually the node's or the administrator's doing.",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (11_400, "3 h 10 min"), (187_200, "2 d 4 h"), (-3, "0 s")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (9_263_000_000, "8.6 GiB"), (2e15, "1819.0 TiB")],
)
def test_sizes_are_in_binary_units(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert align([("NAME", "STEP"), ("a-long-name", "1")]) == ["NAME         STEP", "a-long-name  1"]
