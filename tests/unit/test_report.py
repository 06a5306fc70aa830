"""What report.html says, and the geometry of its curves."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest

from posttrain.contract.facts import Fact, Logged, Started
from posttrain.local.completions import Newest, group_completions
from posttrain.local.curves import (
    Line,
    Redone,
    build_chart,
    curve_of,
    format_ticks,
    format_value,
    merge_history,
    nice_ticks,
    redone_steps,
    smoothed,
    thin,
    throughput_curve,
)
from posttrain.local.records import read_records
from posttrain.local.report import changed_arguments, write_report
from tests.support.recorded_run import build_recorded_run, write_recorded_storage


class _Page(HTMLParser):
    """Gathers what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.json: list[dict[str, object]] = []
        self.words: list[str] = []
        self.marked: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in {"meta", "link", "br", "line", "rect", "path"}:
            self._open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag, attrs = self._open[-1] if self._open else ("", {})
        if tag == "script" and attrs.get("type") == "application/json":
            self.json.append(json.loads(data))
        elif tag not in {"script", "style"}:
            self.words.append(data)
        if tag == "mark":
            self.marked.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def _report(tmp_path: Path, **run: object) -> tuple[str, _Page]:
    write_recorded_storage(tmp_path / "storage")
    write_report(build_recorded_run(**run), storage=tmp_path / "storage", out=tmp_path / "report.html")  # type: ignore[arg-type]
    html = (tmp_path / "report.html").read_text()
    return html, _Page(html)


def test_the_report_holds_every_point_that_was_logged(tmp_path: Path) -> None:
    _, page = _report(tmp_path)
    history = json.loads((tmp_path / "storage" / "trainer_state.json").read_text())["log_history"]
    loss_chart = page.json[0]
    assert loss_chart["lines"] == [
        ["training", [[entry["step"], entry["loss"]] for entry in history if "loss" in entry]],
        ["held out", [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry]],
    ]


def test_the_report_draws_a_curve_for_each_metric(tmp_path: Path) -> None:
    _, page = _report(tmp_path)
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == [
        "Loss by step",
        "Learning rate by step",
        "Gradient norm by step",
        "Token accuracy by step",
        "Tokens per second by step",
    ]
    paths = [value for tag, name, value in page.attributes if (tag, name) == ("path", "d")]
    assert len(paths) == 7
    assert all(re.fullmatch(r"M[\d.]+ [\d.]+(L[\d.]+ [\d.]+)+", path) for path in paths)


def test_the_report_asks_the_network_for_nothing(tmp_path: Path) -> None:
    html, page = _report(tmp_path)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"(pvc|file)://", "", html))
    loading = {"src", "href", "srcset", "action", "data", "poster"}
    assert [(t, n, v) for t, n, v in page.attributes if n in loading] == [("link", "href", "data:,")]


def test_the_report_marks_the_tokens_that_are_trained_on(tmp_path: Path) -> None:
    _, page = _report(tmp_path)
    assert page.marked == [
        "marked",
        "The sum of the first n odd numbers is n².\nFor n = 12 that is 12² = 144.\n\nThe answer is 144.<|im_end|>",
        "No: 7 * 13 = 91, so they are equal.<|im_end|>",
    ]


def test_the_report_tells_what_happened_and_what_was_run(tmp_path: Path) -> None:
    _, page = _report(tmp_path)
    for said in (
        "stratos-demo Succeeded",
        "35 steps trained again",
        "Attempt 1 begins: 2 ranks, 400 steps",
        "RankKilled on rank 1: rank 1 was ended by SIGKILL at step 235",
        "Attempt 2 goes on from step 200",
        "Checkpoint of step 400 complete, 8.6 GiB",
        "212 of 16710 rows are longer",
        "989aa7980e4cf806f80c7fef2b1adb7bc71aa306",
        "learning_rate 4e-05 2e-05 your args",
        "logging_nan_inf_filter false true posttrain",
    ):
        assert said in page.text


