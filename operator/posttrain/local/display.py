"""What a person sees while a run goes on: a live display on a terminal, plain lines elsewhere, a summary at the end.

It owns how progress is shown; it must not read status from anywhere but the run it is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from posttrain.api.training_run import TrainingRun
from posttrain.api.training_run_status import TrainingRunStatus
from posttrain.local.completions import newest_completions
from posttrain.local.environments import cache_root
from posttrain.local.report import REPORT_NAME, write_report
from posttrain.local.state import RunFolder
from posttrain.local.status_text import (
    format_decimal,
    format_duration,
    metric,
    progress_text,
    restart_count,
)
from posttrain.local.summary import Summary, summarize
from posttrain.local.view import View
from posttrain.plan.types import Event

Clock = Callable[[], float]
"""Seconds from any fixed moment."""

STAGE_NAMES = {"Preparing": "Prepare"}
"""Stages that are called otherwise here than in the status."""

PLAIN_SECONDS = 10.0
PLAIN_PERCENT = 5
"""Without a terminal a line of progress comes after so many seconds, or so much of the run, whichever is first."""

_BEFORE = "Environment"
"""What is done before there is a run to show."""

_MARKS = {"Succeeded": ("✓", "green"), "Failed": ("✗", "red")}


@contextmanager
def open_view(*, plain: bool, console: Console | None = None, clock: Clock = time.monotonic) -> Iterator[View]:
    """Give the view that suits where the output goes; what it changed on the terminal is undone in any case."""
    console = console or Console(highlight=False)
    if plain or not console.is_terminal:
        yield PlainView(console, clock=clock)
        return
    view = TerminalView(console, clock=clock)
    with view.live:
        yield view


def stage_name(status: TrainingRunStatus) -> str:
    """Return the stage as it is shown."""
    stage = status.stage or "Pending"
    return STAGE_NAMES.get(stage, stage)


def _conclude(run: TrainingRun, *, folder: RunFolder) -> Summary:
    newest = newest_completions(run, folder=folder, cache=cache_root())
    write_report(run, storage=folder.storage, out=folder.path / REPORT_NAME, completions=newest)
    return summarize(run, folder=folder)


class PlainView:
    """Lines that make sense in a log file: one for each change of stage and event, now and then one of progress."""

    def __init__(self, console: Console, *, clock: Clock) -> None:
        self._console = console
        self._clock = clock
        self._start = clock()
        self._stage = ""
        self._shown_at = self._start
        self._shown_percentage = -PLAIN_PERCENT
        self._shown_step: tuple[int | None, int | None] = (None, None)

    def stage(self, text: str) -> None:
        """Print it."""
        self._line(text)

    def message(self, text: str) -> None:
        """Print it as it is."""
        self._print(text)

    def update(self, run: TrainingRun) -> None:
        """Print what is worth a line."""
        status, progress = run.status, run.status.progress
        name = stage_name(status)
        if name != self._stage:
            self._stage = name
            again = (status.attempt or 0) > 1 and name not in _MARKS
            self._line(f"{name} (attempt {status.attempt})" if again else name)
        step = (status.attempt, progress.step if progress else None)
        if progress is None or step[1] is None or step == self._shown_step or name != "Training":
            return
        percentage = progress.percentage or 0
        late = self._clock() - self._shown_at >= PLAIN_SECONDS
        if late or abs(percentage - self._shown_percentage) >= PLAIN_PERCENT:
            self._shown_at, self._shown_percentage, self._shown_step = self._clock(), percentage, step
            self._line(_with_details(progress_text(status), status))

    def event(self, event: Event) -> None:
        """Print it."""
        self._line(_event_text(event))

    def finish(self, run: TrainingRun, folder: RunFolder) -> None:
        """Write the report and print the summary."""
        self._print("")
        for line in _conclude(run, folder=folder).plain_lines():
            self._print(line)

    def _line(self, text: str) -> None:
        self._print(f"[{format_duration(self._clock() - self._start):>12}] {text}")

    def _print(self, text: str) -> None:
        # Not the console's own print: it breaks lines at 80 columns where there is no terminal.
        self._console.file.write(text + "\n")
        self._console.file.flush()


def _event_text(event: Event) -> str:
    kind = "" if event.type == "Normal" else f"{event.type}: "
    return f"{kind}{event.reason}: {event.message}" if event.message else f"{kind}{event.reason}"


def _details(status: TrainingRunStatus) -> list[str]:
    """Return what stands beside step, percentage and loss."""
    progress, count = status.progress, restart_count(status)
    rate = metric(status, name="learning_rate")
    phase = progress.phase if progress else None
    return [
        *([f"learning rate {format_decimal(rate)}"] if rate else []),
        *([f"{count} restart" if count == 1 else f"{count} restarts"] if count else []),
        *([phase] if phase and phase != "training" else []),
    ]


def _with_details(text: str, status: TrainingRunStatus) -> str:
    return ", ".join([text, *_details(status)])


class TerminalView:
    """A live display: what is over stands above as lines, what goes on is drawn anew several times a second."""

    def __init__(self, console: Console, *, clock: Clock) -> None:
        self._console = console
        self._clock = clock
        self._doing = ""
        self._run: TrainingRun | None = None
        self._stage = ""
        self._stage_start = clock()
        self._spinner = Spinner("dots", style="cyan")
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=8, transient=True)

    def stage(self, text: str) -> None:
        """Show it beside the spinner."""
        self._stage, self._doing = _BEFORE, text

    def message(self, text: str) -> None:
        """Print it above what is live."""
        self._console.print(text, markup=False, soft_wrap=True)

    def update(self, run: TrainingRun) -> None:
        """Take over the run's state, and close the stage that is over."""
        name = stage_name(run.status)
        if name != self._stage:
            if self._run is None:
                self._console.print(_headline(run))
            if self._stage not in {"", "Pending"}:
                self._close_stage(failed=name in {"Failed", "Restarting"})
            self._stage, self._stage_start = name, self._clock()
        self._run = run

    def event(self, event: Event) -> None:
        """Print it above what is live."""
        style = "dim" if event.type == "Normal" else "yellow"
        self._console.print(Text(f"  {_event_text(event)}", style=style), soft_wrap=True)

    def finish(self, run: TrainingRun, folder: RunFolder) -> None:
        """Write the report and replace the live part by the summary."""
        self.live.stop()
        self._console.print(render_summary(_conclude(run, folder=folder)))

    def _close_stage(self, *, failed: bool) -> None:
        mark, style = ("✗", "red") if failed else ("✓", "green")
        took = format_duration(self._clock() - self._stage_start)
        self._console.print(Text.assemble((f"{mark} ", style), f"{self._stage:<12}", (took, "dim")))

    def _render(self) -> RenderableType:
        if self._run is None:
            self._spinner.update(text=Text(self._doing))
            return self._spinner if self._doing else Text("")
        status = self._run.status
        if self._stage in _MARKS:
            return Text("")
        elapsed = format_duration(self._clock() - self._stage_start)
        if self._stage != "Training" or status.progress is None or not status.progress.max_steps:
            phase = status.progress.phase if status.progress and status.progress.phase else ""
            self._spinner.update(text=Text.assemble(f"{self._stage:<12}", (f"{elapsed}  {phase}", "dim")))
            return self._spinner
        return _render_training(status, elapsed=elapsed)


