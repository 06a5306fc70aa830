"""A run's status in words and numbers for people: one line, a table's row, a whole page of text.

It owns wording and units; it must not print, colour or read anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

from posttrain.api.conditions import FINISHED, SUCCEEDED, find_condition, is_true
from posttrain.api.training_run import TrainingRun
from posttrain.api.training_run_status import FailureStatus, TrainingRunStatus
from posttrain.local.curves import format_value

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_duration(seconds: float) -> str:
    """Return a duration with two units: 8 s, 2 min 05 s, 3 h 10 min, 2 d 4 h."""
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def format_bytes(count: float) -> str:
    """Return a size in binary units: 512 B, 1.3 GiB."""
    exponent = min(int(math.log(count, 1024)), len(_BINARY_UNITS) - 1) if count >= 1 else 0
    number = count / 1024**exponent
    return f"{number:.0f} {_BINARY_UNITS[exponent]}" if exponent == 0 else f"{number:.1f} {_BINARY_UNITS[exponent]}"


def format_decimal(text: str | None) -> str:
    """Return a reported decimal shortened to four significant digits; what is no number is left as it is."""
    if text is None:
        return ""
    try:
        value = float(text)
    except ValueError:
        return text
    return format_value(value)


def metric(status: TrainingRunStatus, *, name: str) -> str | None:
    """Return the latest reported value of a metric."""
    metrics = status.progress.metrics if status.progress else None
    return next((item.value for item in metrics or () if item.name == name), None)


def restart_count(status: TrainingRunStatus) -> int:
    """Return how often the gang was restarted, for whichever cause."""
    restarts = status.restarts
    return (restarts.infrastructure or 0) + (restarts.application or 0) if restarts else 0


def elapsed_seconds(status: TrainingRunStatus, *, now: datetime) -> float | None:
    """Return the seconds from the run's start to its end, or to now."""
    if status.start_time is None:
        return None
    return ((status.completion_time or now) - status.start_time).total_seconds()


def progress_text(status: TrainingRunStatus) -> str:
    """Return how far the run is: `step 120/400 (30%), 2 min 05 s left, loss 1.203`."""
    progress = status.progress
    if progress is None or progress.step is None:
        return ""
    text = f"step {progress.step}"
    if progress.max_steps:
        text += f"/{progress.max_steps}"
    if progress.percentage is not None:
        text += f" ({progress.percentage}%)"
    if progress.eta_seconds and status.completion_time is None:
        text += f", {format_duration(progress.eta_seconds)} left"
    for name in ("reward", "loss"):
        if value := metric(status, name=name):
            text += f", {name} {format_decimal(value)}"
    return text


def align(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


MODEL_WIDTH = 40
TABLE_HEADER = ("NAME", "MODEL", "STATE", "STEP", "METRIC", "ETA", "RESTARTS", "AGE")


def state_text(run: TrainingRun, *, executed: bool) -> str:
    """Return the stage, and that nobody is executing a run which has not ended."""
    stage = run.status.stage or "Pending"
    at_rest = stage == "Suspended" or is_true(run.status.conditions, FINISHED)
    return stage if executed or at_rest else f"{stage} (stopped)"


def table_row(run: TrainingRun, *, executed: bool, now: datetime) -> tuple[str, ...]:
    """Return the row of `posttrain status` under `TABLE_HEADER`; `executed`: a process is at work on it."""
    status, progress = run.status, run.status.progress
    step = "" if progress is None or progress.step is None else f"{progress.step}/{progress.max_steps or '?'}"
    eta = progress.eta_seconds if progress and executed else None
    created = run.metadata.creation_timestamp or status.start_time
    return (
        run.metadata.name,
        _shorten(run.spec.model.label),
        state_text(run, executed=executed),
        step,
        format_decimal(metric(status, name="reward") or metric(status, name="loss")),
        format_duration(eta) if eta else "",
        str(restart_count(status)),
        format_duration((now - created).total_seconds()) if created else "",
    )


def _shorten(source: str) -> str:
    return source if len(source) <= MODEL_WIDTH else "…" + source[1 - MODEL_WIDTH :]


def failure_lines(failure: FailureStatus) -> list[str]:
    """Return why something failed and what to do about it."""
    lines = [f"{failure.reason}: {failure.message}"]
    origin = [
        f"rank {failure.rank}" if failure.rank is not None else "",
        f"exit code {failure.exit_code}" if failure.exit_code is not None else "",
        failure.pod or "",
    ]
    if any(origin):
        lines.append("Where: " + ", ".join(part for part in origin if part))
    if failure.advice:
        lines.append(f"What to do: {failure.advice}")
    return lines


def detail_lines(run: TrainingRun, *, executed: bool, now: datetime, locate: Callable[[str], str] = str) -> list[str]:
    """Return the text of `posttrain status NAME`; `executed`: a process is at work on it.

    `locate` tells where on this machine a URI of the status is.
    """
    spec, status = run.spec, run.status
    gang = f"{spec.resources.world_size} {'rank' if spec.resources.world_size == 1 else 'ranks'}"
    rows = [
        ("Name", run.metadata.name),
        ("State", state_text(run, executed=executed)),
        ("Model", spec.model.label),
        ("Data", ", ".join(dataset.source for dataset in spec.datasets)),
        ("Gang", f"{gang}, {spec.parallelism.strategy}"),
        ("Attempt", str(status.attempt) if status.attempt else ""),
        ("Progress", progress_text(status)),
        ("Duration", _optional_duration(elapsed_seconds(status, now=now))),
        ("Restarts", _restarts_text(status)),
        ("Checkpoint", _checkpoint_text(status, locate=locate)),
        ("Trained model", locate(status.model.uri) if status.model and status.model.uri else ""),
        ("Summary", _summary_text(status)),
    ]
    lines = [f"{name + ':':<15}{value}" for name, value in rows if value]
    if status.failure is not None:
        title = "Failure" if status.stage == "Failed" else "Latest restart"
        lines += [
            "",
            f"{title}:",
            *(f"  {line}" for text in failure_lines(status.failure) for line in text.split("\n")),
        ]
    if status.conditions:
        lines += ["", "Conditions:"]
        lines += [f"  {c.type:<13} {c.status:<8} {c.reason:<20} {_first_line(c.message)}" for c in status.conditions]
    return [line.rstrip() for line in lines]


def _optional_duration(seconds: float | None) -> str:
    return "" if seconds is None else format_duration(seconds)


def _restarts_text(status: TrainingRunStatus) -> str:
    if status.restarts is None or not restart_count(status):
        return ""
    counters = status.restarts
    text = f"{counters.infrastructure or 0} by the infrastructure, {counters.application or 0} by the program"
    return f"{text}, {counters.steps_lost} steps trained again" if counters.steps_lost else text


def _checkpoint_text(status: TrainingRunStatus, *, locate: Callable[[str], str]) -> str:
    kept = status.checkpoints
    if kept is None or kept.latest_step is None:
        return ""
    return f"step {kept.latest_step}" + (f" in {locate(kept.latest_uri)}" if kept.latest_uri else "")


def _summary_text(status: TrainingRunStatus) -> str:
    condition = find_condition(status.conditions, SUCCEEDED)
    if condition is None or status.failure is not None:
        return ""
    return f"{condition.reason}: {condition.message}" if condition.message else condition.reason


def _first_line(text: str) -> str:
    first, _, rest = text.partition("\n")
    return f"{first} …" if rest else first