def test_the_report_of_a_failed_run_opens_with_the_cause_and_the_way_out(tmp_path: Path) -> None:
    failure = {
        "reason": "NonFiniteLoss",
        "message": "loss is nan at step 120 <b>",
        "rank": 0,
        "exitCode": 1,
        "advice": "Lower the learning rate.",
    }
    html, page = _report(tmp_path, stage="Failed", failure=failure)
    assert "NonFiniteLoss loss is nan at step 120 <b> Lower the learning rate. rank 0 · exit code 1" in page.text
    assert html.index("NonFiniteLoss") < html.index('class="figures"')
    assert "<b>" not in html


def test_the_report_shows_the_newest_completions_with_what_they_scored_as_text(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2 + 2 = <b>?", "completion": "<script>5</script>", "advantage": -0.5, "reward/accuracy": 0.0},
        {"prompt": "2 + 2 = <b>?", "completion": "4", "advantage": 0.5, "reward/accuracy": 1.0},
        {"prompt": "x" * 300, "completion": "y", "advantage": 0.0, "reward/accuracy": None},
    ]
    newest = Newest(step=40, groups=tuple(group_completions(rows)))
    write_report(build_recorded_run(), storage=tmp_path, out=tmp_path / "report.html", completions=newest)

    html = (tmp_path / "report.html").read_text()
    page = _Page(html)
    assert "What the model answered at step 40 The best of each group first." in page.text
    assert "2 + 2 = <b>? accuracy 1; advantage +0.5 4 accuracy 0; advantage -0.5 <script>5</script>" in page.text
    assert f"{'x' * 158} … {'x' * 300} accuracy none; advantage +0 y" in page.text
    assert "<script>5" not in html


def test_completions_that_cannot_be_read_are_a_note_in_the_report(tmp_path: Path) -> None:
    newest = Newest(step=40, note="step-000040.parquet cannot be read")
    write_report(build_recorded_run(), storage=tmp_path, out=tmp_path / "report.html", completions=newest)

    page = _Page((tmp_path / "report.html").read_text())
    assert "step-000040.parquet cannot be read" in page.text
    assert "What the model answered" not in page.text


def test_a_run_that_logged_nothing_still_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_report(build_recorded_run(), storage=tmp_path / "empty", out=tmp_path / "report.html")
    assert "Nothing was logged" in (tmp_path / "report.html").read_text()


