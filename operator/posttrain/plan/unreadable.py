"""The status of a run whose stored spec today's schema does not accept, as after an upgrade of the CRD.

It owns what such a run is told; nothing else can be decided about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pydantic import ValidationError

from posttrain.api import conditions
from posttrain.api.conditions import find_condition, next_condition
from posttrain.api.reasons import REASONS
from posttrain.api.training_run_status import TrainingRunStatus
from posttrain.errors import Problem
from posttrain.plan.types import Manifest


def status_of_unreadable(manifest: Manifest, problems: Sequence[Problem], *, now: datetime) -> TrainingRunStatus:
    """Return the status that names every problem; what is known of the run already stays."""
    try:
        known = TrainingRunStatus.model_validate(manifest.get("status") or {})
    except ValidationError:
        known = TrainingRunStatus()
    generation = manifest["metadata"].get("generation")
    message = "\n".join(str(problem) for problem in problems)
    refused = {conditions.ACCEPTED, conditions.SUCCEEDED, conditions.READY}
    told = []
    for type_ in conditions.TRAINING_RUN_CONDITIONS:
        before = find_condition(known.conditions, type_)
        if type_ in refused:
            says = ("False", "InvalidSpec", message)
        elif type_ == conditions.STALLED:
            says = ("True", "InvalidSpec", REASONS["InvalidSpec"].message)
        elif before is not None:
            says = (before.status, before.reason, before.message)
        else:
            says = ("Unknown", "Pending", REASONS["Pending"].message)
        told.append(
            next_condition(
                before,
                type_=type_,
                status=says[0],  # type: ignore[arg-type]  # one of the three literals above
                reason=says[1],
                message=says[2],
                now=now,
                observed_generation=generation,
            )
        )
    return known.model_copy(
        update={
            "observed_generation": generation,
            "conditions": told,
            "stage": known.stage or "Pending",
        }
    )
