"""What the job controllers of a cluster do, for as much as a plan uses: PyTorchJob v1 and Job.

It owns which pods a job has and what its status says of them; it must not start or end anything. Behaviour is that of
training-operator v1.9 (pkg/controller.v1/pytorch) and of the Job controller of Kubernetes 1.31 and later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from posttrain.local.pods import build_pod, format_time, is_being_deleted, is_finished
from posttrain.plan.types import Manifest

_BACKOFF_BASE = timedelta(seconds=10)
_BACKOFF_LIMIT = timedelta(minutes=6)


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the nodes of a gang meet."""

    address: str
    port: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What follows for an object from its pods."""

    status: dict[str, Any]
    create: tuple[Manifest, ...] = ()
    delete: tuple[str, ...] = ()
    """Names of pods."""
    retry_at: datetime | None = None
    """When a pod is to be created that is not due yet."""


# --- PyTorchJob ------------------------------------------------------------------------------------------------------


def reconcile_pytorchjob(job: Manifest, pods: Sequence[Manifest], *, rendezvous: Rendezvous, now: datetime) -> Outcome:
    """Return what becomes of a PyTorchJob with restartPolicy Never and cleanPodPolicy Running.

    A missing pod is made, as by the training operator: after the job's creation none is missing, for nobody but the
    job's end deletes one.
    """
    status = dict(job.get("status") or {})
    if _is_true(status, "Succeeded") or _is_true(status, "Failed"):
        live = [pod for pod in pods if not is_finished(pod) and not is_being_deleted(pod)]
        return Outcome(status=status, delete=tuple(pod["metadata"]["name"] for pod in live))
    name = job["metadata"]["name"]
    existing = {pod["metadata"]["name"] for pod in pods}
    missing = tuple(
        pod
        for pod in build_gang(job, rendezvous=rendezvous, now=now)
        if not status and pod["metadata"]["name"] not in existing
    )
    by_role = {role: [pod for pod in pods if _replica_type(pod) == role.lower()] for role in _replica_specs(job)}
    status["replicaStatuses"] = {role: _count_phases(members) for role, members in by_role.items()}
    status.setdefault("startTime", format_time(now))
    conditions = status.get("conditions") or [_condition("Created", f"PyTorchJob {name} is created.", now=now)]
    failed = {role: counts["failed"] for role, counts in status["replicaStatuses"].items() if counts.get("failed")}
    master = status["replicaStatuses"]["Master"]
    if master.get("succeeded"):
        conditions = _ended(conditions, "Succeeded", f"PyTorchJob {name} is successfully completed.", now=now)
        status["completionTime"] = format_time(now)
    elif failed:
        role, count = next(iter(failed.items()))
        message = f"PyTorchJob {name} is failed because {count} {role} replica(s) failed."
        conditions = _ended(conditions, "Failed", message, now=now)
        status["completionTime"] = format_time(now)
    elif master.get("active") and not _is_true({"conditions": conditions}, "Running"):
        conditions = [*conditions, _condition("Running", f"PyTorchJob {name} is running.", now=now)]
    return Outcome(status={**status, "conditions": conditions}, create=missing)


def build_gang(job: Manifest, *, rendezvous: Rendezvous, now: datetime) -> tuple[Manifest, ...]:
    """Return every pod of a PyTorchJob, with the variables that the training operator injects."""
    name, specs = job["metadata"]["name"], _replica_specs(job)
    nodes = sum(spec["replicas"] for spec in specs.values())
    pods: list[Manifest] = []
    for role, spec in specs.items():
        for index in range(spec["replicas"]):
            labels = {
                "training.kubeflow.org/job-name": name,
                "training.kubeflow.org/operator-name": "pytorchjob-controller",
                "training.kubeflow.org/replica-type": role.lower(),
                "training.kubeflow.org/replica-index": str(index),
                **({"training.kubeflow.org/job-role": "master"} if role == "Master" else {}),
            }
            env = injected_env(
                job["spec"]["nprocPerNode"],
                nodes=nodes,
                node=len(pods),
                address=rendezvous.address,
                port=rendezvous.port,
            )
            pod_name = f"{name}-{role.lower()}-{index}"
            pods.append(build_pod(job, spec["template"], name=pod_name, labels=labels, env=env, now=now))
    return tuple(pods)


def injected_env(
    processes_per_node: str, *, nodes: int, node: int, address: str, port: int
) -> tuple[tuple[str, str], ...]:
    """Return the variables that the training operator appends to the container of a node (`node` counts from 0).

    Source: training-operator v1.9.4, pkg/controller.v1/pytorch/{envvar,master,elastic}.go.
    """
    ranks = int(processes_per_node) if processes_per_node.isdecimal() else 1
    return (
        ("PYTHONUNBUFFERED", "1"),
        ("PET_NPROC_PER_NODE", processes_per_node),
        ("MASTER_PORT", str(port)),
        ("PET_MASTER_PORT", str(port)),
        ("MASTER_ADDR", address),
        ("PET_MASTER_ADDR", address),
        ("WORLD_SIZE", str(nodes * ranks)),
        ("RANK", str(node)),
        ("PET_NODE_RANK", str(node)),
        ("PET_NNODES", str(nodes)),
    )


def _replica_specs(job: Manifest) -> Mapping[str, Any]:
    specs = job["spec"]["pytorchReplicaSpecs"]
    return {role: specs[role] for role in ("Master", "Worker") if role in specs}


def _replica_type(pod: Manifest) -> str:
    return str(pod["metadata"]["labels"]["training.kubeflow.org/replica-type"])


def _count_phases(pods: Sequence[Manifest]) -> dict[str, int]:
    names = {"Running": "active", "Succeeded": "succeeded", "Failed": "failed"}
    counts: dict[str, int] = {}
    for pod in pods:
        if pod["status"]["phase"] in names:
            name = names[pod["status"]["phase"]]
            counts[name] = counts.get(name, 0) + 1
    return counts


def _ended(conditions: list[dict[str, Any]], type_: str, message: str, *, now: datetime) -> list[dict[str, Any]]:
    others = [
        {**condition, "status": "False", "lastTransitionTime": format_time(now)}
        if condition["type"] == "Running"
        else condition
        for condition in conditions
    ]
    return [*others, _condition(type_, message, now=now)]


def _condition(type_: str, message: str, *, now: datetime, reason: str | None = None) -> dict[str, Any]:
    return {
        "type": type_,
        "status": "True",
        "reason": reason or f"PyTorchJob{type_}",
        "message": message,
        "lastUpdateTime": format_time(now),
        "lastTransitionTime": format_time(now),
    }


def _is_true(status: Mapping[str, Any], type_: str) -> bool:
    return any(c["type"] == type_ and c["status"] == "True" for c in status.get("conditions") or ())


# --- Job -------------------------------------------------------------------------------------------------------------


def reconcile_job(job: Manifest, pods: Sequence[Manifest], *, now: datetime) -> Outcome:
    """Return what becomes of a Job of one pod, with its backoffLimit and podFailurePolicy."""
    status = dict(job.get("status") or {})
    if _is_true(status, "Complete") or _is_true(status, "Failed"):
        return Outcome(status=status)
    name, spec = job["metadata"]["name"], job["spec"]
    actions = {
        pod["metadata"]["name"]: _failure_action(spec, pod) for pod in pods if pod["status"]["phase"] == "Failed"
    }
    failed = [pod for pod in pods if actions.get(pod["metadata"]["name"], "Ignore") != "Ignore"]
    active = [pod for pod in pods if not is_finished(pod)]
    succeeded = [pod for pod in pods if pod["status"]["phase"] == "Succeeded"]
    status |= {"active": len(active), "succeeded": len(succeeded), "failed": len(failed)}
    status.setdefault("startTime", format_time(now))
    stopped = next((pod for pod in failed if actions[pod["metadata"]["name"]] == "FailJob"), None)
    if succeeded:
        message = "Reached expected number of succeeded pods"
        done = _condition("Complete", message, now=now, reason="CompletionsReached")
        return Outcome(status={**status, "conditions": [done], "completionTime": format_time(now)})
    if stopped is not None:
        message = (
            f"Container {spec['template']['spec']['containers'][0]['name']} for pod "
            f"{stopped['metadata']['namespace']}/{stopped['metadata']['name']} failed with exit code "
            f"{_exit_code(stopped)} matching FailJob rule"
        )
        end = _condition("Failed", message, now=now, reason="PodFailurePolicy")
        return Outcome(status={**status, "conditions": [end]})
    if len(failed) > spec.get("backoffLimit", 6):
        message = "Job has reached the specified backoff limit"
        end = _condition("Failed", message, now=now, reason="BackoffLimitExceeded")
        return Outcome(status={**status, "conditions": [end]})
    if active:
        return Outcome(status=status)
    due = _retry_time(failed)
    if due is not None and due > now:
        return Outcome(status=status, retry_at=due)
    labels = {"batch.kubernetes.io/job-name": name, "job-name": name}
    pod = build_pod(job, spec["template"], name=f"{name}-{len(pods)}", labels=labels, now=now)
    return Outcome(status={**status, "active": 1}, create=(pod,))


def _failure_action(spec: Mapping[str, Any], pod: Manifest) -> str:
    """Return the action of the first rule that a failed pod matches."""
    for rule in spec.get("podFailurePolicy", {}).get("rules", ()):
        if "onExitCodes" in rule and _exit_code(pod) in rule["onExitCodes"]["values"]:
            return str(rule["action"])
        for pattern in rule.get("onPodConditions", ()):
            if any(
                c["type"] == pattern["type"] and c["status"] == pattern["status"] for c in pod["status"]["conditions"]
            ):
                return str(rule["action"])
    return "Count"


def _exit_code(pod: Manifest) -> int | None:
    for container in pod["status"].get("containerStatuses", ()):
        if "terminated" in container["state"]:
            return int(container["state"]["terminated"]["exitCode"])
    return None


def _retry_time(failed: Sequence[Manifest]) -> datetime | None:
    ends = [
        datetime.fromisoformat(container["state"]["terminated"]["finishedAt"])
        for pod in failed
        for container in pod["status"].get("containerStatuses", ())
        if "terminated" in container["state"]
    ]
    if not ends:
        return None
    delay: timedelta = _BACKOFF_BASE * 2 ** (len(failed) - 1)
    return max(ends) + min(delay, _BACKOFF_LIMIT)
