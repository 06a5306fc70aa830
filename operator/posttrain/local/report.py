"""`report.html`: everything worth knowing about one run, on one page that needs nothing else.

It owns what stands in the report and in which order; it must not draw, nor decide anything about the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from posttrain import __version__
from posttrain.api.loader import dump_document
from posttrain.api.methods import table_of
from posttrain.api.training_run import TrainingRun
from posttrain.contract.facts import (
    CheckpointSaved,
    CheckpointSkipped,
    Fact,
    FirstError,
    NonFinite,
    PrepareResult,
    ResultFact,
    SignalLost,
    SignalRegained,
    Started,
)
from posttrain.local.completions import Newest
from posttrain.local.curves import (
    Line,
    Points,
    build_chart,
    curve_of,
    format_value,
    redone_steps,
    throughput_curve,
)
from posttrain.local.pages import write_page
from posttrain.local.records import Records, read_records
from posttrain.local.status_text import elapsed_seconds, format_bytes, format_duration, restart_count

REPORT_NAME = "report.html"

HELD_OUT = "eval_"
"""Prefix that transformers gives to the metrics of held-out data."""

_TITLES = {
    "reward": "Reward",
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "mean_token_accuracy": "Token accuracy",
    "entropy": "Entropy",
    "kl": "KL divergence from the reference model",
    "completions/mean_length": "Tokens of a completion",
    "completions/clipped_ratio": "Share of completions cut off",
    "frac_reward_zero_std": "Share of groups without a difference",
}
# Several metrics that are read together, as lines of one chart: its title by what the names begin and end with.
_TOGETHER = {
    ("rewards/", "/mean"): "Rewards",
    ("time/", ""): "Seconds of a step",
}
_COLOURS = 6
_NO_CURVES = {"epoch", "num_tokens", "num_input_tokens_seen", "total_flos"}
_NO_CURVE_PREFIXES = ("train_", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number at the head of the report."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Happening:
    """One line of the timeline."""

    time: datetime
    after: str
    text: str
    tone: str = ""
    """`good`, `bad` or empty."""


@dataclass(frozen=True, kw_only=True)
class Argument:
    """An argument of the trainer that is not TRL's default."""

    name: str
    value: str
    default: str
    origin: str


def write_report(run: TrainingRun, *, storage: Path, out: Path, completions: Newest | None = None) -> None:
    """Write the report of `run`, made from its status and from what lies in `storage`, to the file `out`."""
    records = read_records(storage)
    lines = metric_lines(records)
    redone = redone_steps(records.facts)
    first = "reward" if "reward" in lines else "loss"
    charts = [
        build_chart(
            lines[name],
            title=title_of(name),
            note=_NOTES.get(name, ""),
            redone=redone,
            from_zero=name in FROM_ZERO,
            width=1000 if name == first else 490,
            height=300 if name == first else 210,
        )
        for name in lines
    ]
    resource = run.to_data()
    resource.pop("status", None)
    write_page(
        out,
        template="report.html",
        run=run,
        version=__version__,
        figures=headline_figures(run, records=records),
        charts=[chart for chart in charts if chart is not None],
        numbers=_table_of_numbers(records, names=list(lines)),
        samples=records.samples,
        completions=completions,
        checkpoints=records.checkpoints,
        prepared=records.prepared,
        timeline=_timeline(records.facts),
        arguments=changed_arguments(run, effective=records.effective_args),
        provenance=provenance_rows(run),
        resource=dump_document(resource),
        notes=records.notes if completions is None or not completions.note else (*records.notes, completions.note),
    )


FROM_ZERO = {"grad_norm", "tokens_per_second", "steps_per_second"}
_NOTES = {
    "tokens_per_second": "between two logs, evaluation and saving included",
    "steps_per_second": "between two logs, evaluation and saving included",
}


def title_of(name: str) -> str:
    """Return a metric's name for people."""
    speeds = {"tokens_per_second": "Tokens per second", "steps_per_second": "Steps per second"}
    known = _TITLES | speeds | {title: title for title in _TOGETHER.values()}
    return known.get(name) or name.replace("_", " ").capitalize()


