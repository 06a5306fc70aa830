"""`next_progress`: how one report changes what is known of a run's progress.

It owns the arithmetic of `status.progress`; it must not turn anything into a condition, nor read a clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from posttrain.api.reasons import CONSEQUENCES
from posttrain.api.training_run_status import (
    Acknowledged,
    FirstErrorReport,
    HistoryPoint,
    LatestCheckpoint,
    Metric,
    NonFiniteReport,
    PrepareReport,
    Progress,
    ResultReport,
    SignalReport,
    SkippedCheckpoint,
)
from posttrain.contract.facts import (
    NAME_MAX_LENGTH,
    VALUE_MAX_LENGTH,
    AcknowledgedSource,
    CheckpointSaved,
    CheckpointSkipped,
    Fact,
    FactsReply,
    FactsReport,
    FirstError,
    Logged,
    NonFinite,
    PhaseChanged,
    PrepareResult,
    ResultFact,
    SignalLost,
    SignalRegained,
    Started,
    is_urgent,
)
from posttrain.contract.progress import KubeflowReport
from posttrain.contract.result import Result

HISTORY_MAX_POINTS = 32
METRICS_KEPT = 20
_LOOKED_FOR = frozenset({"loss", "reward", "learning_rate", "grad_norm", "eval_loss", "eval_reward"})
_SKIPPED_KEPT = 5
_ACKNOWLEDGED_KEPT = 32
_TEXT_MAX_LENGTH = 512
_REMARK_MAX_LENGTH = 200
_PROBLEMS_MAX_LENGTH = 2048
_WARNINGS_MAX_LENGTH = 1024
_NUMBER_MAX_LENGTH = 24
"""Of a float's shortest exact form."""

_LAUNCH_PREFIX = "launch-"

_OF_ONE_ATTEMPT: dict[str, Any] = {
    "step": None,
    "percentage": None,
    "eta_seconds": None,
    "epoch": None,
    "metrics": None,
    "phase": None,
    "attempt_start": None,
    "attempt_start_step": None,
    "rate_start_step": None,
    "last_beat_time": None,
    "non_finite": None,
    "lost_signals": None,
    "first_error": None,
    "result": None,
}
"""What begins anew with each attempt."""


def next_progress(current: Progress | None, report: FactsReport | KubeflowReport, *, received_at: datetime) -> Progress:
    """Return the progress after a report.

    `report.attempt` is what the server authenticated. Times are the server's: workloads' clocks differ. A report of an
    ended attempt moves no step, but its facts count. Of every (attempt, source) the facts are taken in the order of
    `seq`, each once; what follows a gap waits until the gap is sent.
    """
    progress = _take(current, report, received_at=received_at)
    return _with(progress, eta=_duration_text(progress.eta_seconds), metric=_metric_text(progress.metrics))


def _take(current: Progress | None, report: FactsReport | KubeflowReport, *, received_at: datetime) -> Progress:
    progress = current or Progress()
    if progress.attempt is None or report.attempt > progress.attempt:
        progress = _begin_attempt(progress, attempt=report.attempt)
    of_current = report.attempt == progress.attempt
    if of_current:
        progress = _with(progress, last_beat_time=received_at)
    if isinstance(report, KubeflowReport):
        return _take_kubeflow(progress, report, received_at=received_at) if of_current else progress
    for fact in report.facts:
        if fact.attempt <= report.attempt and fact.seq == _acknowledged(progress, fact.attempt, fact.source) + 1:
            progress = _take_fact(progress, fact, received_at=received_at)
            progress = _acknowledge(progress, fact)
    return _take_beat(progress, report, received_at=received_at) if of_current else progress


def facts_reply(progress: Progress, report: FactsReport) -> FactsReply:
    """Return the answer to a report that `next_progress` has taken: how far each of its sources is acknowledged."""
    sources = sorted({(fact.attempt, fact.source) for fact in report.facts})
    return FactsReply(
        acknowledged=tuple(
            AcknowledgedSource(attempt=attempt, source=source, seq=_acknowledged(progress, attempt, source))
            for attempt, source in sources
        )
    )


def must_show_at_once(known: Progress | None, report: FactsReport | KubeflowReport) -> bool:
    """Return whether status must have a report at once; `known` is the progress that status has.

    At once goes what a condition depends on or a person waits for: a new attempt, its first and its last step, urgent
    facts, and facts whose sender waits.
    """
    if known is None or known.attempt is None or report.attempt > known.attempt:
        return True
    reached = report.step or 0
    if isinstance(report, FactsReport):
        new = [fact for fact in report.facts if fact.seq > _acknowledged(known, fact.attempt, fact.source)]
        if any(is_urgent(fact.body) or report.waiting for fact in new):
            return True
        logged = (fact.body.step for fact in new if isinstance(fact.body, Logged) and fact.attempt == known.attempt)
        reached = max(reached, *logged, 0)
    if report.attempt < known.attempt:
        return False
    step, start = known.step or 0, known.attempt_start_step or 0
    last = known.max_steps
    return step <= start < reached or (last is not None and step < last <= reached)