def _headline(run: TrainingRun) -> Text:
    spec = run.spec
    gang = f"{spec.resources.world_size} rank" + ("s" if spec.resources.world_size > 1 else "")
    adapter = f" · {spec.peft.method}" if spec.peft else ""
    return Text.assemble(
        (run.metadata.name, "bold"),
        (f"  {spec.model.label}{adapter} · {gang} · {spec.parallelism.strategy}", "dim"),
    )


def _render_training(status: TrainingRunStatus, *, elapsed: str) -> RenderableType:
    progress = status.progress
    assert progress is not None
    step, total = progress.step or 0, progress.max_steps or 1
    bar = Table.grid(padding=(0, 2), expand=False)
    left = f"{format_duration(progress.eta_seconds)} left" if progress.eta_seconds else ""
    bar.add_row(
        Text("Training", style="bold"),
        ProgressBar(total=total, completed=step, width=36, complete_style="cyan", finished_style="green"),
        Text(f"{step}/{total}"),
        Text(f"{progress.percentage if progress.percentage is not None else 100 * step // total}%"),
        Text(left or elapsed, style="dim"),
    )
    reward = metric(status, name="reward")
    loss = metric(status, name="loss")
    held_out = metric(status, name="eval_loss")
    numbers = [
        *([f"reward {format_decimal(reward)}"] if reward else []),
        *([f"loss {format_decimal(loss)}"] if loss else []),
        *([f"held-out loss {format_decimal(held_out)}"] if held_out else []),
        *_details(status),
    ]
    return Padding(Group(bar, Padding(Text(" · ".join(numbers)), (0, 0, 0, 10))), (0, 0, 0, 2))


def render_summary(summary: Summary) -> RenderableType:
    """Return the summary for a terminal."""
    mark, style = _MARKS.get(summary.stage, ("●", "yellow"))
    parts: list[RenderableType] = [Text.assemble("\n", (f"{mark} ", style), (summary.title, "bold"))]
    if summary.failure:
        parts.append(Padding(Text("\n".join(summary.failure)), (0, 0, 0, 2)))
    for rows in (summary.numbers, summary.paths):
        if rows:
            table = Table.grid(padding=(0, 3))
            for name, value in rows:
                table.add_row(Text(name, style="dim"), Text(value, overflow="fold"))
            parts.append(Padding(table, (1, 0, 0, 2)))
    if summary.last_lines:
        parts.append(Padding(Text("The end of that log:"), (1, 0, 0, 2)))
        parts.append(Padding(Text("\n".join(summary.last_lines), style="dim"), (0, 0, 0, 4)))
    if summary.further:
        parts.append(Padding(Text("\n".join(summary.further), style="dim"), (1, 0, 1, 2)))
    return Group(*parts)
