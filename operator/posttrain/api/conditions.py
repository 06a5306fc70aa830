"""Conditions: the part of a status that people and tools wait for.

It owns the shape of a condition and how a list of them changes; it must not decide when one holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from pydantic import Field

from posttrain.api.base import StatusModel, Time

ConditionStatus = Literal["True", "False", "Unknown"]

ACCEPTED = "Accepted"
PREPARED = "Prepared"
QUOTA_RESERVED = "QuotaReserved"
SERVER_READY = "ServerReady"
PODS_READY = "PodsReady"
SUCCEEDED = "Succeeded"
FINISHED = "Finished"
READY = "Ready"
STALLED = "Stalled"
SIGNAL_HEALTHY = "SignalHealthy"

TRAINING_RUN_CONDITIONS = (
    ACCEPTED,
    PREPARED,
    QUOTA_RESERVED,
    SERVER_READY,
    PODS_READY,
    SUCCEEDED,
    FINISHED,
    READY,
    STALLED,
)
"""Every condition of a TrainingRun, in the order in which they are shown; all are present from the first plan."""

WATCHED_CONDITIONS = (*TRAINING_RUN_CONDITIONS, SIGNAL_HEALTHY)
"""Those of a run that is told of what it learns from, and goes on."""

MESSAGE_MAX_LENGTH = 2048


class Condition(StatusModel):
    """One condition, as in Kubernetes' metav1.Condition."""

    type: str = Field(examples=["Succeeded"])
    """What it is about."""
    status: ConditionStatus = Field(examples=["False"])
    """Whether it holds."""
    reason: str = Field(examples=["InProgress"])
    """One of docs/reasons.md."""
    message: str = Field(default="", examples=["step 120 of 1250"])
    """What a person should know."""
    last_transition_time: Time = Field(examples=["2026-03-01T12:00:00Z"])
    """When status last changed."""
    observed_generation: int | None = Field(default=None, examples=[1])
    """Generation of the spec that it is about."""


def find_condition(conditions: Iterable[Condition] | None, type_: str) -> Condition | None:
    """Return the condition of that type, or None."""
    return next((c for c in conditions or () if c.type == type_), None)


def is_true(conditions: Iterable[Condition] | None, type_: str) -> bool:
    """Return whether the condition of that type is there and True."""
    condition = find_condition(conditions, type_)
    return condition is not None and condition.status == "True"


def next_condition(
    previous: Condition | None,
    *,
    type_: str,
    status: ConditionStatus,
    reason: str,
    message: str,
    now: datetime,
    observed_generation: int | None,
) -> Condition:
    """Return the condition as it should read now; its transition time moves only when the status does."""
    unchanged = previous is not None and previous.status == status
    return Condition(
        type=type_,
        status=status,
        reason=reason,
        message=message[:MESSAGE_MAX_LENGTH],
        last_transition_time=previous.last_transition_time if unchanged and previous else now,
        observed_generation=observed_generation,
    )