def _with(progress: Progress, **changes: Any) -> Progress:
    return progress.model_copy(update=changes)


def _begin_attempt(progress: Progress, *, attempt: int) -> Progress:
    changes: dict[str, Any] = {**_OF_ONE_ATTEMPT, "attempt": attempt}
    # An attempt that never reached a step lost nothing: the one before it is still the one to compare with.
    if progress.attempt is not None and progress.step is not None:
        changes |= {"previous_attempt": progress.attempt, "previous_step": progress.step}
    return _with(progress, **changes)


# --- Steps, percentage, time -----------------------------------------------------------------------------------------


def _take_kubeflow(progress: Progress, report: KubeflowReport, *, received_at: datetime) -> Progress:
    if progress.step is not None and report.step < progress.step:
        return progress
    progress = _with(
        progress,
        max_steps=report.max_steps or progress.max_steps,
        epoch=report.epoch or progress.epoch,
        metrics=_merge_metrics(progress.metrics, report.metrics),
    )
    return _at_step(progress, report.step, received_at=received_at)


def _take_beat(progress: Progress, report: FactsReport, *, received_at: datetime) -> Progress:
    # Once the ranks report, launch's own view of the phase is the coarser one.
    if report.phase and not (report.source.startswith(_LAUNCH_PREFIX) and progress.attempt_start):
        progress = _with(progress, phase=report.phase)
    return progress if report.step is None else _at_step(progress, report.step, received_at=received_at)