def metric_lines(records: Records) -> dict[str, list[Line]]:
    """Return the lines of each chart in the order of the page: what was trained on, and held-out data beside it."""
    logged = {name for numbers in records.history.values() for name in numbers}
    shown = {name.removeprefix(HELD_OUT) for name in logged if not name.startswith(_NO_CURVE_PREFIXES)} - _NO_CURVES
    lines: dict[str, list[Line]] = {}
    together: dict[str, list[Line]] = {}
    for (begin, end), title in _TOGETHER.items():
        members = sorted(name for name in shown if name.startswith(begin) and name.endswith(end))
        shown -= {name for name in shown if name.startswith(begin)}
        together[title] = [
            Line(
                name=name.removeprefix(begin).removesuffix(end),
                points=curve_of(records.history, name=name),
                colour=index % _COLOURS + 1,
            )
            for index, name in enumerate(members)
        ]
    for name in sorted(shown, key=lambda name: (list(_TITLES).index(name) if name in _TITLES else 99, name)):
        lines[name] = [
            Line(
                name="training",
                points=curve_of(records.history, name=name),
                colour=1,
                noisy=name != "learning_rate",
            ),
            Line(name="held out", points=curve_of(records.history, name=HELD_OUT + name), colour=2),
        ]
    lines |= together
    speed = throughput_curve(records.facts)
    name = "tokens_per_second" if speed else "steps_per_second"
    lines[name] = [Line(name="training", points=speed or throughput_curve(records.facts, name=""), colour=1)]
    return {name: found for name, found in lines.items() if any(line.points for line in found)}


def headline_figures(run: TrainingRun, *, records: Records) -> list[Figure]:
    """Return the numbers that say how the run went."""
    status = run.status
    figures = []
    for name, label in (
        ("reward", "Reward"),
        ("eval_reward", "Held-out reward"),
        ("loss", "Loss"),
        ("eval_loss", "Held-out loss"),
    ):
        points = curve_of(records.history, name=name)
        if points:
            note = f"from {format_value(points[0][1])} at step {points[0][0]}" if len(points) > 1 else ""
            figures.append(Figure(label=label, value=format_value(points[-1][1]), note=note))
    step = max(records.history, default=None) or (status.progress.step if status.progress else None)
    if step is not None:
        total = status.progress.max_steps if status.progress else None
        figures.append(Figure(label="Steps", value=f"{step:,}", note=f"of {total:,}" if total else ""))
    seconds = elapsed_seconds(status, now=records.facts[-1].time) if records.facts else None
    if seconds is not None:
        figures.append(Figure(label="Duration", value=format_duration(seconds)))
    figures += _throughput_figure(records)
    lost = status.restarts.steps_lost if status.restarts else None
    figures.append(
        Figure(
            label="Restarts",
            value=str(restart_count(status)),
            note=f"{lost} steps trained again" if lost else "",
        )
    )
    return figures


def _throughput_figure(records: Records) -> list[Figure]:
    speed = median_rate(throughput_curve(records.facts))
    if speed is not None:
        return [Figure(label="Tokens per second", value=format_value(speed), note="median between logs")]
    speed = median_rate(throughput_curve(records.facts, name=""))
    return (
        []
        if speed is None
        else [Figure(label="Steps per second", value=format_value(speed), note="median between logs")]
    )


