"""What the checks of `spec.grpo.signal` found, and what the user chose for that case.

It owns the reading of these findings; it must not count steps, which the trainer does (the fact `SignalLost`), nor
decide what becomes of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic.alias_generators import to_camel

from posttrain.api.signal import SignalPolicy
from posttrain.api.training_run_status import NonFiniteReport
from posttrain.plan.attempts import NON_FINITE
from posttrain.plan.situation import Situation
from posttrain.plan.status import Says

_WORST_FIRST: tuple[SignalPolicy, ...] = ("Fail", "Suspend", "Warn")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Something that a check found."""

    reason: str
    message: str
    policy: SignalPolicy
    field: str
    """Where the policy stands."""


def find_losses(situation: Situation) -> tuple[Loss, ...]:
    """Return what the checks find now of the current attempt, first what has the worst consequences."""
    grpo, progress = situation.run.spec.grpo, situation.attempt_progress
    if progress is None:
        return ()
    found = {report.reason: report.message for report in progress.lost_signals or ()}
    checks = grpo.signal.checks if grpo is not None else {}
    losses = [
        Loss(
            reason=check.REASON,
            message=found[check.REASON],
            policy=check.policy,
            field=f"spec.grpo.signal.{to_camel(name)}.policy",
        )
        for name, check in checks.items()
        if check.REASON in found
    ]
    if progress.non_finite is not None and situation.run.spec.restarts.on_non_finite == "Warn":
        message = say_non_finite(progress.non_finite)
        losses.insert(0, Loss(reason=NON_FINITE, message=message, policy="Warn", field="spec.restarts.onNonFinite"))
    return tuple(sorted(losses, key=lambda loss: _WORST_FIRST.index(loss.policy)))


def say_non_finite(found: NonFiniteReport) -> str:
    """Return what was not finite, and when."""
    return f"{found.metric} was not finite at step {found.step}"


def find_loss(situation: Situation) -> Loss | None:
    """Return the finding that ends the attempt, or None where there is none, or a warning is all that was asked for."""
    return next((loss for loss in find_losses(situation) if loss.policy != "Warn"), None)


def explain_signal(situation: Situation) -> Says | None:
    """Return what `SignalHealthy` says of the current attempt, or None before it trains."""
    progress = situation.attempt_progress
    if progress is None or progress.attempt_start is None:
        return None
    losses = find_losses(situation)
    if not losses:
        return Says("True", "SignalHealthy")
    return Says("False", losses[0].reason, "; ".join(loss.message for loss in losses))