def _at_step(progress: Progress, step: int, *, received_at: datetime) -> Progress:
    """Return the progress at `step`, or where it was if that is further."""
    reached = max(step, progress.step or 0)
    percentage = min(100 * reached // progress.max_steps, 100) if progress.max_steps else None
    return _with(
        progress,
        step=reached,
        percentage=percentage,
        eta_seconds=_eta_seconds(progress, step=reached, now=received_at),
        last_updated_time=received_at,
    )


def _eta_seconds(progress: Progress, *, step: int, now: datetime) -> int | None:
    """Return the time that is left at this attempt's own pace: the steps since it began, in the time since then."""
    if progress.max_steps is None or progress.attempt_start is None or progress.rate_start_step is None:
        return None
    done = step - progress.rate_start_step
    elapsed = (now - progress.attempt_start).total_seconds()
    if step >= progress.max_steps:
        return 0
    if done <= 0 or elapsed <= 0:
        return None
    return round(elapsed / done * (progress.max_steps - step))


def _duration_text(seconds: int | None) -> str | None:
    """Return a duration with two units at most, as kubectl writes an age: 45s, 3m20s, 2h5m, 4d3h."""
    if seconds is None:
        return None
    for unit, smaller, size, inner in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if seconds >= size:
            rest = seconds % size // inner
            return f"{seconds // size}{unit}" + (f"{rest}{smaller}" if rest else "")
    return f"{seconds}s"


def _metric_text(metrics: list[Metric] | None) -> str | None:
    values = {metric.name: metric.value for metric in metrics or ()}
    value = values.get("reward", values.get("loss"))
    try:
        return f"{float(value):.4g}" if value is not None else None
    except ValueError:
        return value


# --- Facts -----------------------------------------------------------------------------------------------------------


def _take_fact(progress: Progress, fact: Fact, *, received_at: datetime) -> Progress:
    of_current = fact.attempt == progress.attempt
    match fact.body:
        case Started() as started:
            return _take_started(progress, started, received_at=received_at) if of_current else progress
        case PhaseChanged(phase=phase):
            return _with(progress, phase=phase) if of_current else progress
        case Logged() as logged:
            return _take_logged(progress, logged, of_current=of_current, received_at=received_at)
        case CheckpointSaved() as saved:
            return _take_saved(progress, saved, attempt=fact.attempt)
        case CheckpointSkipped() as skipped:
            return _take_skipped(progress, skipped, attempt=fact.attempt)
        case NonFinite(metric=metric, step=step):
            if not of_current or (progress.non_finite and progress.non_finite.step <= step):
                return progress
            return _with(progress, non_finite=NonFiniteReport(metric=metric[:NAME_MAX_LENGTH], step=step))
        case SignalLost() as lost:
            report = SignalReport(reason=lost.reason, message=lost.message[:_REMARK_MAX_LENGTH], step=lost.step)
            return _with_signal(progress, lost.reason, report) if of_current else progress
        case SignalRegained(reason=reason):
            return _with_signal(progress, reason, None) if of_current else progress
        case FirstError() as error:
            return _take_error(progress, error) if of_current else progress
        case PrepareResult() as result:
            return _with(
                progress,
                prepare=PrepareReport(
                    problems=_shorten_all(result.problems, limit=_PROBLEMS_MAX_LENGTH) or None,
                    warnings=_shorten_all(result.warnings, limit=_WARNINGS_MAX_LENGTH) or None,
                    commits=_shorten_values(result.commits) or None,
                    estimates=_shorten_values(result.estimates) or None,
                ),
            )
        case ResultFact() as ended:
            return _take_result(progress, ended, attempt=fact.attempt, received_at=received_at)


def _take_started(progress: Progress, started: Started, *, received_at: datetime) -> Progress:
    resumed = started.resumed_from_step
    # If this fact comes late, steps were done before the server's clock began: they count for no pace.
    rate_start = max(resumed, progress.step or 0)
    lost = max((progress.previous_step or 0) - resumed, 0) if progress.previous_step is not None else 0
    progress = _with(
        progress,
        max_steps=started.max_steps,
        world_size=started.world_size,
        versions=_shorten_values(started.versions) or progress.versions,
        attempt_start=received_at,
        attempt_start_step=resumed,
        rate_start_step=rate_start,
        steps_lost=(progress.steps_lost or 0) + lost,
        history=[point for point in progress.history or () if point.step <= resumed] or None,
    )
    return _at_step(progress, resumed, received_at=received_at)


def _take_logged(progress: Progress, logged: Logged, *, of_current: bool, received_at: datetime) -> Progress:
    values = {name: value for name, value in logged.metrics.items() if _fits(name, value)}
    # What an ended attempt did beyond the point that this one resumed from was done again.
    dropped = not of_current and progress.attempt_start_step is not None and logged.step > progress.attempt_start_step
    newest = max((point.step for point in progress.history or ()), default=0)
    if not dropped:
        numbers = {name: value for name, value in values.items() if len(value) <= _NUMBER_MAX_LENGTH}
        point = HistoryPoint(
            step=logged.step,
            loss=numbers.get("loss"),
            reward=numbers.get("reward"),
            learning_rate=numbers.get("learning_rate"),
        )
        progress = _with(progress, history=_add_point(progress.history or [], point) or None)
    if not of_current or logged.step < newest:
        return progress
    progress = _with(
        progress,
        metrics=_merge_metrics(progress.metrics, {k: v for k, v in values.items() if k != "epoch"}),
        epoch=values.get("epoch", progress.epoch),
    )
    return _at_step(progress, logged.step, received_at=received_at)


def _take_saved(progress: Progress, saved: CheckpointSaved, *, attempt: int) -> Progress:
    progress = _with(progress, checkpoints_saved=(progress.checkpoints_saved or 0) + 1)
    known = progress.checkpoint
    if known and (known.attempt or 0, known.step) > (attempt, saved.step):
        return progress
    return _with(
        progress,
        checkpoint=LatestCheckpoint(
            step=saved.step, uri=saved.uri, bytes=saved.bytes, digest=saved.digest, attempt=attempt
        ),
    )


def _take_skipped(progress: Progress, skipped: CheckpointSkipped, *, attempt: int) -> Progress:
    entry = SkippedCheckpoint(step=skipped.step, reason=skipped.reason[:_REMARK_MAX_LENGTH], attempt=attempt)
    known = progress.checkpoint
    corrupt = known is not None and known.step == skipped.step and (known.attempt or 0) < attempt
    return _with(
        progress,
        skipped_checkpoints=[*(progress.skipped_checkpoints or ()), entry][-_SKIPPED_KEPT:],
        checkpoint=None if corrupt else known,
    )


def _with_signal(progress: Progress, reason: str, report: SignalReport | None) -> Progress:
    """Return the progress with what one check of the signal finds now."""
    others = [known for known in progress.lost_signals or () if known.reason != reason]
    return _with(progress, lost_signals=[*others, *([report] if report else [])] or None)


def _take_error(progress: Progress, error: FirstError) -> Progress:
    known = progress.first_error
    if known and (known.reason in CONSEQUENCES, known.time) <= (error.reason in CONSEQUENCES, error.time):
        return progress
    return _with(
        progress,
        first_error=FirstErrorReport(
            rank=error.rank, time=error.time, reason=error.reason, message=error.message[:_TEXT_MAX_LENGTH]
        ),
    )


def _take_result(progress: Progress, ended: ResultFact, *, attempt: int, received_at: datetime) -> Progress:
    progress = _take_last_step(progress, ended.last_step, attempt=attempt, received_at=received_at)
    known, result = progress.result, ended.result
    if attempt != progress.attempt or (known and not _gives_way(known, to=result)):
        return progress
    return _with(
        progress,
        result=ResultReport(
            reason=result.reason,
            message=result.message[:_TEXT_MAX_LENGTH],
            advice=result.advice[:_TEXT_MAX_LENGTH] or None,
            metrics=_shorten_values(result.metrics) or None,
            artifacts=_shorten_values(result.artifacts) or None,
        ),
    )


def _gives_way(known: ResultReport, *, to: Result) -> bool:
    """Return whether another result says more: what this one followed from, or what was made, which one node knows."""
    return known.reason in CONSEQUENCES or (known.reason == to.reason and not known.artifacts and bool(to.artifacts))


def _take_last_step(progress: Progress, last_step: int | None, *, attempt: int, received_at: datetime) -> Progress:
    """Take the last step of an attempt: of this one, or of the one before, whose last word may come late."""
    if last_step is None:
        return progress
    if attempt == progress.attempt:
        return _at_step(progress, last_step, received_at=received_at)
    if attempt != progress.previous_attempt or last_step <= (progress.previous_step or 0):
        return progress
    more = 0
    if progress.attempt_start_step is not None:
        more = max(last_step - max(progress.previous_step or 0, progress.attempt_start_step), 0)
    return _with(progress, previous_step=last_step, steps_lost=(progress.steps_lost or 0) + more)


# --- Acknowledgement -------------------------------------------------------------------------------------------------


def _acknowledged(progress: Progress, attempt: int, source: str) -> int:
    entries = progress.acknowledged or ()
    return next((entry.seq for entry in entries if (entry.attempt, entry.source) == (attempt, source)), 0)


def _acknowledge(progress: Progress, fact: Fact) -> Progress:
    others = [e for e in progress.acknowledged or () if (e.attempt, e.source) != (fact.attempt, fact.source)]
    entries = [*others, Acknowledged(attempt=fact.attempt, source=fact.source, seq=fact.seq)]
    # The status is bounded. What launch tells may be taken twice without harm, what rank 0 tells may not: it counts.
    entries.sort(key=lambda e: (not e.source.startswith(_LAUNCH_PREFIX), e.attempt, e.source))
    kept = entries[-_ACKNOWLEDGED_KEPT:]
    return _with(progress, acknowledged=sorted(kept, key=lambda e: (e.attempt, e.source)))


# --- Bounded values --------------------------------------------------------------------------------------------------


def _add_point(history: list[HistoryPoint], point: HistoryPoint) -> list[HistoryPoint]:
    """Return the history with the point, thinned to its limit so that the points stay evenly spread over the steps."""
    if point.loss is None and point.reward is None and point.learning_rate is None:
        return history
    points = sorted([*(p for p in history if p.step != point.step), point], key=lambda p: p.step)
    while len(points) > HISTORY_MAX_POINTS:
        gaps = [points[i + 1].step - points[i - 1].step for i in range(1, len(points) - 1)]
        del points[1 + gaps.index(min(gaps))]
    return points


def _merge_metrics(known: list[Metric] | None, values: dict[str, str]) -> list[Metric] | None:
    merged = {metric.name: metric.value for metric in known or ()}
    # The newest come last, so that the oldest names are those that a full list drops; but never what people look for.
    for name, value in values.items():
        merged.pop(name, None)
        merged[name] = value
    kept = sorted(merged.items(), key=lambda metric: metric[0] in _LOOKED_FOR)[-METRICS_KEPT:]
    return sorted((Metric(name=name, value=value) for name, value in kept), key=lambda m: m.name) or None


def _fits(name: str, value: str) -> bool:
    return len(name) <= NAME_MAX_LENGTH and len(value) <= VALUE_MAX_LENGTH


def _shorten_all(texts: Iterable[str], *, limit: int) -> list[str]:
    """Return the texts, each cut to its own limit, as many of them as fit into the status."""
    kept: list[str] = []
    for text in texts:
        kept.append(text[:_TEXT_MAX_LENGTH])
        if sum(len(t) for t in kept) > limit:
            return kept[:-1]
    return kept


def _shorten_values(values: dict[str, str]) -> dict[str, str]:
    kept = {name[:NAME_MAX_LENGTH]: value[:512] for name, value in values.items()}
    return dict(list(kept.items())[:METRICS_KEPT])
