"""PyTorchJob: everything that knows Kubeflow's training operator.

It owns how an attempt's gang is written as a PyTorchJob and how its status is read; it must not decide what follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from posttrain.plan import labels, names
from posttrain.plan.manifests import is_being_deleted, parse_time
from posttrain.plan.objects import build_metadata
from posttrain.plan.pod_inputs import PodInputs
from posttrain.plan.trainer_pod import build_trainer_template
from posttrain.plan.types import Manifest, ObjectRef

API_VERSION = "kubeflow.org/v1"
KIND = "PyTorchJob"

JobPhase = Literal["Pending", "Succeeded", "Failed"]


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What an attempt's job says of itself. Pending: it has not ended."""

    phase: JobPhase
    message: str
    created: datetime | None
    ended: datetime | None
    being_deleted: bool


def job_ref(run: str, *, attempt: int) -> ObjectRef:
    """Return the reference to an attempt's job."""
    return ObjectRef(API_VERSION, KIND, names.attempt_name(run, attempt=attempt))


def build_pytorchjob(inputs: PodInputs) -> Manifest:
    """Return the job of an attempt's gang.

    No backoff, deadline, suspension or TTL: they do not work as named, so they are posttrain's own. The Master's end
    is the job's whether the workers ended or not: `cleanPodPolicy: Running` takes their GPUs back.
    """
    name = inputs.run.metadata.name
    resources = inputs.run.spec.resources
    template = build_trainer_template(inputs)
    replica_specs: dict[str, Any] = {"Master": _replicas(1, template)}
    if resources.num_nodes > 1:
        replica_specs["Worker"] = _replicas(resources.num_nodes - 1, template)
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": build_metadata(
            inputs.run,
            name=names.attempt_name(name, attempt=inputs.attempt),
            labels=labels.attempt_labels(name, attempt=inputs.attempt),
        ),
        "spec": {
            "nprocPerNode": str(resources.ranks_per_node),
            "runPolicy": {"cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": replica_specs,
        },
    }


def _replicas(count: int, template: dict[str, Any]) -> dict[str, Any]:
    return {"replicas": count, "restartPolicy": "Never", "template": template}


def parse_job_state(job: Mapping[str, Any]) -> JobState:
    """Return what a job's status says.

    The type and status of each condition are read, never their order: on a resumed job `Suspended` stands last.
    """
    status = job.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition.get("status") == "True" and condition.get("type") in ("Succeeded", "Failed"):
            phase: JobPhase = condition["type"]
            message = condition.get("message") or ""
            ended = parse_time(status.get("completionTime")) or parse_time(condition.get("lastTransitionTime"))
            break
    else:
        phase, message, ended = "Pending", "", None
    return JobState(
        phase=phase,
        message=message,
        created=parse_time(job["metadata"].get("creationTimestamp")),
        ended=ended,
        being_deleted=is_being_deleted(job),
    )
