"""The children of a run that are not pods: service account, claim, network policy, ConfigMaps.

It owns what each of them looks like and to whom it belongs; it must not decide which of them are wanted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from posttrain.api.training_run import TrainingRun
from posttrain.contract.config import TrainingConfig
from posttrain.plan import labels, names
from posttrain.plan.types import Manifest

CONFIG_FILE = "config.json"
DEEPSPEED_FILE = "deepspeed.json"
JOB_FILE = "job.json"
"""The attempt's job as it was made: what it is repaired from, by whatever version of the operator."""

_FOLDER_MARK = ".."
"""A ConfigMap's key holds no slash: `rewards/math.py` is kept under `rewards..math.py`."""


def build_owner_references(run: TrainingRun) -> list[dict[str, Any]]:
    """Return the controller reference to the run: deletion of the children is the garbage collector's work."""
    return [
        {
            "apiVersion": run.api_version,
            "kind": run.kind,
            "name": run.metadata.name,
            "uid": run.metadata.uid or "",
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]


def build_metadata(run: TrainingRun, *, name: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """Return the metadata of a child that goes when the run goes."""
    return {
        "name": name,
        "namespace": run.metadata.namespace,
        "labels": dict(labels),
        "ownerReferences": build_owner_references(run),
    }


def build_service_account(run: TrainingRun) -> Manifest:
    """Return the service account of the run's pods: it has no right, and its token reaches them by projection only."""
    name = run.metadata.name
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": build_metadata(run, name=names.service_account_name(name), labels=labels.run_labels(name)),
        "automountServiceAccountToken": False,
    }


def build_claim(run: TrainingRun, *, size: str) -> Manifest:
    """Return the claim made for the run; a retained one is labelled with the run and not owned by it."""
    name = run.metadata.name
    storage = run.spec.checkpoints.storage
    shared = run.spec.resources.num_nodes > 1 or run.spec.rollout_servers is not None
    mode = storage.access_mode or ("ReadWriteMany" if shared else "ReadWriteOnce")
    metadata = build_metadata(run, name=names.claim_name(name), labels=labels.run_labels(name))
    if run.spec.checkpoints.retain == "Always":
        del metadata["ownerReferences"]
    spec: dict[str, Any] = {
        "accessModes": [mode],
        "resources": {"requests": {"storage": size}},
    }
    if storage.storage_class_name is not None:
        spec["storageClassName"] = storage.storage_class_name
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def build_network_policy(run: TrainingRun) -> Manifest:
    """Return the policy that lets only pods of the same run in; what they reach out to is not restricted.

    A sandbox is no such pod: it has a policy of its own, and policies add up.
    """
    name = run.metadata.name
    peers: dict[str, Any] = {"matchLabels": {labels.RUN: name}}
    if run.spec.used_sandbox is not None:
        peers["matchExpressions"] = [{"key": labels.ROLE, "operator": "NotIn", "values": [labels.ROLE_SANDBOX]}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": build_metadata(run, name=names.network_policy_name(name), labels=labels.run_labels(name)),
        "spec": {
            "podSelector": peers,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": peers}]}],
        },
    }


def build_config_map(
    run: TrainingRun,
    *,
    name: str,
    config: TrainingConfig,
    deepspeed: Mapping[str, Any] | None = None,
    job: Manifest | None = None,
) -> Manifest:
    """Return the ConfigMap from which an attempt, or prepare, reads its configuration.

    It is immutable, so an attempt's keeps its job as well: nobody but its deletion can change what that was.
    """
    data = {CONFIG_FILE: config.to_json()}
    if deepspeed is not None:
        data[DEEPSPEED_FILE] = json.dumps(deepspeed, indent=2, sort_keys=True) + "\n"
    if job is not None:
        data[JOB_FILE] = json.dumps(job, sort_keys=True, separators=(",", ":"))
    run_name = run.metadata.name
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": build_metadata(run, name=name, labels=labels.attempt_labels(run_name, attempt=config.attempt)),
        "immutable": True,
        "data": data,
    }


def build_code_config_map(run: TrainingRun, *, files: Mapping[str, str]) -> Manifest:
    """Return the snapshot of the run's own code; `files` maps paths inside it to texts."""
    name = run.metadata.name
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": build_metadata(run, name=names.code_name(name), labels=labels.run_labels(name)),
        "immutable": True,
        "data": {path.replace("/", _FOLDER_MARK): text for path, text in sorted(files.items())},
    }


def code_files(data: Mapping[str, str]) -> dict[str, str]:
    """Return the files in a code ConfigMap's data, by their path."""
    return {key.replace(_FOLDER_MARK, "/"): text for key, text in data.items()}


def code_items(files: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the `items` with which the volume of a code ConfigMap shows each file at its path."""
    return [{"key": path.replace("/", _FOLDER_MARK), "path": path} for path in sorted(files)]


def code_hash(files: Mapping[str, str]) -> str:
    """Return the hash of own code: of every path with its text."""
    text = json.dumps(sorted(files.items()), separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