def median_rate(points: Points) -> float | None:
    """Return the median of a rate's curve, which a pause for a checkpoint does not bend."""
    values = sorted(value for _, value in points)
    return values[len(values) // 2] if values else None


def changed_arguments(run: TrainingRun, *, effective: Mapping[str, object]) -> list[Argument]:
    """Return the arguments that the trainer had and that are not the defaults its class declares."""
    keys = table_of(run.spec.method).keys
    changed = []
    for name in sorted(effective):
        row = keys.get(name)
        given = name in run.spec.training.args
        if not given and (row is None or effective[name] == row.default):
            continue
        origin = "your args" if given else "posttrain" if row and row.owned else "derived"
        default = _compact(row.default) if row else ""
        changed.append(Argument(name=name, value=_compact(effective[name]), default=default, origin=origin))
    return sorted(
        changed, key=lambda argument: (("your args", "posttrain", "derived").index(argument.origin), argument.name)
    )


def _compact(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def provenance_rows(run: TrainingRun) -> list[tuple[str, str]]:
    """Return what exactly was run, as names and values."""
    provenance = run.status.provenance
    if provenance is None:
        return []
    rows = [
        ("Config hash", provenance.config_hash),
        ("Model commit", provenance.model_commit),
        *((f"Data commit, {name}", commit) for name, commit in (provenance.dataset_commits or {}).items()),
        ("Own code", provenance.code_hash),
        ("Seed", None if provenance.seed is None else str(provenance.seed)),
        *((f"Image, {name}", digest) for name, digest in (provenance.image_digests or {}).items()),
        *((f"Version, {name}", version) for name, version in sorted((provenance.versions or {}).items())),
    ]
    return [(name, value) for name, value in rows if value]


def _table_of_numbers(records: Records, *, names: list[str]) -> tuple[list[str], list[list[str]]]:
    """Return columns and at most some 200 rows: the numbers behind the curves, for those who cannot see them."""
    columns = [
        column
        for name in names
        for column in (name, HELD_OUT + name)
        if any(column in numbers for numbers in records.history.values())
    ]
    steps = [step for step, numbers in records.history.items() if any(column in numbers for column in columns)]
    stride = len(steps) // 200 + 1
    rows = [
        [str(step), *(format_value(numbers[c]) if c in numbers else "" for c in columns)]
        for step, numbers in ((step, records.history[step]) for step in steps[::stride])
    ]
    return ["step", *columns], rows


def _timeline(facts: tuple[Fact, ...]) -> list[Happening]:
    happenings = []
    for fact in facts:
        told = _tell(fact)
        if told is not None:
            text, tone = told
            after = format_duration((fact.time - facts[0].time).total_seconds())
            happenings.append(Happening(time=fact.time, after=f"+{after}", text=text, tone=tone))
    return happenings


def _tell(fact: Fact) -> tuple[str, str] | None:
    """Return what happened in a sentence and its tone, or None for what is no event."""
    match fact.body:
        case PrepareResult(problems=problems, warnings=warnings):
            if problems:
                return f"Checks found {_count(len(problems), 'problem')}", "bad"
            return "Checks passed" + (f" with {_count(len(warnings), 'warning')}" if warnings else ""), ""
        case Started(world_size=ranks, max_steps=steps, resumed_from_step=resumed):
            place = f"goes on from step {resumed}" if resumed else "begins"
            return f"Attempt {fact.attempt} {place}: {_count(ranks, 'rank')}, {_count(steps, 'step')}", ""
        case CheckpointSaved(step=step, bytes=size):
            return f"Checkpoint of step {step} complete, {format_bytes(size)}", ""
        case CheckpointSkipped(step=step, reason=reason):
            return f"Checkpoint of step {step} passed over: {reason}", "bad"
        case NonFinite(metric=metric, step=step):
            return f"{metric} is not finite at step {step}", "bad"
        case SignalLost(reason=reason, message=message):
            return f"{reason}: {message}", "bad"
        case SignalRegained(reason=reason, step=step):
            return f"{reason} is over at step {step}", ""
        case FirstError(rank=rank, reason=reason, message=message):
            where = "" if rank is None else f" on rank {rank}"
            return f"{reason}{where}: {message}", "bad"
        case ResultFact(result=result) if result.reason != "Prepared":
            who = f"Attempt {fact.attempt}" if fact.attempt else "Prepare"
            return f"{who} ended: {result.reason}", "good" if result.reason == "Completed" else ""
    return None


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