def test_a_torn_line_and_a_torn_file_are_passed_over_and_named(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    write_recorded_storage(storage)
    whole = len(read_records(storage).facts)
    with (storage / "facts.jsonl").open("a") as file:
        file.write('{"attempt": 2, "source": "ra')
    (storage / "samples.json").write_text("[{")
    records = read_records(storage)
    assert (len(records.facts), records.samples) == (whole, ())
    assert [note.split(" ")[0] for note in records.notes] == [f"facts.jsonl:{whole + 1}", "samples.json"]


def test_the_newest_complete_checkpoint_stands_in_for_a_run_that_has_not_ended(tmp_path: Path) -> None:
    for step, complete in ((9, True), (10, True), (11, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": step / 10}]}))
        if complete:
            (folder / ".posttrain-complete.json").write_text("{}")
    assert read_records(tmp_path).history == {10: {"loss": 1.0}}


def test_arguments_are_listed_where_given_or_other_than_the_default() -> None:
    run = build_recorded_run()
    effective = {"learning_rate": 4e-5, "weight_decay": 0.0, "packing": True, "bf16": True, "save_strategy": "no"}
    listed = [(a.name, a.value, a.default, a.origin) for a in changed_arguments(run, effective=effective)]
    assert listed == [
        ("learning_rate", "4e-05", "2e-05", "your args"),
        ("packing", "true", "false", "your args"),
        ("save_strategy", "no", "steps", "posttrain"),
        ("bf16", "true", "null", "derived"),
    ]


def _logged(step: int, seconds: float, *, attempt: int = 1, **metrics: str) -> Fact:
    time = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    return Fact(attempt=attempt, source="rank-0", seq=step + 1, time=time, body=Logged(step=step, metrics=metrics))


def _started(attempt: int, resumed: int, seconds: float) -> Fact:
    time = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    body = Started(world_size=1, max_steps=100, resumed_from_step=resumed)
    return Fact(attempt=attempt, source="rank-0", seq=1, time=time, body=body)


def test_facts_go_on_where_the_log_history_ends_and_later_attempts_win() -> None:
    facts = [_logged(10, 0, loss="2.5"), _logged(20, 1, loss="9"), _logged(20, 5, attempt=2, loss="1.5")]
    history = merge_history([{"step": 10, "loss": 2.0, "epoch": 0.1}], facts=facts)
    assert history == {10: {"loss": 2.0, "epoch": 0.1}, 20: {"loss": 1.5}}


def test_a_loss_that_is_not_finite_leaves_a_gap_in_the_curve() -> None:
    history = merge_history([{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1.0}])
    assert curve_of(history, name="loss") == ((1, 2.0), (3, 1.0))


def test_throughput_is_counted_within_an_attempt_only() -> None:
    facts = [
        _started(1, 0, 0),
        _logged(10, 10, num_tokens="1000"),
        _logged(20, 20, num_tokens="3000"),
        _started(2, 10, 500),
        _logged(20, 510, attempt=2, num_tokens="3000"),
        _logged(30, 514, attempt=2, num_tokens="5000"),
    ]
    assert throughput_curve(facts) == ((20, 200.0), (30, 500.0))


def test_steps_that_are_trained_again_are_those_past_the_checkpoint() -> None:
    facts = [_started(1, 0, 0), _logged(35, 9), _started(2, 30, 20), _logged(50, 30, attempt=2), _started(3, 50, 40)]
    assert redone_steps(facts) == (
        Redone(start=30, end=35, label="attempt 2"),
        Redone(start=50, end=50, label="attempt 3"),
    )


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.57, 1.41, ["0.4", "0.6", "0.8", "1.0", "1.2", "1.4", "1.6"]),
        (0.0, 4e-5, ["0", "1e-5", "2e-5", "3e-5", "4e-5"]),
        (0.0, 1e-4, ["0", "2e-5", "4e-5", "6e-5", "8e-5", "1e-4"]),
        (9_800, 10_950, ["9.75k", "10.00k", "10.25k", "10.50k", "10.75k", "11.00k"]),
        (0, 2_600_000, ["0", "1M", "2M", "3M"]),
        (3, 3, ["2.6", "2.8", "3.0", "3.2", "3.4"]),
        (-3, 2, ["-3", "-2", "-1", "0", "1", "2"]),
    ],
)
def test_ticks_are_round_numbers_that_enclose_the_values(low: float, high: float, labels: list[str]) -> None:
    ticks = nice_ticks(low, high, count=5)
    assert ticks[0] <= low and high <= ticks[-1]
    assert format_ticks(ticks) == labels


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.61237, "0.6124"), (4e-5, "4e-5"), (12345.6, "12,346"), (0, "0"), (1e7, "1e7"), (math.nan, "nan"), (-2.0, "-2")],
)
def test_values_are_written_with_four_digits(value: float, text: str) -> None:
    assert format_value(value) == text


def test_a_long_line_is_thinned_without_losing_its_spike() -> None:
    points = tuple((step, 100.0 if step == 7777 else math.sin(step)) for step in range(20_000))
    thinned = thin(points, limit=600)
    assert len(thinned) <= 600
    assert (7777, 100.0) in thinned
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])


def test_smoothing_keeps_a_straight_line_straight() -> None:
    values = [3.0 * step for step in range(500)]
    assert [value for _, value in smoothed(tuple(enumerate(values)))] == pytest.approx(values)


def test_a_line_of_one_point_is_drawn() -> None:
    chart = build_chart([Line(name="training", points=((5, 1.0),))], title="Loss")
    assert chart is not None
    assert [dot[2] for dot in chart.lines[0].dots] == ["step 5: 1"]


def test_no_points_make_no_chart() -> None:
    assert build_chart([Line(name="training", points=())], title="Loss") is None
