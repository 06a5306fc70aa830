"""The status of a run whose stored spec today's schema does not accept, as after an upgrade of the CRD.

It owns what such a run is told; nothing else can be decided about it, and nothing is: an attempt that has ended is
judged when the spec can be read again, its job and pods being kept till then. A run that has ended stays as it ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from pydantic import ValidationError

from posttrain.api import conditions
from posttrain.api.conditions import find_condition, next_condition
from posttrain.api.reasons import REASONS
from posttrain.api.training_run_status import TrainingRunStatus
from posttrain.errors import Problem
from posttrain.plan.pytorchjob import job_ref, parse_job_state
from posttrain.plan.types import Manifest, ObjectRef


def status_of_unreadable(
    manifest: Manifest, problems: Sequence[Problem], *, objects: Mapping[ObjectRef, Manifest], now: datetime
) -> TrainingRunStatus | None:
    """Return the status that names every problem; what is known of the run already stays. None after its end.

    `objects` are the run's children.
    """
    if (manifest.get("status") or {}).get("completionTime") is not None:
        return None
    try:
        known = TrainingRunStatus.model_validate(manifest.get("status") or {})
    except ValidationError:
        known = TrainingRunStatus()
    generation = manifest["metadata"].get("generation")
    message = "\n".join(str(problem) for problem in problems)
    ended = _explain_end(manifest, known, objects)
    refused = {conditions.ACCEPTED, conditions.SUCCEEDED, conditions.READY}
    watched = find_condition(known.conditions, conditions.SIGNAL_HEALTHY) is not None
    told = []
    for type_ in conditions.WATCHED_CONDITIONS if watched else conditions.TRAINING_RUN_CONDITIONS:
        before = find_condition(known.conditions, type_)
        if type_ in refused:
            says = ("False", "InvalidSpec", message)
        elif type_ == conditions.STALLED:
            says = ("True", "InvalidSpec", REASONS["InvalidSpec"].message)
        elif type_ == conditions.PODS_READY and ended is not None:
            says = ("False", "InvalidSpec", ended)
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
            "stage": (known.stage if ended is None else None) or "Pending",
        }
    )


def _explain_end(manifest: Manifest, known: TrainingRunStatus, objects: Mapping[ObjectRef, Manifest]) -> str | None:
    """Return how the current attempt's gang has ended; None while its job has not, and before there is one."""
    job = objects.get(job_ref(manifest["metadata"]["name"], attempt=known.attempt or 0))
    if job is None and known.attempt_created_time is None:
        return None
    state = parse_job_state(job) if job is not None else None
    if state is None or (state.phase == "Pending" and state.being_deleted):
        end = "was deleted"
    elif state.phase == "Pending":
        return None
    else:
        end = f"has ended ({state.phase})"
    return f"attempt {known.attempt}: its PyTorchJob {end}, which is judged when the spec can be read again"
