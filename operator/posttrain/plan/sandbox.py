"""The sandbox of a run, in which programs out of completions are carried out: a Deployment behind walls of its own.

It owns what it consists of, and whether it serves or why not yet; it must not decide when it is wanted.

A Deployment that is there is left as it is: a newer operator's idea of it would end the programs of a run that trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.api.grpo import Sandbox
from posttrain.api.training_run import TrainingRun
from posttrain.contract import environment
from posttrain.plan import labels, names
from posttrain.plan.manifests import is_being_deleted, pods_of_role
from posttrain.plan.objects import build_metadata
from posttrain.plan.pods import find_end, find_obstacle
from posttrain.plan.status import Says
from posttrain.plan.trainer_pod import POD_SECURITY, container_security
from posttrain.plan.types import Manifest, ObjectRef, Observed
from posttrain.settings import Settings

DEPLOYMENT = "apps/v1", "Deployment"
SANDBOX_CONTAINER = "sandbox"
IMAGE_KEY = "sandbox"
"""Of the image in the provenance."""

_PORT = 2000
_SCRATCH_FOLDER = "/tmp"
_SCRATCH_MIB = 512
"""Of the disk for each program that runs: twice what one may write."""
_OWN_MEMORY_MIB = 1024
_GRACE_SECONDS = 5
"""A program that is cut off is run again, or its completion has no reward: nothing is worth waiting for."""


def sandbox_urls(run: TrainingRun) -> tuple[str, ...]:
    """Return where the programs out of the run's completions are sent."""
    used = run.spec.used_sandbox
    if used is None or used.is_rented:
        return ()
    return used.endpoints or (f"http://{names.sandbox_name(run.metadata.name)}:{_PORT}",)


def sandbox_ref(run: str) -> ObjectRef:
    """Return the reference to the Deployment: of all parts the one that holds something."""
    return ObjectRef(*DEPLOYMENT, names.sandbox_name(run))


def build_sandbox(run: TrainingRun, sandbox: Sandbox, *, image: str, settings: Settings) -> tuple[Manifest, ...]:
    """Return all parts, in apply order: no program runs before nobody but the trainer reaches it."""
    name = run.metadata.name
    metadata = build_metadata(run, name=names.sandbox_name(name), labels=labels.run_labels(name))
    own_labels = {**labels.run_labels(name), labels.ROLE: labels.ROLE_SANDBOX}
    selector = {labels.RUN: name, labels.ROLE: labels.ROLE_SANDBOX}
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata,
        "spec": {
            "podSelector": {"matchLabels": selector},
            # Of Egress nothing is said further down: no way out is open.
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {
                    "from": [{"podSelector": {"matchLabels": {**selector, labels.ROLE: labels.ROLE_TRAINER}}}],
                    "ports": [{"protocol": "TCP", "port": _PORT}],
                }
            ],
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {"selector": selector, "ports": [{"name": "http", "protocol": "TCP", "port": _PORT}]},
    }
    deployment = {
        "apiVersion": DEPLOYMENT[0],
        "kind": DEPLOYMENT[1],
        "metadata": metadata,
        "spec": {
            "replicas": 1,
            # Never two of them: the new one would wait for the room that the old one has.
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": selector},
            "template": {
                "metadata": {"labels": own_labels},
                "spec": _pod_spec(run, sandbox, image=image, settings=settings),
            },
        },
    }
    return policy, service, deployment


def _pod_spec(run: TrainingRun, sandbox: Sandbox, *, image: str, settings: Settings) -> dict[str, Any]:
    memory_mib = sandbox.concurrency * sandbox.memory_mib + _OWN_MEMORY_MIB
    amounts = {"cpu": str(sandbox.concurrency + 1), "memory": f"{memory_mib}Mi"}
    options = {
        "concurrency": sandbox.concurrency,
        "memory-mib": sandbox.memory_mib,
        "max-seconds": sandbox.max_seconds,
    }
    command = ["python", "-m", "posttrain_workloads.sandbox"]
    container = {
        "name": SANDBOX_CONTAINER,
        "image": image,
        "command": [*command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))],
        "env": [
            {"name": environment.LISTEN, "value": f"0.0.0.0:{_PORT}"},
            {"name": "TMPDIR", "value": _SCRATCH_FOLDER},
        ],
        "ports": [{"name": "http", "containerPort": _PORT, "protocol": "TCP"}],
        "readinessProbe": {"httpGet": {"path": "/api/v2/runtimes", "port": _PORT}, "periodSeconds": 2},
        "resources": {"limits": amounts, "requests": amounts},
        "securityContext": {**container_security(), "readOnlyRootFilesystem": True},
        # What it says before it gives up stands in the pod's status, and from there in the run's.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "scratch", "mountPath": _SCRATCH_FOLDER}],
    }
    scratch = {"sizeLimit": f"{sandbox.concurrency * _SCRATCH_MIB}Mi"}
    overrides = run.spec.pod_overrides
    secrets = (overrides.image_pull_secrets if overrides else None) or ()
    where = settings.sandbox
    return {
        "serviceAccountName": run.spec.access.service_account_name or names.service_account_name(run.metadata.name),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "securityContext": dict(POD_SECURITY),
        "containers": [container],
        "volumes": [{"name": "scratch", "emptyDir": scratch}],
        **({"imagePullSecrets": [{"name": secret} for secret in secrets]} if secrets else {}),
        **({"nodeSelector": dict(where.node_selector)} if where.node_selector else {}),
        **(
            {"tolerations": [t.model_dump(by_alias=True, exclude_none=True) for t in where.tolerations]}
            if where.tolerations
            else {}
        ),
        **({"runtimeClassName": where.runtime_class_name} if where.runtime_class_name else {}),
    }


# --- What is observed of it ------------------------------------------------------------------------------------------


def explain_unready(run: str, observed: Observed) -> Says | None:
    """Return why the sandbox does not serve yet; None where it does."""
    deployment = observed.objects.get(sandbox_ref(run))
    status = (deployment.get("status") or {}) if deployment is not None else {}
    if deployment is not None and not is_being_deleted(deployment) and status.get("readyReplicas"):
        return None
    pods = pods_of_role(observed.pods, labels.ROLE_SANDBOX)
    ended = find_end(pods, container=SANDBOX_CONTAINER)
    if ended is not None:
        return Says("False", "SandboxFailed", ended)
    refused = _refusal(status) if not pods else None
    obstacle = find_obstacle(pods, events=observed.pod_events)
    return obstacle or refused or Says("False", "SandboxStarting", "the sandbox is starting")


def _refusal(status: Mapping[str, Any]) -> Says | None:
    """Return why there is no pod: what the API server answered to the one who was to make it."""
    for condition in status.get("conditions") or ():
        if (condition.get("type"), condition.get("status")) == ("ReplicaFailure", "True"):
            message = f"the sandbox's pod cannot be created: {condition.get('message')}"
            reason = "QuotaExceeded" if "exceeded quota" in message else "PodsNotCreated"
            return Says("False", reason, message)
    return None
