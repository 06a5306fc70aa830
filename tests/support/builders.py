"""Resources, children and reports for tests, each with the few fields that a test is about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from posttrain.api.training_run import TrainingRun
from posttrain.api.training_run_status import TrainingRunStatus
from posttrain.contract.facts import Fact, FactBody, FactsReport
from posttrain.contract.result import Result, to_termination_message
from posttrain.plan import labels, names
from posttrain.plan.types import Manifest

T0 = datetime(2026, 3, 1, 9, 0, tzinfo=UTC)
"""When the runs of tests are made."""

UID = "6f1c3f6e-0000-4000-8000-000000000001"


def at(seconds: float) -> datetime:
    """Return the time so many seconds after T0."""
    return T0 + timedelta(seconds=seconds)


def rfc3339(time: datetime) -> str:
    """Return a time as Kubernetes writes it."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


GRPO: dict[str, Any] = {"rewards": [{"name": "accuracy"}], "args": {"max_steps": 20}}
"""The field of a spec that asks for reinforcement learning; in its place `sft` is None."""


def build_spec(**changes: Any) -> dict[str, Any]:
    """Return a valid spec as JSON data: two small claims' worth of CPU training; `changes` replace whole fields.

    A field of which the change is None is left out.
    """
    spec: dict[str, Any] = {
        "model": {"source": "pvc://inputs/model"},
        "datasets": [{"source": "pvc://inputs/train.jsonl"}],
        "sft": {"args": {"max_steps": 20}},
        "resources": {"gpusPerNode": 0, "cpu": "2", "memory": "4Gi"},
        "checkpoints": {"storage": {"size": "10Gi"}, "everySteps": 5},
    }
    return {key: value for key, value in {**spec, **changes}.items() if value is not None}


def build_run(
    *, name: str = "demo", status: TrainingRunStatus | None = None, generation: int = 1, **changes: Any
) -> TrainingRun:
    """Return a run; `changes` replace fields of its spec."""
    data = {
        "apiVersion": "posttrain.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": name, "namespace": "team", "uid": UID, "generation": generation},
        "spec": build_spec(**changes),
    }
    run = TrainingRun.model_validate_json(json.dumps(data))
    return run.model_copy(update={"status": status}) if status is not None else run


def build_other_run(name: str, *, stage: str, reason: str = "InProgress", **spec: Any) -> Manifest:
    """Return another run of the namespace as it is stored; Succeeded and Failed are ends."""
    ended, succeeded = stage in ("Succeeded", "Failed"), "True" if stage == "Succeeded" else "False"
    condition = {"type": "Succeeded", "status": succeeded, "reason": reason, "message": f"it is {stage}"}
    status: dict[str, Any] = {"stage": stage, "conditions": [{**condition, "lastTransitionTime": rfc3339(T0)}]}
    if ended:
        status["completionTime"] = rfc3339(T0)
    if stage == "Succeeded":
        status["model"] = {"uri": f"pvc://{name}/{name}/model"}
    return {
        "apiVersion": "posttrain.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": name, "namespace": "team"},
        "spec": build_spec(**spec),
        "status": status,
    }


def build_observed_job(
    run: str, *, attempt: int, created: datetime = T0, status: Mapping[str, Any] | None = None
) -> Manifest:
    """Return an attempt's PyTorchJob as it is observed."""
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": names.attempt_name(run, attempt=attempt), "creationTimestamp": rfc3339(created)},
        "status": dict(status or {}),
    }


def ended_status(type_: str, *, at_time: datetime, message: str = "") -> dict[str, Any]:
    """Return the status of a job that ended: `Succeeded`, `Failed`, or a batch Job's `Complete`."""
    condition = {"type": type_, "status": "True", "message": message, "lastTransitionTime": rfc3339(at_time)}
    return {"conditions": [condition], "completionTime": rfc3339(at_time)}


def build_pod(
    run: str,
    *,
    attempt: int = 1,
    node: int = 0,
    phase: str = "Running",
    node_name: str | None = "node-0",
    uid: str = "",
    started: datetime | None = None,
) -> Manifest:
    """Return a pod of an attempt's gang; attempt 0 is prepare's."""
    role = labels.ROLE_TRAINER if attempt else labels.ROLE_PREPARE
    name = names.pod_name(run, attempt=attempt, node=node) if attempt else f"{names.prepare_name(run)}-x7k2p"
    pod: Manifest = {
        "metadata": {
            "name": name,
            "uid": uid or f"uid-{name}",
            "labels": labels.pod_labels(run, attempt=attempt, role=role),
            "creationTimestamp": rfc3339(started or T0),
        },
        "spec": {"nodeName": node_name} if node_name else {},
        "status": {"phase": phase, "startTime": rfc3339(started or T0)},
    }
    return pod


def end_pod(
    pod: Manifest,
    *,
    exit_code: int,
    finished: datetime,
    result: Result | None = None,
    terminated_reason: str | None = None,
) -> Manifest:
    """Return the pod after its container ended."""
    container = "prepare" if pod["metadata"]["labels"][labels.ROLE] == labels.ROLE_PREPARE else "pytorch"
    terminated: dict[str, Any] = {
        "exitCode": exit_code,
        "reason": terminated_reason or ("Completed" if exit_code == 0 else "Error"),
        "finishedAt": rfc3339(finished),
    }
    if result is not None:
        terminated["message"] = to_termination_message(result)
    status = {
        **pod["status"],
        "phase": "Succeeded" if exit_code == 0 else "Failed",
        "containerStatuses": [{"name": container, "state": {"terminated": terminated}}],
    }
    return {**pod, "status": status}


def build_fact(body: FactBody, *, seq: int, attempt: int = 1, source: str = "rank-0", time: datetime = T0) -> Fact:
    """Return one fact."""
    return Fact(attempt=attempt, source=source, seq=seq, time=time, body=body)


def build_report(
    *bodies: FactBody, attempt: int = 1, source: str = "rank-0", first_seq: int = 1, **beat: Any
) -> FactsReport:
    """Return a report with facts numbered from `first_seq`; `beat` gives phase and step."""
    facts = tuple(build_fact(body, seq=first_seq + i, attempt=attempt, source=source) for i, body in enumerate(bodies))
    return FactsReport(attempt=attempt, source=source, facts=facts, **beat)
