"""Prepare's Job: the checks and downloads before any GPU is held.

It owns how that Job is written and how its status is read; it must not decide what follows from its result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from posttrain.contract.result import ExitCode
from posttrain.plan import labels, names
from posttrain.plan.manifests import is_being_deleted, parse_time
from posttrain.plan.objects import build_metadata
from posttrain.plan.pod_inputs import PodInputs
from posttrain.plan.trainer_pod import PREPARE_CONTAINER, build_prepare_template
from posttrain.plan.types import Manifest, ObjectRef

API_VERSION = "batch/v1"
KIND = "Job"


@dataclass(frozen=True, kw_only=True)
class PrepareState:
    """What prepare's Job says of itself. Pending: it has not ended."""

    phase: Literal["Pending", "Complete", "Failed"]
    message: str
    ended: datetime | None
    being_deleted: bool


def prepare_ref(run: str) -> ObjectRef:
    """Return the reference to prepare's Job."""
    return ObjectRef(API_VERSION, KIND, names.prepare_name(run))


def build_prepare_job(inputs: PodInputs) -> Manifest:
    """Return prepare's Job: a wrong configuration fails it at once, a lost node costs no try."""
    name = inputs.run.metadata.name
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": build_metadata(
            inputs.run,
            name=names.prepare_name(name),
            labels=labels.attempt_labels(name, attempt=inputs.attempt),
        ),
        "spec": {
            "backoffLimit": inputs.settings.prepare_backoff_limit,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": PREPARE_CONTAINER,
                            "operator": "In",
                            "values": [int(ExitCode.INVALID)],
                        },
                    },
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": build_prepare_template(inputs),
        },
    }


def parse_prepare_state(job: Mapping[str, Any]) -> PrepareState:
    """Return what the Job's status says."""
    for condition in (job.get("status") or {}).get("conditions") or ():
        if condition.get("status") == "True" and condition.get("type") in ("Complete", "Failed"):
            return PrepareState(
                phase=condition["type"],
                message=condition.get("message") or "",
                ended=parse_time(condition.get("lastTransitionTime")),
                being_deleted=is_being_deleted(job),
            )
    return PrepareState(phase="Pending", message="", ended=None, being_deleted=is_being_deleted(job))
