"""How a local run ended, for the person who waited for it: numbers, paths, what went wrong, what to do next.

It owns what the summary says; it must not colour or print it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from posttrain.api.conditions import SIGNAL_HEALTHY, SUCCEEDED, find_condition
from posttrain.api.training_run import TrainingRun
from posttrain.contract.checkpoints import MODEL_FOLDER
from posttrain.local.records import Records, read_records
from posttrain.local.report import REPORT_NAME, headline_figures
from posttrain.local.state import RunFolder
from posttrain.local.status_text import failure_lines, format_duration

LAST_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is said at the end; rows are names and values."""

    stage: str
    title: str
    failure: tuple[str, ...] = ()
    numbers: tuple[tuple[str, str], ...] = ()
    paths: tuple[tuple[str, str], ...] = ()
    last_lines: tuple[str, ...] = ()
    """The end of the log of what failed."""
    further: tuple[str, ...] = ()

    def plain_lines(self) -> Iterator[str]:
        """Yield the summary's lines without any colour."""
        yield self.title
        yield from (f"  {line}" for line in self.failure)
        for rows in (self.numbers, self.paths):
            yield from ("", *(f"  {name:<19}{value}" for name, value in rows)) if rows else ()
        if self.last_lines:
            yield from ("", "  The end of that log:", *(f"    {line}" for line in self.last_lines))
        yield from ("", *(f"  {line}" for line in self.further))


def summarize(run: TrainingRun, *, folder: RunFolder) -> Summary:
    """Return what is to be said of a run that is over, made from its status and from what lies in its folder."""
    status, name = run.status, run.metadata.name
    records = read_records(folder.storage)
    failure = status.failure if status.stage == "Failed" else None
    log = folder.log_file(failure.pod) if failure is not None and failure.pod else None
    paths = {
        "Trained model": folder.storage / MODEL_FOLDER if status.model is not None else None,
        "Report": folder.path / REPORT_NAME,
        "Storage": folder.storage,
        "Log" if log else "Logs": log or folder.logs,
    }
    return Summary(
        stage=status.stage or "Pending",
        title=f"{name} {_outcome(run)}",
        failure=tuple(line for text in failure_lines(failure) for line in text.splitlines()) if failure else (),
        numbers=(*_warnings(run, records=records), *_numbers(run, records=records)),
        paths=tuple((label, shown(path)) for label, path in paths.items() if path is not None and path.exists()),
        last_lines=tuple(read_last_lines(log)) if log is not None and log.exists() else (),
        further=(f"More: posttrain status {name}, posttrain logs {name}, posttrain compare {name} OTHER-RUN",),
    )


def _outcome(run: TrainingRun) -> str:
    status = run.status
    condition = find_condition(status.conditions, SUCCEEDED)
    if condition is not None and condition.reason == "DryRun":
        return "passed its checks; spec.prepare.dryRun ends it there"
    word = {"Succeeded": "succeeded", "Failed": "failed", "Suspended": "is suspended"}.get(status.stage or "")
    if word is None or status.start_time is None or status.completion_time is None:
        return word or "has not ended"
    return f"{word} after {format_duration((status.completion_time - status.start_time).total_seconds())}"


def _numbers(run: TrainingRun, *, records: Records) -> list[tuple[str, str]]:
    estimates = (records.prepared.estimates if records.prepared else {}) if not records.history else {}
    figures = headline_figures(run, records=records)
    return [
        *estimates.items(),
        *(
            (figure.label, f"{figure.value} ({figure.note})" if figure.note else figure.value)
            for figure in figures
            if figure.label != "Duration" and (figure.label, figure.value) != ("Restarts", "0")
        ),
    ]


def _warnings(run: TrainingRun, *, records: Records) -> list[tuple[str, str]]:
    warnings = list(records.prepared.warnings) if records.prepared else []
    signal = find_condition(run.status.conditions, SIGNAL_HEALTHY)
    if signal is not None and signal.status == "False" and run.status.failure is None:
        warnings.append(f"{signal.reason}: {signal.message}")
    return [("Warning", warning) for warning in warnings]


def read_last_lines(log: Path) -> list[str]:
    """Return the end of a log."""
    with log.open(errors="replace") as lines:
        return [line.rstrip() for line in deque(lines, maxlen=LAST_LINES)]


def shown(path: Path) -> str:
    """Return a path as it can be typed from here."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)
